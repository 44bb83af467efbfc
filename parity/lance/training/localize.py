"""What of a run of training is wrong by itself: forwards, backwards, added up over the pack, checkpointed, stepped."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from parity import memory
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE
from parity.errors import ParityError, one_line
from parity.hypotheses import Hypothesis
from parity.lance.ports import MlxPort
from parity.lance.training.bundle import TrainingBundle, read_training_bundle
from parity.lance.training.check import disagreement, side_of
from parity.lance.training.faults import CATALOGUE
from parity.lance.training.hypotheses import HYPOTHESES, exact_hypotheses, scaled
from parity.lance.training.judge import Limits, exact_results, limits_of, measured, sides_of
from parity.lance.training.mlx_side import MlxTraining
from parity.lance.training.names import located, owner
from parity.lance.training.optimizer import optimizer_findings
from parity.lance.training.steered import MlxSteered, OtherRows, Passed, rows_of, torch_run
from parity.lance.training.torch_side import TorchTraining
from parity.laws.place import FEWEST
from parity.localize.explain import Causes, explain, removed
from parity.localize.findings import EXACT, EXPLAINS, LOCAL, STRUCTURE, Finding, Localization, TapError
from parity.oracle.bounds import Bounds, bounds_of
from parity.oracle.floors import Progress
from parity.oracle.oracle import REFERENCE
from parity.pairs.known import Known
from parity.pairs.probe import PairProbe
from parity.ports.port import versions
from parity.tensors.metrics import compare
from parity.tensors.names import starred
from parity.tensors.recording import Recording, Tap
from parity.tensors.rounding import ULP

FINE, COARSE = False, True
"""Taps at every part; at layers alone, within which everything is computed once more on the way back."""
_FOLLOWS = {"timesteps": ("x_t", "hidden_in", "time_embedder"), "label_ids": ("ce",)}
"""What cannot be given to a run, and the components that are wrong where it is."""


@dataclass(frozen=True, eq=False)
class TrustedTraining:
    """The reference of a bundle of training.

    Attributes:
        given: what each part of its own run was given, forwards and backwards, in the reference's rows; by FINE and
            COARSE, as `bounds`, which say how far a part may be off that is given that.
        disagreement: where it and the oracle disagree, in words.
    """

    bundle: TrainingBundle
    side: TorchTraining
    limits: Limits
    disagreement: str
    given: dict[bool, Passed]
    bounds: dict[bool, Bounds]

    @classmethod
    def of(cls, bundle: TrainingBundle, progress: Progress | None = None) -> "TrustedTraining":
        """Run the reference and its equally right variants, these from what the reference was given."""
        side, limits = TorchTraining(bundle), limits_of(bundle, progress)
        sides = dict(sides_of(bundle))
        given = {coarse: torch_run(side, {}, coarse) for coarse in (FINE, COARSE)}
        bounds = {}
        for coarse, passed in given.items():
            runs = {variant: torch_run(other, passed.values, coarse).all for variant, other in sides.items()}
            floors = measured(passed.all, runs, lambda name: located(name).call)
            # A part that is given all that it reads rounds a few times, whichever it is: few variants tell of all.
            most = max(ULP[bundle.dtype], *floors.levels.values())
            levels = dict.fromkeys(floors.levels, most)
            spreads = dict.fromkeys(levels, max(floors.spreads.values()))
            floors = replace(floors, levels=levels, flips=dict.fromkeys(levels, 0.0), spreads=spreads)
            bounds[coarse] = bounds_of(floors, passed.all, bundle.dtype)
        return cls(bundle, side, limits, disagreement(bundle, limits), given, bounds)


class TrainingProbe(PairProbe):
    """A place that is wrong by itself; what the reference makes there under a hypothesis is computed anew."""

    again: Callable[[], np.ndarray] | None = None

    def recompute(self) -> np.ndarray:
        """What the reference makes there of what it was given."""
        return self.expected if self.again is None else self.again().reshape(self.expected.shape)


def localize_training(
    path: Path, load: Callable[[Any], Any], faults: Sequence[str] = (), progress: Progress | None = None,
    hypotheses: Sequence[Hypothesis] = (),
) -> Localization:  # fmt: skip
    """Find everything that is wrong by itself in how lance_mlx trains, with what explains it.

    Args:
        faults: names of training.faults by which it is broken on purpose.

    Raises ParityError for a bundle that is unusable, or a port whose backward pass cannot be steered.
    """
    if unknown := [name for name in faults if name not in CATALOGUE]:
        raise ParityError(f"there is no fault of training {unknown[0]!r}: name one of {', '.join(CATALOGUE)}")
    if load is not MlxPort:
        raise ParityError("the backward pass of mlx alone can be steered: use check for any other implementation")
    started = time.perf_counter()
    memory.reset_peak()
    tell = progress or (lambda what: None)
    path = path.resolve()
    trusted = _trusted(path, tuple(file.stat().st_mtime_ns for file in sorted(path.glob("*"))))
    with ExitStack() as broken, one_line(f"mlx cannot run bundle {trusted.bundle.name}"):
        for fault in faults:
            broken.enter_context(CATALOGUE[fault].patch())
        found = _Training(trusted, [*hypotheses, *HYPOTHESES], tell)
        found.run(side_of(trusted.bundle, load)[1])
    reason = trusted.disagreement
    verdict = INCONCLUSIVE if reason else DIVERGE if found.findings else AGREE
    return Localization(
        bundle=trusted.bundle.name, impl="mlx", task="training", entry="training", dtype=trusted.bundle.dtype,
        verdict=verdict, reason=reason, findings=[] if reason else found.findings, taps=found.errors,
        exact=found.exact, alarm=trusted.bounds[FINE].alarm, faults=list(faults),
        provenance=versions("mlx"), seconds=time.perf_counter() - started, peak_bytes=memory.peak(),
    )  # fmt: skip


@lru_cache(maxsize=8)
def _trusted(path: Path, changed: tuple[int, ...]) -> TrustedTraining:
    return TrustedTraining.of(read_training_bundle(path))


class _Training:
    def __init__(self, trusted: TrustedTraining, hypotheses: Sequence[Hypothesis], tell: Progress) -> None:
        self.trusted, self.hypotheses, self.tell = trusted, hypotheses, tell
        self.findings: list[Finding] = []
        self.errors: list[TapError] = []
        self.exact: list[str] = []

    def run(self, side: MlxTraining) -> None:
        bundle = self.trusted.bundle
        free = side.run()
        for result in exact_results(bundle, free):
            self.exact.append(result.tap.name)
            if result.diverges and not self._follows(result.tap.component):
                held = bundle.inputs.get(result.tap.path)
                same = held is not None and held.shape == free.exact[result.tap.path].shape
                causes = self._exact_causes(result.tap, held.array, free.exact[result.tap.path]) if same else None
                self._add(result.tap.name, result.tap.component, EXACT, result.difference.error, 0.0, None, causes,
                          detail=result.difference.mismatch or "")  # fmt: skip
        self._learned(free.gradients.keys(), bundle.gradients.keys())
        if any(finding.detail for finding in self.findings):
            # What has other rows, or learns something else, cannot be given what the reference was.
            return
        for coarse in (FINE, COARSE):
            self.tell("backward pass" if not coarse else "checkpointed layers")
            given = rows_of(self.trusted.side, side, self.trusted.given[coarse].values)
            steered = MlxSteered(side, given, coarse)
            try:
                passed = steered.run()
            except OtherRows as error:
                name = error.args[0]
                detail = f"{located(name).component} is not called with the rows that it should be"
                self._add(name, located(name).component, STRUCTURE, None, None, None, detail=detail)
                return
            right = given | self.trusted.given[coarse].parameters
            wrong = self._compared(right, passed.all, self.trusted.bounds[coarse])
            if coarse is FINE:
                self._explained(wrong, right, passed.all, side)
            elif not self.findings:
                self._whole(wrong, right, passed.all, "checkpointing")
        if not self.findings:
            # What samples weigh is seen where no gradient is given to them.
            own = MlxSteered(side, {})
            added, parameters = own.gradients(), own.run().parameters
            wrong = self._compared(parameters, added, self.trusted.bounds[FINE], keep=False)
            self._whole(wrong, parameters, added, "gradients", _of_samples(own) if wrong else ())
        self.tell("optimizer")
        self.findings += optimizer_findings(bundle, self.trusted.side)
        if not self.findings:
            far = [r for r in self.trusted.limits.compared(bundle, free) if r.diverges]
            if far:
                self._add(far[0].tap.name, far[0].tap.component, STRUCTURE, far[0].difference.error, None, None,
                          detail="it differs, and no part is wrong by itself")  # fmt: skip

    def _compared(self, right: Recording, got: Recording, bounds: Bounds, keep: bool = True) -> list[TapError]:
        errors = []
        for name in sorted(got, key=lambda name: located(name).place):
            if name not in right or name not in bounds.taps:
                continue
            held, ours, bound = right[name], got[name], bounds.taps[name]
            ours = Tap(ours.array.reshape(held.shape), ours.dtype) if ours.size == held.size else ours
            difference = compare(held, ours)
            tap = replace(located(name), component=owner(name))
            errors.append(TapError(tap, REFERENCE, held.shape, held.dtype, difference.rel_l2, None, None, None,
                                   bound.floor, bound.allowed, difference.mismatch))  # fmt: skip
        self.errors += errors if keep else []
        return [error for error in errors if error.wrong and not self._follows(error.tap.component)]

    def _follows(self, component: str) -> bool:
        """Whether a component is wrong for what was found to be given to it."""
        wrong = {finding.component for finding in self.findings if finding.kind == EXACT}
        return any(component.startswith(_FOLLOWS.get(each, ())) for each in wrong)

    def _learned(self, got: Any, expected: Any) -> None:
        for names, words in ((sorted(got - expected), "learned and is to be frozen"),
                             (sorted(expected - got), "frozen and is to be learned")):  # fmt: skip
            if names:
                more = f", and {len(names) - 1} more" if len(names) > 1 else ""
                self._add(names[0], "trainable parameters", STRUCTURE, None, None, None,
                          detail=f"{names[0]} is {words}{more}")  # fmt: skip

    def _explained(self, wrong: list[TapError], right: Recording, got: Recording, side: MlxTraining) -> None:
        while wrong:
            first, *rest = wrong
            self.tell(f"laws about {first.tap.component}")
            alike = [e for e in rest if e.tap.call == first.tap.call and _kind(e) == _kind(first)]
            site, others = self._site(first, right, got, side), [self._site(e, right, got, side) for e in alike]
            few = scaled(site.expected, site.got, site.part.facts["what"]) if site.expected.size < FEWEST else []
            causes = explain(site, others[0] if others else None, [*self.hypotheses, *few])
            same = [e for e, other in zip(alike, others, strict=True)
                    if not causes.together or (removed(other, causes.together, {}) or 0) >= EXPLAINS]  # fmt: skip
            self._add(first.tap.name, first.tap.component, LOCAL, first.local, first.floor, first.allowed, causes,
                      [e.tap.name for e in same])  # fmt: skip
            wrong = [error for error in rest if error not in same]

    def _whole(
        self, wrong: list[TapError], right: Recording, got: Recording, component: str, tried: Sequence[Hypothesis] = ()
    ) -> None:
        """One finding of all that is wrong, whose parts are made by the same few lines."""
        if not wrong:
            return
        sites = [self._site(error, right, got, None) for error in wrong]
        ranked = max((explain(site, None, tried) for site in sites[:4]), key=lambda causes: sum(
            (removed(site, causes.together, {}) or 0) >= EXPLAINS for site in sites))  # fmt: skip
        first = wrong[0]
        detail = f"{len(wrong)} gradients differ from what the parts make"
        self._add(first.tap.name, component, LOCAL, first.local, first.floor, first.allowed, ranked,
                  [e.tap.name for e in wrong[1:]], detail)  # fmt: skip

    def _site(self, error: TapError, right: Recording, got: Recording, side: MlxTraining | None) -> TrainingProbe:
        name, axes = error.tap.name, _axes(error)
        held = right[name].array
        facts = {"what": "the gradient" if error.tap.call != "forward" else "the result"}
        part = Known("any", {}, facts, lambda array: np.atleast_1d(array), axes)
        ours = got[name].array.reshape(held.shape) if got[name].size == held.size else got[name].array
        site = TrainingProbe(error.tap, part, held, ours, self.trusted.bundle.dtype, error.floor, error.allowed)
        if side is not None:

            def again() -> np.ndarray:
                passed = torch_run(self.trusted.side, self.trusted.given[FINE].values)
                whole = rows_of(self.trusted.side, side, passed.values) | passed.parameters
                return np.atleast_1d(whole[name].array)

            site.again = again
        return site

    def _exact_causes(self, tap: Any, held: np.ndarray, ours: np.ndarray) -> Causes:
        axes = ("axis", "token")[-held.ndim :] if held.dtype.kind != "f" else ("token", "channel")[: held.ndim]
        part = Known("any", {}, {"what": tap.component}, lambda array: array, axes)
        site = TrainingProbe(tap, part, held, ours.astype(held.dtype), "float32", exact=True)
        return explain(site, None, exact_hypotheses(self.trusted.bundle))

    def _add(
        self, name: str, component: str, kind: str, error: float | None, floor: float | None, allowed: float | None,
        causes: Causes | None = None, also: Sequence[str] = (), detail: str = "",
    ) -> None:  # fmt: skip
        ranked = tuple(each for each in (causes.ranked if causes else ()) if each.residual_removed > 0)
        new = Finding(component, name, located(name).call, kind, error, floor, explanations=ranked, also=also,
                      detail=detail, allowed=allowed, rated=False,
                      failed=tuple(causes.failed.items()) if causes else ())  # fmt: skip
        for place, other in enumerate(self.findings):
            # What a module makes of its input's and its parameters' gradients may be wrong for one reason.
            if other.component == component and other.explained and new.explained:
                if other.explanations[0].name == new.explanations[0].name:
                    self.findings[place] = replace(other, also=[*other.also, name, *also])
                    return
        self.findings.append(new)


def _kind(error: TapError) -> str:
    return f"{starred(error.tap.component)} {starred(error.tap.path)}"


def _axes(error: TapError) -> tuple[str, ...]:
    if error.tap.call == "gradients":
        return (("row", "column") if "embed_tokens" not in error.tap.path else ("token", "channel"))[: len(error.shape)]
    return ("token", "channel") if len(error.shape) == 2 else ("token", "head", "channel")[: max(len(error.shape), 1)]


def _of_samples(steered: MlxSteered) -> list[Hypothesis]:
    """That one sample of several alone counts."""
    count = len(steered.side.samples)
    parts = [steered.of_sample(index) for index in range(count)] if count > 1 else []
    return [Hypothesis(f"sample {i + 1} of {count} alone counts", ("*",),
                       transform=lambda site, array, own=own: np.atleast_1d(own[site.tap.name].array))
            for i, own in enumerate(parts)]  # fmt: skip


def findings_of(found: Localization) -> Iterator[tuple[str, str]]:
    """Component and cause, in words, of each finding."""
    for finding in found.findings:
        yield finding.component, finding.cause_names if finding.explained else finding.detail
