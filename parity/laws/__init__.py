"""Laws by kind of component: what it computes instead, read from recorded inputs and outputs."""

import numpy as np

from parity.laws import activation, linear, norm, sums, weight
from parity.laws.base import Component, Curves, Figure, Fitter, Law, Matrices

__all__ = ["Component", "Curves", "Figure", "Fitter", "Law", "Matrices", "LAWS", "fitted"]

LAWS: dict[str, tuple[Fitter, ...]] = {
    "linear": (linear.read,),
    "weight": (weight.changed,),
    "norm": (norm.read,),
    "gated": (activation.read,),
    "sum": (sums.read,),
}
"""The fitters of each kind of component."""


def fitted(component: Component, got: np.ndarray) -> list[Law]:
    """The laws that the fitters of a component's kind read from what was computed in its place."""
    return [law for fitter in LAWS.get(component.kind, ()) for law in fitter(component, got)]
