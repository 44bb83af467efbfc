"""Compares what an implementation computes with an oracle bundle."""

import math
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from parity import memory
from parity.bundle import Bundle, read_bundle
from parity.diagnosis import name_component
from parity.errors import ParityError
from parity.implementations import Implementation, Progress, Reference
from parity.metrics import Difference, compare
from parity.recording import Recording, Tap
from parity.registry import TapName, parse
from parity.requests import SUPPORTED_TASKS
from parity.verdict import (
    AGREE,
    DIVERGE,
    ORDER_MEDIAN,
    UNUSABLE,
    UPSTREAM_MEDIAN,
    Limit,
    bfloat16_limits,
    float32_limits,
    rounding_median,
)

# Orders of rounding that are equally right: how PyTorch's attention and its matrix products add up.
ORDERS = (("sdpa", "native"), ("sdpa", "float32"), ("math", "native"), ("math", "float32"), ("sdpa", "disturbed"))


class UnsupportedTask(ParityError):
    """The bundle is sound, but its task is not implemented yet."""


@dataclass(frozen=True)
class TapResult:
    """One tap compared: where it lies, what the oracle's is like, how far ours is, how far it may be."""

    tap: TapName
    shape: tuple[int, ...]
    dtype: str
    difference: Difference
    limit: Limit

    @property
    def diverges(self) -> bool:
        """Whether the tap is farther than its limit, or cannot be close at all."""
        error = self.difference.rel_l2
        return self.difference.mismatch is not None or error is None or not error <= self.limit.error

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is not finite becomes null."""
        d = self.difference
        return {
            "tap": self.tap.name,
            "call": self.tap.call,
            "component": self.tap.component,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "rel_l2": finite(d.rel_l2),
            "limit": finite(self.limit.error),
            "diverges": self.diverges,
            "max_abs": finite(d.max_abs),
            "max_abs_at": None if d.at is None else list(d.at),
            "oracle_value": finite(d.expected),
            "value": finite(d.got),
            "cosine": finite(d.cosine),
            "bits_equal": finite(d.bits_equal),
            "upstream_floor": finite(self.limit.upstream),
            "order_floor": finite(self.limit.order),
            "leading": self.limit.leading,
            "mismatch": d.mismatch,
        }


@dataclass(frozen=True)
class Result:
    """The comparison of one implementation with one bundle; `taps` are in order of execution.

    `inputs` are the integer inputs, compared before any float; `compared` counts the oracle's taps only.
    `upstream_median` is the median of error / U for bfloat16 (see parity.verdict), None for float32.
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
            "worst": worst and {"tap": worst.tap.name, "rel_l2": finite(worst.difference.rel_l2)},
            "first_divergence": self.first_divergence,
            "task": self.task,
            "entry": self.entry,
            "numerics": self.dtype,
            "upstream_median": finite(self.upstream_median),
            "seconds": finite(self.seconds),
            "peak_bytes": self.peak_bytes,
            "versions": self.versions,
            "created": self.created,
            "inputs": [result.to_json() for result in self.inputs],
            "taps": [result.to_json() for result in self.taps],
        }


@dataclass(frozen=True)
class Run:
    """A bundle replayed by an implementation: what it computed, in how many seconds, with what peak memory in bytes."""

    bundle: Bundle
    recording: Recording
    impl: Implementation
    seconds: float | None = None
    peak_bytes: int | None = None


def check_bundle(path: Path, impl: Implementation, progress: Progress | None = None) -> Result:
    """Replay a bundle with an implementation and compare; `progress` is told the name of each call before it runs.

    Raises ParityError for a bundle that is unusable and UnsupportedTask for one of a task that does not exist yet.
    """
    return check_recording(record_bundle(path, impl, progress))


def record_bundle(path: Path, impl: Implementation, progress: Progress | None = None) -> Run:
    """Read a bundle and replay it; see check_bundle."""
    bundle = read_bundle(path)
    if bundle.task not in SUPPORTED_TASKS:
        raise UnsupportedTask(f"bundle {bundle.name}: task {bundle.task!r} is not supported yet")
    memory.reset_peak()
    start = time.perf_counter()
    recording = impl.record(bundle, progress)
    return Run(bundle, recording, impl, time.perf_counter() - start, memory.peak())


def check_recording(run: Run) -> Result:
    """Compare what was replayed with the bundle, integers first."""
    bundle, recording = run.bundle, run.recording
    limits = limits_of(bundle)
    names = sorted(bundle.taps, key=lambda name: bundle.locate(name).place)
    integers = {f"inputs/{name}": tap for name, tap in bundle.inputs.items() if tap.dtype == "int32"}
    integers = dict(sorted(integers.items(), key=lambda item: parse(item[0]).place))
    computed = {f"inputs/{name}": tap for name, tap in recording.items()}
    missing = [name for name in integers if name not in computed] + [name for name in names if name not in recording]
    inputs = [_compare(parse(n), oracle, computed[n], Limit(0.0)) for n, oracle in integers.items() if n in computed]
    taps = [_compare(bundle.locate(n), bundle.taps[n], recording[n], limits[n]) for n in names if n in recording]
    differences = {result.tap.name: result.difference for result in taps}
    far = (rounding_median(differences, limits, ORDER_MEDIAN) or 0.0) > UPSTREAM_MEDIAN
    first = _first_divergence(bundle, recording, [*inputs, *taps], far)
    evidence = any(result.difference.size for result in taps)
    verdict = DIVERGE if first else AGREE if evidence and not missing else UNUSABLE
    return Result(
        bundle=bundle.name,
        impl=run.impl.name,
        task=bundle.task,
        entry=bundle.entry,
        dtype=bundle.dtype,
        verdict=verdict,
        taps=taps,
        inputs=inputs,
        missing=missing,
        first_divergence=first,
        upstream_median=rounding_median(differences, limits),
        seconds=run.seconds,
        peak_bytes=run.peak_bytes,
        versions=run.impl.versions(),
        source=bundle.manifest["source"],
        request=bundle.request,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def unusable_json(bundle: str, impl: str, error: str) -> dict[str, Any]:
    """Return the report of a bundle that could not be compared, in the form of Result.to_json."""
    nothing = {"compared": 0, "missing": [], "worst": None, "first_divergence": None, "inputs": [], "taps": []}
    return {"bundle": bundle, "impl": impl, "verdict": UNUSABLE, **nothing, "error": error}


def limits_of(bundle: Bundle) -> dict[str, Limit]:
    """Return the limit of every tap of a bundle; for bfloat16 they are measured with the reference."""
    if bundle.dtype == "float32":
        return float32_limits(bundle)
    return _measured_limits(bundle.path, (bundle.path / "taps.safetensors").stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _measured_limits(path: Path, mtime_ns: int) -> dict[str, Limit]:
    del mtime_ns  # it only tells a bundle that was written anew apart in the cache
    bundle, reference = read_bundle(path), Reference()
    exact = reference.record_with(bundle, "float32")
    return bfloat16_limits(bundle, exact, [reference.record_with(bundle, "bfloat16", *order) for order in ORDERS])


def _first_divergence(
    bundle: Bundle, recording: Recording, results: list[TapResult], far: bool
) -> dict[str, Any] | None:
    diverging = [result for result in results if result.diverges]
    # Integers decide what everything after them means, so they come first whatever their place in time.
    first = next((r for r in diverging if r.tap.integer), next(iter(diverging), None))
    if first is None and far:
        # No single tap is too far, but most are: the first of those.
        first = next(r for r in results if r.difference.rel_l2 and r.difference.rel_l2 > (r.limit.upstream or 0.0))
    if first is None:
        return None
    component = name_component(bundle, recording, first.tap.name, {result.tap.name for result in diverging})
    rel_l2 = finite(first.difference.rel_l2)
    return {"tap": first.tap.name, "call": first.tap.call, "component": component, "rel_l2": rel_l2}


def _compare(name: TapName, oracle: Tap, ours: Tap, limit: Limit) -> TapResult:
    given, computed = oracle, ours
    if limit.leading is not None:
        given, computed = (Tap(tap.array[: limit.leading], tap.dtype) for tap in (oracle, ours))
    return TapResult(name, oracle.array.shape, oracle.dtype, compare(given, computed), limit)


def _badness(result: TapResult) -> tuple[bool, float]:
    error = result.difference.rel_l2
    return result.difference.mismatch is not None, math.inf if error is None else error


def finite(value: float | None) -> float | None:
    """Return the value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
