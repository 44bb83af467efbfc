"""What a model's definition has to offer as the trusted side of a bundle."""

from collections.abc import Callable, Container, Mapping
from typing import Any, Protocol

import numpy as np

from parity.tensors.recording import Recording, Tap


class Trusted(Protocol):
    """The trusted implementation with a bundle's request loaded.

    Attributes:
        layout: the request's sequence as it lays it out; `layout.arrays()` are its integers by name.
        pipeline, request, entry: what hypotheses look at and change.
    """

    layout: Any
    pipeline: Any
    request: Any
    entry: str

    def record(
        self,
        names: Container[str] | None = None,
        progress: Callable[[str], None] | None = None,
        force: Mapping[str, Tap] | None = None,
    ) -> Recording:
        """Run the request, with `force` from the given values; all taps, or those in `names`."""

    def recompute(self, name: str, force: Mapping[str, Tap]) -> np.ndarray | None:
        """Compute one tap anew from the forced values before it; None if it never comes."""


class Variant(Protocol):
    """One equally right way to compute: its name, the family that rounds as it does, and which of its draws it is."""

    name: str
    family: str
    draw: int
    numerics: Any
