"""Schedules, guidance, steps and noise of the sampler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from blind_faults.common import half, pair, plain, precision, small
from lance_mlx.requests.request import Request
from lance_mlx.sampling import flow, guidance, schedule
from parity.lance.faults.base import DRAWS, FLOAT32, Patch, Target, everywhere, function, together

Times = Callable[[int, float], np.ndarray]
Guide = Callable[[mx.array, mx.array, Request], mx.array]


def _schedule(times: Times) -> Patch:
    def call(original: Callable, num_steps: int, shift: float) -> np.ndarray:
        return times(num_steps, shift).astype(np.float32)

    return function(schedule, "timesteps", call)


def _shifted(u: np.ndarray, shift: float) -> np.ndarray:
    return shift * u / (1 + (shift - 1) * u)


def _diffusers(num_steps: int, shift: float) -> np.ndarray:
    return np.append(_shifted(np.linspace(1, 1e-3, num_steps), shift), 0)


def _thousandths(num_steps: int, shift: float) -> np.ndarray:
    return np.round(_shifted(np.linspace(1, 0, num_steps + 1), shift) * 1000) / 1000


def _second_step_late(num_steps: int, shift: float) -> np.ndarray:
    times = _shifted(np.linspace(1, 0, num_steps + 1), shift)
    times[1] = times[1] * 0.99
    return times


def _guided(guide: Guide) -> Patch:
    """A patch of guided_velocity, computed in float32 and rounded once."""

    def call(original: Callable, cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
        wide = (x.astype(mx.float32) for x in (cond, uncond))
        return guide(*wide, request).astype(cond.dtype)

    return function(guidance, "guided_velocity", call)


def _renormed(cond: mx.array, guided: mx.array, axis: int | None = None) -> mx.array:
    lengths = [mx.sqrt(mx.sum(x * x, axis=axis, keepdims=axis is not None)) for x in (cond, guided)]
    return guided * mx.clip(lengths[0] / (lengths[1] + 1e-8), 0, 1)


def _toward(cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    return uncond + (cond - uncond) * request.guidance_scale


def _zero_star(cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    factor = mx.sum(cond * uncond) / (mx.sum(uncond * uncond) + 1e-8)
    return _renormed(cond, _toward(cond, uncond * factor, request))


def _orthogonal(cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    delta = cond - uncond
    across = delta - cond * (mx.sum(delta * cond) / mx.sum(cond * cond))
    return _renormed(cond, cond + across * (request.guidance_scale - 1))


def _rescaled(cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    guided = _toward(cond, uncond, request)
    return 0.7 * guided * (mx.std(cond) / mx.std(guided)) + 0.3 * guided


def _three_channels(cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    guided = _renormed(cond, _toward(cond, uncond, request))
    return mx.concatenate([guided[:, :3], cond[:, 3:]], axis=1)


def _all_but_the_last(cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
    guided = _renormed(cond, _toward(cond, uncond, request))
    return mx.concatenate([guided[:-1], cond[-1:]])


@contextmanager
def _counted(seen: list[int]) -> Iterator[None]:
    """Count guided velocities into `seen` and start again with every schedule; a list of one number."""

    def times(original: Callable, num_steps: int, shift: float) -> np.ndarray:
        seen[:] = [0]
        return original(num_steps, shift)

    with everywhere(schedule, "timesteps", times):
        yield


def _first_step_zero(target: Target):
    seen = [0]

    def guide(original: Callable, cond: mx.array, uncond: mx.array, request: Request) -> mx.array:
        velocity = original(cond, uncond, request)
        seen[0] += 1
        return mx.zeros_like(velocity) if seen[0] == 1 else velocity

    @contextmanager
    def patch() -> Iterator[None]:
        with _counted(seen), everywhere(guidance, "guided_velocity", guide):
            yield

    return patch()


def _even_intervals(target: Target):
    steps: list[int] = [1]

    def times(original: Callable, num_steps: int, shift: float) -> np.ndarray:
        steps[0] = num_steps
        return original(num_steps, shift)

    def advance(original: Callable, x_t: mx.array, velocity: mx.array, interval: float) -> mx.array:
        return original(x_t, velocity, 1 / steps[0])

    @contextmanager
    def patch() -> Iterator[None]:
        with everywhere(schedule, "timesteps", times), everywhere(flow, "advance", advance):
            yield

    return patch()


def _moved(change: Callable[[mx.array], mx.array]) -> Patch:
    """A patch of the state after every step."""

    def advance(original: Callable, x_t: mx.array, velocity: mx.array, interval: float) -> mx.array:
        x = original(x_t, velocity, interval)
        return change(x).astype(x.dtype)

    return function(flow, "advance", advance)


def _interval(change: Callable[[float], float]) -> Patch:
    return function(flow, "advance", lambda original, x, velocity, interval: original(x, velocity, change(interval)))


def _noise(change: Callable[[mx.array], mx.array]) -> Patch:
    def state(original: Callable, noise: mx.array, clean: mx.array | None) -> mx.array:
        return original(change(noise).astype(noise.dtype), clean)

    return function(flow, "initial_state", state)


def _standardised(noise: mx.array) -> mx.array:
    wide = noise.astype(mx.float32)
    return (wide - wide.mean()) / mx.std(wide)


def _last_latent_kept(original: Callable, x_t: mx.array, velocity: mx.array, interval: float) -> mx.array:
    x = original(x_t, velocity, interval)
    return mx.concatenate([x[:-1], x_t[-1:]])


def _to_bfloat16(value: float) -> float:
    return mx.array(value).astype(mx.bfloat16).item()


FAULTS = [
    plain(
        "blind-schedule-down-to-a-thousandth",
        "schedule",
        _schedule(_diffusers),
        "The schedule spaces u evenly from 1 to 0.001 over as many points as there are steps and appends 0 (diffusers' "
        "linspace over 1000 training steps), instead of from 1 to 0 over one point more.",
        tasks=DRAWS,
    ),
    plain(
        "blind-schedule-thousandths",
        "schedule",
        _schedule(_thousandths),
        "Times are rounded to whole thousandths, as indexes of 1000 training steps.",
        tasks=DRAWS,
    ),
    plain(
        "blind-guidance-zero-star",
        "guidance",
        _guided(_zero_star),
        "The unconditional velocity is first scaled to its projection, <cond, uncond> / |uncond|^2, as CFG-Zero* does.",
        tasks=DRAWS,
    ),
    plain(
        "blind-guidance-orthogonal",
        "guidance",
        _guided(_orthogonal),
        "Guidance moves only across the conditional velocity: the part of cond - uncond along cond is left out "
        "(adaptive projected guidance).",
        tasks=DRAWS,
    ),
    plain(
        "blind-guidance-rescaled-by-deviation",
        "guidance",
        _guided(_rescaled),
        "Instead of the global renorm the guided velocity is rescaled to the standard deviation of cond and mixed in "
        "with weight 0.7, diffusers' guidance_rescale.",
        tasks=DRAWS,
    ),
    plain(
        "blind-guidance-of-three-channels",
        "guidance",
        _guided(_three_channels),
        "Guidance is applied to the first three channels alone, as DiT's forward_with_cfg does; the other 45 get the "
        "conditional velocity.",
        tasks=DRAWS,
    ),
    plain(
        "blind-euler-even-intervals",
        "euler",
        _even_intervals,
        "Every step is 1 / steps long, as if times were not shifted; the times themselves are.",
        tasks=DRAWS,
    ),
    plain(
        "blind-noise-standardised",
        "noise",
        _noise(_standardised),
        "The drawn noise is brought to mean 0 and deviation 1 before it is used.",
        tasks=DRAWS,
    ),
    small(
        "blind-schedule-second-time-late",
        "schedule",
        _schedule(_second_step_late),
        "The time after the first step alone is 1 % smaller.",
        tasks=DRAWS,
    ),
    small(
        "blind-guidance-first-step-zero",
        "guidance",
        _first_step_zero,
        "The guided velocity of the first step is zero, the zero-init of CFG-Zero*; later ones are right.",
        tasks=DRAWS,
    ),
    small(
        "blind-guidance-last-latent-without",
        "guidance",
        _guided(_all_but_the_last),
        "The last latent of the block gets the conditional velocity; all others are guided.",
        tasks=DRAWS,
    ),
    small(
        "blind-euler-clips-at-three",
        "euler",
        _moved(lambda x: mx.clip(x, -3.0, 3.0)),
        "Latents are clipped to plus and minus 3 after every step, which meets one in some hundred.",
        tasks=DRAWS,
    ),
    small(
        "blind-euler-last-latent-stays",
        "euler",
        function(flow, "advance", _last_latent_kept),
        "The last latent of the block is never moved and stays noise.",
        tasks=DRAWS,
    ),
    precision(
        "blind-euler-state-float16",
        "euler",
        _moved(half),
        "The state between steps is kept in float16.",
        tasks=DRAWS,
        dtypes=FLOAT32,
    ),
    precision(
        "blind-euler-interval-bfloat16",
        "euler",
        _interval(_to_bfloat16),
        "The length of a step, t - t_next, is rounded to bfloat16 before it multiplies the velocity.",
        tasks=DRAWS,
    ),
    pair(
        "blind-pair-guidance-base-and-axis",
        "guidance",
        _guided(lambda cond, uncond, request: _renormed(cond, cond + (cond - uncond) * request.guidance_scale, axis=0)),
        "Two faults of guidance at once: it starts from cond instead of from uncond, cond + s * (cond - uncond), and "
        "the renorm has one factor a channel.",
        tasks=DRAWS,
    ),
    pair(
        "blind-pair-schedule-and-intervals",
        "schedule",
        together(_schedule(_thousandths), _moved(lambda x: mx.clip(x, -3.0, 3.0))),
        "Two faults of the sampler in two places: times are rounded to thousandths (schedule), and latents are clipped "
        "to plus and minus 3 after every step (euler).",
        tasks=DRAWS,
    ),
    pair(
        "blind-pair-noise-and-state",
        "noise",
        together(_noise(_standardised), _interval(lambda interval: interval * 0.995)),
        "Two faults of the sampler in two places: the noise is brought to mean 0 and deviation 1 (noise), and every "
        "step is 0.5 % shorter than t - t_next (euler).",
        tasks=DRAWS,
    ),
]
