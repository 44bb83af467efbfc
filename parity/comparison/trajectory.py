"""Errors over denoising steps and guidance arms, and over the tokens of an answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from parity.model import definition
from parity.oracle.oracle import Oracle
from parity.ports.port import Port
from parity.tensors.metrics import compare
from parity.tensors.recording import Observed, Recording, Tap
from parity.tensors.rounding import ULP, rounded

# Draws of one rounding of the first state that the envelope is the largest of.
DRAWS = 3
_STATES = ("sampler.x_t", "sampler.x_init")


@dataclass(frozen=True)
class Departure:
    """One step of the trajectory.

    Attributes:
        step: its number, from 0.
        t: time at its start.
        velocity: relative error of each arm's velocity, and of the guided one, from the oracle's state
            (teacher-forced); keys cond, uncond, guided.
        latent: relative error of the state after the step, free-running.
        envelope: how far one rounding of the first state moves the reference's state after the step: the largest of
            several draws; None where it was not measured.
    """

    step: int
    t: float
    velocity: dict[str, float]
    latent: float | None
    envelope: float | None


@dataclass(frozen=True)
class Margin:
    """One answered token.

    Attributes:
        step: its number, from 0.
        expected, got: the oracle's token and ours, both given the oracle's tokens before it.
        margin: how far apart the reference's two best logits are.
        error: largest error of a logit that matters to the choice.
    """

    step: int
    expected: int
    got: int
    margin: float
    error: float

    @property
    def tie(self) -> bool:
        """Whether the error of the logits can flip the choice."""
        return self.margin <= 2 * self.error


def teacher_forced(port: Port, oracle: Oracle) -> Observed:
    """Run with the oracle's states and tokens at the start of every step and everything else the port's own."""
    given = {n: t for n, t in oracle.passes.items() if n.startswith(_STATES) or n == "tokens"}
    return port.run(set(oracle.taps), given).filled(oracle.taps)


def trajectory(oracle: Oracle, forced: Recording, free: Recording) -> list[Departure]:
    """Every step's departure; empty for questions.

    `forced` was run from the oracle's state at every step, `free` from the port's own.
    """
    request = oracle.run.request
    if request.understanding:
        return []
    envelope = _envelope(oracle)
    calls = {call: f"velocity_call{i}" for i, call in enumerate(definition().velocity_calls(oracle.bundle.guided))}
    departures = []
    for step, t in enumerate(oracle.bundle.timesteps):
        names = {
            "cond": _velocity_name(oracle, calls, "cond", step),
            "uncond": _velocity_name(oracle, calls, "uncond", step),
            "guided": f"sampler.velocity{step}",
        }
        errors = {arm: _error(oracle.taps, forced, name) for arm, name in names.items()}
        velocity = {arm: error for arm, error in errors.items() if error is not None}
        after = _after(oracle, step)
        departures.append(Departure(step, t, velocity, _error(oracle.taps, free, after), envelope.get(step)))
    return departures


def first_departure(departures: list[Departure], threshold: float) -> int | None:
    """The first step after which the state is farther than `threshold` times the envelope; None when none is."""
    for departure in departures:
        if departure.latent is not None and departure.envelope and departure.latent > threshold * departure.envelope:
            return departure.step
    return None


def margins(oracle: Oracle, forced: Recording) -> list[Margin]:
    """Every answered token with the reference's margin and the error of the logits; empty where nothing is answered.

    Both sides were given the oracle's tokens before it.
    """
    tokens = oracle.taps.get("tokens")
    if tokens is None:
        return []
    found = []
    for step, token in enumerate(tokens.array.tolist()):
        expected, got = (definition().answer_logits(oracle, taps, step) for taps in (oracle.taps, forced))
        if expected is None or got is None:
            continue
        second, first = np.sort(expected)[-2:]
        apart = float(np.abs(got.astype(np.float64) - expected).max())
        found.append(Margin(step, int(token), int(got.argmax()), float(first - second), apart))
    return found


def _velocity_name(oracle: Oracle, calls: Mapping[tuple[str, int], str], arm: str, step: int) -> str:
    return calls.get((arm, step), "") if oracle.run.entry == "full_sequence" else f"{arm}.step{step}/llm2vae"


def _after(oracle: Oracle, step: int) -> str:
    return f"sampler.x_t{step + 1}" if f"sampler.x_t{step + 1}" in oracle.taps else "latent"


def _error(expected: Mapping[str, Tap], got: Mapping[str, Tap], name: str) -> float | None:
    return compare(expected[name], got[name]).rel_l2 if name in expected and name in got else None


@lru_cache(maxsize=2)
def _envelope(oracle: Oracle) -> dict[int, float]:
    """How far one rounding of the first state moves the reference's state after each step: the largest of the draws."""
    start = oracle.taps.get("sampler.x_init") or oracle.taps["sampler.noise"]
    steps = range(len(oracle.bundle.timesteps))
    names = {_after(oracle, step) for step in steps}
    plain = oracle.run.record(names)
    moved: dict[int, float] = {}
    for draw in range(DRAWS):
        signs = np.random.default_rng(draw).choice([-1.0, 1.0], start.array.shape)
        # A unit in the last place is two roundings: half a unit is what one may be off by.
        perturbed = start.array * (1 + signs * ULP[start.dtype])
        given = {"sampler.x_init": Tap(rounded(perturbed, start.dtype), start.dtype)}
        other = oracle.run.record(names, force=given)
        for step in steps:
            error = _error(plain, other, _after(oracle, step))
            moved[step] = max(moved.get(step, 0.0), error or 0.0)
    return moved
