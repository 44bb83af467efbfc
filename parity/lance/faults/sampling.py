"""Faults of the flow sampler: schedule, Euler steps, the first state; and of choosing an answer's tokens."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import mlx.core as mx
import numpy as np

import lance_mlx.pipeline as pipeline
from lance_mlx.backend.numerics import scaled
from lance_mlx.requests.request import Question
from lance_mlx.sampling import flow, schedule, text
from parity.lance.faults.base import (
    ASKS,
    BFLOAT16,
    DRAWS,
    KV_CACHE,
    Fault,
    Need,
    Patch,
    Target,
    function,
    rounded,
    wrapped,
)


def _times(change: Callable[[Callable[[int, float], np.ndarray], int, float], np.ndarray]) -> Patch:
    return function(schedule, "timesteps", change)


def _twice(original: Callable, num_steps: int, shift: float) -> np.ndarray:
    t = original(num_steps, shift)
    return (np.float32(shift) * t / (1 + np.float32(shift - 1) * t)).astype(np.float32)


def _num_points(original: Callable, num_steps: int, shift: float) -> np.ndarray:
    times = original(num_steps - 1, shift) if num_steps > 1 else np.ones(1, np.float32)
    return np.append(times, np.float32(0))


def _rounded_times(original: Callable, num_steps: int, shift: float) -> np.ndarray:
    return np.array(rounded(mx.array(original(num_steps, shift))))


def _advances(change: Callable[[Callable, mx.array, mx.array, float], mx.array]) -> Patch:
    return lambda target: wrapped(flow, "advance", change)


def _with_schedule(interval: Callable[[np.ndarray, int], float]) -> Patch:
    """Choose the length of an Euler step from the schedule and the number of the step."""

    @contextmanager
    def patch(target: Target) -> Iterator[None]:
        times = [np.zeros(0, np.float32)]

        def timesteps(original: Callable, num_steps: int, shift: float) -> np.ndarray:
            times[0] = original(num_steps, shift)
            return times[0]

        def advance(original: Callable, x_t: mx.array, velocity: mx.array, right: float) -> mx.array:
            intervals = times[0][:-1] - times[0][1:]
            return original(x_t, velocity, interval(intervals, int(np.abs(intervals - right).argmin())))

        with wrapped(flow, "timesteps", timesteps), wrapped(flow, "advance", advance):
            yield

    return patch


def _equal(intervals: np.ndarray, step: int) -> float:
    return 1 / len(intervals)


def _next(intervals: np.ndarray, step: int) -> float:
    return float(intervals[min(step + 1, len(intervals) - 1)])


def _float32_state(original: Callable, x_t: mx.array, velocity: mx.array, interval: float) -> mx.array:
    return original(x_t.astype(mx.float32), velocity.astype(mx.float32), interval)


@contextmanager
def _moves_given(target: Target) -> Iterator[None]:
    """Move the rows that are given by the velocity that the model has for them."""
    whole: list[mx.array] = []

    def velocities(original: Callable, *args: object) -> list[mx.array]:
        outputs = original(*args)
        whole[:] = outputs[:1]
        return outputs

    def guided(original: Callable, *args: object) -> mx.array:
        whole[:] = [original(*args)]
        return whole[0]

    def advance(original: Callable, x_t: mx.array, moving: mx.array, interval: float) -> mx.array:
        right = original(x_t, moving, interval)
        given = len(x_t) - len(moving)
        if not given or len(whole[0]) != len(x_t):
            return right
        return mx.concatenate([x_t[:given] - scaled(whole[0][:given], interval), right[given:]])

    with ExitStack() as stack:
        stack.enter_context(wrapped(flow, "velocities", velocities))
        stack.enter_context(wrapped(flow, "guided_velocity", guided))
        stack.enter_context(wrapped(flow, "advance", advance))
        yield


def _all_noise(original: Callable, noise: mx.array, clean: mx.array | None) -> mx.array:
    return noise


def _all_ids(original: Callable, *args: object, **values: object) -> Iterator[int]:
    return original(*args, **values | {"vocabulary": 2**30})


def _at_random(original: Callable, logits: mx.array, question: Question, key: mx.array) -> mx.array:
    return original(logits, replace(question, temperature=1.0), key)


def _schedule(name: str, explanation: str, patch: Patch, about: str) -> Fault:
    return Fault(name, about, "schedule", patch, DRAWS, explanation=explanation)


def _euler(name: str, explanation: str, patch: Patch, about: str, **only: tuple[str, ...]) -> Fault:
    return Fault(name, about, "euler", patch, DRAWS, explanation=explanation, **only)


FAULTS = [
    _schedule(
        "schedule-shift-1",
        "the timestep shift is 1",
        _times(lambda original, num_steps, shift: original(num_steps, 1.0)),
        "Times are evenly spaced: they are not shifted.",
    ),
    _schedule(
        "schedule-shift-twice", "the timestep shift is applied twice", _times(_twice), "Times are shifted twice."
    ),
    _schedule(
        "schedule-shift-inverted",
        "the timestep shift is inverted",
        _times(lambda original, num_steps, shift: original(num_steps, 1 / shift)),
        "Times are shifted towards the data instead of towards the noise.",
    ),
    _schedule(
        "schedule-reversed",
        "t is in reverse",
        _times(lambda original, num_steps, shift: original(num_steps, shift)[::-1].copy()),
        "Times rise from 0 to 1 instead of falling.",
    ),
    _schedule(
        "schedule-num-steps-points",
        "the schedule has as many points as steps, and a last one",
        _times(_num_points),
        "1 and 0 are the ends of num_steps points instead of num_steps + 1: the last step stands still.",
    ),
    _schedule(
        "schedule-rounded",
        "t is rounded to bfloat16",
        _times(_rounded_times),
        "Times are rounded to bfloat16.",
    ),
    _euler(
        "euler-backwards",
        "the Euler step goes the other way",
        _advances(lambda original, x_t, velocity, interval: original(x_t, velocity, -interval)),
        "An Euler step adds the velocity instead of subtracting it.",
    ),
    _euler(
        "euler-equal-steps",
        "the Euler step is 1 / steps long",
        _with_schedule(_equal),
        "All Euler steps are 1 / num_steps long, whatever the schedule.",
    ),
    _euler(
        "euler-next-interval",
        "the Euler step is as long as the one after it should be",
        _with_schedule(_next),
        "An Euler step is as long as the one after it should be.",
    ),
    _euler(
        "euler-float32-state",
        "the Euler state is kept in float32",
        _advances(_float32_state),
        "The latents are not rounded to bfloat16 after a step.",
        dtypes=BFLOAT16,
    ),
    Fault(
        "euler-moves-the-given-frame",
        "The latent frame that is given moves with the others.",
        "euler",
        _moves_given,
        frozenset({"i2v"}),
        entries=KV_CACHE,
        explanation="the given frame moves",
    ),
    Fault(
        "given-frame-missing",
        "The first state is noise everywhere: the given latent frame is not in its place.",
        "noise",
        lambda target: wrapped(flow, "initial_state", _all_noise),
        frozenset({"i2v"}),
        explanation="the given frame is not in place",
    ),
    Fault(
        "vocabulary-not-masked",
        "Ids beyond the tokenizer's, of which the head has some, may be answered.",
        "tokens",
        lambda target: wrapped(pipeline, "answer_tokens", _all_ids),
        ASKS,
        explanation="the vocabulary is not masked",
        needs=Need(
            "a long answer, in which ids beyond the tokenizer's come up",
            lambda bundle: "tokens" in bundle.taps and len(bundle.taps["tokens"].array) >= 64,
        ),
    ),
    Fault(
        "answers-drawn-at-random",
        "The tokens of an answer are drawn by their probabilities instead of taking the most probable.",
        "tokens",
        lambda target: wrapped(text, "_choose", _at_random),
        ASKS,
    ),
]
