"""Compares what an implementation computes with an oracle bundle."""

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from parity import memory
from parity.bundle.reading import Bundle, read_bundle
from parity.comparison.exact import ExactMismatch, check_preprocessed, check_weights
from parity.comparison.trajectory import margins
from parity.comparison.verdict import (
    AGREE,
    DIVERGE,
    INCONCLUSIVE,
    MEDIAN,
    UNUSABLE,
    limits_from,
    median_over_floor,
    median_over_upstream,
)
from parity.errors import FloorsRefused, ParityError
from parity.model import definition
from parity.oracle.bounds import EQUAL, Alarm, Bound
from parity.oracle.floors import logits_of, run_free
from parity.oracle.floors_file import judged
from parity.oracle.judgement import Judgement, clears
from parity.oracle.oracle import FREE, Oracle
from parity.ports.loading import port_loader
from parity.ports.port import Loader, Port, Progress
from parity.tensors.metrics import Difference, bits, compare, finite
from parity.tensors.names import TapName, parse
from parity.tensors.recording import Recording, Tap
from parity.tensors.sketch import Sketch

# One tap that agrees may do so by chance.
FEWEST_TAPS = 2


class UnsupportedTask(ParityError):
    """The bundle is sound, but its task is not implemented yet."""


@dataclass(frozen=True)
class TapResult:
    """One tap compared: where it lies, what the oracle's is like, how far ours is, how far it may be."""

    tap: TapName
    shape: tuple[int, ...]
    dtype: str
    difference: Difference
    limit: Bound

    @property
    def diverges(self) -> bool:
        """Whether the tap is farther than its limit, or cannot be close at all."""
        return self.limit.exceeded_by(self.difference)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is not finite becomes null."""
        return {
            "tap": self.tap.name,
            "call": self.tap.call,
            "component": self.tap.component,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "limit": finite(self.limit.allowed),
            "diverges": self.diverges,
            "upstream_floor": finite(self.limit.upstream),
            "floor": finite(self.limit.floor),
        } | self.difference.to_json("oracle_value", "value")


@dataclass(frozen=True)
class Result:
    """The comparison of one implementation with one bundle; `taps` are in order of execution.

    `inputs` are the integer inputs, compared before any float, and before those the weights of a port of the user's
    that are not the oracle's; `compared` counts the oracle's taps only.
    `upstream_median` is the median of error over upstream's own rounding error for bfloat16, None for float32;
    `floor_median` that of error over the floor. `reason` says why a comparison is inconclusive, `remark` what else has
    to be known of one that is not.
    """

    bundle: str
    impl: str
    task: str
    entry: str
    dtype: str
    verdict: str
    taps: list[TapResult]
    inputs: list[TapResult]
    missing: list[str]
    first_divergence: dict[str, Any] | None
    upstream_median: float | None = None
    floor_median: float | None = None
    alarm: Alarm | None = None
    reason: str = ""
    remark: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    created: str = ""

    @property
    def compared(self) -> int:
        """How many of the oracle's taps were compared."""
        return len(self.taps)

    @property
    def worst(self) -> TapResult | None:
        """The tap with the largest relative error; one that has none, for its shape or NaN, is the worst of all."""
        return max(self.taps, key=_badness, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the report of `lance-parity check --json`: strict JSON, without NaN or Infinity."""
        worst = self.worst
        return {
            "bundle": self.bundle,
            "impl": self.impl,
            "verdict": self.verdict,
            "compared": self.compared,
            "missing": self.missing,
            "worst": worst and {"tap": worst.tap.name, "rel_l2": finite(worst.difference.error)},
            "first_divergence": self.first_divergence,
            "task": self.task,
            "entry": self.entry,
            "numerics": self.dtype,
            "upstream_median": finite(self.upstream_median),
            "floor_median": finite(self.floor_median),
            "false_alarm_rate": self.alarm and self.alarm.rate,
            "threshold": self.alarm and finite(self.alarm.threshold),
            "reason": self.reason,
            "remark": self.remark,
            "seconds": finite(self.seconds),
            "peak_bytes": self.peak_bytes,
            "versions": self.versions,
            "created": self.created,
            "inputs": [result.to_json() for result in self.inputs],
            "taps": [result.to_json() for result in self.taps],
        }


@dataclass(frozen=True)
class Run:
    """A bundle replayed by an implementation: what it computed, in how many seconds, with what peak memory in bytes.

    `unstable` names the first tap in which a second replay differs, None where all are equal. `preprocessed` are the
    visuals as the implementation resizes them itself, `weights` the parameters that it uses and that are not the
    oracle's.
    """

    bundle: Bundle
    recording: Recording
    port: Port
    unstable: str | None = None
    preprocessed: dict[str, np.ndarray] | None = None
    weights: Sequence[ExactMismatch] = ()
    seconds: float | None = None
    peak_bytes: int | None = None


def check_bundle(path: Path, impl: str | Loader, progress: Progress | None = None) -> Result:
    """Replay a bundle with a port and compare; `progress` is told the name of each call before it runs.

    `impl` is a port's name, FILE.py:NAME, or what loads one. Raises ParityError for a bundle that is unusable or a port
    that cannot run it, and UnsupportedTask for a bundle of a task that does not exist yet.
    """
    load = port_loader(impl) if isinstance(impl, str) else impl
    if definition().is_training(path):
        return definition().check_training(path, load, progress)
    return check_recording(record_bundle(path, load, progress), progress)


def record_bundle(path: Path, impl: str | Loader, progress: Progress | None = None) -> Run:
    """Read a bundle and replay it; see check_bundle."""
    load = port_loader(impl) if isinstance(impl, str) else impl
    bundle = read_bundle(path)
    if bundle.task not in definition().SUPPORTED_TASKS:
        raise UnsupportedTask(
            f"bundle {bundle.name}: task {bundle.task!r} is none of {', '.join(definition().SUPPORTED_TASKS)}"
        )
    definition().require_consistent(bundle)
    memory.reset_peak()
    start = time.perf_counter()
    port = load(bundle)
    weights = _wrong_weights(port, bundle, progress)
    recording = replayed(port, bundle, progress)
    seconds, peak = time.perf_counter() - start, memory.peak()
    unstable = first_unequal(recording, replayed(port, bundle, progress))
    return Run(bundle, recording, port, unstable, port.preprocessed(bundle.path.parent), weights, seconds, peak)


def _wrong_weights(port: Port, bundle: Bundle, progress: Progress | None) -> Sequence[ExactMismatch]:
    """The weights of a port of the user's that are not the oracle's, as far as it tells them."""
    if not port.partial:
        return ()
    try:
        oracle = trusted_of(bundle, progress).oracle
    except ParityError:
        # Without the reference there is nothing to compare with.
        return ()
    return check_weights(port, oracle).mismatches


def replayed(port: Port, bundle: Bundle, progress: Progress | None = None) -> Recording:
    """What a port computes by itself of a bundle, an answer's tokens given, with the integers of the sequence under
    their names in inputs.safetensors."""
    found = port.run(definition().wanted(bundle), definition().answered(bundle), progress=progress)
    found = found.filled(bundle.taps)
    exact = {name.removeprefix("inputs/"): tap for name, tap in found.exact.items() if name not in found.absent}
    return {name: tap for name, tap in exact.items() if name in bundle.inputs} | found.recording


def first_unequal(first: Recording, second: Recording) -> str | None:
    """The first tap that two recordings do not have bit for bit alike; None where all are equal."""
    for name, tap in first.items():
        other = second.get(name)
        if other is None or not np.array_equal(bits(tap.array), bits(other.array)):
            return name
    return None


def check_recording(run: Run, progress: Progress | None = None) -> Result:
    """Compare what was replayed with the bundle, integers first.

    Whether the oracle and the reference agree is judged before: where they do not, nothing can be said of a run, unless
    it agrees with the oracle where the reference does not.
    """
    bundle, recording = run.bundle, dict(run.recording)
    reason = f"two equal runs differ first at {run.unstable}" if run.unstable else ""
    blind, remark, logits, alarm = "", "", {}, None
    try:
        trusted = trusted_of(bundle, progress)
        limits, alarm = limits_of(bundle, progress)
        logits = logits_of(trusted.own)
        recording |= _settled(trusted.oracle, recording)
        blind, remark = _blind(trusted, recording, limits)
        reason = reason or blind
    except FloorsRefused:
        raise
    except ParityError as error:
        # Without the reference only what must be equal can be judged.
        reason = reason or str(error)
        limits = {name: EQUAL if tap.dtype == "int32" else Bound(math.inf) for name, tap in bundle.expected.items()}
    expected = bundle.expected | {name: tap for name, tap in logits.items() if name in recording}
    names = sorted(expected, key=lambda name: bundle.locate(name).place)
    integers = {f"inputs/{name}": tap for name, tap in bundle.inputs.items() if tap.dtype == "int32"}
    integers = dict(sorted(integers.items(), key=lambda item: parse(item[0]).place))
    computed = {f"inputs/{name}": tap for name, tap in recording.items()}
    missing = [name for name in integers if name not in computed] + [name for name in names if name not in recording]
    inputs = [_compare(parse(m.tap), Tap(m.expected, "float32"), Tap(m.got, "float32"), EQUAL) for m in run.weights]
    inputs += [_compare(parse(n), oracle, computed[n], EQUAL) for n, oracle in integers.items() if n in computed]
    inputs += _preprocessed(run)
    taps = [_compare(bundle.locate(n), expected[n], recording[n], limits[n]) for n in names if n in recording]
    differences = {result.tap.name: result.difference for result in taps}
    over_floor = median_over_floor(differences, limits)
    first = _first_divergence(bundle, recording, [*inputs, *taps], (over_floor or 0.0) > MEDIAN)
    if any(result.difference.size for result in taps) and len(taps) < FEWEST_TAPS:
        reason = reason or f"only {len(taps)} tap was compared"
    if run.port.partial and missing:
        lacking = f"{len(missing)} tap{' is' if len(missing) == 1 else 's are'} not"
        remark = "; ".join(filter(None, [remark, f"judged on what {run.port.name} tells: {lacking}"]))
    verdict = _verdict(taps, [] if run.port.partial else missing, first, reason, run.unstable or blind)
    return Result(
        bundle=bundle.name,
        impl=run.port.name,
        task=bundle.task,
        entry=bundle.entry,
        dtype=bundle.dtype,
        verdict=verdict,
        taps=taps,
        inputs=inputs,
        missing=missing,
        first_divergence=first,
        upstream_median=median_over_upstream(differences, limits),
        floor_median=over_floor,
        alarm=alarm,
        reason=reason,
        remark=remark,
        seconds=run.seconds,
        peak_bytes=run.peak_bytes,
        versions=run.port.versions(),
        source=bundle.manifest["source"],
        request=bundle.request,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def unusable_json(bundle: str, impl: str, error: str) -> dict[str, Any]:
    """Return the report of a bundle that could not be compared, in the form of Result.to_json."""
    nothing = {"compared": 0, "missing": [], "worst": None, "first_divergence": None, "inputs": [], "taps": []}
    return {"bundle": bundle, "impl": impl, "verdict": UNUSABLE, **nothing, "error": error}


@dataclass(frozen=True, eq=False)
class Trusted:
    """The trusted side of a bundle.

    Attributes:
        oracle: the reference from upstream's values.
        own: the reference from the request's randomness alone.
        judgement: whether the two agree with each other.
    """

    oracle: Oracle
    own: Recording
    judgement: Judgement


def trusted_of(bundle: Bundle, progress: Progress | None = None) -> Trusted:
    """Run the reference and judge the bundle; raises ParityError when the reference cannot run it."""
    return _trusted(bundle, progress)[0]


def limits_of(bundle: Bundle, progress: Progress | None = None) -> tuple[dict[str, Bound], Alarm]:
    """Return the limit of every tap of a bundle and of an answer's logits, and how often they raise a false alarm.

    Raises ParityError when the reference cannot run the bundle.
    """
    return _trusted(bundle, progress)[1]


_KEPT: dict[Hashable, tuple[Trusted, tuple[dict[str, Bound], Alarm]]] = {}
"""The trusted sides of the last bundles: two implementations are checked after each other."""


def _trusted(bundle: Bundle, progress: Progress | None) -> tuple[Trusted, tuple[dict[str, Bound], Alarm]]:
    # A bundle that was written anew is another one, and so is one whose checkpoint was.
    folders = (bundle.path, bundle.checkpoint, *bundle.checkpoint.iterdir())
    files = [file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file()]
    key = frozenset((file, status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()])
    if key not in _KEPT:
        while len(_KEPT) > 1:
            _KEPT.pop(next(iter(_KEPT)))
        oracle = Oracle.of(read_bundle(bundle.path))
        floors, judgement = judged(oracle, progress)
        trusted = Trusted(oracle, run_free(oracle.run, bundle), judgement)
        _KEPT[key] = trusted, limits_from(bundle, floors[FREE], logits_of(trusted.own))
    return _KEPT[key]


def _blind(trusted: Trusted, recording: Recording, limits: dict[str, Bound]) -> tuple[str, str]:
    """Why nothing can be said of a run where the oracle and the reference disagree; else what has to be known."""
    judgement, expected = trusted.judgement, trusted.oracle.bundle.expected
    if judgement.agree:
        return "", ""
    # Only what is far off in a run of its own can be told apart there.
    if clears(judgement, recording, expected, limits) and not clears(judgement, trusted.own, expected, limits):
        return "", f"{judgement.sentence()}; this run agrees with the oracle there"
    return judgement.sentence(), ""


def _settled(oracle: Oracle, recording: Recording) -> Recording:
    """An answer whose choices are the oracle's wherever both it and the one chosen instead are a rounding behind the
    likeliest."""
    expected, got = oracle.taps.get("tokens"), recording.get("tokens")
    if expected is None or got is None or expected.array.shape != got.array.shape:
        return {}
    ties = [
        margin.step
        for margin in margins(oracle, recording)
        if margin.tie
        and all(_behind(oracle, margin.step, int(t.array[margin.step])) <= 2 * margin.error for t in (got, expected))
    ]
    settled = got.array.copy()
    settled[ties] = expected.array[ties]
    return {"tokens": Tap(settled, "int32")}


def _behind(oracle: Oracle, step: int, token: int) -> float:
    """By how much the reference's logit of a token is lower than that of the likeliest."""
    logits = definition().answer_logits(oracle, oracle.taps, step).astype(np.float64)
    return float(logits.max() - logits[token]) if 0 <= token < len(logits) else math.inf


def _preprocessed(run: Run) -> list[TapResult]:
    """The pixels and patches that the implementation makes of the visuals' files itself."""
    inputs, computed = run.bundle.inputs, run.preprocessed or {}
    drawn = definition().drawn_visuals(run.bundle) if computed else set()
    wrong = {breach.tap for breach in check_preprocessed(computed, inputs, drawn)}
    results = []
    for name, got in sorted(computed.items()):
        if name not in inputs:
            continue
        tap = f"inputs/{name}"
        expected, ours = inputs[name], Tap(np.ascontiguousarray(got, np.float32), "float32")
        # The same picture but for where it is cut is as good.
        difference = compare(expected, ours if tap in wrong else expected)
        results.append(TapResult(parse(tap), expected.shape, expected.dtype, difference, EQUAL))
    return results


def _verdict(
    taps: list[TapResult], missing: list[str], first: dict[str, Any] | None, reason: str, untold: str | None
) -> str:
    if first and not untold:
        return DIVERGE
    if missing or not any(result.difference.size for result in taps):
        return UNUSABLE
    return INCONCLUSIVE if reason else AGREE


def _first_divergence(
    bundle: Bundle, recording: Recording, results: list[TapResult], far: bool
) -> dict[str, Any] | None:
    diverging = [result for result in results if result.diverges]
    # Weights and integers decide what everything after them means: they come first whatever their place in time.
    first = next((r for r in diverging if r.tap.integer or _is_weight(r)), next(iter(diverging), None))
    if first is None and far:
        # No single tap is too far, but most are: the first of those.
        first = next(r for r in results if (r.difference.rel_l2 or 0.0) > r.limit.floor)
    if first is None:
        return None
    names = {result.tap.name for result in diverging}
    component = first.tap.component
    if not _is_weight(first):
        component = definition().name_component(bundle, recording, first.tap.name, names)
    rel_l2 = finite(first.difference.error)
    return {"tap": first.tap.name, "call": first.tap.call, "component": component, "rel_l2": rel_l2}


def _is_weight(result: TapResult) -> bool:
    return result.tap.name.startswith("weights/")


def _compare(name: TapName, oracle: Tap | Sketch, ours: Tap, limit: Bound) -> TapResult:
    return TapResult(name, oracle.shape, oracle.dtype, compare(oracle, ours, name.most), limit)


def _badness(result: TapResult) -> tuple[bool, float]:
    error = result.difference.rel_l2
    return result.difference.mismatch is not None, math.inf if error is None else error
