"""What is a sum of a few known arrays, each times a number, where it differs from what it should be."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from parity.laws.base import Component
from parity.laws.numbers import plainest
from parity.laws.rounding import bfloat16
from parity.laws.support import Span, beyond, mask, spans

# A law may leave this part of the residual, beyond rounding.
LEFT = 0.05
# What two terms leave has to be this much less than what one does.
WORTH_ANOTHER = 0.2
# Values that a fit looks at.
MOST = 200_000
# A slice that is off by less than this part of what the whole is off by may be so by rounding alone.
APART = 0.05
# Indices along an axis that are told one by one.
LISTED = 4
# What float32 sums in another order differ by where nothing is known of it.
NOISE = 4e-7


@dataclass(frozen=True)
class Where:
    """A part of an array: spans along the axes of one way to see it; all of it where there are none.

    Attributes:
        spans: what is chosen along which axes.
        axes: the names of the axes.
        grid: whether the first axis is seen as the three of its grid.
    """

    spans: tuple[Span, ...] = ()
    axes: tuple[str, ...] = ()
    grid: bool = False

    @property
    def size(self) -> float:
        return sum(span.size for span in self.spans)

    def says(self, clause: str) -> str:
        """A sentence, given what is true in the part: "in channel 7 alone the velocity is 0"."""
        if not self.spans:
            return clause
        ordered = sorted(self.spans, key=lambda span: not span.alone)
        return f"{' '.join(span.held for span in ordered)} {clause}"

    def mask(self, component: Component) -> np.ndarray | None:
        """The part of another component's result as booleans in its shape; None where it has no such axes."""
        shape, axes = seen(component)[self.grid] if self.grid < len(seen(component)) else ((), ())
        chosen = mask(self.spans, axes, shape)
        if chosen is None or (self.spans and axes != self.axes):
            return None
        return np.broadcast_to(chosen, shape).reshape(component.own.shape)


def seen(component: Component) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """The ways to see a result: its shape and the names of its axes, and with the first axis as a grid."""
    shape = component.own.shape
    axes = tuple(component.facts.get("axes") or ("row", "channel", *(f"axis {i}" for i in range(2, 9)))[: len(shape)])
    ways, grid = [(shape, axes)], component.facts.get("grid")
    if grid is not None and len(shape) > 1 and np.prod(grid) == shape[0]:
        ways.append(((*grid, *shape[1:]), ("frame", "row", "column", *axes[1:])))
    return ways


def where(component: Component, got: np.ndarray) -> list[Where]:
    """The parts in which a result differs, all of it first, then the smallest description."""
    own = component.own.astype(np.float64)
    residual = got - own
    fine, found = relative(component), []
    # What is rounded in other places may stand out a little where something else is far off.
    coarse = max(fine, APART * float(np.linalg.norm(residual)) / (float(np.linalg.norm(own)) or 1.0))
    for level in (fine, coarse):
        for number, (shape, axes) in enumerate(seen(component)):
            chosen = []
            for axis, name in enumerate(axes):
                slices = beyond(residual.reshape(shape), own.reshape(shape), axis, level)
                chosen += [span for span in spans(name, slices)[:1] if span.size <= LISTED]
            if chosen and Where(tuple(chosen), axes, bool(number)) not in found:
                found.append(Where(tuple(chosen), axes, bool(number)))
    # Of two ways to say the same the grid's words are the plainer ones.
    found.sort(key=lambda part: (part.size, not part.grid))
    return [Where(), *found[:4]]


def enough(component: Component, got: np.ndarray, value: np.ndarray | None) -> bool:
    """Whether a value leaves no more of the residual than a law may."""
    if value is None or value.shape != got.shape:
        return False
    left = np.linalg.norm(got.astype(np.float64) - value)
    whole = np.linalg.norm(got.astype(np.float64) - component.own)
    rounding = 1.5 * max(component.rounding, grain(component.own) * float(np.linalg.norm(got)))
    return bool(whole > component.rounding and left <= max(min(rounding, whole / 2), LEFT * whole))


def comparable(component: Component, got: np.ndarray) -> bool:
    """Whether there is something to be read: equal shapes, finite values, a difference beyond rounding."""
    if component.own.shape != got.shape or got.size < 2:
        return False
    if not (np.isfinite(got).all() and np.isfinite(component.own).all()):
        return False
    return bool(np.linalg.norm(got.astype(np.float64) - component.own) > max(component.rounding, 0.0))


def mixed(
    got: np.ndarray, terms: Mapping[str, np.ndarray], rounding: float, most: int = 2
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Sums that are what was computed: of each the numbers by term, and how far off each may be; the shortest first.

    `got` and the terms are float64 of one shape; `rounding` is the norm that may be left.
    """
    names = [name for name, term in terms.items() if np.any(term)]
    step = max(got.size // MOST, 1)
    y = got.ravel()[::step]
    columns = np.stack([terms[name].ravel()[::step] for name in names], 1) if names else np.zeros((len(y), 0))
    scale, found, best = np.linalg.norm(y), [], np.inf
    for count in range(1, min(most, len(names)) + 1):
        here = []
        for chosen in combinations(range(len(names)), count):
            part = columns[:, chosen]
            if len(y) < 4 * count:
                continue
            factors, left = _fit(part, y)
            if factors is None:
                continue
            off = {names[j]: 2 * max(rounding / np.sqrt(step), 2e-7 * scale) / np.linalg.norm(columns[:, j])
                   for j in chosen}  # fmt: skip
            here.append((left, {names[j]: float(f) for j, f in zip(chosen, factors, strict=True)}, off))
        here.sort(key=lambda item: item[0])
        good = [(f, off) for left, f, off in here if left <= max(rounding, LEFT * scale)]
        if good and here[0][0] < WORTH_ANOTHER * best:
            found += good[:2]
            best = here[0][0]
        if best <= max(rounding, 1e-5 * scale):
            break
    return found[::-1] if len(found) > 1 else found


def _fit(part: np.ndarray, y: np.ndarray) -> tuple[np.ndarray | None, float]:
    """Least squares; None where terms are all but parallel."""
    gram = part.T @ part
    if np.linalg.cond(gram) > 1e10:
        return None, np.inf
    factors = np.linalg.solve(gram, part.T @ y)
    return factors, float(np.linalg.norm(y - part @ factors))


def summed(factors: Mapping[str, float], terms: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The sum of terms; None where one is missing."""
    if not all(name in terms for name in factors):
        return None
    return sum(factor * terms[name] for name, factor in factors.items())


def spelled(factors: Mapping[str, float], off: Mapping[str, float]) -> tuple[str, dict[str, float]]:
    """A sum in words, and its numbers as they are said: "0.5 noise - 2 velocity"."""
    words, plain = [], {}
    for name, factor in factors.items():
        plain[name], said = plainest(factor, off[name])
        sign = "- " if said.startswith("-") else ("+ " if words else "")
        said = said.removeprefix("-")
        words.append(f"{sign}{'' if said == '1' else said + ' '}{name}")
    return " ".join(words), plain


def is_bfloat16(own: np.ndarray) -> bool:
    """Whether all values are such as bfloat16 has."""
    return not (np.ascontiguousarray(own, np.float32).view(np.uint32) & 0xFFFF).any()


def rounded_as(own: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Values with the rounding that a result shows."""
    return bfloat16(value) if is_bfloat16(own) else value


def grain(own: np.ndarray) -> float:
    """How far a value of a result may be from what it stands for, relative to it."""
    return 2.0**-9 if is_bfloat16(own) else 2.0**-24


def relative(component: Component) -> float:
    """What rounding makes of a component's result, relative to its norm; all values of a slice may be off by their
    grain."""
    norm = float(np.linalg.norm(component.own.astype(np.float64)))
    return max(component.rounding / norm if norm else 0.0, grain(component.own), NOISE)


def put(own: np.ndarray, chosen: np.ndarray | None, value: np.ndarray | None) -> np.ndarray | None:
    """A result with other values in a part of it, rounded as it is."""
    if chosen is None or value is None:
        return None
    return np.where(chosen, rounded_as(own, np.asarray(value)), own).astype(np.float32)
