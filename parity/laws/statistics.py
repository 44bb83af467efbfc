"""Laws of channels less a mean in units of a deviation: which means and deviations were used instead."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.convolution import Reading, reading_of
from parity.laws.mixture import comparable, enough, rounded_as
from parity.laws.numbers import listed, plainest
from parity.laws.patches import all_places, convolved, laid_out, taken

Known = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Means and deviations by whose they are."""
LISTED = 4


@dataclass(frozen=True)
class Statistics:
    """Means and deviations by channel, float64 [channels], and what is said of them; `describes` as of a Law."""

    mean: np.ndarray
    deviation: np.ndarray
    words: str
    size: float
    describes: bool


def read(
    own: np.ndarray, got: np.ndarray, mean: np.ndarray, deviation: np.ndarray, names: Sequence[str], known: Known
) -> Statistics | None:
    """The means and deviations that values [channels, n] were normalised by, which should be those given.

    None where they are the right ones, and where no such numbers make what was computed.
    """
    channels = len(own)
    x, y = own.astype(np.float64), got.astype(np.float64)
    centred = x - x.mean(1, keepdims=True)
    square = np.sum(centred * centred, 1)
    if (square <= 1e-12 * np.maximum(np.sum(x * x, 1), 1e-30)).any():
        return None
    a = np.sum(centred * y, 1) / square
    b = y.mean(1) - a * x.mean(1)
    spread = np.linalg.norm(y - a[:, None] * x - b[:, None], axis=1)
    if (np.abs(a) < 1e-9).any() or (spread > 0.05 * np.linalg.norm(y - x, axis=1).max()).any():
        return None
    off_a = 3 * spread / np.sqrt(square) + 3e-7 * np.abs(a)
    off_b = 3 * spread / np.sqrt(x.shape[1]) + 3e-7 * (np.abs(b) + np.abs(y).max(1))
    found = {"deviation": deviation / a, "mean": np.empty(channels)}
    found["mean"] = mean - b * found["deviation"]
    off = {
        "deviation": np.abs(deviation / a**2) * off_a,
        "mean": np.abs(found["deviation"]) * (off_b + np.abs(b / a) * off_a),
    }
    right = {"mean": mean, "deviation": deviation}
    words, size, describes = [], 0.0, False
    for what in ("mean", "deviation"):
        wrong = np.abs(found[what] - right[what]) > np.maximum(off[what], 1e-6 * np.abs(right[what]))
        if not wrong.any():
            found[what] = right[what]
            continue
        said, numbers, unnamed = _told(what, found[what], off[what], wrong, right[what], names, known)
        found[what] = np.where(wrong, found[what], right[what])
        words.append(said)
        size += numbers
        describes |= unnamed
    if not words:
        return None
    return Statistics(found["mean"], found["deviation"], " and ".join(words), size, describes)


def _told(
    what: str,
    found: np.ndarray,
    off: np.ndarray,
    wrong: np.ndarray,
    right: np.ndarray,
    names: Sequence[str],
    known: Known,
) -> tuple[str, float, bool]:
    """What is said of some means or deviations, which are then the numbers that were said; whether that names none."""
    for whose, sets in known.items():
        values = np.asarray(sets[what == "deviation"], np.float64)
        if (np.abs(values - found)[wrong] <= np.maximum(off, 1e-9)[wrong]).all():
            same = np.abs(values - right) <= 1e-9
            if (wrong | same).all():
                found[:] = values
                return f"the {what} is {whose}", 1, False
    order = [int(np.abs(right - value).argmin()) for value in found]
    if sorted(order) == list(range(len(right))) and order != sorted(order) and len(set(right.tolist())) == len(right):
        if (np.abs(right[order] - found) <= np.maximum(off, 1e-9)).all():
            found[:] = right[order]
            whose = ", ".join(names[i] for i in order) if len(order) <= LISTED else "other channels"
            return f"the {what}s are those of {whose}", 1.5, False
    values = [plainest(float(value), float(near)) for value, near in zip(found, off, strict=True)]
    for i in np.flatnonzero(wrong):
        found[i] = values[i][0]
    places = np.flatnonzero(wrong)
    if len({values[i][1] for i in places}) == 1:
        where = "" if wrong.all() else f" of {_channels([names[i] for i in places])}"
        alone = " alone" if len(places) == 1 and len(wrong) > 1 else ""
        return f"the {what}{where}{alone} is {values[places[0]][1]}", 1 + (0 if wrong.all() else len(places)), False
    ratio = found[wrong] / np.where(right[wrong] != 0, right[wrong], np.nan)
    if np.isfinite(ratio).all() and np.ptp(ratio) <= 1e-4 * abs(ratio.mean()):
        factor, said = plainest(float(ratio.mean()), 1e-4 * abs(ratio.mean()))
        found[wrong] = right[wrong] * factor
        return f"the {what} is {said} times as large", 1 + (not wrong.all()), False
    said, many = [f"{values[i][1]} of {names[i]}" for i in places], len(places) > LISTED
    words = f"another in {len(places)} channels" if many else listed(said)
    return f"the {what} is {words}", 1.0 + len(places), many


def _channels(words: Sequence[str]) -> str:
    return f"{len(words)} channels" if len(words) > LISTED else listed(words)


def normalised(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Own [1, channels, ...] less facts mean, in units of facts deviation, [channels]; facts what."""
    if not comparable(component, got) or component.own.ndim < 3:
        return

    def rows(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, 1, 0).reshape(array.shape[1], -1)

    mean, deviation = (np.asarray(component.facts[name], np.float64) for name in ("mean", "deviation"))
    channels = len(mean)
    if component.own.shape[1] != channels:
        return
    known = {"left out": (np.zeros(channels), np.ones(channels)), "turned round": (-mean, 1 / deviation),
             "the variance": (mean, deviation**2), "its root": (mean, np.sqrt(deviation))}  # fmt: skip
    found = read(rows(component.own), rows(got), mean, deviation, [f"channel {i}" for i in range(channels)], known)
    if found is None:
        return

    def apply(other: Component) -> np.ndarray | None:
        if other.own.ndim < 2 or other.own.shape[1] != channels:
            return None
        shape = [1, -1] + [1] * (other.own.ndim - 2)
        values = (v.reshape(shape) for v in (deviation, mean, found.mean, found.deviation))
        old_deviation, old_mean, new_mean, new_deviation = values
        return ((other.own * old_deviation + old_mean - new_mean) / new_deviation).astype(np.float32)

    if enough(component, got, apply(component)):
        words = f"of {component.facts.get('what', 'the result')} {found.words}"
        yield Law(words, found.size, apply, describes=found.describes)


def brought_back(component: Component, got: np.ndarray) -> Iterator[Law]:
    """A convolution of x that was made with facts statistics, mean and deviation [in], of which one channel's are
    others."""
    known, reading = component.facts.get("statistics"), reading_of(component)
    if known is None or reading is None or not comparable(component, got):
        return
    mean, deviation = (np.asarray(values, np.float64) for values in known)
    places = all_places(got.shape)
    target = taken(got.astype(np.float64) - component.own, places)

    def parts(other: Reading, channel: int, at: np.ndarray) -> list[np.ndarray]:
        """What a channel makes of the result, and what it would where it is 1."""
        x, weight = other.x[[channel]], other.weight[:, [channel]]
        return [convolved(values, weight, other.geometry, at) for values in (x, np.ones_like(x))]

    fits = []
    for channel in range(len(mean)):
        columns = np.stack([part.ravel() for part in parts(reading, channel, places)], 1)
        factors = np.linalg.lstsq(columns, target.ravel(), rcond=1e-9)[0]
        fits.append((float(np.linalg.norm(columns @ factors - target.ravel())), channel, factors, columns))
    left, channel, (more, by), columns = min(fits, key=lambda fit: fit[0])
    noise = max(left, 1e-6 * float(np.linalg.norm(target))) / target.size**0.5
    near = 3 * noise / np.linalg.norm(columns, axis=0)
    scale, said = plainest(float(deviation[channel] * (1 + more)), float(near[0] * deviation[channel]))
    level, also = plainest(float((1 + more) * mean[channel] + by), float(near[1] + near[0] * abs(mean[channel])))
    words = [f"the deviation of channel {channel} alone is {said}"] if abs(more) > near[0] else []
    if abs(level - mean[channel]) > near[1] + near[0] * abs(mean[channel]):
        words.append(f"the mean of channel {channel} alone is {also}")
    else:
        level = float(mean[channel])
    ratio = scale / deviation[channel] if abs(more) > near[0] else 1.0

    def apply(other: Component) -> np.ndarray | None:
        seen = reading_of(other)
        if seen is None or "statistics" not in other.facts:
            return None
        one, ones = parts(seen, channel, all_places(other.own.shape))
        change = (ratio - 1) * one + (level - ratio * mean[channel]) * ones
        return rounded_as(other.own, other.own + laid_out(change, other.own.shape)).astype(np.float32)

    if words and enough(component, got, apply(component)):
        yield Law(f"of the latents {' and '.join(words)}", 2.0 * len(words), apply)
