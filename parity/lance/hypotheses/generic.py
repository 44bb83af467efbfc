"""Hypotheses that may be true of any part: left out, twice, scaled, reversed, transposed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis
from parity.lance.hypotheses.tools import forward, leaf, of_weight

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

ALL = ("*",)
MODULES = ("layers.*", "norm*", "vit_model.*", "vae.*", "time_embedder*", "vae2llm", "llm2vae", "lm_head")


def result(name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Hypothesis:
    """A hypothesis about a result of any shape; integers and parameters have their own."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        if of_weight(site) or site.tap.integer or array.dtype != np.float32:
            return None
        new = change(array)
        return None if new is None or new.shape != array.shape else np.ascontiguousarray(new)

    return Hypothesis(name, ALL, transform=transform)


def passed(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, *rest: Any) -> Tensor:
    """The input passes on."""
    if original(x, *rest).shape != x.shape:
        raise DoesNotApply
    return x


def twice(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, *rest: Any) -> Tensor:
    leaf(module)
    out = original(x, *rest)
    if out.shape != x.shape:
        raise DoesNotApply
    return original(out, *rest)


def added(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, *rest: Any) -> Tensor:
    """The input is added to the output."""
    out = original(x, *rest)
    if out.shape != x.shape:
        raise DoesNotApply
    return out + x


def exchanged(first: int, second: int) -> Callable[[np.ndarray], np.ndarray | None]:
    """Two axes exchanged in memory; where they differ in size the values are read as if they had not been."""

    def change(array: np.ndarray) -> np.ndarray | None:
        if array.ndim <= max(first, second) or min(array.shape[first], array.shape[second]) == 1:
            return None
        return np.ascontiguousarray(array.swapaxes(first, second)).reshape(array.shape)

    return change


def reversed_axis(axis: int) -> Callable[[np.ndarray], np.ndarray | None]:
    return lambda array: np.flip(array, axis) if array.ndim >= -axis and array.ndim > axis else None


def rolled(by: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.roll(array, by, 0)


HYPOTHESES = [
    Hypothesis("the part is left out", MODULES, forward(passed)),
    Hypothesis("the part is applied twice", MODULES, forward(twice)),
    Hypothesis("the part's input is added to its result", MODULES, forward(added)),
    result("the result is zero", np.zeros_like),
    result("the result is negated", np.negative),
    result("the result is twice as large", lambda array: 2 * array),
    result("the result is half as large", lambda array: array / 2),
    result("the result's rows are reversed", reversed_axis(0)),
    result("the result's last axis is reversed", reversed_axis(-1)),
    result("the result's rows are one too early", rolled(-1)),
    result("the result's rows are one too late", rolled(1)),
    result("the result's first two axes are exchanged", exchanged(0, 1)),
    result("the result's second and third axes are exchanged", exchanged(1, 2)),
    result("the result's last two axes are exchanged", exchanged(3, 4)),
]
