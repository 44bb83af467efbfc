"""A run of training against its bundle: integers, then forwards, backwards and two steps of the optimizer."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from parity import memory
from parity.bundle.reading import read_json
from parity.comparison.check import Result, TapResult
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE, MEDIAN, UNUSABLE, median_over_floor
from parity.errors import ParityError, one_line
from parity.lance.ports import MlxPort, ReferencePort
from parity.lance.training.bundle import FORMAT, TrainingBundle, read_training_bundle
from parity.lance.training.judge import Limits, exact_results, expected, limits_of
from parity.lance.training.names import located
from parity.lance.training.run import TrainingRun
from parity.oracle.bounds import EQUAL
from parity.oracle.floors import Progress
from parity.ports.port import versions
from parity.tensors.metrics import Difference, finite

NOT_OF_MLX = frozenset({"time_embedder", "grad/time_embedder"})
"""What mlx has in another form: an embedding for each distinct time, which its parameters' gradients stand for."""


class TrainingSide(Protocol):
    """Something that trains, loaded for a bundle."""

    def run(self) -> TrainingRun:
        """Forward, backward and the bundle's steps of the optimizer."""


def is_training(path: Path) -> bool:
    """Whether a folder is a bundle of training; what cannot be read is none."""
    try:
        return read_json(path / "manifest.json").get("format") == FORMAT
    except ParityError:
        return False


def side_of(bundle: TrainingBundle, load: Callable[[Any], Any]) -> tuple[str, TrainingSide]:
    """What a loader of a port loads for a bundle of training, and its name: of a file's port its `run()` is asked."""
    from parity.lance.training.mlx_side import MlxTraining
    from parity.lance.training.torch_side import TorchTraining

    kinds = {MlxPort: ("mlx", MlxTraining), ReferencePort: ("reference", TorchTraining)}
    if load in kinds:
        name, kind = kinds[load]
        with one_line(f"{name} cannot run bundle {bundle.name}"):
            return name, kind(bundle)
    port = load(bundle)
    return port.name, port.given


def check_training(path: Path, load: Callable[[Any], Any], progress: Progress | None = None) -> Result:
    """Train one pack with a port and compare; the reference is held against the oracle before.

    Raises ParityError for a bundle that is unusable or a port that cannot run it.
    """
    bundle = read_training_bundle(path)
    memory.reset_peak()
    start = time.perf_counter()
    name, side = side_of(bundle, load)
    with one_line(f"{name} cannot run bundle {bundle.name}"):
        run = side.run()
        seconds, peak = time.perf_counter() - start, memory.peak()
        unstable = _unlike(run, side.run())
    limits = limits_of(bundle, progress)
    departures = disagreement(bundle, limits)
    inputs, taps = exact_results(bundle, run), limits.compared(bundle, run)
    missing = sorted(expected_names(bundle) - {r.tap.name for r in taps} - (NOT_OF_MLX if name == "mlx" else set()))
    extra = sorted(run.gradients.keys() - bundle.gradients.keys())
    taps += [_extra(name, run) for name in extra]
    differences = {result.tap.name: result.difference for result in taps}
    over_floor = median_over_floor(differences, limits.bounds.taps)
    first = next((r for r in [*inputs, *taps] if r.diverges), None)
    if first is None and (over_floor or 0.0) > MEDIAN:
        first = next(r for r in taps if (r.difference.rel_l2 or 0.0) > r.limit.floor)
    reason = f"two equal runs differ first at {unstable}" if unstable else departures
    verdict = INCONCLUSIVE if reason else DIVERGE if first else UNUSABLE if missing else AGREE
    told = first and {"tap": first.tap.name, "call": first.tap.call, "component": first.tap.component,
                      "rel_l2": finite(first.difference.error)}  # fmt: skip
    return Result(
        bundle=bundle.name, impl=name, task="training", entry="training", dtype=bundle.dtype, verdict=verdict,
        taps=taps, inputs=inputs, missing=missing, first_divergence=told, floor_median=over_floor, alarm=limits.alarm,
        reason=reason, seconds=seconds, peak_bytes=peak,
        versions=versions({"mlx": "mlx", "reference": "torch"}.get(name, "numpy")), source=bundle.manifest["source"],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def disagreement(bundle: TrainingBundle, limits: Limits) -> str:
    """Where the reference does not compute what the bundle holds, in words; nothing where it does."""
    from parity.lance.training.torch_side import TorchTraining

    with one_line(f"reference cannot run bundle {bundle.name}"):
        run = TorchTraining(bundle).run()
    wrong = [r for r in [*exact_results(bundle, run), *limits.compared(bundle, run)] if r.diverges]
    return _said(wrong) if wrong else ""


def expected_names(bundle: TrainingBundle) -> set[str]:
    """All that a run is to compute."""
    right = expected(bundle)
    return set(right.outputs) | set(right.gradients) | set(right.deltas)


def _extra(name: str, run: TrainingRun) -> TapResult:
    """A gradient of what is to be frozen."""
    ours = run.gradients[name]
    unlike = Difference(None, None, None, None, None, None, None, ours.size, "it is learned and is to be frozen")
    return TapResult(located(name), ours.shape, "float32", unlike, EQUAL)


def _said(wrong: list[TapResult]) -> str:
    first, more = wrong[0], len(wrong) - 1
    error, allowed = first.difference.error, first.limit.allowed
    far = f"error {error:.3g}, rounding allows {allowed:.3g}" if error is not None and allowed else "it differs"
    others = f", and {more} more" if more else ""
    return f"oracle and reference disagree at {first.tap.name} ({first.difference.mismatch or far}){others}"


def _unlike(run: TrainingRun, again: TrainingRun) -> str | None:
    both = [replace(each, outputs=each.outputs | each.gradients | each.deltas).outputs for each in (run, again)]
    return next((name for name, array in both[0].items() if array.tobytes() != both[1][name].tobytes()), None)
