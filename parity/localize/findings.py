"""What localizing finds: every tap's local and propagated error, the findings in order, and their explanations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.comparison.trajectory import Departure, Margin
from parity.hypotheses import Hypothesis
from parity.laws import Figure
from parity.localize.confidence import Record, record_of
from parity.oracle.bounds import Alarm
from parity.tensors.metrics import finite
from parity.tensors.names import TapName, starred

if TYPE_CHECKING:
    from parity.localize.attribution import Attribution

EXACT, LOCAL, STRUCTURE = "exact", "local", "structure"
"""Kinds of findings: an integer or a weight that must be equal, an activation that is locally too far, an error."""


@dataclass(frozen=True)
class TapError:
    """One tap of a run, measured twice: from the oracle's input (local) and from the run's own (total).

    Attributes:
        tap: which one, with its component, call and axes.
        source: UPSTREAM or REFERENCE.
        local: |f(oracle's input) - r| / |r|, r being what the reference makes of the oracle's input, which is held
            against the oracle before.
        propagated: |f(own input) - f(oracle's input)| / |oracle|: what earlier errors do here.
        total: |f(own input) - oracle| / |oracle|; as vectors, local, propagated and what r is off by add up to it.
        gain: propagated error here over the total error of the tap before it in the same call, None without one.
        floor: the largest local error of equally right orders of rounding.
        allowed: the largest error that agrees; None where the tap has no floor.
        mismatch: why the two cannot be close whatever their values (shape, dtype, NaN), or None.
        passed: taps before it in the same block that the run does not tell, and computes on the way.
        accuracy: how near `local` is to the exact error, relative to it, in 95 of 100 cases, where a sketch tells it;
            None where it is exact.
    """

    tap: TapName
    source: str
    shape: tuple[int, ...]
    dtype: str
    local: float | None
    propagated: float | None
    total: float | None
    gain: float | None
    floor: float | None
    allowed: float | None
    mismatch: str | None = None
    accuracy: float | None = None
    passed: Sequence[str] = ()

    @property
    def ratio(self) -> float | None:
        """Local error over the floor; infinite for a mismatch."""
        if self.mismatch is not None:
            return math.inf
        if self.local is None or self.floor is None:
            return None
        return self.local / self.floor if self.floor else (math.inf if self.local else 0.0)

    @property
    def wrong(self) -> bool:
        """Whether the tap is wrong by itself."""
        if self.mismatch is not None:
            return True
        return self.local is not None and self.allowed is not None and not self.local <= self.allowed


@dataclass(frozen=True)
class SliceError:
    """The error of a part of a tap.

    Attributes:
        axis: role, expert, head, frame, channel or token.
        label: which one, such as "noise", "gen", "3".
        share: its part of the whole squared error, 0 to 1.
        error: |ours - oracle| / |oracle| within the slice.
    """

    axis: str
    label: str
    share: float
    error: float


@dataclass(frozen=True)
class Explanation:
    """A hypothesis that was tried: the part of the residual norm that it removes, here and on a second input.

    `residual_removed` is 1 when the hypothesis reproduces what was computed, 0 (or less) when it does not help.
    `second` is None where there is no second input of the kind. `left` is what remains, in floors; None where rounding
    may do nothing; `agrees` whether that is no more than agrees. `figure` is what a page may draw of a law;
    `size` is how many numbers and choices were read from the data to say it, 0 where it was said beforehand, and
    `describes` whether it only describes them.
    """

    name: str
    residual_removed: float
    second: float | None = None
    left: float | None = None
    agrees: bool = True
    figure: Figure | None = field(default=None, repr=False, compare=False)
    size: float = 0.0
    describes: bool = False

    @property
    def read(self) -> bool:
        """Whether it was read from the data rather than said beforehand."""
        return bool(self.size)

    @classmethod
    def of(
        cls, hypothesis: Hypothesis, removed: float, second: float | None = None, left: float | None = None,
        agrees: bool = True,
    ) -> "Explanation":  # fmt: skip
        """What a hypothesis explains, with what is known of the hypothesis."""
        # What is read may be counted in NumPy's numbers, which JSON has not.
        known = hypothesis.figure, float(hypothesis.size), hypothesis.describes
        return cls(hypothesis.name, removed, second, left, agrees, *known)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong by itself.

    Attributes:
        component: what is wrong, as in TapName.component; for a weight the module that holds it.
        tap, call: where it shows first.
        kind: EXACT, LOCAL or STRUCTURE.
        local_error: None where there is no number for it.
        floor: what rounding alone does there; 0 where equality is asked for.
        slice: the slice that holds most of the error, in words, or None.
        slices: all slices measured.
        explanations: best first; empty when no hypothesis changes anything there.
        also: other taps that have the same cause.
        failed: hypotheses that could not be tried, each with what it raised, in a line.
        detail: one sentence with the first values that differ.
        allowed: the largest local error that agrees there; None where equality is asked for.
        part: where integers differ for several reasons, the part of them that this finding is about; else None.
        rated: whether how often explanations were right was measured on components such as this one.
        support: where among the compared taps of its kind it holds, in words; None where it is everywhere, or unknown.
        cause: what was tried of the first explanation, where that explains it.
    """

    component: str
    tap: str
    call: str
    kind: str
    local_error: float | None
    floor: float | None
    slice: str | None = None
    slices: Sequence[SliceError] = ()
    explanations: Sequence[Explanation] = ()
    also: Sequence[str] = ()
    detail: str = ""
    failed: Sequence[tuple[str, str]] = ()
    allowed: float | None = None
    part: float | None = None
    support: str | None = None
    rated: bool = True
    cause: Hypothesis | None = field(default=None, repr=False, compare=False)

    @property
    def explained(self) -> bool:
        """Whether the first explanation removes most of the residual."""
        return bool(self.explanations) and self.explanations[0].residual_removed >= EXPLAINS

    @property
    def causes(self) -> Sequence[Explanation]:
        """The first explanation and those that say as little and do the same, here and on the second input: which of
        them it is nothing tells."""
        first = self.explanations[:1]
        return [e for e in self.explanations if first and replace(e, name=first[0].name) == first[0]]

    @property
    def cause_names(self) -> str:
        """Their names in a line."""
        return " or ".join(each.name for each in self.causes)

    @property
    def certain(self) -> bool:
        """Whether nothing is left beside the first explanation but what agrees, and such explanations are mostly right;
        else it is a hint, or a part of it."""
        good = self.record is None or self.record.good
        clear = self.explained and self.explanations[0].agrees and not self.explanations[0].describes
        return clear and good and not self._rivals

    @property
    def _rivals(self) -> Sequence[Explanation]:
        """Explanations that leave about as little as the first, here and on a second input, and say it with less than a
        number more, where the first leaves more than rounding: any may be it."""
        first, *others = self.explanations
        if not first.read or first.left is None or first.left <= ROUNDING:
            return []

        def near(removed: float | None, best: float | None) -> bool:
            return None in (removed, best) or removed >= 1 - ALIKE * (1 - best)

        others = [e for e in others if e.read and e.agrees and not e.describes and e.size < first.size + 1]
        alike = [e for e in others if near(e.residual_removed, first.residual_removed)]
        return [e for e in alike if near(e.second, first.second)]

    @property
    def record(self) -> Record | None:
        """How often explanations such as the first were right; None where there is none, or too few are known."""
        known = self.rated and self.explained
        return record_of(self.explanations[0].read, starred(self.component)) if known else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is not finite becomes null."""
        return {
            "component": self.component,
            "tap": self.tap,
            "call": self.call,
            "kind": self.kind,
            "local_error": finite(self.local_error),
            "floor": finite(self.floor),
            "allowed": finite(self.allowed),
            "slice": self.slice,
            "slices": [{"axis": s.axis, "label": s.label, "share": finite(s.share), "error": finite(s.error)}
                       for s in self.slices],
            "explanations": [
                {"name": e.name, "residual_removed": finite(e.residual_removed), "second": finite(e.second),
                 "left": finite(e.left), "agrees": e.agrees, "read": e.read, "describes": e.describes}
                for e in self.explanations
            ],
            "also": list(self.also),
            "failed": [{"name": name, "error": error} for name, error in self.failed],
            "detail": self.detail,
            "part": finite(self.part),
            "support": self.support,
            "record": self.record and self.record._asdict(),
        }  # fmt: skip


ROUNDING, ALIKE = 1.5, 1.5
"""Floors that rounding may leave beside an explanation; and what leaves so many times as much explains as well."""
EXPLAINS = 0.9
"""Part of the residual norm that an explanation has to remove: less is called no explanation."""


@dataclass(frozen=True)
class Picture:
    """A tap to draw: what the oracle has and what was computed from the oracle's input, float32 of one shape."""

    tap: TapName
    expected: np.ndarray
    got: np.ndarray


@dataclass(frozen=True)
class Localization:
    """Everything `lance-parity localize` knows about one bundle and one implementation.

    `taps` are in order of execution; `findings` in the order in which they were found and corrected.
    """

    bundle: str
    impl: str
    task: str
    entry: str
    dtype: str
    verdict: str
    reason: str
    findings: Sequence[Finding]
    taps: Sequence[TapError]
    exact: Sequence[str]
    alarm: Alarm | None
    trajectory: Sequence[Departure] = ()
    margins: Sequence[Margin] = ()
    pictures: Sequence[Picture] = ()
    faults: Sequence[str] = ()
    request: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    peak_bytes: int | None = None
    remark: str = ""
    attribution: "Attribution | None" = None

    @property
    def first(self) -> Finding | None:
        """The first finding."""
        return self.findings[0] if self.findings else None

    def to_json(self) -> dict[str, Any]:
        """Return the document of `lance-parity localize --json`: strict JSON, without NaN or Infinity."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "remark": self.remark,
            "findings": [finding.to_json() for finding in self.findings],
            "bundle": self.bundle,
            "impl": self.impl,
            "faults": list(self.faults),
            "task": self.task,
            "entry": self.entry,
            "numerics": self.dtype,
            "exact": list(self.exact),
            "alarm": self.alarm and {
                "rate": self.alarm.rate,
                "taps": self.alarm.taps,
                "threshold": finite(self.alarm.threshold),
                "samples": self.alarm.samples,
            },
            "trajectory": [
                {
                    "step": d.step,
                    "t": finite(d.t),
                    "velocity": {arm: finite(error) for arm, error in d.velocity.items()},
                    "latent": finite(d.latent),
                    "envelope": finite(d.envelope),
                }
                for d in self.trajectory
            ],
            "margins": [
                {"step": m.step, "expected": m.expected, "got": m.got, "margin": finite(m.margin),
                 "error": finite(m.error), "tie": m.tie}
                for m in self.margins
            ],
            "taps": [
                {
                    "tap": t.tap.name,
                    "call": t.tap.call,
                    "component": t.tap.component,
                    "source": t.source,
                    "shape": list(t.shape),
                    "dtype": t.dtype,
                    "local": finite(t.local),
                    "propagated": finite(t.propagated),
                    "total": finite(t.total),
                    "gain": finite(t.gain),
                    "floor": finite(t.floor),
                    "allowed": finite(t.allowed),
                    "wrong": t.wrong,
                    "mismatch": t.mismatch,
                    "accuracy": finite(t.accuracy),
                }
                for t in self.taps
            ],
            "attribution": self.attribution and self.attribution.to_json(),
            "request": self.request,
            "provenance": self.provenance,
            "seconds": finite(self.seconds),
            "peak_bytes": self.peak_bytes,
        }  # fmt: skip
