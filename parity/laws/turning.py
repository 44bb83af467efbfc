"""A rotation by position as its laws see it, and what it computes instead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.mixture import is_bfloat16, rounded_as
from parity.laws.rounding import bfloat16, rounded_to

# What a law without a number may leave of the residual.
WHOLLY = 0.02


@dataclass(frozen=True)
class Turn:
    """x as complex pairs z [n, heads, f] and their table [n, f]; positions [n, f] and frequencies [f] where known.

    Frequencies are theta ** -exponents [f]. `dtype` is what the table is rounded to, `speeds` what its frequencies are,
    `products` what products are before they are added.
    """

    z: np.ndarray
    table: np.ndarray
    positions: np.ndarray | None
    frequencies: np.ndarray | None
    ids: np.ndarray | None
    axes: np.ndarray
    theta: float
    exponents: np.ndarray
    dtype: str
    speeds: str = "float32"
    products: str = "float32"

    @property
    def turned(self) -> np.ndarray:
        return self.times(self.table)

    def parts(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs times the cosines, and times the sines, of a table [n, f]."""
        parts = self.z * table.real[:, None], self.z * table.imag[:, None]
        return parts if self.products == "float32" else tuple(rounded_to(self.products, part) for part in parts)

    def times(self, table: np.ndarray) -> np.ndarray:
        """What comes of a table [n, f]."""
        with_cosines, with_sines = self.parts(table)
        return with_cosines + 1j * with_sines

    def by(self, angles: np.ndarray) -> np.ndarray:
        """What comes of angles [n, f], rounded as the table is."""
        return self.times(rounded_to(self.dtype, np.exp(1j * angles)))

    def with_theta(self, theta: float) -> np.ndarray:
        """What comes of frequencies of another theta, rounded as they are."""
        return self.by(self.positions * rounded_to(self.speeds, theta**-self.exponents))


Change = Callable[[Turn], np.ndarray | None]
"""The complex pairs [n, heads, f] that come out instead."""


def applied(change: Change) -> Callable[[Component], np.ndarray | None]:
    """A change as what a law computes, rounded as what is there."""

    def apply(component: Component) -> np.ndarray | None:
        turn = turn_of(component)
        new = None if turn is None else change(turn)
        if new is None:
            return None
        result = np.concatenate([new.real, new.imag], -1) + beside(component, turn)
        return rounded_as(component.own, result).astype(np.float32)

    return apply


def beside(component: Component, turn: Turn) -> np.ndarray:
    """What is there beside the rotation as it is rounded: nothing where no other law is beneath."""
    return component.own - rounded_as(component.own, np.concatenate([turn.turned.real, turn.turned.imag], -1))


def turn_of(component: Component) -> Turn | None:
    """A component's pairs and table; None where it has none that fit."""
    x, cos, sin = (component.inputs.get(name) for name in ("x", "cos", "sin"))
    if x is None or cos is None or x.ndim != 3 or x.shape[-1] % 2 or cos.shape != (len(x), x.shape[-1] // 2):
        return None
    if not x.size or component.own.shape != x.shape or not np.isfinite(component.own).all():
        return None
    table = cos.astype(np.float64) + 1j * sin.astype(np.float64)
    half, theta = table.shape[1], float(component.facts.get("theta", 0))
    axes = np.asarray(component.facts.get("axes", np.zeros(half, int)))
    exponents = np.asarray(component.facts.get("exponents", even_exponents(half)))
    dtype = "bfloat16" if np.array_equal(rounded_to("bfloat16", table), table) else "float32"
    turn = Turn(as_pairs(x.astype(np.float64)), table, None, None, None, axes, theta, exponents, dtype)
    if is_bfloat16(component.own):
        in_steps = replace(turn, products="bfloat16")
        turn = min(turn, in_steps, key=lambda each: np.linalg.norm(beside(component, each)))
    ids = component.inputs.get("position_ids")
    if ids is None or theta <= 1 or len(axes) != half or axes.max() >= len(ids):
        return turn
    positions = ids[axes].T.astype(np.float64)
    exact = theta**-exponents
    tried = {"float32": exact, "bfloat16": rounded_to("bfloat16", exact)}
    off = {dtype: np.abs(np.exp(1j * positions * speeds) - table) for dtype, speeds in tried.items()}
    # Of positions that are small either may be near enough.
    held = min(off, key=lambda dtype: np.linalg.norm(off[dtype]))
    if off[held].max() >= 0.02:
        return turn
    ids = ids.astype(np.float64)
    return replace(turn, positions=positions, frequencies=tried[held], speeds=held, ids=ids)


def even_exponents(count: int) -> np.ndarray:
    """From 0 up to 1, evenly spaced."""
    return np.arange(count) / count


def as_pairs(x: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    return x[..., :half] + 1j * x[..., half:]


def with_theta(power: float) -> Change:
    """Frequencies of another theta, by its logarithm."""
    return lambda turn: None if turn.positions is None else turn.with_theta(float(np.exp(power)))


def read_at(change: Callable[[np.ndarray], np.ndarray], axes: Sequence[int]) -> Change:
    def turned(turn: Turn) -> np.ndarray | None:
        if turn.positions is None:
            return None
        positions = turn.positions.copy()
        for axis in axes:
            positions[:, turn.axes == axis] = change(turn.ids[axis])[:, None]
        return turn.by(positions * turn.frequencies)

    return turned


def turned_in_part(start: int, size: int, own: bool) -> Change:
    def turned(turn: Turn) -> np.ndarray | None:
        if turn.positions is None and not own:
            return None
        x = np.concatenate([turn.z.real, turn.z.imag], -1)
        inner = as_pairs(x[..., start : start + size])
        table = turn.table[:, : size // 2]
        if not own:
            table = np.exp(1j * turn.positions[:, : size // 2] * turn.theta ** -even_exponents(size // 2))
        inner = inner * table[:, None]
        x = x.copy()
        x[..., start : start + size] = np.concatenate([inner.real, inner.imag], -1)
        return as_pairs(x)

    return turned


def unrounded(component: Component, got: np.ndarray, turn: Turn, enough: float) -> Law | None:
    """A table in float32 where it should be rounded: then what is turned comes out in float32, or is rounded once."""
    rounds = is_bfloat16(got)
    if turn.positions is None or turn.dtype == "float32":
        return None

    def exact(turn: Turn) -> Turn:
        return replace(turn, dtype="float32")

    def own(turn: Turn) -> np.ndarray:
        return turn.by(turn.positions * turn.theta**-turn.exponents)

    ways: dict[str, Change] = {"cosines and sines are": lambda t: exact(t).by(t.positions * t.frequencies)}
    if turn.speeds != "float32":
        ways["frequencies are"] = own
        ways["frequencies, cosines and sines are"] = lambda t: own(exact(t))
    for words, change in ways.items():

        def apply(other: Component, change: Change = change) -> np.ndarray | None:
            turn = turn_of(other)
            new = None if turn is None or turn.positions is None else change(turn)
            if new is None:
                return None
            if not is_bfloat16(other.own):
                return applied(change)(other)
            values = np.concatenate([new.real, new.imag], -1).astype(np.float32)
            return bfloat16(values) if rounds else values

        left = float(np.linalg.norm(got.astype(np.float64) - apply(component)))
        if left <= max(enough, WHOLLY * float(np.linalg.norm(got.astype(np.float64) - component.own))):
            return Law(f"{words} float32", 0.5 + 0.1 * words.count(" "), apply)
    return None
