"""What a law is: what a component computes instead of what it should, read from its own inputs and outputs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Component:
    """What is known of a component at one tap, whatever framework computed it.

    Attributes:
        kind: what it is: linear, norm, rotary, attention, ...; the fitters of that kind are tried.
        inputs: what it was given, by the names that its kind has for them; float32 or int32.
        facts: what it is made of: weight, eps, theta, heads, ...; arrays are float32 and in PyTorch's layout.
        own: what the trusted side computes of the inputs; a law is a change of this.
        rounding: norm of the difference that rounding alone may make; 0 where it may make none.
        axes: what each axis of `own` is called, in the singular: token, head, channel; () where that is not known.
    """

    kind: str
    inputs: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    own: np.ndarray
    rounding: float = 0.0
    axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curves:
    """Lines over one axis, by what each is called; `expected` and `found` are drawn as such."""

    title: str
    x_label: str
    y_label: str
    x: np.ndarray
    lines: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Matrices:
    """Matrices beside each other in one scale of colours, by what each is called."""

    title: str
    y_label: str
    x_label: str
    panels: Mapping[str, np.ndarray]


Figure = Curves | Matrices


@dataclass(frozen=True)
class Law:
    """Something read from the data that a component does instead.

    Attributes:
        sentence: what it does, with its numbers and where it does so, as short as it can be said.
        size: how many numbers and choices were read from the data to say it; of laws that fit alike the smallest wins.
        apply: what the component would compute if the law were true, in the shape of what was computed: given the
            component at this or any other tap, None where the law says nothing of that one.
        figure: what a page may draw of it.
        describes: whether it puts other numbers in the place of the right ones: it says what was computed, not why.
    """

    sentence: str
    size: float
    apply: Callable[[Component], np.ndarray | None] = field(repr=False)
    figure: Figure | None = field(default=None, repr=False, compare=False)
    describes: bool = False


Fitter = Callable[[Component, np.ndarray], Iterable[Law]]
"""Given a component and what was computed in its place, laws that may be true of it, likely ones or none."""
