"""Laws of pixels: each value is another function of what it is made of, or the values stand in another order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np

from parity.laws.base import Component, Curves, Law
from parity.laws.numbers import plainest
from parity.laws.order import Order
from parity.laws.place import as_own
from parity.laws.reordered import orders
from parity.laws.support import Span, beyond, mask, spans

# Values that a curve is read from, its knots where nothing plainer is found, and the part of values that may lie apart.
SAMPLED, KNOTS, APART = 20000, 33, 0.002
# How far a written number may be from one that is read of whole numbers.
WRITTEN = 0.25
LEFT = 0.05
# Sides of the squares that pixels are taken apart into.
SIDES = (2, 8, 16)


@dataclass(frozen=True)
class Curve:
    """A function of one value, how it is said and how many numbers say it; `describes` as of a Law."""

    says: str
    size: float
    of: Callable[[np.ndarray], np.ndarray]
    describes: bool = False


def curve(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Pixels as another function of own, or of `x` [like own], what own is made of value by value."""
    own = component.own
    if own.shape != got.shape or not own.size or not np.isfinite(got).all():
        return
    residual = got.astype(np.float64) - own
    if np.linalg.norm(residual) <= component.rounding or not residual.any():
        return
    # The functions are of all values, or of those of some colours or frames.
    where = []
    for axis, name in list(enumerate(component.axes))[:2]:
        wrong = beyond(residual, own.astype(np.float64), axis, 1e-4)
        where += spans(name, wrong)[:1]
    chosen = np.broadcast_to(mask(where, component.axes, own.shape), own.shape)
    # A change of own may sit on top of another fault; integers have lost what they are made of.
    for name in ("own", "x") if own.dtype.kind == "f" else ("x", "own"):
        source = own if name == "own" else component.inputs.get("x")
        if source is None or source.shape != own.shape:
            continue
        u, v, right = (array[chosen].astype(np.float64) for array in (source, got, own))
        if len(u) > SAMPLED:
            places = np.random.default_rng(0).choice(len(u), SAMPLED, replace=False)
            u, v, right = u[places], v[places], right[places]
        rounding = component.rounding * np.sqrt(len(u) / own.size)
        limit = max(rounding, LEFT * np.linalg.norm(v - right))
        found = False
        for each in _curves(u, v):
            with np.errstate(all="ignore"):
                left = np.linalg.norm(v - each.of(u))
            if left <= limit:
                yield _law(component, each, name, where, u)
                found = True
        if found:
            return


def _law(component: Component, found: Curve, source: str, where: list[Span], u: np.ndarray) -> Law:
    def apply(other: Component) -> np.ndarray | None:
        values = other.own if source == "own" else other.inputs.get("x")
        chosen = mask(where, other.axes, other.own.shape)
        if values is None or values.shape != other.own.shape or chosen is None:
            return None
        return as_own(other, np.where(chosen, found.of(values.astype(np.float64)), other.own))

    x = np.linspace(u.min(), u.max(), 200)
    order = np.argsort(component.inputs["x"].ravel(), kind="stable") if source == "x" else None
    expected = x
    if order is not None:
        expected = np.interp(x, component.inputs["x"].ravel()[order], component.own.ravel()[order].astype(np.float64))
    figure = Curves("value by value", "what should be" if source == "own" else "before it is made", "value", x,
                    {"expected": expected, "found": found.of(x)})  # fmt: skip
    within = f"{', '.join(span.within for span in where)} " if where else ""
    of = "" if source == "own" else " of what it is made of"
    size = found.size + sum(span.size for span in where) + (source == "x") * 0.5
    return Law(f"{within}each value is {found.says}{of}", size, apply, figure, found.describes)


def _curves(u: np.ndarray, v: np.ndarray) -> Iterator[Curve]:
    """Functions that may make values [n] of others, the plainest first."""
    for says, of in NAMED.items():
        yield Curve(says, 1, of)
    whole = bool((v == np.rint(v)).all()) and np.ptp(v) > 4
    low, high = float(v.min()), float(v.max())
    ends = [bool((v == end).mean() > 0.001) for end in (low, high)]
    inside = ((v > low) | (not ends[0])) & ((v < high) | (not ends[1]))
    if inside.sum() < 16 or not np.ptp(u[inside]):
        return
    if whole:
        yield from _bytes(u)
    ways = ROUNDINGS if whole else (("", 0.0, lambda x: x),)
    # Whole numbers of what bfloat16 holds are off from a line as if by rule: numbers that people write are near it.
    for (how, shift, rounding), near in product(ways, (0.0, WRITTEN) if whole else (0.0,)):
        slope, offset = np.polyfit(u[inside], v[inside] + shift, 1)
        spread = np.std(v[inside] + shift - slope * u[inside] - offset) / np.sqrt(inside.sum())
        within = 4 * spread / max(float(u[inside].std()), 1e-12) + 1e-7 * abs(slope)
        slope, said = plainest(float(slope), max(within, near))
        offset = float((v[inside] + shift - slope * u[inside]).mean())
        offset, more = plainest(offset, max(4 * spread + 1e-7, near))
        if not slope:
            continue
        clipped = (low if ends[0] else -np.inf, high if ends[1] else np.inf)
        linear = "x" if slope == 1 else "-x" if slope == -1 else f"{said} x"
        if offset:
            linear += f" {'-' if offset < 0 else '+'} {more.removeprefix('-')}"
        words = [f"({linear})" if any(ends) or how else linear, how]
        if ends[0] or ends[1]:
            bounds = ["-inf" if not ends[0] else f"{low:.4g}", "inf" if not ends[1] else f"{high:.4g}"]
            words.append(f"within [{', '.join(bounds)}]")
        if how == "cut off" and (slope * u + offset).min() >= 0:
            continue
        size = 1.0 * (slope != 1) + (offset != 0) + 0.5 * sum(ends) + (0 if not how else 0.5 + (how != "rounded")) + 0.5

        def of(x: np.ndarray, slope=slope, offset=offset, rounding=rounding, clipped=clipped) -> np.ndarray:
            return rounding(slope * x + offset).clip(*clipped)

        yield Curve(" ".join(filter(None, words)), size, of)
    yield from _powers(u, v)
    yield from _steps(u, v)
    yield from _table(u, v)


def _bytes(u: np.ndarray) -> Iterator[Curve]:
    """Values of 8 bits made by numbers that people write, clipped or not."""
    for slope, offset in ((127.5, 127.5), (127.5, 128.0), (128.0, 128.0), (255.0, 0.0)):
        linear = f"({slope:g} x + {offset:g})" if offset else f"({slope:g} x)"
        for how, _, rounding in ROUNDINGS:

            def wide(x: np.ndarray, slope=slope, offset=offset, rounding=rounding) -> np.ndarray:
                return rounding(slope * x + offset)

            more = how != "rounded"
            yield Curve(f"{linear} {how} within [0, 255]", 0.5 + more, lambda x, wide=wide: wide(x).clip(0, 255))
            if wide(u).min() < 0 or wide(u).max() > 255:
                yield Curve(f"{linear} {how} modulo 256", 3 + more, lambda x, wide=wide: wide(x) % 256)


def _powers(u: np.ndarray, v: np.ndarray) -> Iterator[Curve]:
    """A gamma of values in [-1, 1], or in [0, 1]."""
    for to, back, words in ((lambda x: (x + 1) / 2, lambda y: 2 * y - 1, "of [-1, 1] "),
                            (lambda x: x, lambda y: y, "")):  # fmt: skip
        one, two = to(u), to(v)
        inside = (one > 0.02) & (one < 0.98) & (two > 0.001) & (two < 0.999)
        if inside.sum() < 16:
            continue
        logs = np.log(one[inside])
        power = float((logs * np.log(two[inside])).sum() / (logs * logs).sum())
        power, said = plainest(power, 0.002 * abs(power))
        if power not in (0, 1):
            of = lambda x, to=to, back=back, power=power: back(to(x).clip(0, None) ** power)  # noqa: E731
            yield Curve(f"the power {said} {words}".strip(), 1.5, of)


def _steps(u: np.ndarray, v: np.ndarray) -> Iterator[Curve]:
    """Values on a grid."""
    levels = np.unique(v)
    if not 2 < len(levels) < len(v) / 4:
        return
    steps = np.diff(levels)
    step = float(np.median(steps[steps > 0.1 * steps.max()]))
    count, said = plainest(1 / step, 1e-4 / step)
    for how, _, rounding in ROUNDINGS:
        yield Curve(f"{how} to a multiple of 1/{said}", 1.5,
                    lambda x, rounding=rounding, count=count: rounding(x * count) / count)  # fmt: skip


def _table(u: np.ndarray, v: np.ndarray) -> Iterator[Curve]:
    """Any function, as a line through a few knots."""
    knots = np.unique(np.quantile(u, np.linspace(0, 1, KNOTS)))
    if len(knots) < 5:
        return
    order = np.argsort(u, kind="stable")
    half = order[::2]
    # Each knot is the mean of what lies near it.
    near = np.clip(np.searchsorted(knots, u[half]) - 1, 0, len(knots) - 2)
    right = (u[half] - knots[near]) / (knots[near + 1] - knots[near])
    basis = np.zeros((len(half), len(knots)))
    basis[np.arange(len(half)), near], basis[np.arange(len(half)), near + 1] = 1 - right, right
    values = np.linalg.lstsq(basis, v[half], rcond=None)[0]
    shown = ", ".join(f"{knots[i]:.2g} becomes {values[i]:.2g}" for i in (0, len(knots) // 2, -1))
    yield Curve(f"another function: {shown}", float(len(knots)), lambda x: np.interp(x, knots, values), True)


def _srgb(x: np.ndarray) -> np.ndarray:
    y = (x + 1) / 2
    y = np.where(y <= 0.0031308, 12.92 * y, 1.055 * y.clip(1e-9, None) ** (1 / 2.4) - 0.055)
    return 2 * y - 1


def _linear_light(x: np.ndarray) -> np.ndarray:
    y = (x + 1) / 2
    y = np.where(y <= 0.04045, y / 12.92, ((y + 0.055).clip(1e-9, None) / 1.055) ** 2.4)
    return 2 * y - 1


NAMED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh(x)": np.tanh,
    "the sigmoid of x": lambda x: 1 / (1 + np.exp(-x)),
    "2 sigmoid(x) - 1": lambda x: 2 / (1 + np.exp(-x)) - 1,
    "sin(x)": np.sin,
    "|x|": np.abs,
    "the sRGB curve of x": _srgb,
    "the linear light of x": _linear_light,
}
ROUNDINGS: tuple[tuple[str, float, Callable[[np.ndarray], np.ndarray]], ...] = (
    ("rounded", 0.0, np.rint),
    ("rounded down", 0.5, np.floor),
    ("rounded up", -0.5, np.ceil),
    ("cut off", 0.5, np.trunc),
)


def rearranged(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Pixels [colour, frame, row, column] whose values within squares, or whose squares, stand in another order."""
    own = component.own
    if own.shape != got.shape or own.ndim != 4 or not np.isfinite(got).all() or not (own != got).any():
        return
    if np.linalg.norm(got.astype(np.float64) - own) <= component.rounding:
        return
    for side in SIDES:
        for apart, back, axes in _views(side):
            one, two = apart(own), apart(got)
            if one is None:
                continue
            packed = component.facts.get("packed") if side == component.facts.get("side") else None
            likely = {axes[0]: _packings(len(own), side, packed)} if packed else {}
            for law in orders(replace(component, own=one, axes=axes), two, likely=likely):
                yield Law(law.sentence, law.size + 0.5, _viewed(law, apart, back, axes))


def _packings(colours: int, side: int, packed: Sequence[str]) -> list[Order]:
    """What packed channels, laid out as `packed` says, are where they are read in another order, colours reversed."""
    names = ("colour", "row", "column")
    grid = np.arange(colours * side * side).reshape(colours, side, side)
    laid = grid.transpose([names.index(name) for name in packed]).ravel()
    found = []
    for order in permutations(names):
        for flipped in (False, True):
            read = laid.reshape([grid.shape[names.index(name)] for name in order])
            index = read.transpose([order.index(name) for name in names])
            index = (index[::-1] if flipped else index).ravel()
            says = f"{{many}} laid out as ({', '.join(packed)}) are read as ({', '.join(order)})"
            says += ", colours reversed" if flipped else ""
            found.append(Order(says, 1.5 + 0.5 * flipped, lambda n, index=index: index if n == len(index) else None))
    return found


View = Callable[[np.ndarray], np.ndarray | None]


def _views(side: int) -> Iterator[tuple[View, Callable[[np.ndarray, tuple[int, ...]], np.ndarray], tuple[str, ...]]]:
    """Pixels as planes of one place in a square each, and as squares."""

    def split(array: np.ndarray) -> np.ndarray | None:
        colours, frames, rows, columns = array.shape
        if rows % side or columns % side or min(rows, columns) == side:
            return None
        return array.reshape(colours, frames, rows // side, side, columns // side, side)

    def planes(array: np.ndarray) -> np.ndarray | None:
        parts = split(array)
        if parts is None or len(array) * side * side > 64:
            return None
        parts = parts.transpose(0, 3, 5, 1, 2, 4)  # colour, row and column in the square, frame, square's row, column
        return parts.reshape(-1, *parts.shape[3:])

    def from_planes(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        colours, frames, rows, columns = shape
        parts = array.reshape(colours, side, side, frames, rows // side, columns // side)
        return parts.transpose(0, 3, 4, 1, 5, 2).reshape(shape)

    def squares(array: np.ndarray) -> np.ndarray | None:
        parts = split(array)
        if parts is None or parts.shape[2] * parts.shape[4] > 512:
            return None
        parts = parts.transpose(2, 4, 0, 1, 3, 5)
        return parts.reshape(-1, *parts.shape[2:4], side * side)

    def from_squares(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        colours, frames, rows, columns = shape
        parts = array.reshape(rows // side, columns // side, colours, frames, side, side)
        return parts.transpose(2, 3, 0, 4, 1, 5).reshape(shape)

    name = f"{side}x{side} square"
    yield planes, from_planes, (f"packed channel (of each {name})", "frame", "row", "column")
    yield squares, from_squares, (name, "colour", "frame", f"value in each {name}")


def _viewed(law: Law, apart: View, back: Callable, axes: tuple[str, ...]) -> Callable[[Component], np.ndarray | None]:
    def apply(other: Component) -> np.ndarray | None:
        one = apart(other.own) if other.own.ndim == 4 else None
        moved = None if one is None else law.apply(replace(other, own=one, axes=axes))
        return None if moved is None or moved.shape != one.shape else back(moved, other.own.shape)

    return apply


FITTERS = (curve, rearranged)
