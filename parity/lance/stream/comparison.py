"""Layer-streamed parity: both implementations at full depth and width with one layer in memory at a time.

One denoising step, or the first token of an answer, goes through the model part by part: the embeddings, every layer,
what follows the last one. The reference runs first and gives what is expected; lance_mlx then runs twice, free on its
own rows and steered, with every tap given what is expected before it. Variants of the reference on the same input give
every tap's floor, within the same pass over the layers.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from lance_mlx.backend.allocator import release
from parity import memory
from parity.comparison.exact import ExactMismatch, check_exact
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE
from parity.errors import ParityError, one_line
from parity.lance.faults import Fault
from parity.lance.faults.layered import at_layer
from parity.lance.names import parse
from parity.lance.stream.mlx import MlxStream, Passes
from parity.lance.stream.parts import EMBEDDINGS, HEAD_TAPS, LAYER, head_parts
from parity.lance.stream.plan import StreamPlan
from parity.lance.stream.reference import Computed, ReferenceStream
from parity.lance.trusted import exact_of
from parity.localize.findings import EXACT, LOCAL, STRUCTURE, Finding, Localization, TapError
from parity.localize.tap_errors import propagated_error
from parity.oracle.bounds import Bounds, Scale, bounds_by_scale, scale_of
from parity.oracle.judgement import Departure
from parity.oracle.oracle import REFERENCE, UPSTREAM
from parity.ports.port import versions
from parity.tensors.metrics import Difference, compare, finite
from parity.tensors.recording import Observed, Recording

Tell = Callable[[str, int, int], None]
LayerFault = tuple[Fault, int | None]
"""A fault, and the layer that it breaks; None where it breaks the whole model."""
EMBEDDED, HEAD = "embeddings", "head"
"""The names of the parts before and after the layers."""


@dataclass(frozen=True)
class Part:
    """What was compared of one part: the embeddings, a layer, or what follows the layers.

    Attributes:
        farthest: the tap with the largest local error over its floor; None where no tap has one.
        total: largest error of its last taps, the residual stream after a layer, when lance_mlx goes its own way.
        wrong: the taps that are wrong by themselves.
    """

    name: str
    farthest: TapError | None
    total: float | None
    wrong: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is not finite becomes null."""
        far = self.farthest
        return {
            "part": self.name,
            "tap": far and far.tap.name,
            "local": far and finite(far.local),
            "over_floor": far and far.ratio and finite(far.ratio),
            "total": finite(self.total),
            "wrong": list(self.wrong),
        }


@dataclass(frozen=True)
class Streamed(Localization):
    """A streamed comparison: a localization of one step without hypotheses, its taps part by part."""

    @property
    def parts(self) -> list[Part]:
        """The parts in the order in which they ran."""
        grouped: dict[str, list[TapError]] = {}
        for tap in self.taps:
            grouped.setdefault(part_of(tap), []).append(tap)
        return [_part(name, taps) for name, taps in grouped.items()]

    def to_json(self) -> dict[str, Any]:
        """Return the document of `lance-parity stream --json`: that of `localize`, and the parts."""
        return super().to_json() | {"parts": [part.to_json() for part in self.parts]}


def part_of(tap: TapError) -> str:
    """The part that a tap belongs to."""
    if tap.tap.layer is not None:
        return f"layers.{tap.tap.layer}"
    return HEAD if tap.tap.name in HEAD_TAPS else EMBEDDED


def _part(name: str, taps: Sequence[TapError]) -> Part:
    rated = [tap for tap in taps if tap.ratio is not None]
    ends = [tap for tap in taps if tap.tap.component == name] or taps
    return Part(
        name=name,
        farthest=max(rated, key=lambda tap: tap.ratio, default=None),
        total=max((tap.total for tap in ends if tap.total is not None), default=None),
        wrong=tuple(tap.tap.name for tap in taps if tap.wrong),
    )


@dataclass(frozen=True)
class _Measured:
    """One tap as it was compared, when its bound was not yet known."""

    shape: tuple[int, ...]
    dtype: str
    scale: Scale
    own: Difference
    local: Difference
    total: float | None
    propagated: float | None


def stream(plan: StreamPlan, faults: Sequence[LayerFault] = (), tell: Tell | None = None) -> Streamed:
    """Compare one step of lance_mlx with the reference's, part by part; the weights of one part are held at a time.

    `faults` break lance_mlx, everywhere or at one layer. `tell` is told the name of each part as it begins, its
    number from 0 and how many there are. Raises ParityError for a checkpoint or a request that cannot be used.
    """
    memory.reset_peak()
    started = time.perf_counter()
    with one_line("the request cannot be streamed"):
        theirs = ReferenceStream(plan.checkpoint, plan.variant, plan.request, plan.numerics, plan.replay, plan.given)
        ours = MlxStream(plan.checkpoint, plan.variant, plan.request, plan.numerics)
    for fault, layer in faults:
        if layer is not None and layer >= theirs.layers:
            raise ParityError(f"fault {fault.name}@{layer}: the checkpoint has layers 0 to {theirs.layers - 1}")
    with one_line("the request cannot be streamed"):
        return _MlxRun(plan, theirs, tell or (lambda part, number, parts: None), ours, faults).run(started)


class StreamRun:
    """One streamed comparison under way.

    Attributes:
        impl: what is compared; `versions` of it.
        remark: what has to be known of the result.
    """

    impl, faults = "mlx", ()
    remark = ""

    def __init__(self, plan: StreamPlan, theirs: ReferenceStream, tell: Tell) -> None:
        self.plan, self.theirs, self.tell = plan, theirs, tell
        self.exact = exact_of(theirs.run)
        self.measured: dict[str, _Measured] = {}
        self.failure = ""

    def run(self, started: float) -> Streamed:
        observed = self._compare()
        bounds = self._bounds()
        taps = [self._tap_error(name, bounds) for name in self.measured]
        mismatches = list(check_exact(self.exact, observed))
        blind = self._disagreement()
        findings = [] if blind else [*map(_exact_finding, mismatches), *self._local_findings(taps)]
        verdict = DIVERGE if findings else INCONCLUSIVE if blind or self.failure else AGREE
        return Streamed(
            bundle=self.plan.name,
            impl=self.impl,
            task=self.plan.request["task"],
            entry="kv_cache",
            dtype=self.plan.numerics,
            verdict=verdict,
            reason=blind or self.failure,
            remark=self.remark,
            findings=findings,
            taps=taps,
            exact=[name for name in self.exact.arrays if name in observed.exact],
            alarm=bounds.alarm,
            faults=[fault.name if layer is None else f"{fault.name}@{layer}" for fault, layer in self.faults],
            request=self.plan.request,
            provenance=self._versions() | versions("torch"),
            seconds=time.perf_counter() - started,
            peak_bytes=memory.peak(),
        )

    def _compare(self) -> Observed:
        """Run both sides and note every tap; returns what the steered run observed."""
        raise NotImplementedError

    def _versions(self) -> dict[str, str]:
        return versions("mlx")

    def _note(self, computed: Computed, steered: Recording, own: Recording) -> None:
        for name, expected in computed.taps.items():
            if name not in steered:
                continue
            mine, total = own.get(name), None
            if mine is not None and mine.array.shape == expected.array.shape:
                total = compare(expected, mine).rel_l2
            self.measured[name] = _Measured(
                shape=expected.array.shape,
                dtype=expected.dtype,
                scale=scale_of(expected),
                own=compare(expected, computed.own[name]),
                local=compare(computed.own[name], steered[name]),
                total=total,
                propagated=propagated_error(expected, steered[name], mine),
            )

    def _bounds(self, segment: bool = False) -> Bounds:
        names = [name for name, found in self.measured.items() if found.dtype != "int32"]
        floors = self.theirs.floors(names, segment)
        scales = {name: self.measured[name].scale for name in floors.levels}
        return bounds_by_scale(floors, scales, self.plan.numerics)

    def _disagreement(self) -> str:
        """Where the reference does not compute what is given, by more than rounding; empty where it does."""
        bounds = self._bounds(segment=True)
        for name in self.measured:
            if name not in self.plan.given or name not in bounds.taps:
                continue
            departure = Departure(parse(name), self.measured[name].own, bounds.taps[name])
            if departure.bound.exceeded_by(departure.difference):
                return f"{departure.said}: it is not about {self.impl}"
        return ""

    def _tap_error(self, name: str, bounds: Bounds) -> TapError:
        found = self.measured[name]
        exact = found.dtype == "int32"
        return TapError(
            tap=parse(name),
            source=UPSTREAM if name in self.plan.given else REFERENCE,
            shape=found.shape,
            dtype=found.dtype,
            local=found.local.rel_l2,
            propagated=found.propagated,
            total=found.total,
            gain=None,
            floor=0.0 if exact else bounds.floor(name),
            allowed=0.0 if exact else bounds.allowed(name),
            mismatch=found.local.mismatch,
        )

    def _local_findings(self, taps: Sequence[TapError]) -> list[Finding]:
        """A finding for every component of every layer that is wrong by itself, in the order in which they ran."""
        grouped: dict[str, list[TapError]] = {}
        for tap in taps:
            if tap.wrong:
                grouped.setdefault(tap.tap.component, []).append(tap)
        return [self._local_finding(*group) for group in grouped.values()]

    def _local_finding(self, first: TapError, *also: TapError) -> Finding:
        d = self.measured[first.tap.name].local
        detail = d.mismatch or f"{first.tap.name} is {d.got:.7g} at {list(d.at)} where {d.expected:.7g} is expected"
        name, call = first.tap.name, first.tap.call
        others = [tap.tap.name for tap in also]
        return Finding(first.tap.component, name, call, LOCAL, first.local, first.floor, also=others, detail=detail)


class _MlxRun(StreamRun):
    """lance_mlx, of whose weights one part is in memory at a time."""

    def __init__(
        self,
        plan: StreamPlan,
        theirs: ReferenceStream,
        tell: Tell,
        ours: MlxStream,
        faults: Sequence[LayerFault],
    ) -> None:
        super().__init__(plan, theirs, tell)
        self.ours, self.faults = ours, faults

    def _compare(self) -> Observed:
        parts = self.theirs.layers + 2
        with self._broken(None):
            self.tell(EMBEDDED, 0, parts)
            observed, forced, free = self._embed()
            for index in range(self.theirs.layers):
                self.tell(f"layers.{index}", index + 1, parts)
                self._layer(index, forced, free)
                memory.give_back()
            self.tell(HEAD, parts - 1, parts)
            self._finish(forced, free)
        return observed

    @contextmanager
    def _broken(self, layer: int | None) -> Iterator[None]:
        """Apply the faults of one layer, or those of the whole model."""
        with ExitStack() as stack:
            for fault, place in self.faults:
                if place == layer:
                    target = self.ours.target
                    stack.enter_context(fault.patch(target) if layer is None else at_layer(fault, target, layer))
            yield

    def _embed(self) -> tuple[Observed, Passes, Passes]:
        vit = self.theirs.vit()
        computed = self.theirs.embed(vit)
        replay = self.plan.replay
        given = (replay.noise, replay.vit_grids, vit)
        with self.ours.loaded(*EMBEDDINGS):
            observed, forced = self.ours.embed(*given, force=computed.taps, exact=self.exact)
            try:
                with one_line("lance_mlx cannot embed the request"):
                    own, free = self.ours.embed(*given)
            except ParityError as error:
                self.failure, own, free = str(error), Observed({}, {}, {}), {}
        self._note(computed, observed.recording, own.recording)
        # Rows of another sequence cannot be followed through layers that are compared with these.
        return observed, forced, {call: each for call, each in free.items() if _alike(each, forced.get(call))}

    def _layer(self, index: int, forced: Passes, free: Passes) -> None:
        computed = self.theirs.run_layer(index)
        expected = {name: tap for parts in computed.values() for name, tap in parts.taps.items()}
        with self.ours.loaded(LAYER.format(index)), self._broken(index):
            going = self.ours.run_layer(index, free)
            for call, steered in self.ours.run_layer(index, forced, expected):
                own = next(going)[1] if call in free else {}
                self._note(computed[call], steered, own)
                release()

    def _finish(self, forced: Passes, free: Passes) -> None:
        computed = self.theirs.finish()
        with self.ours.loaded(*head_parts(self.theirs.run.layout.answer is None)):
            steered, own = self.ours.finish(forced, computed.taps), self.ours.finish(free)
        self._note(computed, steered, own)


def _alike(each: Any, other: Any) -> bool:
    return other is not None and each.rows.interleave().shape == other.rows.interleave().shape


def _exact_finding(mismatch: ExactMismatch) -> Finding:
    parsed = parse(mismatch.tap)
    kind = STRUCTURE if mismatch.got is None else EXACT
    return Finding(parsed.component, mismatch.tap, parsed.call, kind, mismatch.error, 0.0, detail=mismatch.detail)
