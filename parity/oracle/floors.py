"""What rounding alone does: how far equally right variants of the reference are from the one that rounds least.

No floor is a distance from the oracle: what the oracle and the reference disagree about is judged in judgement.py.
Every variant runs three times: from the oracle's values at every tap (local), from upstream's own taps only, so that
errors add up between one and the next (segment), and from the request's randomness (free). Answers are given the
oracle's tokens in all three.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import one_line
from parity.model import definition
from parity.oracle.machines import machine, others, record_elsewhere
from parity.oracle.oracle import FREE, KINDS, LOCAL, SEGMENT, Oracle
from parity.oracle.trusted import Trusted, Variant
from parity.tensors.metrics import compare, rel_l2
from parity.tensors.names import component_kind, parse
from parity.tensors.recording import Recording, Tap
from parity.tensors.rounding import step_squares
from parity.tensors.sketch import Sketch

OWN = "the reference itself"
FLOORS = "floors"
"""What is told while they are measured begins with it, which may take minutes."""

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Floors:
    """How far equally right variants are from the one that rounds least, of one kind; by tap name.

    Attributes:
        levels: the largest of their relative L2 errors.
        flips: of bfloat16 taps, the largest mean squared error in units of the last place over all taps of the
            component: about the part of the elements that round the other way; 0 of others.
        spreads: standard deviation of the logarithm of the error from one draw to the next, over all taps of the
            component.
        variants: their names; names of other machines' settings among them.
        machines: the machines that they were measured on; see parity.oracle.machines.
        upstream: relative distance of upstream's bfloat16 taps from the reference's float32 ones; only for FREE.
    """

    levels: dict[str, float]
    flips: dict[str, float]
    spreads: dict[str, float]
    variants: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    upstream: dict[str, float] = field(default_factory=dict)


FloorSet = dict[str, Floors]
"""The floors of a bundle, by KINDS."""


def measure(
    oracle: Oracle, progress: Progress | None = None, environments: Mapping[str, dict[str, str]] | None = None
) -> FloorSet:
    """Run every variant of the reference, here and as other machines compute; raises ParityError when it cannot run.

    `environments` are the settings of those; by default those of parity.oracle.machines.others.
    """
    bundle = oracle.bundle
    elsewhere = others() if environments is None else environments
    variants, exact = definition().variants_for(bundle), definition().exact_variant(bundle.dtype)
    started, count = itertools.count(1), 1 + len(variants) + len(elsewhere)

    def tell(name: str) -> None:
        if progress is not None:
            progress(f"{FLOORS} {next(started)} of {count}: {name}")

    with one_line(f"reference cannot run bundle {bundle.name}"):
        own = run_free(oracle.run, bundle)
        centers = _runs_of(bundle, oracle.passes, exact, tell)
        tables, names = [LevelTable() for _ in KINDS], list[str]()

        def add(name: str, recordings: Sequence[Recording], variant: Variant | None = None) -> None:
            for table, center, recording in zip(tables, centers, recordings, strict=True):
                table.add(len(names), center, recording, variant)
            names.append(name)

        add(OWN, (oracle.own, oracle.own, own))
        for variant in variants:
            add(variant.name, _runs_of(bundle, oracle.passes, variant, tell), variant)
    for name, recordings in record_elsewhere(bundle, oracle.passes, elsewhere, tell).items():
        add(name, recordings)
    expected = (oracle.taps, bundle.expected, bundle.expected | logits_of(own))
    floors = [table.floors(floats_of(taps), tuple(names)) for table, taps in zip(tables, expected, strict=True)]
    # Where errors have added up on the way their sum says nothing of how often one component rounds the other way.
    floors[1:] = [replace(each, flips={n: floors[0].flips.get(n, 0.0) for n in each.levels}) for each in floors[1:]]
    if bundle.dtype != "float32":
        kept = floats_of(bundle.expected)
        float32 = run_free(definition().load_trusted(bundle, "float32"), bundle, set(kept))
        floors[2] = replace(floors[2], upstream=dict(zip(kept, errors_of(bundle.expected, float32, kept), strict=True)))
    return dict(zip(KINDS, floors, strict=True))


def carrying(oracle: Oracle, floors: FloorSet) -> FloorSet:
    """Floors in which also float32 taps have the flips of what they are computed from.

    A query's norm, in float32, follows from a projection that bfloat16 rounds, and that is given to it by the local run
    alone. Of the few elements of a small tap none may have flipped in any variant, and one will on another machine.
    """
    local, most, flips = floors[LOCAL].flips, dict[tuple[str, int], float](), dict[str, float]()
    for name, tap in oracle.taps.items():
        place = parse(name)
        at = place.call, place.layer
        if tap.dtype == "bfloat16" and place.layer is not None and name not in oracle.bundle.expected:
            most[at] = max(most.get(at, 0.0), local[name])
        elif tap.dtype == "float32" and at in most:
            flips[name] = most[at]
    return floors | {
        kind: replace(floors[kind], flips={n: flips.get(n, f) for n, f in floors[kind].flips.items()})
        for kind in (SEGMENT, FREE)
    }


def own_runs(run: Trusted, bundle: Bundle, passes: Recording) -> tuple[Recording, Recording, Recording]:
    """The local, segment and free recording of a loaded reference."""
    return (
        definition().cut(run, definition().run_passes(run, passes)),
        definition().cut(run, definition().run_passes(run, bundle.taps)),
        run_free(run, bundle),
    )


def pooled(several: Sequence[Floors]) -> Floors:
    """The floors of all variants together; of taps that all of them have."""

    def largest(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: max(table[name] for table in tables) for name in tables[0]}

    return Floors(
        largest([f.levels for f in several]),
        largest([f.flips for f in several]),
        largest([f.spreads for f in several]),
        tuple(dict.fromkeys(name for f in several for name in f.variants)),
        tuple(dict.fromkeys(name for f in several for name in f.machines)),
        several[0].upstream,
    )


def _runs_of(
    bundle: Bundle, passes: Recording, variant: Variant, tell: Progress
) -> tuple[Recording, Recording, Recording]:
    tell(variant.name)
    run = definition().load_run(bundle, variant.numerics)
    kinds = (
        lambda: definition().cut(run, definition().run_passes(run, passes)),
        lambda: definition().cut(run, definition().run_passes(run, bundle.taps)),
        lambda: run_free(run, bundle),
    )
    return tuple(definition().run_variant(variant, each) for each in kinds)


def run_free(run: Trusted, bundle: Bundle, names: set[str] | None = None) -> Recording:
    """What the reference computes from the request's randomness, and an answer's tokens, alone; no integers."""
    recording = run.record(names, force=definition().answered(bundle))
    return {name: tap for name, tap in recording.items() if tap.dtype != "int32"}


def logits_of(own: Recording) -> Recording:
    """The logits of an answer, which no bundle holds and every choice hangs on."""
    return {name: tap for name, tap in own.items() if name.endswith("/language_model.lm_head")}


def floats_of(taps: Mapping[str, Tap | Sketch]) -> list[str]:
    """Names of the taps that are no integers, which have floors."""
    return [name for name, tap in taps.items() if tap.dtype != "int32"]


class LevelTable:
    """Errors of variants tap by tap, from which floors are made; arrays are not kept.

    `kind` says which component a tap is of, whichever layer it is in.
    """

    def __init__(self, kind: Callable[[str], str] = component_kind) -> None:
        self._kind = kind
        self._levels: dict[str, float] = {}
        # By component: squared errors of every recording in squared units of the last place, and how many elements.
        self._squares: dict[str, dict[int, float]] = {}
        self._units: dict[str, dict[str, float]] = {}
        # By family of draws and tap: the errors of the draws.
        self._draws: dict[tuple[str, str], list[float]] = {}

    def add(self, number: int, center: Recording, recording: Recording, variant: Variant | None = None) -> None:
        """Take the errors of a variant, by its number, at all taps that both it and the exact one have."""
        for name, tap in recording.items():
            wanted = center.get(name)
            if wanted is None or tap.dtype == "int32" or wanted.array.shape != tap.array.shape:
                continue
            error = relative(wanted, tap)
            self._levels[name] = max(self._levels.get(name, 0.0), error)
            if variant is not None and variant.draw and error:
                self._draws.setdefault((name, variant.family), []).append(error)
            if wanted.dtype == "bfloat16":
                kind = self._kind(name)
                unit = step_squares(wanted.array, "bfloat16").total
                square = (error * float(np.linalg.norm(wanted.array.astype(np.float64)))) ** 2
                sums = self._squares.setdefault(kind, {})
                sums[number] = sums.get(number, 0.0) + square
                self._units.setdefault(kind, {})[name] = unit

    def floors(self, names: Iterable[str], variants: tuple[str, ...]) -> Floors:
        """The floors of taps, measured on this machine; a tap that no variant computed has none."""
        known = [name for name in names if name in self._levels]
        flips = {kind: max(sums.values()) / (sum(self._units[kind].values()) or 1.0)
                 for kind, sums in self._squares.items()}  # fmt: skip
        spreads = self._spreads()
        return Floors(
            {name: self._levels[name] for name in known},
            {name: flips[kind] if name in self._units.get(kind := self._kind(name), ()) else 0.0 for name in known},
            {name: spreads.get(self._kind(name), 0.0) for name in known},
            variants,
            (machine(),),
        )  # fmt: skip

    def _spreads(self) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for (name, _), errors in self._draws.items():
            if len(errors) > 1:
                found.setdefault(self._kind(name), []).append(float(np.log(errors).var(ddof=1)))
        return {kind: float(np.mean(variances)) ** 0.5 for kind, variances in found.items()}


def relative(expected: Tap | Sketch, got: Tap) -> float:
    """Relative L2 error whatever the dtypes; 0 where it says nothing of rounding: no value, or nothing finite."""
    # The dtypes differ where one side is wider on purpose: only values count here.
    if isinstance(expected, Sketch):
        error = compare(replace(expected, dtype="float32"), replace(got, dtype="float32")).rel_l2
    else:
        error = rel_l2(expected.array, got.array)
    return error if error is not None and math.isfinite(error) else 0.0


def errors_of(expected: Mapping[str, Tap | Sketch], got: Mapping[str, Tap], names: Sequence[str]) -> list[float]:
    """Relative errors in the order of `names`; 0 where one side has no value or another shape."""
    return [relative(expected[name], got[name]) if name in got else 0.0 for name in names]
