"""Whether the oracle and the reference agree, which comes before anything is said of a port.

The reference runs from upstream's own taps; how far it is from them is held against what rounding does over the same
way. Where it is farther, one of weights, inputs, upstream's commit, the captured file or the reference is not what it
should be: no verdict about a port follows from such a bundle.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from parity.bundle.reading import CONFIG, WEIGHTS
from parity.model import definition
from parity.oracle.bounds import EQUAL, Bound, Bounds, bounds_of
from parity.oracle.common import common_error
from parity.oracle.floors import Floors, FloorSet
from parity.oracle.oracle import FREE, SEGMENT, Oracle
from parity.oracle.visuals import differing_visuals
from parity.tensors.metrics import Difference, compare
from parity.tensors.names import TapName, component_kind, parse
from parity.tensors.recording import Tap
from parity.tensors.rounding import ULP
from parity.tensors.sketch import Sketch


class Cause(StrEnum):
    """What is likely not what it should be."""

    INPUTS = "the inputs"
    CAPTURE = "the captured file"
    WEIGHTS = "the weights"
    CONFIG = "the configuration"
    CODE = "upstream's commit or the reference"


# Components that compute without weights: if these differ throughout, the code does.
_FUNCTIONS = re.compile(r"noise|sdpa|_rope|positions|euler|schedule|guidance|sequence|grids|tokens|frames|"
                        r"latent_pos_embed|layers\.\d+(\.self_attn)?$|vae\.pixels|vae\.encoder\.sample")  # fmt: skip
# The VAE has no configuration, and what leads from one state to the next none but the request.
_UNCONFIGURED = re.compile(r"vae\.|pixels|latent$|sampler\.")
# What is computed with the numbers of a request.
_SETTINGS = re.compile(r"euler|schedule|guidance")
# What reads visuals.
_SEEING = re.compile(r"vit_model|vae\.encode")
_GIVEN = re.compile(r"sampler\.x_init|sampler\.x_t0|sampler\.noise|vae\.latent\d+|vae\.encode\d+\.eps")
# Where no more than this part of what a component computed is wrong, the rest shows that it computes rightly.
_SOME = 0.5
_NOTHING = 1e-2
_FEW_UNITS = 8.0
# A file that was damaged is wrong in few taps.
_FEW = 4
# Two right runs are at most two floors apart: of two errors the smaller one is told from the other by more than that.
_APART = 2.0


@dataclass(frozen=True)
class Departure:
    """One of upstream's taps that the reference does not compute from those before it.

    Attributes:
        difference: of the reference's value from the oracle's.
        bound: what rounding explains.
        common: what the errors of all rows have in common, relative L2; see common_error.
    """

    tap: TapName
    difference: Difference
    bound: Bound
    common: float = 0.0

    @property
    def disagrees(self) -> bool:
        """Whether that is more than rounding."""
        return self.bound.exceeded_by(self.difference) or self.common > self.bound.floor

    @property
    def said(self) -> str:
        """Where they disagree and by how much, in words."""
        d, bound = self.difference, self.bound
        allowed = f"rounding allows {bound.allowed:.3g} from the taps before"
        far = f"error {d.rel_l2:.3g}, {allowed}" if bound.allowed else "it differs"
        if not bound.exceeded_by(d):
            far = f"error {d.rel_l2:.3g}, of which rounding explains the size, but not what all rows have in common"
        return f"oracle and reference disagree at {self.tap.name} ({d.mismatch or far})"


@dataclass(frozen=True)
class Judgement:
    """Where the oracle and the reference disagree, in order of execution, and which are the likely causes."""

    departures: tuple[Departure, ...]
    causes: tuple[Cause, ...] = ()
    why: str = ""

    @property
    def agree(self) -> bool:
        """Whether the reference computes what the oracle holds."""
        return not self.departures

    @property
    def names(self) -> set[str]:
        """The taps where they disagree."""
        return {departure.tap.name for departure in self.departures}

    def sentence(self) -> str:
        """Say in one line what disagrees first, by how much, and why."""
        if self.agree:
            return ""
        more = len(self.departures) - 1
        others = f", and {more} more tap{'s' * (more != 1)}" if more else ""
        *first, last = self.causes
        or_last = f"{', ' if last is Cause.CODE else ' or '}{last}" if first else last
        return f"{self.departures[0].said}{others}; likely {', '.join(first)}{or_last}: {self.why}"


def judge(oracle: Oracle, floors: FloorSet) -> Judgement:
    """Hold the reference against every tap of upstream's; see Judgement."""
    arrays, wrong = oracle.layout.arrays(), list[Departure]()
    for name in definition().SEQUENCE:
        difference = compare(oracle.bundle.inputs[name], Tap(np.asarray(arrays[name], np.int32), "int32"))
        if EQUAL.exceeded_by(difference):
            wrong.append(Departure(parse(f"inputs/{name}"), difference, EQUAL))
    bounds = segment_bounds(oracle, floors[SEGMENT])
    places = sorted(oracle.bundle.expected, key=lambda name: oracle.bundle.locate(name).place)
    for name in places:
        expected, own = oracle.bundle.expected[name], oracle.own[name]
        tap = oracle.bundle.locate(name)
        if name == "tokens":
            wrong += _choices(oracle, bounds, floors[FREE])
            continue
        bound = EQUAL if expected.dtype == "int32" else bounds.taps.get(name, EQUAL)
        departure = _departure(tap, expected, own, bound)
        if departure.disagrees:
            wrong.append(departure)
    if not wrong:
        return Judgement(())
    if _SEEING.match(wrong[0].tap.name):
        wrong[:0] = _visuals(oracle)
    causes, why = _causes(oracle, wrong)
    return Judgement(tuple(wrong), _open(oracle, wrong[0].tap, causes), why)


def _visuals(oracle: Oracle) -> list[Departure]:
    """The visuals that the reference makes otherwise of their files."""
    made = definition().visuals_of(oracle.run, oracle.bundle.path.parent)
    both = differing_visuals(made, oracle.bundle.inputs, definition().drawn_visuals(oracle.bundle))
    taps = ((name, (Tap(np.ascontiguousarray(x, np.float32), "float32") for x in arrays)) for name, *arrays in both)
    return [Departure(parse(f"inputs/{name}"), compare(*each), EQUAL) for name, each in taps]


def segment_bounds(oracle: Oracle, segment: Floors) -> Bounds:
    """How far the reference, run from upstream's taps, may be from them."""
    values = oracle.own | {name: sketch for name, sketch in oracle.bundle.sketches.items() if name in oracle.own}
    return bounds_of(segment, values, oracle.bundle.dtype)


def clears(
    judgement: Judgement,
    got: Mapping[str, Tap],
    expected: Mapping[str, Tap | Sketch],
    bounds: Mapping[str, Bound],
) -> bool:
    """Whether a run agrees with the oracle wherever the reference does not: then the reference is wrong there."""
    for departure in judgement.departures:
        name = departure.tap.name
        if name not in got or name not in expected:
            return False
        if _departure(departure.tap, expected[name], got[name], bounds.get(name, EQUAL)).disagrees:
            return False
    return True


def _departure(tap: TapName, expected: Tap | Sketch, got: Tap, bound: Bound) -> Departure:
    # In float32 the size of an error tells more than what rows have in common, of which rounding leaves some.
    whole = not isinstance(expected, Sketch) and expected.dtype == got.dtype
    common = common_error(tap, expected.array, got.array) if whole and bound.counted else 0.0
    return Departure(tap, compare(expected, got, tap.most), bound, common)


def _choices(oracle: Oracle, bounds: Bounds, free: Floors) -> list[Departure]:
    """The answer, where a token is not the likeliest of the reference's, by more than rounding.

    `free` are the floors of logits that the bundle does not hold, to which errors have added up all along the answer.
    """
    expected = oracle.bundle.taps["tokens"]
    chosen = expected.array.copy()
    uncaptured = {name: tap for name, tap in oracle.own.items() if name not in bounds.taps}
    bounds = replace(bounds, taps=bounds.taps | bounds_of(free, uncaptured, oracle.bundle.dtype).taps)
    for step, token in enumerate(expected.array.tolist()):
        logits, name = definition().answer_logits(oracle, oracle.own, step), definition().logits_name(step)
        if logits is None:
            continue
        logits = logits.astype(np.float64)
        allowed = bounds.allowed(name) if name in bounds.taps else 0.0
        if not 0 <= token < len(logits) or logits.max() - logits[token] > allowed * np.linalg.norm(logits):
            chosen[step] = logits.argmax()
    if np.array_equal(chosen, expected.array):
        return []
    return [Departure(parse("tokens"), compare(expected, Tap(chosen, "int32")), EQUAL)]


def _open(oracle: Oracle, tap: TapName, causes: set[Cause]) -> tuple[Cause, ...]:
    """The causes that no checksum of the bundle rules out."""
    held = oracle.bundle.manifest
    if causes & {Cause.WEIGHTS, Cause.CODE} and CONFIG not in held and not _UNCONFIGURED.match(tap.name):
        causes = causes | {Cause.CONFIG}
    if Cause.WEIGHTS in causes and WEIGHTS in held:
        causes = causes - {Cause.WEIGHTS} | {Cause.CODE}
    return tuple(cause for cause in Cause if cause in causes)


def _causes(oracle: Oracle, wrong: Sequence[Departure]) -> tuple[set[Cause], str]:
    first = wrong[0].tap
    names = {departure.tap.name for departure in wrong}
    if first.component == "preprocess":
        return {Cause.INPUTS}, "they are not what the visuals' files make: copy inputs.safetensors and the files again"
    if first.name.startswith("inputs/"):
        return {Cause.INPUTS}, "the request or the tokenizer is another one than the capture's"
    if _GIVEN.fullmatch(first.name):
        return {Cause.INPUTS}, "the state does not follow from the noise that the bundle holds"
    kind, call = component_kind(first.name), _kind_of_call(first)
    located = {name: oracle.bundle.locate(name) for name in oracle.bundle.expected if component_kind(name) == kind}
    peers = [name for name, tap in located.items()
             if tap.component == first.component and _kind_of_call(tap) == call]  # fmt: skip
    off = [name for name in peers if name in names]
    used = _used(oracle, first.name)
    if used is False:
        return {Cause.CAPTURE}, "what comes after it does not follow from it, but from what the reference computes"
    if used is None and len(off) <= _SOME * len(peers):
        return {Cause.CAPTURE}, f"the same component agrees in {len(peers) - len(off)} other places"
    if used is None and len(peers) == 1:
        if _reordered(oracle, first.name):
            return {Cause.CAPTURE}, "its values are the right ones, in another order"
        if _part_off(oracle, wrong[0]) <= _SOME and not _by_units(oracle, first.name):
            return {Cause.CAPTURE}, "most of its values agree"
        if not any(map(_weighs, _between(oracle, first.name))):
            return {Cause.CAPTURE}, "it follows from the tap before it without any weight"
        if len(names) > _FEW:
            more = len(names) - 1
            return {Cause.WEIGHTS, Cause.CODE}, f"{more} other taps do not follow from those before them either"
        return {Cause.CAPTURE, Cause.WEIGHTS}, "there is no second tap of its kind to tell by"
    between = dict.fromkeys(parse(n).component for n in _between(oracle, first.name) if _weighs(n) and n != first.name)
    if re.search(r"velocity|hidden_out", first.name):
        if len(between) != 1:
            told = "no tap tells which part of the model it is: record it again by the entry kv_cache"
            return {Cause.WEIGHTS, Cause.CODE}, told
        return {Cause.WEIGHTS}, f"{next(iter(between))} differs in {_places(off, peers)}"
    if _SETTINGS.match(first.component) and not between:
        told = f"{first.component} follows from captured values and the numbers of the request"
        return {Cause.INPUTS, Cause.CODE}, told
    if not _weighs(first.name):
        told = f"{first.component} has no weights and differs in {_places(off, peers)}"
        if not isinstance(oracle.bundle.expected[first.name], Sketch) and (read := _reads_weights(oracle, first.name)):
            return {Cause.WEIGHTS, Cause.CODE}, f"{told}; it reads {read}, of which no value was captured"
        return {Cause.CODE}, told
    feeds = "" if not _unheld(oracle, first) else ", or what feeds it that no tap holds"
    return {Cause.WEIGHTS}, f"{first.component}{feeds}; it differs in {_places(off, peers)}"


def _places(off: Sequence[str], peers: Sequence[str]) -> str:
    if len(peers) == 1:
        return "its only place"
    return f"all {len(off)} places" if len(off) == len(peers) else f"{len(off)} of {len(peers)} places"


def _used(oracle: Oracle, name: str) -> bool | None:
    """Whether upstream went on from the value that a bundle holds of a tap rather than from the reference's; None where
    nothing tells.

    What upstream computed next follows from a value that it computed otherwise, and not from one damaged afterwards.
    """
    given = {other: tap for other, tap in oracle.bundle.taps.items() if other != name}
    without = definition().cut(oracle.run, definition().run_passes(oracle.run, given))
    for other, expected in oracle.bundle.expected.items():
        own, mended = oracle.own[other], without[other]
        if other == name or expected.dtype == "int32" or np.array_equal(own.array, mended.array):
            continue
        from_it, from_own = (_error(expected, got, oracle.bundle.locate(other).most) for got in (own, mended))
        if max(from_it, from_own) > _APART * min(from_it, from_own):
            return from_it < from_own
    return None


def _error(expected: Tap | Sketch, got: Tap, most: float | None) -> float:
    error = compare(expected, got, most).rel_l2
    return math.inf if error is None or math.isnan(error) else error


def _weighs(name: str) -> bool:
    """Whether what computes a tap has weights."""
    return not _FUNCTIONS.search(parse(name).component)


def _reads_weights(oracle: Oracle, name: str) -> str:
    """The component with weights whose value was not captured and moves a tap most nearly as it is off; or nothing."""
    own = oracle.own[name].array.astype(np.float64)
    off, found = oracle.bundle.expected[name].array - own, {}
    for other in _unheld(oracle, parse(name)):
        value = oracle.passes[other]
        given = oracle.bundle.taps | {other: replace(value, array=2 * value.array)}
        moved = definition().cut(oracle.run, definition().run_passes(oracle.run, given))[name].array - own
        if moved.any():
            found[parse(other).component] = abs(float(np.vdot(moved, off))) / float(np.linalg.norm(moved))
    return max(found, key=found.get, default="")


def _unheld(oracle: Oracle, tap: TapName) -> list[str]:
    """Taps before one in its call and layer that have weights and were not captured."""
    names = list(oracle.own)
    before = {name: parse(name) for name in names[: names.index(tap.name)] if name not in oracle.bundle.expected}
    return [n for n, near in before.items() if (near.call, near.layer) == (tap.call, tap.layer) and _weighs(n)]


def _between(oracle: Oracle, name: str) -> list[str]:
    """The tap and those that the reference computes between it and upstream's last one before it."""
    names = list(oracle.own)
    last = names.index(name)
    first = last
    while first and names[first - 1] not in oracle.bundle.expected:
        first -= 1
    return names[first : last + 1]


def _by_units(oracle: Oracle, name: str) -> bool:
    """Whether a bfloat16 tap is off by few units in the last place only: most of it may then round alike by chance."""
    expected, own = oracle.bundle.expected[name], oracle.own[name].array.astype(np.float64)
    if expected.dtype != "bfloat16" or isinstance(expected, Sketch):
        return False
    unit = ULP["bfloat16"] * float(np.linalg.norm(own)) / max(own.size, 1) ** 0.5
    return bool(np.abs(expected.array - own).max(initial=0.0) <= _FEW_UNITS * unit)


def _reordered(oracle: Oracle, name: str) -> bool:
    """Whether a tap holds the values that it should, elsewhere."""
    expected, own = oracle.bundle.expected[name], oracle.own[name].array
    if isinstance(expected, Sketch) or expected.array.shape != own.shape:
        return False
    a, b = np.sort(expected.array, axis=None).astype(np.float64), np.sort(own, axis=None)
    # Sorting takes noise away with the order: what is left has to be next to nothing of the difference.
    return bool(np.linalg.norm(a - b) <= _NOTHING * np.linalg.norm(expected.array.astype(np.float64) - own))


def _kind_of_call(tap: TapName) -> str:
    return re.sub(r"\d+", "*", tap.call)


def _part_off(oracle: Oracle, departure: Departure) -> float:
    """The part of the elements that are off by more than rounding."""
    expected, own = oracle.bundle.expected[departure.tap.name], oracle.own[departure.tap.name].array
    if isinstance(expected, Sketch) or expected.array.shape != own.shape or not own.size:
        return 1.0
    size = departure.bound.allowed * float(np.linalg.norm(own.astype(np.float64))) / own.size**0.5
    return float(np.mean(np.abs(expected.array.astype(np.float64) - own) > 4 * max(size, 1e-30)))
