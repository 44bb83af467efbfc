"""A place of a pair that is wrong by itself, as hypotheses and laws are handed it."""

from collections.abc import Mapping

import numpy as np

from parity.laws import Component
from parity.pairs.known import NEAR, Known
from parity.tensors.names import TapName


class PairProbe:
    """What parity.localize.explain asks of a place.

    Attributes:
        tap, component: which one.
        part: what is known of what makes it.
        expected, got: what the trusted model and the port make of the same input, as the laws of the kind have it.
        floor, allowed, dtype: what rounding does to it, and how far it may be, relative to |expected|.
        exact: whether it is a parameter, which nothing computes.
        results: other results of its call with its shape, by tap.
    """

    shared = None
    right = ()

    def __init__(
        self,
        tap: TapName,
        part: Known,
        expected: np.ndarray,
        got: np.ndarray,
        dtype: str,
        floor: float = 0.0,
        allowed: float | None = None,
        results: Mapping[str, np.ndarray] | None = None,
        exact: bool = False,
    ) -> None:
        self.tap, self.component, self.part, self.dtype, self.exact = tap, tap.component, part, dtype, exact
        self.expected, self.got, self.floor, self.allowed = part.view(expected), part.view(got), floor, allowed
        self.results = results or {}

    @property
    def near(self) -> float:
        """How near another value has to be for it to be the same but for rounding, relative."""
        return NEAR[self.dtype]

    def judged(self, array: np.ndarray) -> np.ndarray:
        """All of it."""
        return array

    def recompute(self) -> np.ndarray:
        """What the trusted model makes of what it was given here."""
        return self.expected

    def known(self, own: np.ndarray) -> Component:
        """What is known of the part where `own` is computed."""
        rounding = float(np.linalg.norm(self.expected.astype(np.float64))) * self.floor
        return Component(self.part.kind, self.part.inputs, self.part.facts, own, rounding, self.part.axes)
