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
    makers = {
        Scheduler.EULER: lambda: lambda velocity, *_: velocity,
        Scheduler.HEUN: lambda: _heun(field, advance),
        Scheduler.DPMPP_2M: _dpmpp_2m,
        Scheduler.UNIPC: _unipc,
    }
    return makers[scheduler]()


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


def _unipc() -> Solver:
    """UniPC-2 with B2(h) = e^h - 1 (arXiv 2302.04867, algorithms 5 to 8): a pass a step.

    With that B its predictor is the step of DPM-Solver++(2M). The velocity seen at a predicted point corrects the step
    that led there before the next one is predicted, and is not computed anew; the last step is not corrected.
    """
    predict = _dpmpp_2m()
    # Of the last two steps where their velocity was seen, the nearer one first: time, corrected and clean latents.
    before: list[tuple[float, mx.array, mx.array]] = []

    def solve(velocity: mx.array, x_t: mx.array, t: float, t_next: float) -> mx.array:
        predicted = x_t[len(x_t) - len(velocity) :].astype(mx.float32)
        clean = predicted - t * velocity.astype(mx.float32)
        corrected = _correct(before, clean, t) if before else predicted
        before[:] = [(t, corrected, clean), *before[:1]]
        along = predict((corrected - clean) / t, corrected, t, t_next)
        # What is advanced is the predicted point.
        return (along + (predicted - corrected) / (t - t_next)).astype(velocity.dtype)

    return solve


def _correct(before: list[tuple[float, mx.array, mx.array]], clean: mx.array, t: float) -> mx.array:
    """UniC: where the step that ends at t leads, float32 [m, 48], now that the clean latents there are known too.

    The clean latents of the step are a parabola of the logarithm of the signal-to-noise ratio through the last three
    that were seen, which is integrated exactly. Where one of them was seen at t = 1, whose logarithm is infinite, the
    mean of the last two stands in, the paper's a_1 = 1/2.
    """
    t_start, x_start, clean_start = before[0]
    change = (clean - clean_start) / 2
    if len(before) > 1 and before[1][0] < 1:
        start, width = _log_ratio(t_start), _log_ratio(t) - _log_ratio(t_start)
        earlier = (_log_ratio(before[1][0]) - start) / width
        # Integrals of u and u^2 over [0, 1] under the weight e^(width u), over that of 1.
        first = 1 / -math.expm1(-width) - 1 / width
        second = 1 / -math.expm1(-width) - 2 * first / width
        of_earlier = (second - first) / (earlier * (earlier - 1))
        change = of_earlier * (before[1][2] - clean_start) + (first - of_earlier * earlier) * (clean - clean_start)
    return x_start * (t / t_start) + (clean_start + change) * (1 - t / t_start)


def _log_ratio(t: float) -> float:
    return math.log((1 - t) / t)
