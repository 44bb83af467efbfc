"""Laws of pixels made ready for a model: normalised, turned, moved, in patches."""

from collections.abc import Callable, Iterator
from itertools import permutations

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.change import of_values
from parity.laws.fit import Fit
from parity.laws.mixture import comparable
from parity.laws.statistics import read

# Pixels that a picture is moved by, at most; and values that are looked at first.
FARTHEST, LOOKED_AT = 3, 20_000
COLOURS = ("red", "green", "blue")
Turn = Callable[[np.ndarray], np.ndarray]


def preprocess(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Pixels of colours in units of a deviation, less a mean.

    facts view, back: own as [colours, frames, h, w] and such an array as own; mean, deviation; known: means and
    deviations by whose they are; what; patches: orders of the values in patches by what is said of them, or {}.
    """
    if not comparable(component, got):
        return
    view: Turn = component.facts["view"]
    own, new = view(component.own), view(got)
    if own.shape != new.shape or own.ndim != 4 or len(own) != 3:
        return
    found = False
    for words, size, turn in _turns(component, own, new):
        for said, more, finish in _values(component, turn(own), new):
            law = _law(component, words, said, size + more, turn, finish)
            if law is not None and _right(component, got, law):
                found = True
                yield law
        if found:
            return
    for words, change in component.facts.get("patches", {}).items():
        law = Law(words, 1, lambda other, change=change: np.ascontiguousarray(change(other), np.float32))
        if _right(component, got, law):
            yield law


def _right(component: Component, got: np.ndarray, law: Law) -> bool:
    value = law.apply(component)
    if value is None or value.shape != got.shape:
        return False
    whole = np.linalg.norm(got.astype(np.float64) - component.own)
    return bool(np.linalg.norm(got.astype(np.float64) - value) <= 0.02 * whole)


def _law(
    component: Component,
    words: str,
    said: str,
    size: float,
    turn: Turn,
    finish: Callable[[Component, np.ndarray], np.ndarray],
) -> Law | None:
    if not words and not said:
        return None

    def apply(other: Component) -> np.ndarray | None:
        pixels = turn(other.facts["view"](other.own))
        made = finish(other, pixels)
        return None if made.shape != pixels.shape else np.ascontiguousarray(other.facts["back"](made), np.float32)

    return Law(f"{component.facts['what']} {' and '.join(filter(None, [words, said]))}", size, apply)


def _turns(component: Component, own: np.ndarray, new: np.ndarray) -> Iterator[tuple[str, float, Turn]]:
    """What may have been done to where pixels and colours are, that which makes them alike but for their values."""
    frames, height, width = own.shape[1:]
    candidates: list[tuple[str, float, Turn]] = [("", 0, lambda x: x)]
    for order in permutations(range(3)):
        if order != (0, 1, 2):
            words = "have their colours in reverse" if order == (2, 1, 0) else (
                f"have their colours in the order {', '.join(COLOURS[i] for i in order)}")  # fmt: skip
            candidates.append((words, 1, lambda x, order=order: x[list(order)]))
    candidates += [
        ("are mirrored", 1, lambda x: x[..., ::-1]),
        ("are upside down", 1, lambda x: x[..., ::-1, :]),
        ("are turned by 180 degrees", 1, lambda x: x[..., ::-1, ::-1]),
        ("have frames in reverse", 1, lambda x: x[:, ::-1]),
        ("are grey", 1, _grey),
    ]
    if height == width:
        candidates += [
            ("have rows and columns exchanged", 1, lambda x: x.swapaxes(-1, -2)),
            ("are turned by 90 degrees", 1, lambda x: np.rot90(x, 1, (-2, -1))),
            ("are turned by 270 degrees", 1, lambda x: np.rot90(x, 3, (-2, -1))),
        ]
    else:
        candidates.append(("are read column by column", 1, lambda x: x.reshape(*x.shape[:2], x.shape[3], -1).swapaxes(
            -1, -2)))  # fmt: skip
    for by in (side * count for count in range(1, min(frames, 5)) for side in (1, -1)):
        said = f"have frames {abs(by)} {'later' if by > 0 else 'earlier'}, those at the end"
        candidates.append((f"{said} repeated", 1, lambda x, by=by: _moved(x, 1, by)))
        candidates.append((f"{said} come round", 1, lambda x, by=by: np.roll(x, by, 1)))
    if frames > 1:
        candidates.append(("have every frame be the first", 1, lambda x: np.repeat(x[:, :1], x.shape[1], 1)))
        candidates.append(("have every frame be the last", 1, lambda x: np.repeat(x[:, -1:], x.shape[1], 1)))
    steps = range(-FARTHEST, FARTHEST + 1)
    for dy, dx in ((dy, dx) for dy in steps for dx in steps if dy or dx):
        down, right = f"{abs(dy)} {'down' if dy > 0 else 'up'}", f"{abs(dx)} {'right' if dx > 0 else 'left'}"
        said = "are moved " + " and ".join([down] * bool(dy) + [right] * bool(dx))
        size = 1.0 + bool(dy and dx)
        candidates.append((said, size, lambda x, dy=dy, dx=dx: np.roll(x, (dy, dx), (-2, -1))))
        edges = f"{said}, their edges repeated"
        candidates.append((edges, size + 0.1, lambda x, dy=dy, dx=dx: _moved(_moved(x, 2, dy), 3, dx)))
    step = max(own.size // LOOKED_AT, 1)
    likeness = []
    for words, size, turn in candidates:
        value = turn(own)
        if value.shape != new.shape:
            continue
        alike = [_alike(a.ravel()[::step], b.ravel()[::step]) for a, b in zip(value, new, strict=True)]
        likeness.append((min(alike), words, size, turn))
    best = max(likeness, key=lambda item: item[0])[0]
    if best < 0.9:
        return
    for alike, words, size, turn in sorted(likeness, key=lambda item: item[2]):
        if 1 - alike <= 4 * (1 - best) + 1e-6:
            yield words, size, turn


def _moved(x: np.ndarray, axis: int, by: int) -> np.ndarray:
    """Pixels moved along an axis, those at the edge repeated."""
    count = x.shape[axis]
    return np.take(x, np.clip(np.arange(count) - by, 0, count - 1), axis)


def _grey(x: np.ndarray) -> np.ndarray:
    return np.repeat(np.tensordot([0.299, 0.587, 0.114], x, 1)[None], 3, 0)


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64) - a.mean(), b.astype(np.float64) - b.mean()
    square = (a @ a) * (b @ b)
    return abs(float(a @ b)) / np.sqrt(square) if square > 0 else float(not (a @ a) and not (b @ b))


def _values(
    component: Component, own: np.ndarray, new: np.ndarray
) -> Iterator[tuple[str, float, Callable[[Component, np.ndarray], np.ndarray]]]:
    """What may have been done to values that are where they should be."""
    if np.array_equal(own, new):
        yield "", 0, lambda other, x: x
        return
    facts = component.facts
    mean, deviation = (np.asarray(facts[name], np.float64) for name in ("mean", "deviation"))
    flat = [x.reshape(3, -1) for x in (own, new)]
    found = read(*flat, mean, deviation, COLOURS, facts.get("known", {}))
    if found is not None:
        yield f"are normalised by others: {found.words}", found.size, lambda other, x: _normalised(
            other, x, found.mean, found.deviation)  # fmt: skip
    for change in of_values(Fit(own.astype(np.float64), new.astype(np.float64), 1e-6 * own.size**0.5)):
        words = change.sentence.strip().replace("is ", "are ", 1).replace("has ", "have ", 1)
        yield words, change.size, lambda other, x, change=change: np.asarray(change.apply(x), np.float32)
    yield from _bent(component, own, new, mean, deviation)


def _normalised(other: Component, x: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Pixels normalised anew: from 8 bits where they were that, with float32's rounding."""
    shape = (-1, 1, 1, 1)
    old = [np.asarray(other.facts[name], np.float64).reshape(shape) for name in ("mean", "deviation")]
    colours = x.astype(np.float64) * old[1] + old[0]
    levels = np.round(colours * 255)
    if np.abs(colours * 255 - levels).max() < 1e-2:
        eight = levels.astype(np.float32) / np.float32(255)
        return (eight - mean.reshape(shape).astype(np.float32)) / deviation.reshape(shape).astype(np.float32)
    return (colours - mean.reshape(shape)) / deviation.reshape(shape)


def _bent(
    component: Component, own: np.ndarray, new: np.ndarray, mean: np.ndarray, deviation: np.ndarray
) -> Iterator[tuple[str, float, Callable[[Component, np.ndarray], np.ndarray]]]:
    """Colours raised to a power before they are normalised."""
    shape = (-1, 1, 1, 1)

    def colours(x: np.ndarray) -> np.ndarray:
        return x * deviation.reshape(shape) + mean.reshape(shape)

    a, b = colours(own.astype(np.float64)), colours(new.astype(np.float64))
    inner = (a > 0.02) & (a < 0.98) & (b > 0.005) & (b < 0.999)
    if inner.sum() < 16:
        return
    powers = np.log(b[inner]) / np.log(a[inner])
    power = float(np.median(powers))
    if np.percentile(np.abs(powers - power), 90) > 0.05 * abs(power) or abs(power - 1) < 1e-3:
        return
    power = next((plain for plain in (2.2, 1 / 2.2, 2.0, 0.5, 2.4, 1 / 2.4) if abs(power - plain) < 0.01), power)

    def bent(other: Component, x: np.ndarray) -> np.ndarray:
        raised = np.clip(colours(x.astype(np.float64)), 0, None) ** power
        return (raised - mean.reshape(shape)) / deviation.reshape(shape)

    yield f"have their colours raised to the power {power:.4g}", 1, bent
