"""Compares any two runs tap by tap, never holding more than one tap of each that is read from a file."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.comparison.check import Result, Run, check_recording, read_bundle
from parity.comparison.runs import Given, Recorded, Source, opened
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE, UNUSABLE
from parity.errors import ParityError
from parity.tensors.metrics import Difference, compare, finite
from parity.tensors.names import parse
from parity.tensors.recording import Recording

if TYPE_CHECKING:
    import pandas

FLOORS, WITHIN, EQUALITY = "floors", "within", "equality"
"""What a comparison is judged by: the bundle's own limits, a bound that was given, or equality of every bit."""


@dataclass(frozen=True)
class TapComparison:
    """One tap that both runs have: shape and dtype of the expected one and of the other, how far it is and may be."""

    name: str
    call: str
    component: str
    shape: tuple[int, ...]
    dtype: str
    shape_b: tuple[int, ...]
    dtype_b: str
    difference: Difference
    limit: float | None
    diverges: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is not finite becomes null."""
        return {
            "tap": self.name,
            "call": self.call,
            "component": self.component,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "shape_b": list(self.shape_b),
            "dtype_b": self.dtype_b,
            "limit": finite(self.limit),
            "diverges": self.diverges,
        } | self.difference.to_json("expected", "got")


@dataclass(frozen=True)
class Comparison:
    """Two runs compared: `a` is what is expected, `b` what is judged.

    Attributes:
        a, b: the names of the runs.
        verdict: AGREE, DIVERGE, INCONCLUSIVE (nothing says how far rounding may take them apart), or
            UNUSABLE (nothing was compared, or `b` lacks taps).
        reason: the verdict in a sentence.
        judged_by: FLOORS, WITHIN or EQUALITY.
        taps: what both have, in order of execution.
        only_a, only_b: names that the other lacks.
        within: the bound that was given, relative L2, or None.
    """

    a: str
    b: str
    verdict: str
    reason: str
    judged_by: str
    taps: Sequence[TapComparison]
    only_a: Sequence[str]
    only_b: Sequence[str]
    within: float | None = None

    @property
    def first_divergence(self) -> TapComparison | None:
        """The first tap that diverges; integers come before all others, since they decide what those mean."""
        diverging = [tap for tap in self.taps if tap.diverges]
        return next((tap for tap in diverging if tap.dtype == "int32"), next(iter(diverging), None))

    @property
    def bits_equal(self) -> bool:
        """Whether everything compared has the same shapes, dtypes and bits."""
        return all(tap.difference.mismatch is None and tap.difference.bits_equal == 1.0 for tap in self.taps)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        first = self.first_divergence
        return {
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            "reason": self.reason,
            "judged_by": self.judged_by,
            "within": self.within,
            "compared": len(self.taps),
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "first_divergence": first
            and {
                "tap": first.name,
                "call": first.call,
                "component": first.component,
                "rel_l2": finite(first.difference.error),
            },
            "taps": [tap.to_json() for tap in self.taps],
        }

    def to_frame(self) -> "pandas.DataFrame":
        """Return a row for each tap, in order of execution, with the keys of `to_json` as columns."""
        import pandas

        rows = []
        for tap in self.taps:
            places = {"shape": tap.shape, "shape_b": tap.shape_b, "max_abs_at": tap.difference.at}
            rows.append(tap.to_json() | places)
        return pandas.DataFrame(rows, columns=list(COLUMNS))

    def describe(self) -> str:
        """Return the verdict and the first divergence in a few lines."""
        lines = [f"{self.b} against {self.a}: {self.verdict}, {self.reason}"]
        first = self.first_divergence
        if first:
            d = first.difference
            error = "" if d.error is None else f": error {d.error:.3g}"
            error += "" if first.limit is None or not error else f", limit {first.limit:.3g}"
            lines.append(f"first divergence: {first.name}{error}")
            if d.mismatch:
                lines.append(f"  {d.mismatch}")
            elif d.at is not None:
                lines.append(f"  largest difference at {list(d.at)}: {d.got:.7g} instead of {d.expected:.7g}")
        for names, lacking in ((self.only_a, self.b), (self.only_b, self.a)):
            # What a replay computes beside the bundle's taps is nothing that the bundle should have.
            if names and (lacking == self.b or self.judged_by != FLOORS):
                lines.append(f"{lacking} lacks {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
        return "\n".join(lines)


COLUMNS = (
    *("tap", "call", "component", "shape", "dtype", "shape_b", "dtype_b", "rel_l2", "limit", "diverges", "max_abs"),
    *("max_abs_at", "expected", "got", "cosine", "bits_equal", "mismatch"),
)
"""The columns of Comparison.to_frame."""


def compare_runs(
    a: Given,
    b: Given,
    within: float | None = None,
    check_dtype: bool | None = None,
    allow_missing: bool = False,
    start: Callable[[str], Callable[[str], None]] | None = None,
    python: Path | None = None,
) -> Comparison:
    """Compare run `b` with run `a`; see parity.comparison.runs.opened for what names a run.

    A bundle and a replay of it under its own numerics are judged by the bundle's floors, as `lance-parity check` does,
    and so are two such replays, and a bundle and a file of taps. Any other two agree where every tap is within the
    relative L2 error `within`, integers equal; without `within` they agree where every bit is equal, and are
    inconclusive otherwise.

    Args:
        check_dtype: whether float32 and bfloat16 are different; None: unless the two runs' numerics are known to be.
        allow_missing: whether `b` may lack taps of `a`.
        start: told the name of each run that has to be computed; returns the callback for its progress.
        python: the interpreter of a port from a file; see parity.ports.loading.port_loader.

    Raises ParityError for what cannot be opened.
    """
    if within is not None and not within >= 0:
        raise ParityError(f"within must be a relative error of 0 or more, not {within}")
    with ExitStack() as stack:
        runs: list[Source] = []
        for given, label in ((a, "a"), (b, "b")):
            progress = start(str(given)) if start and not isinstance(given, Mapping) else None
            like = runs[0].path if runs else None
            runs.append(stack.enter_context(opened(given, label, like, progress, python)))
        if within is None and (judged := _by_floors(*runs, allow_missing)):
            return judged
        return _by_bound(*runs, within, check_dtype, allow_missing)


def _by_floors(a: Source, b: Source, allow_missing: bool) -> Comparison | None:
    """Judge as `check` does; None where the two are not about one bundle under its own numerics."""
    if a.replay is not None and b.bundle:
        a, b = b, a
    if a.bundle and b.file:
        bundle = read_bundle(a.path)
        recording = {name.removeprefix("inputs/"): b.taps[name] for name in b.taps}
        if not recording.keys() & bundle.expected.keys():
            return None
        return _from_result(check_recording(Run(bundle, recording, Recorded(b.label))), a, b, allow_missing)
    if b.replay is None or a.path is None or b.path is None or a.path.resolve() != b.path.resolve():
        return None
    bundle = read_bundle(b.path)
    if {a.numerics, b.numerics} != {bundle.dtype} or not (a.bundle or a.replay is not None):
        return None
    if a.replay is not None:
        # The other replay stands in for the oracle; the limits are still those of the bundle.
        expected: Recording = a.replay.recording
        inputs = {name: expected.get(name, tap) for name, tap in bundle.inputs.items()}
        taps = {name: expected[name] for name in bundle.expected if name in expected}
        bundle = replace(bundle, inputs=inputs, taps=taps, sketches={})
    result = check_recording(replace(b.replay, bundle=bundle))
    return _from_result(result, a, b, allow_missing)


def _from_result(result: Result, a: Source, b: Source, allow_missing: bool) -> Comparison:
    rows = []
    for r in [*result.inputs, *result.taps]:
        # Visuals that a port resizes, and weights, are compared beside its taps.
        kept = r.tap.name in b.taps
        of_b = (b.taps.shape(r.tap.name), b.taps.dtype(r.tap.name)) if kept else (tuple(r.shape), r.dtype)
        of_a = r.tap.name, r.tap.call, r.tap.component, tuple(r.shape), r.dtype
        rows.append(TapComparison(*of_a, *of_b, r.difference, r.limit.allowed, r.diverges))
    names = {row.name for row in rows} | set(result.missing)
    verdict = result.verdict
    if verdict == UNUSABLE and allow_missing and any(row.difference.size for row in rows):
        verdict = AGREE
    reason = result.reason if verdict == INCONCLUSIVE else _reason(verdict, rows, result.missing)
    if verdict == DIVERGE and not any(row.diverges for row in rows):
        reason = f"most taps are too far, from {result.first_divergence['tap']} on"
    only_b = [name for name in b.taps if name not in names and name not in a.taps]
    return Comparison(a.label, b.label, verdict, reason, FLOORS, rows, list(result.missing), only_b)


def _by_bound(a: Source, b: Source, within: float | None, check_dtype: bool | None, allow_missing: bool) -> Comparison:
    if check_dtype is None:
        check_dtype = a.numerics is None or b.numerics is None or a.numerics == b.numerics
    names = in_order(a.taps)
    rows = [_compare(name, a, b, within, check_dtype) for name in names if name in b.taps]
    only_a, only_b = [n for n in names if n not in b.taps], [n for n in in_order(b.taps) if n not in a.taps]
    if any(row.diverges for row in rows):
        verdict = DIVERGE
    elif not any(row.difference.size for row in rows) or (only_a and not allow_missing):
        verdict = UNUSABLE
    else:
        equal = all(row.difference.bits_equal == 1.0 for row in rows)
        verdict = AGREE if within is not None or equal else INCONCLUSIVE
    judged_by = EQUALITY if within is None else WITHIN
    reason = _reason(verdict, rows, only_a)
    return Comparison(a.label, b.label, verdict, reason, judged_by, rows, only_a, only_b, within)


def _reason(verdict: str, rows: Sequence[TapComparison], missing: Sequence[str]) -> str:
    compared = f"{len(rows)} tap{'s' * (len(rows) != 1)}"
    if verdict == DIVERGE:
        return f"diverging: {sum(row.diverges for row in rows)} of {compared}"
    if verdict == INCONCLUSIVE:
        different = sum(row.difference.bits_equal != 1.0 for row in rows)
        return f"not equal: {different} of {compared}; no floor says by how much they may differ, give a bound (within)"
    if verdict == UNUSABLE:
        return f"{len(missing)} tap{'s' * (len(missing) != 1)} missing" if missing and rows else "nothing was compared"
    return f"{compared} compared"


def unusable(a: str, b: str, reason: str) -> Comparison:
    """Return the comparison of runs that could not be compared."""
    return Comparison(a, b, UNUSABLE, reason, EQUALITY, [], [], [])


def in_order(names: Mapping[str, Any]) -> list[str]:
    """Return names in order of execution; those that are no tap's come last, in the order given."""
    places = {}
    for index, name in enumerate(names):
        try:
            places[name] = (0, *parse(name).place)
        except ParityError:
            places[name] = (1, index)
    return sorted(names, key=places.__getitem__)


def _compare(name: str, a: Source, b: Source, within: float | None, check_dtype: bool) -> TapComparison:
    try:
        tap = parse(name)
        call, component, most = tap.call, tap.component, tap.most
    except ParityError:
        call, component, most = name.rpartition("/")[0], name, None
    shapes = a.taps.shape(name), b.taps.shape(name)
    where = name, call, component, shapes[0], a.taps.dtype(name), shapes[1], b.taps.dtype(name)
    if shapes[0] != shapes[1]:
        # Neither is read for that.
        what = f"shape {list(shapes[1])} instead of {list(shapes[0])}"
        difference = Difference(None, None, None, None, None, None, None, math.prod(shapes[0]), what)
        return TapComparison(*where, difference, None, True)
    expected, got = a.taps[name], b.taps[name]
    floats = "int32" not in (expected.dtype, got.dtype)
    kept = (expected, got)
    if floats and not check_dtype:
        kept = (replace(expected, dtype="float32"), replace(got, dtype="float32"))
    difference = compare(*kept, most)
    limit = within if floats else 0.0
    error = difference.rel_l2
    diverges = difference.mismatch is not None or error is None or (limit is not None and not error <= limit)
    return TapComparison(*where, difference, limit, diverges)
