"""Laws of the times of a flow sampler, at the boundaries of its steps and of every latent in one."""

from collections.abc import Callable, Iterator

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.mixture import where
from parity.laws.numbers import plainest
from parity.laws.order import fitting
from parity.laws.rounding import bfloat16
from parity.laws.support import spans

Grid = Callable[[int], np.ndarray]

GRIDS: dict[str, Grid] = {
    "": lambda n: np.linspace(1, 0, n + 1),
    "ends at 1 / steps before its last point": lambda n: np.append(np.linspace(1, 1 / n, n), 0),
    "has as many points as steps, and a last one": lambda n: np.append(np.linspace(1, 0, max(n, 1)), 0),
    "ends at 1 / steps": lambda n: np.linspace(1, 1 / n, n + 1),
    "ends at 1 / (steps + 1)": lambda n: np.linspace(1, 0, n + 2)[:-1],
    "starts one step late": lambda n: np.linspace(1, 0, n + 2)[1:],
    "starts half a step late": lambda n: np.append(1 - (np.arange(n) + 0.5) / n, 0),
    "is in thousandths": lambda n: np.append(np.round(np.linspace(1000, 1000 / n, n)) / 1000, 0),
    "is a cosine": lambda n: (1 + np.cos(np.pi * np.linspace(0, 1, n + 1))) / 2,
    "is a quarter cosine": lambda n: np.cos(np.pi / 2 * np.linspace(0, 1, n + 1)),
    "is one less a quarter sine": lambda n: 1 - np.sin(np.pi / 2 * np.linspace(0, 1, n + 1)),
}
"""Even times and what else stands in their place before they are shifted, for n steps."""
AFTER: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda t: t,
    "in reverse": lambda t: t[::-1],
    "counted from the data": lambda t: 1 - t,
    "times 1000": lambda t: t * 1000,
    "rounded to bfloat16": bfloat16,
    "rounded to thousandths": lambda t: np.round(t * 1000) / 1000,
    "cut to thousandths": lambda t: np.floor(t * 1000) / 1000,
}

BENT: dict[str, Callable[[float], float]] = {
    "applied twice": lambda s: s**2,
    "inverted": lambda s: 1 / s,
    "its square root": lambda s: s**0.5,
    "e to its power": np.exp,
}
"""What may be taken for the shift."""


def shifted(u: np.ndarray, shift: float) -> np.ndarray:
    return shift * u / (1 + (shift - 1) * u)


def schedule(component: Component, got: np.ndarray) -> Iterator[Law]:
    """t at every boundary of steps, [steps + 1]; facts shift, steps."""
    own, shift = component.own, component.facts["shift"]
    if (
        own.shape != got.shape
        or got.ndim != 1
        or len(got) < 3
        or np.array_equal(own, got)
        or not np.isfinite(got).all()
    ):
        return
    found: list[Law] = []
    for after, change in AFTER.items():
        for words, grid in GRIDS.items():
            for law in _of_grid(got.astype(np.float64), shift, words, grid, after, change):
                found.append(law)
    yield from sorted(found or _between(got.astype(np.float64), shift), key=lambda law: law.size)[:6]
    yield from _apart(component, got)


def _between(got: np.ndarray, shift: float) -> Iterator[Law]:
    """Even times between other ends than 1 and 0, before they are shifted; also with 0 behind them."""
    with np.errstate(all="ignore"):
        even = got / (shift - (shift - 1) * got)
    ends = [("", even)] if got[-1] else [("", even), (" and then to 0", even[:-1])]
    for words, inner in ends:
        if len(inner) < 3 or not np.isfinite(inner).all() or np.ptp(np.diff(inner)) > 1e-5 * np.abs(inner).max():
            continue
        (first, one), (last, two) = (plainest(float(end), 1e-5) for end in inner[[0, -1]])
        if first == last:
            continue
        told = [f"from {one}"] * (first != 1) + [f"to {two}"] * (last != 0 or bool(words))

        def grid(n: int, first: float = first, last: float = last, behind: bool = bool(words)) -> np.ndarray:
            return np.append(np.linspace(first, last, n), 0) if behind else np.linspace(first, last, n + 1)

        yield from _of_grid(got, shift, f"goes evenly {' '.join(told)}{words}", grid, "", AFTER[""], len(told))


def _of_grid(
    got: np.ndarray,
    shift: float,
    words: str,
    grid: Grid,
    after: str,
    change: Callable[[np.ndarray], np.ndarray],
    numbers: float = 1,
) -> Iterator[Law]:
    """Laws of a grid, with what may be done to it before and after; `numbers` were read from the data to say it."""
    n = len(got) - 1
    u = grid(n)

    def law(says: str, size: float, bend: Callable[[np.ndarray, float], np.ndarray]) -> Iterator[Law]:
        def apply(other: Component) -> np.ndarray | None:
            if other.own.ndim != 1 or len(other.own) < 3:
                return None
            even = grid(len(other.own) - 1)
            return np.asarray(change(bend(even, other.facts["shift"]).astype(np.float32)), np.float32)

        made = np.asarray(change(bend(u, shift).astype(np.float32)), np.float64)
        if np.abs(made - got).max() <= 3e-7 * max(np.abs(got).max(), 1e-9):
            parts = [f"the schedule {words}" if words else "", says, f"t is {after}" if after else ""]
            yield Law(" and ".join(filter(None, parts)), size + numbers * bool(words) + bool(after), apply)

    yield from law("", 0, shifted)
    # The shift is read where t is no end, from what was not rounded.
    if after not in ("", "in reverse", "counted from the data", "times 1000"):
        return
    t = {"": got, "in reverse": got[::-1], "counted from the data": 1 - got, "times 1000": got / 1000}[after]
    inner = (u > 1e-6) & (u < 1 - 1e-6) & (t > 1e-6) & (t < 1 - 1e-6)
    if not inner.any():
        return
    with np.errstate(all="ignore"):
        odds = t[inner] * (1 - u[inner]) / (u[inner] * (1 - t[inner]))
        power = np.log(t[inner]) / np.log(shifted(u, shift)[inner])
        plain_power = np.log(t[inner]) / np.log(u[inner])
    if np.ptp(odds) <= 1e-4 * odds.mean() and abs(odds.mean() - shift) > 1e-4 * shift:
        value, said = plainest(float(odds.mean()), 1e-5 * odds.mean())
        yield from law(f"the timestep shift is {said}", 1, lambda u, s: shifted(u, value))
        for says, bend in BENT.items():
            if abs(bend(shift) - value) < 1e-5 * value:
                yield from law(f"the timestep shift is {says}", 0.9, lambda u, s, bend=bend: shifted(u, bend(s)))
    for powers, says, base in ((power, "t is raised", shifted), (plain_power, "even times are not shifted but raised",
                                                                lambda u, s: u)):  # fmt: skip
        if inner.sum() > 1 and np.ptp(powers) <= 1e-4 * abs(powers.mean()) and abs(powers.mean() - 1) > 1e-4:
            p, said = plainest(float(powers.mean()), 1e-5 * abs(powers.mean()))
            yield from law(f"{says} to the power {said}", 2, lambda u, s, p=p, base=base: base(u, s) ** p)


def _apart(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Some times that are off, and all as a sum."""
    own, differs = component.own.astype(np.float64), component.own != got
    places = np.flatnonzero(differs)
    wrong = got.astype(np.float64)
    if len(places) == 1:
        i = int(places[0])
        last = i == len(own) - 1
        value, said = plainest(float(wrong[i]), 1e-7)
        name = "the last t" if last else ("the first t" if not i else f"t of step {i}")
        near = [(f"that of boundary {j}", j) for j in range(len(own)) if own[j] == got[i] and j != i]

        def one(other: Component) -> np.ndarray | None:
            place = len(other.own) - 1 if last else i
            if other.own.ndim != 1 or place >= len(other.own):
                return None
            new = other.own.copy()
            new[place] = other.own[near[0][1]] if near else value
            return new

        yield Law(f"{name} alone is {near[0][0] if near else said}", 2, one)
    for order in fitting(own[:, None], wrong[:, None], differs):
        if np.array_equal(order.taken(component.own, 0), got):
            moved = lambda other, order=order: order.taken(other.own, 0) if other.own.ndim else None  # noqa: E731
            yield Law(f"of the times {order.of_axis('boundary')}", order.size + 1, moved)
    if len(places) > 2:
        a, b = np.polyfit(own, wrong, 1)
        (a, said_a), (b, said_b) = plainest(float(a), 1e-6 * abs(a)), plainest(float(b), 1e-6 * np.abs(wrong).max())
        if np.abs(a * own + b - wrong).max() <= 1e-6 * np.abs(wrong).max():
            words = f"{said_a} times as large" if not b else f"{said_a} t + {said_b}"
            yield Law(f"t is {words}", 1 + bool(b), lambda other: (a * other.own + b).astype(np.float32))


def of_latents(component: Component, got: np.ndarray) -> Iterator[Law]:
    """t of every latent in a step, [latents]; facts times, step, made (booleans [latents])."""
    own, times, step = component.own, component.facts["times"], component.facts["step"]
    if own.shape != got.shape or got.ndim != 1 or np.array_equal(own, got) or not np.isfinite(got).all():
        return
    made = component.facts["made"]
    differs = own != got
    values = np.unique(got[differs])
    if len(values) != 1:
        return
    value = float(values[0])

    def sources(times: np.ndarray, step: int) -> Iterator[tuple[str, float]]:
        t, n = float(times[step]), len(times) - 1
        yield "the step's t", t
        yield "0", 0.0
        yield "that of the step after it", float(times[min(step + 1, n)])
        yield "that of the step before it", float(times[max(step - 1, 0)])
        yield "that of the first step", float(times[0])
        yield "that of the last step", float(times[-2])
        yield "1 - t", 1 - t
        yield "t times 1000", 1000 * t
        yield "that of an even schedule", 1 - step / n
        yield "the number of the step", float(step)
        yield "rounded to bfloat16", float(bfloat16(np.array([t]))[0])
        yield "rounded to thousandths", round(t * 1000) / 1000
        yield "halfway to the next", (t + float(times[min(step + 1, n)])) / 2

    parts: list[tuple[str, float, Callable[[Component], np.ndarray]]] = []
    if np.array_equal(differs, made):
        parts.append(("", 0, lambda other: other.facts["made"]))
    elif np.array_equal(differs, ~made):
        parts.append(("of what is given ", 0, lambda other: ~other.facts["made"]))
    elif differs.all():
        parts.append(("of all latents ", 0, lambda other: np.ones(len(other.own), bool)))
    for part in where(component, got)[1:]:
        parts.append((part.says("").strip() + " ", part.size, part.mask))
    for says, size, chosen in parts:
        for number, (words, meant) in enumerate(sources(times, step)):
            if abs(meant - value) <= 1e-6 * max(abs(value), 1e-9):

                def named(other: Component, number: int = number, chosen=chosen) -> np.ndarray | None:
                    mask = chosen(other)
                    new = list(sources(other.facts["times"], other.facts["step"]))[number][1]
                    return None if mask is None else np.where(mask, np.float32(new), other.own)

                yield Law(f"t {says}is {words}", 1 + size, named)

        def constant(other: Component, chosen=chosen) -> np.ndarray | None:
            mask = chosen(other)
            return None if mask is None else np.where(mask, np.float32(value), other.own)

        yield Law(f"t {says}is {plainest(value, 1e-7)[1]}", 2 + size, constant)
        t = float(times[step])
        if t and value:
            ratio, said = plainest(value / t, 1e-6 * value / t)

            def times_as_large(other: Component, chosen=chosen, ratio: float = ratio) -> np.ndarray | None:
                mask = chosen(other)
                new = np.float32(ratio * other.facts["times"][other.facts["step"]])
                return None if mask is None else np.where(mask, new, other.own)

            cost = 1.5 if float(f"{ratio:.1e}") == ratio else 2.5
            yield Law(f"t {says}is {said} times as large", cost + size, times_as_large)


def guided(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Whether guidance acts in each step, 0 or 1 [steps]; facts times, at every boundary, and interval (low, high]."""
    own = component.own
    if own.shape != got.shape or got.ndim != 1 or np.array_equal(own, got) or not np.isin(got, (0, 1)).all():
        return
    low, high = (float(bound) for bound in component.facts["interval"])
    t = np.asarray(component.facts["times"], np.float64)[: len(got)]
    acts = got.astype(bool)
    if acts.any():
        bounds = _bounds(t, acts, low, high)
        if bounds is not None:
            said, size, (lowest, highest) = bounds
            yield Law(f"guidance acts where t is {said}", size, lambda other: (
                (other.facts["times"][: len(other.own)] > lowest) & (other.facts["times"][: len(other.own)] <= highest)
            ).astype(np.int32))  # fmt: skip
    for span in spans("step", acts):
        yield Law(f"guidance acts {span.within}", 1.2 + span.size, lambda other, span=span: span.of(
            len(other.own)).astype(np.int32))  # fmt: skip
    if acts.all() or not acts.any():
        says = "acts in every step" if acts.all() else "never acts"
        yield Law(f"guidance {says}", 0.5, lambda other: np.full(len(other.own), int(acts.all()), np.int32))


def _bounds(t: np.ndarray, acts: np.ndarray, low: float, high: float) -> tuple[str, float, tuple[float, float]] | None:
    """An interval of t that makes the steps guided, with as much of the right one as may be."""
    inside, outside = t[acts], t[~acts]
    below, above = outside[outside < inside.min()], outside[outside > inside.max()]
    if len(below) + len(above) != len(outside):
        return None
    words, size, bounds = [], 0.0, [low, high]
    least, under = float(inside.min()), float(below.max(initial=-np.inf))
    if not under <= low < least:
        bounds[0] = _plain(under, least) if np.isfinite(under) else least - 1
        words += [f"above about {bounds[0]:.4g}" if np.isfinite(under) else "however small"]
        size += 1
    most, over = float(inside.max()), float(above.min(initial=np.inf))
    if not most <= high < over:
        bounds[1] = _plain(most, over) if np.isfinite(over) else most + 1
        words += [f"up to about {bounds[1]:.4g}" if np.isfinite(over) else "however large"]
        size += 1
    return (" and ".join(words), size, (bounds[0], bounds[1])) if words else None


def _plain(low: float, high: float) -> float:
    """The plainest number of an interval [low, high)."""
    middle = (low + high) / 2
    for digits in range(4):
        value = round(middle, digits)
        if low <= value < high:
            return value
    return middle
