"""Hypotheses about guidance: the steps in which it acts, its formula and its renorm."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

import reference.sampler
from parity.hypotheses.base import DoesNotApply, Hypothesis
from parity.lance.hypotheses.tools import function, times_of
from reference.request import Renorm, Request

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

Guide = Callable[[Tensor, Tensor, Request], Tensor]
Formula = Callable[[Guide, Tensor, Tensor, Request], Tensor]
"""A guided velocity, of upstream's function, the conditional and unconditional velocities and the request."""


def acts(name: str, act: Callable[[np.ndarray, float, float], np.ndarray]) -> Hypothesis:
    """A hypothesis about which steps are guided, given t of each step and the interval."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        if site.tap.name != "inputs/guided":
            return None
        # The comparison is made in float32.
        low, high = np.float32(site.request.cfg_interval)
        return act(times_of(site)[:-1], low, high).astype(np.int32)

    return Hypothesis(name, ("guidance",), transform=transform)


def uniform(t: np.ndarray) -> np.ndarray:
    return np.linspace(1, 0, len(t) + 1)[:-1]


def guides(name: str, guide: Formula) -> Hypothesis:
    """A hypothesis about the guided velocity: `guide` gets upstream's function and its inputs."""
    return Hypothesis(name, ("guidance",), function(
        reference.sampler, "guide", lambda site, original, *inputs: guide(original, *inputs)))  # fmt: skip


def changed(request: Request, **values: object) -> Request:
    """A request with other values, unchecked: they need not be ones that a user may ask for."""
    other = object.__new__(Request)
    other.__dict__.update(vars(request) | values)
    return other


def asking(**values: object) -> Formula:
    """Upstream's formula for another request."""

    def guide(original: Guide, cond: Tensor, uncond: Tensor, request: Request) -> Tensor:
        if all(getattr(request, key) == value for key, value in values.items()):
            raise DoesNotApply
        return original(cond, uncond, changed(request, **values))

    return guide


def in_float32(original: Guide, cond: Tensor, uncond: Tensor, request: Request) -> Tensor:
    return original(cond.float(), uncond.float(), request)


def rounded_at_the_end(original: Guide, cond: Tensor, uncond: Tensor, request: Request) -> Tensor:
    return in_float32(original, cond, uncond, request).to(cond.dtype)


HYPOTHESES = [
    acts("guidance acts at every step", lambda t, low, high: np.ones_like(t)),
    acts("guidance never acts", lambda t, low, high: np.zeros_like(t)),
    acts("the guidance interval leaves out its upper end", lambda t, low, high: (t > low) & (t < high)),
    acts("the guidance interval holds its lower end and not its upper", lambda t, low, high: (t >= low) & (t < high)),
    acts("the guidance interval holds both its ends", lambda t, low, high: (t >= low) & (t <= high)),
    acts("the guidance interval counts from the data", lambda t, low, high: (1 - t > low) & (1 - t <= high)),
    acts("the guidance interval counts steps", lambda t, low, high: (1 - uniform(t) >= low) & (1 - uniform(t) <= high)),
    acts("the guidance interval is compared before the shift", lambda t, low, high: (
        uniform(t) > low) & (uniform(t) <= high)),
    acts("guidance acts outside its interval", lambda t, low, high: ~((t > low) & (t <= high))),
    acts("guidance acts in the default interval", lambda t, low, high: (t > 0.4) & (t <= 1.0)),
    guides("guidance starts from the conditional velocity", lambda original, cond, uncond, request: original(
        cond, uncond, changed(request, cfg_text_scale=request.cfg_text_scale + 1))),
    guides("the guidance arms are exchanged", lambda original, cond, uncond, request: original(uncond, cond, request)),
    guides("guidance steers away from the conditional velocity", lambda original, cond, uncond, request: original(
        cond, uncond, changed(request, cfg_text_scale=-request.cfg_text_scale))),
    guides("the renorm is per token", asking(cfg_renorm_type=Renorm.CHANNEL)),
    guides("there is no renorm", asking(cfg_renorm_type=Renorm.NONE)),
    guides("guidance computes in float32", in_float32),
    guides("guidance computes in float32 and rounds once", rounded_at_the_end),
]  # fmt: skip
