"""Which part of a port of any model is wrong by itself, by how much more than rounding, and what it does instead."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from parity import memory
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE
from parity.errors import one_line
from parity.hypotheses import Hypothesis
from parity.localize.explain import Causes, explain, removed
from parity.localize.findings import EXACT, EXPLAINS, LOCAL, Explanation, Finding, Localization, TapError
from parity.pairs.facts import known
from parity.pairs.hypotheses import HYPOTHESES, rewired
from parity.pairs.inputs import of_one_value, untried
from parity.pairs.known import NEAR, Known
from parity.pairs.layouts import in_groups
from parity.pairs.mlx_side import MlxSide
from parity.pairs.names import WEIGHTS, kind_of, parse
from parity.pairs.pair import Pair
from parity.pairs.probe import PairProbe
from parity.pairs.readings import readings
from parity.pairs.remarks import listed, remarks
from parity.pairs.shapes import other_length
from parity.pairs.sides import IN, OUTPUT, QKV
from parity.pairs.sound import differing, require_sound
from parity.pairs.steered import Steering
from parity.pairs.torch_side import TorchSide
from parity.pairs.weights import WeightMismatch, check_weights
from parity.ports.port import versions
from parity.report.words import sentence
from parity.tensors.metrics import Difference, compare, rel_l2
from parity.tensors.names import TapName
from parity.tensors.recording import Recording

Progress = Callable[[str], None]


def localize_pair(
    pair: Pair, name: str = "pair", hypotheses: Sequence[Hypothesis] = HYPOTHESES, progress: Progress | None = None
) -> Localization:
    """Find everything that is wrong by itself in a port, in order of execution, and explain it.

    Every part of the port is given what the trusted model's is given, and held against what that makes of it; how far
    apart right code may be is measured with the trusted model. `hypotheses` are tried beside the laws that are read
    from the data. Raises ParityError where one of the models cannot run.
    """
    tell = progress or (lambda what: None)
    found = _Investigation(pair, name, hypotheses, tell).run()
    for said, inputs in pair.also.items():
        if found.verdict != AGREE:
            break
        tell(said)
        more = _Investigation(replace(pair, inputs=inputs), f"{name}, {said}", hypotheses, tell).run()
        found = replace(more, seconds=found.seconds + more.seconds, peak_bytes=max(found.peak_bytes, more.peak_bytes))
    if found.verdict == AGREE:
        tried = ", ".join(["the inputs", *pair.also])
        said = [f"run with {tried}"] if pair.also else []
        said += (
            [f"not tried: {', '.join(kinds)}"]
            if (kinds := untried(pair, {error.tap.call for error in found.taps}))
            else []
        )
        alike = dict.fromkeys(each for inputs in (pair.inputs, *pair.also.values()) for each in of_one_value(inputs)[0])
        said += [f"of one value throughout, which shows nothing: {', '.join(alike)}"] if alike else []
        found = replace(found, bundle=name, remark="; ".join(filter(None, [found.remark, *said])))
    return found


def assert_pair_agrees(pair: Pair, name: str = "pair") -> None:
    """Raise AssertionError, with the first wrong part and its cause in the message, unless a port agrees; for tests."""
    __tracebackhide__ = True
    found = localize_pair(pair, name)
    if found.verdict != AGREE:
        raise AssertionError("\n".join(filter(None, [sentence(found), found.remark])))


class _Investigation:
    def __init__(self, pair: Pair, name: str, hypotheses: Sequence[Hypothesis], tell: Progress) -> None:
        self.pair, self.name, self.hypotheses, self.tell = pair, name, hypotheses, tell
        self.findings: list[Finding] = []
        self._parts: dict[tuple[str, int], Known] = {}

    def run(self) -> Localization:
        started = time.perf_counter()
        memory.reset_peak()
        self.tell("trusted model")
        with one_line(f"the trusted model of {self.name} cannot run"):
            self.own, again = TorchSide().run(self.pair), TorchSide().run(self.pair)
        self.taps: Recording = self.own.taps
        require_sound(self.name, self.taps, again.taps)
        with one_line(f"the port of {self.name} cannot run"):
            self.tell("port")
            weights = check_weights(self.pair)
            free, other = (MlxSide(self.pair, self.own, {}).run() for _ in range(2))
        dtype = "bfloat16" if any(tap.dtype == "bfloat16" for tap in self.taps.values()) else "float32"
        drawn = differing(free.taps, other.taps)
        steering = Steering(self.pair, self.name, self.own, self.tell)
        with weights.right():
            steered, bounds = steering.run(free.taps.keys(), dtype)
            if elsewhere := steering.elsewhere(steered, bounds):
                steered, bounds = steering.run(free.taps.keys() - elsewhere, dtype)
        self.more = {name: array for name, array in steered.more.items()
                     if IN not in name and name.partition("#")[0] in self.taps}  # fmt: skip
        for mismatch in weights.mismatches:
            self._weight(mismatch)
        errors = [*steering.errors(bounds, free.taps, steered.taps)]
        wrong = [error for error in errors if error.wrong]
        if drawn is not None:
            self._drawn(drawn, free.taps, other.taps)
            wrong = []
        self.unlike = {error.tap.name for error in wrong if _other_shape(error)}
        while wrong:
            wrong = self._finding(wrong, steered.taps)
        lacking = [name for name in weights.unmatched if any(fnmatchcase(name, each) for each in self.pair.lacks)]
        unmatched = [name for name in weights.unmatched if name not in lacking]
        verdict, reason = self._verdict(errors, steered, unmatched)
        return Localization(
            bundle=self.name,
            impl="port",
            task="",
            entry="",
            dtype=dtype,
            verdict=verdict,
            reason=reason,
            remark=remarks(self.taps, steered, bounds, lacking, len(weights.mismatches) == len(weights.compared) > 0),
            findings=self.findings,
            taps=errors,
            exact=[f"{WEIGHTS}{name}" for name in weights.compared],
            alarm=bounds.alarm,
            provenance=versions("torch", "mlx"),
            seconds=time.perf_counter() - started,
            peak_bytes=memory.peak(),
        )

    def _weight(self, mismatch: WeightMismatch) -> None:
        tap = parse(f"{WEIGHTS}{mismatch.name}")
        facts = {"name": mismatch.name.rpartition(".")[2], "what": "the weight"}
        # Kernels as PyTorch has them.
        part = Known("weight", {}, facts, lambda array: np.moveaxis(array, -1, 1) if array.ndim > 2 else array)
        causes = Causes((), 0.0, ())
        if mismatch.got.shape == mismatch.expected.shape:
            results = {f"{WEIGHTS}{mismatch.of}": mismatch.got} if mismatch.of else {}
            site = PairProbe(tap, part, mismatch.expected, mismatch.got, "float32", results=results, exact=True)
            causes = explain(site, None, [*self.hypotheses, *rewired(site, results)])
        self._add(tap, EXACT, mismatch.error, 0.0, None, causes, [], mismatch.detail)

    def _finding(self, wrong: list[TapError], got: Recording) -> list[TapError]:
        """Explain the first of the wrong taps; return those that have another cause."""
        first = wrong[0]
        alike = [error for error in wrong[1:] if kind_of(error.tap.name) == kind_of(first.tap.name)]
        # Another call of the same part says more than the same call in another layer.
        alike.sort(key=lambda error: (error.tap.component != first.tap.component, error.tap.call == first.tap.call))
        self.tell(f"laws about {first.tap.component}")
        site = self._site(first, got)
        second = next((found for error in alike if (found := self._site(error, got)) is not None), None)
        causes = Causes((), 0.0, ())
        if _other_shape(first):
            lacks = other_length(self.taps[first.tap.name].array, got[first.tap.name].array, NEAR[first.dtype])
            causes = Causes((), 0.0, () if lacks is None else (Explanation(lacks, 1.0),))
        if site is not None:
            causes = explain(site, second, [*self.hypotheses, *rewired(site, site.results)])
        covered = {error.tap.name for error in alike if not causes.together or self._explained(error, causes, got)}
        covered |= {error.tap.name for error in wrong[1:] if self._follows(error, got)}
        covered |= {error.tap.name for error in wrong[1:] if self._of_other_shape(error, first)}
        detail = _sentence(first.tap.name, compare(self.taps[first.tap.name], got[first.tap.name]))
        alike = [name for name in covered if kind_of(name) == kind_of(first.tap.name)]
        self._add(first.tap, LOCAL, first.local, first.floor, first.allowed, causes, sorted(alike), detail)
        return [error for error in wrong[1:] if error.tap.name not in covered]

    def _of_other_shape(self, error: TapError, first: TapError) -> bool:
        """Whether a tap is of another shape as what came first in its call, or made of what could not be given."""
        later = _other_shape(first) and _other_shape(error) and error.tap.call == first.tap.call
        return later or any(f"{error.tap.name}:{read}" in self.unlike for read in (IN[1:], *QKV))

    def _follows(self, error: TapError, got: Recording) -> bool:
        """Whether a sum is what it should be of what the port adds: then one of its terms is wrong, and not the sum."""
        name = error.tap.name
        part = self._part(name, got)
        if part.kind != "sum" or error.allowed is None or len(terms := part.facts["names"]) < 2:
            return False
        if any(term not in got or got[term].shape != self.taps[term].shape for term in terms):
            return False
        made = sum(got[term].array.astype(np.float64) for term in terms)
        error_of_sum = rel_l2(made.astype(np.float32), got[name].array)
        return error_of_sum is not None and error_of_sum <= error.allowed

    def _part(self, name: str, got: Recording, batch: int = 0) -> Known:
        if (name, batch) not in self._parts:
            self._parts[name, batch] = known(self.pair.trusted, self.own, name, got, batch)
        return self._parts[name, batch]

    def _site(self, error: TapError, got: Recording) -> PairProbe | None:
        name = error.tap.name
        found = got[name].array
        expected = in_groups(self.taps[name].array, found.shape)
        if expected is None:
            return None
        apart = np.abs(expected.astype(np.float64) - found).reshape(len(expected), -1).sum(1)
        part = self._part(name, got, int(apart.argmax()))
        results = {
            other: tap.array
            for other, tap in self.taps.items()
            if parse(other).call == error.tap.call and other != name and tap.shape == found.shape
        }
        results |= readings(self.taps, name, found.shape)
        results |= {other: array for other, array in self.more.items() if array.shape == found.shape}
        floor, dtype = error.floor or 0.0, self.taps[name].dtype
        return PairProbe(error.tap, part, expected, found, dtype, floor, error.allowed, results)

    def _drawn(self, name: str, one: Recording, other: Recording) -> None:
        """The finding that a port computes something else each time, beside which nothing can be told."""
        cause = Explanation("it computes something else each time, as with dropout or noise that is not seeded", 1.0)
        error = rel_l2(one[name].array, other[name].array)
        detail = f"{name} differs between two runs of the port: port.eval() leaves dropout out"
        self._add(parse(name), LOCAL, error, None, None, Causes((), 0.0, (cause,)), [], detail)

    def _explained(self, error: TapError, causes: Causes, got: Recording) -> bool:
        site = self._site(error, got)
        share = None if site is None else removed(site, causes.together, causes.failed)
        return share is not None and share >= EXPLAINS

    def _add(self, tap: TapName, kind: str, error: float | None, floor: float | None, allowed: float | None,
             causes: Causes, also: Sequence[str], detail: str) -> None:  # fmt: skip
        # What removes nothing was not worth saying.
        ranked = tuple(each for each in causes.ranked if each.residual_removed > 0)
        finding = Finding(
            tap.component, tap.name, tap.call, kind, error, floor, explanations=ranked, also=also, detail=detail,
            failed=tuple(causes.failed.items()), allowed=allowed, rated=False,
        )  # fmt: skip
        together = [hypothesis for hypothesis in causes.together if hypothesis not in causes.beside]
        if len(causes.together) < 2:
            self._join_or_append(finding)
        for hypothesis in together if len(causes.together) > 1 else ():
            own = Explanation.of(hypothesis, causes.removed, agrees=causes.agrees)
            self.findings.append(replace(finding, explanations=(own, *causes.ranked)))

    def _join_or_append(self, finding: Finding) -> None:
        """Append a finding; what one part reads that is wrong for one reason, as its queries and keys, is one."""
        for place, other in enumerate(self.findings):
            alike = kind_of(other.tap).partition(" (")[0] == kind_of(finding.tap).partition(" (")[0]
            both = finding.explained and other.explained
            same = both and finding.explanations[0].name == other.explanations[0].name
            # Of weights that differ for no reason each layer's are as much one finding.
            none = finding.kind == other.kind == EXACT and not finding.explained and not other.explained
            if alike and (same or none):
                self.findings[place] = replace(other, also=[*other.also, finding.tap, *finding.also])
                return
        self.findings.append(finding)

    def _verdict(self, errors: Sequence[TapError], steered: MlxSide, unmatched: Sequence[str]) -> tuple[str, str]:
        if self.findings:
            return DIVERGE, ""
        said = ""
        if unmatched:
            said = (
                f"{listed(list(unmatched))} of one model match nothing of the other: name their counterparts in "
                "Pair.names, or what is lacking on purpose in Pair.lacks"
            )
        elif self.own.calls != steered.calls:
            theirs, ours = (", ".join(calls) or "begins none" for calls in (self.own.calls, steered.calls))
            said = f"the runs begin other calls ({theirs}; the port: {ours}): name them alike"
        elif not errors:
            said = "nothing was compared: no path of the port is one of the trusted model's; see Pair.names"
        elif not any(error.tap.path.startswith(OUTPUT) for error in errors):
            said = "no output was compared: let both runs return what they end in"
        elif of_one_value(self.pair.inputs)[1]:
            said = (
                "the inputs hold one value throughout, of which nearly all that is wrong comes out right: draw others"
            )
        elif not any(self.taps[error.tap.name].array.any() for error in errors if error.tap.path.startswith(OUTPUT)):
            said = "the output is 0 throughout, as of weights that begin at 0: draw others"
        return (INCONCLUSIVE, said) if said else (AGREE, "")


def _other_shape(error: TapError) -> bool:
    return error.local is None


def _sentence(name: str, difference: Difference) -> str:
    if difference.mismatch or difference.at is None:
        return f"{name}: {difference.mismatch or 'equal'}"
    return f"{name} is {difference.got:.7g} at {list(difference.at)} where it should be {difference.expected:.7g}"
