"""Hypotheses about t: at the boundaries of the steps, and of every latent in one."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from parity.hypotheses.base import Hypothesis
from parity.tensors.rounding import rounded
from reference.sampler import time_grid

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The values as bfloat16 has them."""
    return rounded(x, "bfloat16")


def timed(name: str, times: Callable[[np.ndarray, int, float], np.ndarray]) -> Hypothesis:
    """A hypothesis about t at every step boundary, [steps + 1]: `times` gets upstream's, the steps and the shift."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        if site.tap.name != "inputs/timesteps":
            return None
        return times(array, site.request.num_steps, site.request.timestep_shift).astype(np.float32)

    return Hypothesis(name, ("schedule",), transform=transform)


def shifted(u: np.ndarray, shift: float) -> np.ndarray:
    return shift * u / (1 + (shift - 1) * u)


def even(points: int) -> np.ndarray:
    return np.linspace(1, 0, points)


def per_latent(name: str, change: Callable[["TapProbe", np.ndarray], np.ndarray]) -> Hypothesis:
    """A hypothesis about the t of every latent in a step, [latents]."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        return change(site, array).astype(np.float32) if site.tap.name.startswith("sampler.timestep") else None

    return Hypothesis(name, ("schedule",), transform=transform)


def times_of(site: "TapProbe") -> np.ndarray:
    return time_grid(site.request.num_steps, site.request.timestep_shift).numpy()


def next_time(site: "TapProbe", array: np.ndarray) -> np.ndarray:
    times = times_of(site)
    return np.where(array == 0, array, times[min(site.tap.numbers["step"] + 1, len(times) - 1)])


SHIFTS = (1.0, 2.0, 3.0, 3.5, 4.0, 5.0, 7.0)
HYPOTHESES = [
    *(timed(f"the timestep shift is {s:g}", lambda t, n, shift, s=s: shifted(even(n + 1), s)) for s in SHIFTS),
    timed("the timestep shift is applied twice", lambda t, n, shift: shifted(t, shift)),
    timed("the timestep shift is inverted", lambda t, n, shift: shifted(even(n + 1), 1 / shift)),
    timed("the schedule runs from data to noise", lambda t, n, shift: t[::-1]),
    timed("t counts from the data", lambda t, n, shift: 1 - t),
    timed("the schedule has num_steps points", lambda t, n, shift: np.append(shifted(even(max(n, 1)), shift), 0)),
    timed("the schedule ends at 1 / num_steps", lambda t, n, shift: shifted(np.linspace(1, 1 / n, n + 1), shift)),
    timed("the schedule ends at 0.001", lambda t, n, shift: shifted(np.linspace(1, 0.001, n + 1), shift)),
    timed("the schedule starts at 0.999", lambda t, n, shift: shifted(np.linspace(0.999, 0, n + 1), shift)),
    timed("t is rounded to bfloat16", lambda t, n, shift: bfloat16(t)),
    timed("t is rounded to thousandths", lambda t, n, shift: np.round(t * 1000) / 1000),
    timed("the schedule counts from 1000", lambda t, n, shift: t * 1000),
    timed("the schedule is a cosine", lambda t, n, shift: (1 + np.cos(np.pi * (1 - even(n + 1)))) / 2),
    timed("the schedule is exponential", lambda t, n, shift: np.exp(shift) / (
        np.exp(shift) + (1 / np.maximum(even(n + 1), 1e-12) - 1))),
    per_latent("clean latents have the step's t", lambda site, t: np.full_like(t, t.max())),
    per_latent("latents have the next step's t", next_time),
    per_latent("latents' t is multiplied by 1000", lambda site, t: t * 1000),
    per_latent("latents' t is rounded to bfloat16", lambda site, t: bfloat16(t)),
]  # fmt: skip
