"""Laws of where something is rounded to bfloat16: norms, convolutions and sums that round other steps than they should.

A result that bfloat16 holds tells the steps that were rounded on its way: of all ways to round them few make it. What
is told is by what the ways that make what was computed differ from those that make what should have been.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations, permutations

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.convolution import reading_of
from parity.laws.mixture import is_bfloat16
from parity.laws.numbers import listed
from parity.laws.patches import all_places, convolved, laid_out
from parity.laws.rounding import bfloat16

# A way may leave this part of the difference: where sums are taken in another order a few values round otherwise. Of
# several that do, those that leave about as little as the best.
LEFT, ALIKE = 0.1, 0.02
# Rows that ways are tried on, inputs that are added, how many steps may differ, and laws that are told.
ROWS, TERMS, MOST, TOLD = 320, 4, 6, 4
Way = frozenset[str]
"""What is true of a way to compute, of keys of its Steps' words; of a sum the order of its terms."""


@dataclass(frozen=True)
class Steps:
    """The ways that a kind of component may be computed in.

    Attributes:
        words: what each step that may be rounded is called; of what else may be true of a way how it is said that it
            is, and that it is not.
        ways: of a component.
        flat: of an array of a component's shape its rows [n, channels], and `back` the other way around.
        compute: of a component in a way, some rows [n, channels]; None where too little is known of it.
    """

    words: Mapping[str, str | tuple[str, str]]
    ways: Callable[[Component], list[Way]]
    flat: Callable[[Component, np.ndarray], np.ndarray]
    back: Callable[[Component, np.ndarray], np.ndarray]
    compute: Callable[[Component, Way, np.ndarray], np.ndarray | None]

    def read(self, component: Component, got: np.ndarray) -> Iterator[Law]:
        """What is rounded that should not be, and what is not that should."""
        if not _comparable(component, got):
            return
        own, found = self.flat(component, component.own), self.flat(component, got)
        differs = np.flatnonzero((own != found).any(1))
        # Those that differ tell what is done, the others what is not.
        rows = np.unique(np.concatenate([_some(differs, ROWS), _some(np.arange(len(own)), ROWS // 2)]))
        own, found = own[rows], found[rows]
        whole = float(np.linalg.norm(found - own))
        made = {way: value for way in self.ways(component) if (value := self.compute(component, way, rows)) is not None}
        right, computed = (_fitting(made, value, whole) for value in (own, found))
        pairs = [(a, b) for a in right for b in computed if a != b and len(a ^ b) <= MOST]
        if not pairs:
            return
        pairs.sort(key=lambda pair: (len(pair[0] ^ pair[1]), right[pair[0]] + computed[pair[1]]))
        told = {self.said(*pair): self._law(*pair) for pair in reversed(pairs)}
        yield from list(told.values())[: -TOLD - 1 : -1]

    def _law(self, should: Way, does: Way) -> Law:
        def apply(other: Component) -> np.ndarray | None:
            if not is_bfloat16(other.own):
                return None
            every = np.arange(len(self.flat(other, other.own)))
            first, second = self.compute(other, should, every), self.compute(other, does, every)
            if first is None or second is None:
                return None
            return (other.own + self.back(other, second - first)).astype(np.float32)

        return Law(self.said(should, does), 0.4 + 0.1 * len(should ^ does), apply)

    def said(self, should: Way, does: Way) -> str:
        """How two ways differ, in words."""
        differ = [key for key in self.words if key in should ^ does]
        others = [self.words[key][key not in does] for key in differ if isinstance(self.words[key], tuple)]
        for yes, verb in ((False, "not rounded"), (True, "rounded")):
            names = [self.words[key] for key in differ if (key in does) is yes and isinstance(self.words[key], str)]
            if names:
                several = len(names) > 1 or names == [self.words.get("squares")]
                others.append(f"{listed(names)} {'are' if several else 'is'} {verb}")
        return listed(others)


def _comparable(component: Component, got: np.ndarray) -> bool:
    own = component.own
    return bool(own.shape == got.shape and own.size > 1 and is_bfloat16(own) and np.isfinite(got).all()
                and np.isfinite(own).all() and (own != got).any())  # fmt: skip


def _some(places: np.ndarray, count: int) -> np.ndarray:
    return places[:: max(-(-len(places) // count), 1)]


def _fitting(made: Mapping[Way, np.ndarray], value: np.ndarray, whole: float) -> dict[Way, float]:
    """The ways that make a value, with what they leave of it."""
    lefts = {way: float(np.linalg.norm(result - value)) for way, result in made.items()}
    best = min(lefts.values(), default=np.inf)
    return {way: left for way, left in lefts.items() if left <= min(LEFT * whole, best + ALIKE * whole)}


def _subsets(keys: Mapping[str, object], without: tuple[str, ...] = ()) -> list[Way]:
    names = [key for key in keys if key not in without]
    return [frozenset(chosen) for n in range(len(names) + 1) for chosen in combinations(names, n)]


NORM = {
    "reciprocal": ("x is multiplied by the reciprocal of the root", "x is divided by the root"),
    "squares": "the squares",
    "sum": "the sum of squares",
    "root": "the root",
    "normed": "the normed x",
    "scaled": "the normed x times the root of the channels",
    "result": "the result",
}


def _norm(component: Component, way: Way, rows: np.ndarray) -> np.ndarray | None:
    x, weight = component.inputs.get("x"), component.facts.get("weight")
    if x is None or weight is None or x.shape != component.own.shape:
        return None
    x, weight = _rows(component, x)[rows].astype(np.float32), np.asarray(weight, np.float32).ravel()
    if x.shape[1] != len(weight):
        return None
    narrow = lambda key, value: bfloat16(value) if key in way else value  # noqa: E731
    by_length = component.facts.get("by_length", False)
    total = narrow("squares", x * x).astype(np.float64).sum(1, keepdims=True)
    total = narrow("sum", (total if by_length else total / x.shape[1]).astype(np.float32))
    root = np.sqrt(total + np.float32(component.facts.get("eps", 0.0)))
    with np.errstate(all="ignore"):
        normed = x * narrow("root", 1 / root) if "reciprocal" in way else x / narrow("root", root)
    normed = narrow("normed", np.nan_to_num(normed))
    if by_length:
        normed = narrow("scaled", normed * np.float32(x.shape[1] ** 0.5))
    return narrow("result", normed * weight)


def _norm_ways(component: Component) -> list[Way]:
    ways = _subsets(NORM, () if component.facts.get("by_length") else ("scaled",))
    # Whether one divides or multiplies shows where the root is rounded alone.
    return [way for way in ways if "reciprocal" not in way or "root" in way]


def _axis(component: Component) -> int:
    return component.facts.get("axis", -1) % component.own.ndim


def _rows(component: Component, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, _axis(component), -1).reshape(-1, array.shape[_axis(component)])


def _from_rows(component: Component, rows: np.ndarray) -> np.ndarray:
    axis, shape = _axis(component), component.own.shape
    return np.moveaxis(rows.reshape(*shape[:axis], *shape[axis + 1 :], shape[axis]), -1, axis)


CONVOLUTION = {
    "once": ("what it reads is rounded once", "what it reads is rounded step by step"),
    "frames": "the product of each of the kernel's frames",
    "product": "the product without the bias",
    "result": "the result",
}


def _convolution(component: Component, way: Way, rows: np.ndarray) -> np.ndarray | None:
    reading, bias = reading_of(component), component.facts.get("bias")
    x = component.facts["read_once"]() if "once" in way else None
    if reading is None or ("once" in way and (x is None or x[0].shape != reading.x.shape)):
        return None
    narrow = lambda key, value: bfloat16(value) if key in way else value.astype(np.float32)  # noqa: E731
    x = reading.x if x is None else x[0].astype(reading.x.dtype)
    places, weight = all_places(component.own.shape)[rows], reading.weight
    total = np.zeros((len(places), len(weight)))
    for frames in range(weight.shape[2]) if "frames" in way else (slice(None),):
        part = np.zeros_like(weight)
        part[:, :, frames] = weight[:, :, frames]
        total = narrow("frames", total + narrow("frames", convolved(x, part, reading.geometry, places)))
    total = narrow("product", total) + (0 if bias is None else np.asarray(bias, np.float32))
    return narrow("result", total)


def _convolution_ways(component: Component) -> list[Way]:
    reading = reading_of(component)
    if reading is None:
        return []
    known = {"once": "read_once" in component.facts, "frames": reading.weight.shape[2] > 1,
             "product": component.facts.get("bias") is not None}  # fmt: skip
    return [way for way in _subsets(CONVOLUTION, tuple(key for key in known if not known[key]))
            # What is rounded apart is rounded in the end.
            if not {"frames", "product"} <= way]  # fmt: skip


class _Sums(Steps):
    """Ways to add up inputs: a key for each place in the order and what comes there, and for the rounding."""

    def said(self, should: Way, does: Way) -> str:
        if "step by step" not in does:
            return "the sum is rounded once" if "once" in does else "the sum is not rounded"
        order = _order(does)
        if len(order) > 3:
            return f"it is added up in the order {', '.join(order)}"
        return f"{order[-1]} are added last"


def _order(way: Way) -> list[str]:
    """The inputs in the order in which a way adds them."""
    return [key[2:] for key in sorted(key for key in way if key[0].isdigit())]


def _sum_ways(component: Component) -> list[Way]:
    parts = _parts(component)
    # What stands in rows of its own may come at any time.
    beside = {name: sum((a != 0).any(-1).astype(int) for other, a in parts.items() if other != name) for name in parts}
    names = [name for name, array in parts.items() if ((array != 0).any(-1) & (beside[name] > 0)).any()]
    if not 2 <= len(names) <= TERMS:
        return []
    orders = [order for order in permutations(names) if names.index(order[0]) < names.index(order[1])]
    stepwise = [frozenset({"step by step", *(f"{i} {name}" for i, name in enumerate(order))}) for order in orders]
    return [*stepwise, frozenset({"once"}), frozenset()]


def _sum(component: Component, way: Way, rows: np.ndarray) -> np.ndarray | None:
    order, parts = _order(way), _parts(component)
    if not parts or not set(order) <= parts.keys():
        return None
    total = np.zeros((len(rows), component.own.shape[-1]), np.float32)
    for name in chain(order, (name for name in parts if name not in order)):
        total = total + parts[name][rows]
        total = bfloat16(total) if "step by step" in way else total
    return bfloat16(total) if "once" in way else total


def _parts(component: Component) -> dict[str, np.ndarray]:
    """The inputs [n, channels] that should be added, each in the rows that it has a part in."""
    return {name: np.where(rows[:, None], component.inputs[name], 0).astype(np.float32)
            for name, rows in component.facts.get("added", {}).items()}  # fmt: skip


norm = Steps(NORM, _norm_ways, _rows, _from_rows, _norm).read
convolution = Steps(
    CONVOLUTION,
    _convolution_ways,
    lambda component, array: np.moveaxis(array[0], 0, -1).reshape(-1, array.shape[1]),
    lambda component, rows: laid_out(rows, component.own.shape),
    _convolution,
).read
added = _Sums(
    {},
    _sum_ways,
    lambda component, array: array.reshape(-1, array.shape[-1]),
    lambda component, rows: rows.reshape(component.own.shape),
    _sum,
).read
