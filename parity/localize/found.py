"""Findings as they are put together: one for each cause that meets in a place, and one for what has one reason."""

from collections.abc import Sequence
from dataclasses import replace

from parity.bundle.reading import Bundle
from parity.localize.explain import Causes
from parity.localize.findings import Explanation, Finding
from parity.tensors.names import component_kind


class Found:
    """The findings of a bundle, in the order in which they are made.

    Attributes:
        all: the findings.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.all: list[Finding] = []
        self._bundle = bundle

    def add(
        self,
        tap: str,
        kind: str,
        error: float | None,
        level: float | None,
        causes: Causes,
        slices: Sequence,
        place: str | None,
        also: Sequence[str],
        detail: str,
        allowed: float | None = None,
        support: str | None = None,
    ) -> None:
        """Add a finding for every cause that meets in a place."""
        parsed = self._bundle.locate(tap)
        finding = Finding(
            component=parsed.component,
            tap=tap,
            call=parsed.call,
            kind=kind,
            local_error=error,
            floor=level,
            slice=place,
            slices=slices,
            explanations=causes.ranked,
            also=also,
            detail=detail,
            allowed=allowed,
            support=support,
            failed=tuple(causes.failed.items()),
            cause=causes.together[0] if len(causes.together) == 1 else None,
        )
        if causes.parts:
            self._add_parts(finding, causes)
            return
        if len(causes.together) < 2:
            self._join_or_append(finding)
            return
        # Of causes that meet, none is more certain than what describes the rest.
        describes = any(hypothesis.describes for hypothesis in causes.together)
        for hypothesis in causes.together:
            if hypothesis in causes.beside:
                continue
            own = replace(Explanation.of(hypothesis, causes.removed, agrees=causes.agrees), describes=describes)
            others = [e for e in causes.ranked if e.name != hypothesis.name]
            self.all.append(replace(finding, explanations=(own, *others), cause=hypothesis))

    def _join_or_append(self, finding: Finding) -> None:
        """Append a finding; weights, and taps of one kind, that are wrong for one reason are one finding."""
        for place, other in enumerate(self.all):
            if not (finding.explained and other.explained and finding.kind == other.kind):
                continue
            alike = _group_of(other.tap) == _group_of(finding.tap)
            if alike and other.explanations[0].name == finding.explanations[0].name:
                self.all[place] = replace(other, also=[*other.also, finding.tap, *finding.also])
                return
        self.all.append(finding)

    def _add_parts(self, finding: Finding, causes: Causes) -> None:
        """Add a finding for the cause of each part of some integers, and one for those that are left."""
        for hypothesis, part in zip(causes.together, causes.parts, strict=True):
            whole = replace(Explanation.of(hypothesis, 1.0), figure=None)
            self.all.append(replace(finding, explanations=(whole,), part=part, cause=hypothesis))
        if (left := 1 - sum(causes.parts)) > 1e-9:
            others = [e for e in causes.ranked if e.name not in {h.name for h in causes.together}]
            unexplained = [replace(e, residual_removed=min(e.residual_removed, 0.0)) for e in others]
            detail = f"{left:.1%} of the values that differ are left; {finding.detail}"
            self.all.append(replace(finding, explanations=unexplained, part=left, also=(), detail=detail))


def _group_of(tap: str) -> str:
    return "weights" if tap.startswith("weights/") else component_kind(tap)
