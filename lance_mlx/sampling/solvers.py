"""How a step gets from t to a smaller t: along the velocity where it starts, as upstream, or along a better one.

A solver turns the velocity at the start of a step into the one that the step goes along.
"""

import math
from collections.abc import Callable

import mlx.core as mx

from lance_mlx.requests.request import Scheduler

Field = Callable[[mx.array, float], mx.array]
"""The velocity at latents and a time, [m, 48] of the last m of [n, 48]."""
Advance = Callable[[mx.array, mx.array, float], mx.array]
"""Latents after an Euler step: latents, velocity, by how much t falls."""
Solver = Callable[[mx.array, mx.array, float, float], mx.array]
"""The velocity to go along: that at the start, latents there, t, t at the end."""


def make_solver(scheduler: Scheduler, field: Field, advance: Advance) -> Solver:
    """The solver of one run, which may remember earlier steps."""
    if scheduler is Scheduler.HEUN:
        return _heun(field, advance)
    return _dpmpp_2m() if scheduler is Scheduler.DPMPP_2M else lambda velocity, *_: velocity


def _heun(field: Field, advance: Advance) -> Solver:
    """The mean of the velocities at both ends: order 2, two passes a step but for the last, which ends at t = 0."""

    def solve(velocity: mx.array, x_t: mx.array, t: float, t_next: float) -> mx.array:
        if t_next == 0:
            return velocity
        there = field(advance(x_t, velocity, t - t_next), t_next)
        return ((velocity.astype(mx.float32) + there.astype(mx.float32)) / 2).astype(velocity.dtype)

    return solve


def _dpmpp_2m() -> Solver:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) with 1 - t for alpha and t for sigma: order 2, a pass a step.

    What it extrapolates are clean latents; the first two steps and the last are Euler's, since the logarithm of the
    signal-to-noise ratio is infinite at t = 1 and t = 0.
    """
    before: list[tuple[mx.array, float]] = []

    def solve(velocity: mx.array, x_t: mx.array, t: float, t_next: float) -> mx.array:
        wide = velocity.astype(mx.float32)
        clean = x_t[len(x_t) - len(velocity) :].astype(mx.float32) - t * wide
        if before and t_next > 0 and before[0][1] < 1:
            earlier, t_before = before[0]
            ratio = (_log_ratio(t_next) - _log_ratio(t)) / (_log_ratio(t) - _log_ratio(t_before))
            wide = wide - (clean - earlier) * (ratio / (2 * t))
        before[:] = [(clean, t)]
        return wide.astype(velocity.dtype)

    return solve


def _log_ratio(t: float) -> float:
    return math.log((1 - t) / t)
