"""Laws of pictures whose values are mixed with those beside them: along an axis, and of colours in squares."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.numbers import listed, norm_of, plainest, told
from parity.laws.place import as_own
from parity.laws.support import beyond, plural, spans

# How far away a value may come from, how many slices and values of each are looked at, and what a law may leave.
REACH, SLICES, VALUES, LEFT = 2, 64, 4096, 0.02
AXES = ("frame", "row", "column")
# What red and blue count in luma.
LUMA = {"BT.601": (0.299, 0.114), "BT.709": (0.2126, 0.0722)}
SQUARES = ((2, 2), (1, 2), (2, 1), (4, 4))
Mix = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class _Mixed:
    """Slices of an axis that are sums of slices near them: of each its distances and what they count."""

    axis: str
    length: int
    slices: dict[int, Mix]

    def of(self, own: np.ndarray, axis: int) -> np.ndarray:
        moved = np.moveaxis(own.astype(np.float64), axis, 0)
        new = moved.copy()
        for at, mix in self.slices.items():
            new[at] = sum(factor * moved[at + by] for by, factor in mix)
        return np.moveaxis(new, 0, axis)

    def says(self) -> tuple[str, float] | None:
        """In words, and how many numbers these take; None where there are too many."""
        places, mixes = list(self.slices), set(self.slices.values())
        sources = {tuple(at + by for by, _ in mix) for at, mix in self.slices.items()}
        if len(sources) == 1 and sources == {tuple(places)} and len({f for mix in mixes for _, f in mix}) == 1:
            middle = " in the middle" if places[0] + places[-1] == self.length - 1 else ""
            both = "both" if len(places) == 2 else "all"
            return f"the {plural(self.axis)} {listed(list(map(str, places)))}{middle} are {both} their mean", 1.5
        if len(mixes) == 1:
            (mix,) = mixes
            chosen = np.isin(np.arange(self.length), places)
            where = spans(self.axis, chosen) if not chosen.all() else []
            within = f"{where[0].within} " if where else ""
            size = max(len(mix), 0.5) + (where[0].size if where else 0)
            parts = " + ".join(self._part(by, factor) for by, factor in mix)
            return f"{within}each {self.axis} is {parts or 0}", size
        if len(places) > REACH:
            return None
        words = [
            f"{self.axis} {at} is {' + '.join(f'{told(f)} {self.axis} {at + by}' for by, f in mix) or 0}"
            for at, mix in self.slices.items()
        ]
        return listed(words), sum(map(len, mixes))

    def _part(self, by: int, factor: float) -> str:
        which = "itself" if not by else f"the one {abs(by)} {'before' if by < 0 else 'behind'}"
        return f"{told(factor)} times {which}"


def along_an_axis(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Some or all frames, rows or columns that are sums of those near them."""
    own = component.own
    if own.shape != got.shape or len(component.axes) != own.ndim or not np.isfinite(got).all():
        return
    residual = got.astype(np.float64) - own
    allowed = max(component.rounding, LEFT * norm_of(residual), 0.3 * own.size**0.5 * (own.dtype.kind != "f"))
    for axis, name in enumerate(component.axes):
        wrong = beyond(residual, own.astype(np.float64), axis, component.rounding / (norm_of(own) or 1.0) + 1e-6)
        if name not in AXES or own.shape[axis] < 3 or not wrong.any():
            continue
        found = _mixed(name, *(np.moveaxis(a, axis, 0).reshape(len(wrong), -1) for a in (own, got)), wrong)
        said = found.says() if found else None
        if said is None or norm_of(got - found.of(own, axis)) > allowed:
            continue

        def apply(other: Component, found: _Mixed = found) -> np.ndarray | None:
            if found.axis not in other.axes or other.own.shape[at := other.axes.index(found.axis)] != found.length:
                return None
            return as_own(other, found.of(other.own, at))

        yield Law(*said, apply)


def _mixed(name: str, own: np.ndarray, got: np.ndarray, wrong: np.ndarray) -> _Mixed | None:
    """What each wrong slice [n, values] is a sum of; None where one is none."""
    columns = np.random.default_rng(0).permutation(own.shape[1])[:VALUES]
    own, got, slices = own[:, columns].astype(np.float64), got[:, columns].astype(np.float64), {}
    places = np.flatnonzero(wrong)
    for at in places[:SLICES]:
        near = np.arange(max(at - REACH, 0), min(at + REACH + 1, len(own)))
        if own.shape[1] < 4 * len(near):
            return None
        factors = np.linalg.lstsq(own[near].T, got[at], rcond=1e-6)[0]
        if norm_of(got[at] - factors @ own[near]) > 5 * LEFT * norm_of(got[at] - own[at]):
            return None
        plain = [plainest(float(factor), 0.01)[0] for factor in factors]
        slices[int(at)] = tuple((int(j - at), factor) for j, factor in zip(near, plain, strict=True) if factor)
    # Of more the others are as those in the middle.
    slices |= {int(at): slices[int(places[SLICES // 2])] for at in places[SLICES:]}
    fits = all(0 <= at + by < len(own) for at, mix in slices.items() for by, _ in mix)
    return _Mixed(name, len(own), slices) if fits else None


def chroma(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Pixels [3, frames, rows, columns] in [-1, 1], or of 8 bits made of such, whose chroma squares share."""
    own = component.own
    if own.ndim != 4 or len(own) != 3 or got.shape != own.shape or not (own != got).any():
        return
    for standard, (red, blue) in LUMA.items():
        for square in SQUARES:

            def apply(other: Component, red: float = red, blue: float = blue, square: tuple = square):
                x, bits = other.inputs.get("x"), other.own.dtype.kind != "f"
                values = (x.astype(np.float64) + 1) * 127.5 if bits and x is not None else other.own.astype(np.float64)
                _, frames, rows, columns = values.shape
                if rows % square[0] or columns % square[1]:
                    return None
                luma = red * values[0] + (1 - red - blue) * values[1] + blue * values[2]
                parts = (values - luma).reshape(
                    3, frames, rows // square[0], square[0], columns // square[1], square[1])  # fmt: skip
                shared = luma + np.broadcast_to(parts.mean((3, 5), keepdims=True), parts.shape).reshape(values.shape)
                return as_own(other, shared.clip(0, 255)) if bits else shared.clip(-1, 1).astype(np.float32)

            law = Law(f"each {square[0]} by {square[1]} pixels share the mean of their chroma ({standard})", 1.5, apply)
            made = law.apply(component)
            if made is not None and norm_of(got - made.astype(np.float64)) <= LEFT * norm_of(got - own.astype(float)):
                yield law


FITTERS = (along_an_axis, chroma)
