"""Whether a run of training agrees with its bundle: by how far equally right runs of the reference are apart."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from parity.comparison.check import TapResult
from parity.lance.training.bundle import GRADIENT, TrainingBundle
from parity.lance.training.names import STEP, located
from parity.lance.training.run import TrainingRun
from parity.lance.training.torch_side import TorchTraining, disturbed_weights, variants_of
from parity.lance.variants import Variant
from parity.oracle.bounds import EQUAL, Alarm, Bound, Bounds, bounds_of
from parity.oracle.floors import Floors, LevelTable, Progress
from parity.tensors.metrics import compare
from parity.tensors.recording import Recording, Tap
from parity.tensors.rounding import ULP
from reference.numerics import Numerics

_DRAWS = (1, 2, 3)
_FLAT = 32
"""A gradient counts for the sign that a step takes where it is so many times as large as what rounding does to it."""
_STEADY = 0.1
"""Spread of the error of what a step changes: how much a parameter is rounded does not hang on what is drawn."""
_TIMES = 4
"""Units in the last place of the largest value by which times and states may be off, which few operations make."""


@dataclass(frozen=True)
class Limits:
    """How far each tap, gradient and delta of a run may be from the bundle's.

    Attributes:
        bounds: by name.
        clear: where a parameter's gradient has a sign that rounding cannot turn, bool, by the parameter's name. The
            optimizer's eps is so small that a step moves every parameter by the learning rate, however small its
            gradient is: what a step changes is looked at there.
    """

    bounds: Bounds
    clear: dict[str, np.ndarray]

    @property
    def alarm(self) -> Alarm:
        """How often a right run is called wrong."""
        return self.bounds.alarm

    def of(self, run: TrainingRun) -> Recording:
        """What of a run is compared, by name."""
        taps = {n: Tap(a.astype(np.float32), "float32") for n, a in (run.outputs | run.gradients).items()}
        for name, delta in run.deltas.items():
            clear = self.clear.get(STEP.sub("", name))
            if clear is not None and clear.shape == delta.shape:
                taps[name] = Tap(delta[clear], "float32")
        return taps

    def compared(self, bundle: TrainingBundle, run: TrainingRun) -> list[TapResult]:
        """A run against its bundle, in order of execution."""
        right, found = self.of(expected(bundle)), []
        for name, ours in self.of(run).items():
            if name not in right:
                continue
            held = right[name]
            # A run may leave out rows that nothing is learned from, and lay out what has but one axis.
            if held.array.ndim and len(held.array) == len(run.rows) and ours.shape != held.shape:
                held = Tap(held.array[run.rows], held.dtype)
            if ours.size == held.size:
                ours = Tap(ours.array.reshape(held.shape), ours.dtype)
            found.append(TapResult(located(name), held.shape, held.dtype, compare(held, ours), self.bounds.taps[name]))
        return sorted(found, key=lambda result: result.tap.place)


def expected(bundle: TrainingBundle) -> TrainingRun:
    """What a bundle holds, as a run."""
    held = [{name: tap.array for name, tap in part.items()} for part in (bundle.outputs, bundle.gradients)]
    deltas = {name: tap.array for name, tap in bundle.deltas.items()}
    exact = {name: tap.array for name, tap in bundle.inputs.items()}
    return TrainingRun(exact, *held, np.ones(exact["text_ids"].shape, bool), deltas)


def limits_of(bundle: TrainingBundle, progress: Progress | None = None) -> Limits:
    """Measure how far equally right runs of the reference are from each other; never how far any is from the bundle."""
    whole, runs = TorchTraining(bundle).run(), dict(equally_right(bundle, progress))
    parameters, limits = bundle.unrounded(), Limits(Bounds({}, Alarm(0.0, 0, 0.0, 0)), {})
    first = limits.of(whole)
    floors = measured(first, {variant: limits.of(run) for variant, run in runs.items()})
    # The squares of a tensor, added up one by one.
    largest = max(array.size for array in parameters.values())
    floors.levels["total_norm"] = max(floors.levels.get("total_norm", 0.0), ULP["float32"] * largest**0.5)
    for name, gradient in whole.gradients.items():
        size = np.sqrt(np.mean(np.square(gradient, dtype=np.float64)))
        limits.clear[name] = np.abs(gradient) > _FLAT * floors.levels[name] * size
    right = limits.of(expected(bundle))
    values = {name: tap for name, tap in limits.of(whole).items() if name in right}
    steps = {name: tap for name, tap in values.items() if STEP.match(name)}
    more = measured(steps, {variant: limits.of(run) for variant, run in runs.items()})
    for name, tap in steps.items():
        # What a step changes is the difference of two parameters that are rounded.
        length = float(np.linalg.norm(parameters[STEP.sub("", name)]))
        rounding = ULP["float32"] * length / float(np.linalg.norm(tap.array) or 1)
        more.levels[name] = max(more.levels.get(name, 0.0), rounding)
    levels = floors.levels | more.levels
    spreads = floors.spreads | dict.fromkeys(steps, _STEADY)
    known = replace(floors, levels=levels, flips=dict.fromkeys(levels, 0.0), spreads=spreads)
    return replace(limits, bounds=bounds_of(known, values, bundle.dtype))


def measured(
    center: Recording, recordings: Mapping[Variant, Recording], kind_of: Callable[[str], str] | None = None
) -> Floors:
    """Floors of all that is in `center`: at least the median of all of its kind, for few variants were measured."""
    kind_of = kind_of or _kind
    table = LevelTable(kind_of)
    for number, (variant, recording) in enumerate(recordings.items()):
        table.add(number, center, recording, variant)
    floors = table.floors(center, tuple(variant.name for variant in recordings))
    kinds: dict[str, list[float]] = {}
    for name, level in floors.levels.items():
        kinds.setdefault(kind_of(name), []).extend([level] if level else [])
    levels = {n: max(level, median(kinds[kind_of(n)] or [0.0])) for n, level in floors.levels.items()}
    return replace(floors, levels=levels)


def equally_right(bundle: TrainingBundle, progress: Progress | None = None) -> Iterator[tuple[Variant, TrainingRun]]:
    """What the reference computes in other orders of rounding, and with weights that are half a unit off."""
    for variant, side in sides_of(bundle):
        if progress is not None:
            progress(f"rounding: {variant.name}")
        yield variant, side.run()


def sides_of(bundle: TrainingBundle) -> Iterator[tuple[Variant, TorchTraining]]:
    """The reference in those ways, loaded."""
    for name, numerics in variants_of(bundle.dtype).items():
        yield Variant(name, name, numerics), TorchTraining(bundle, numerics)
    for draw in _DRAWS:
        numerics = Numerics(bundle.dtype)
        # Weights that are bfloat16 are not rounded once more: there sums are off.
        name = "weights half a unit off" if bundle.dtype == "float32" else "sums disturbed"
        if bundle.dtype != "float32":
            numerics = replace(numerics, attention="disturbed", linear="disturbed", draw=draw)
        side = TorchTraining(bundle, numerics)
        if bundle.dtype == "float32":
            disturbed_weights(side, draw)
        yield Variant(f"{name}, {draw}", name, numerics, draw=draw), side


def beyond(results: list[TapResult]) -> dict[str, float]:
    """The names of what is farther than it may be, and by how many floors."""
    far = [result for result in results if result.diverges]
    errors = {r.tap.name: np.inf if r.difference.error is None else r.difference.error for r in far}
    return {r.tap.name: errors[r.tap.name] / r.limit.floor if r.limit.floor else np.inf for r in far}


def exact_results(bundle: TrainingBundle, run: TrainingRun) -> list[TapResult]:
    """What must be equal: integers and masks; times and states within some units in the last place."""
    found = []
    for name, ours in run.exact.items():
        held = mask_of(bundle).astype(np.int32) if name == "mask" else bundle.inputs[name].array
        whole = held.dtype.kind != "f"
        taps = [Tap(each.astype(np.int32 if whole else np.float32), "int32" if whole else "float32")
                for each in (held, ours)]  # fmt: skip
        difference, limit = compare(*taps), EQUAL
        if not whole and bundle.inputs[name].dtype == "float32" and held.size:
            # Of the largest value, as a part of the whole.
            most = _TIMES * ULP["float32"] * float(np.abs(held).max())
            limit = Bound(most * held.size**0.5 / float(np.linalg.norm(held) or 1))
            limit = limit if difference.max_abs is not None and difference.max_abs <= most else EQUAL
        tap = replace(located(f"inputs/{name}"), integer=True)
        found.append(TapResult(tap, held.shape, taps[0].dtype, difference, limit))
    return found


def mask_of(bundle: TrainingBundle) -> np.ndarray:
    """Which key each query sees, bool [L, L], from a bundle's splits and samples, row by row as they are meant."""
    lengths, modes = (bundle.inputs[name].array.tolist() for name in ("split_lens", "attn_modes"))
    rows = len(bundle.inputs["text_ids"].array)
    split = np.repeat(np.arange(len(lengths)), lengths)[:rows]
    sample = np.repeat(np.arange(len(bundle.inputs["sample_lens"].array)), bundle.inputs["sample_lens"].array)[:rows]
    seen = np.zeros((rows, rows), bool)
    for query in range(rows):
        for key in range(rows):
            own = split[query] == split[key]
            noise = modes[split[key]] == 3
            before = key <= query or own and modes[split[query]] != 0
            seen[query, key] = sample[query] == sample[key] and before and (own or not noise)
    return seen


def _kind(name: str) -> str:
    if name.startswith(GRADIENT):
        return GRADIENT
    return "steps" if STEP.match(name) else "parameters" if name.endswith((".weight", ".bias")) else "taps"
