"""What became of positions, told from those expected and those found."""

from collections.abc import Callable, Iterator

import numpy as np

from parity.laws.numbers import snapped, told
from parity.laws.rounding import rounded_to
from parity.laws.support import span_of

Map = Callable[[np.ndarray], np.ndarray]
# The part of the positions that have to come out as they were found; the law itself is held against the result.
MOST = 0.9


def told_positions(ids: np.ndarray, found: np.ndarray) -> Iterator[tuple[str, float, Map]]:
    """Maps of positions [n] that make those found of those expected, each in words and with its size."""
    wrong = np.abs(found - ids) > 0.25
    if not wrong.any():
        return
    for words, size, change in _maps(ids, found, wrong):
        made = change(ids)
        if np.mean(np.abs(made[wrong] - found[wrong]) < 0.5) >= MOST and np.mean(np.abs(made - found) < 0.5) >= MOST:
            yield words, size, change


def _slowed(ids: np.ndarray, found: np.ndarray) -> Iterator[tuple[str, float, Map]]:
    """Positions that count another number of times, up to a limit."""
    most = found.max()
    rising = (found < most - 1) & (ids > 0)
    if rising.sum() < 2 or rising.all():
        return
    ratio = float(np.sum(found[rising] * ids[rising]) / np.sum(ids[rising] ** 2))
    ratio = snapped(ratio, lambda number: bool(np.abs(number * ids[rising] - found[rising]).max() < 0.05))
    limit = float(np.round(most / ratio)) if ratio > 0 else 0.0
    if limit and told(ratio) != "1":
        words = f"positions above {told(limit)} read {told(limit)}, and angles are {told(ratio)} times as large"
        yield words, 2, lambda p: ratio * np.minimum(p, limit)


def _maps(ids: np.ndarray, found: np.ndarray, wrong: np.ndarray) -> Iterator[tuple[str, float, Map]]:
    most, least = found.max(), found.min()
    if wrong.all() and most - least < 0.5:
        # A limit that no position is within is none.
        yield f"every position reads {told(most)}", 1, lambda p: np.full_like(p, most)
    else:
        yield f"positions above {told(most)} read {told(most)}", 1, lambda p: np.minimum(p, most)
        yield f"positions below {told(least)} read {told(least)}", 1, lambda p: np.maximum(p, least)
        yield from _slowed(ids, found)
    shift = float(np.median(found[wrong] - ids[wrong]))
    yield f"positions are shifted by {told(shift)}", 1, lambda p: p + shift
    over = np.abs(found - ids)[wrong]
    if (period := float(over.min())) >= 2:
        yield f"positions are taken modulo {told(period)}", 1, lambda p: p % period
    if np.ptp(ids[wrong]) > 0:
        slope, start = np.polyfit(ids[wrong], found[wrong], 1)
        slope = snapped(float(slope), lambda number: abs(number - slope) * np.ptp(ids[wrong]) < 1)
        start = float(np.round(2 * np.median(found[wrong] - slope * ids[wrong])) / 2)
        more = f" {'+' if start > 0 else '-'} {told(abs(start))}" if start else ""
        yield f"positions are multiplied by {told(slope)}{more}", 1 + bool(start), lambda p: slope * p + start
        yield f"positions are multiplied by {told(slope)} and rounded down", 1.5, lambda p: np.floor(slope * p)
        yield f"positions are multiplied by {told(slope)} and rounded", 1.5, lambda p: np.round(slope * p)
    for dtype in ("bfloat16", "float16"):
        yield f"positions are {dtype}", 1, lambda p, dtype=dtype: rounded_to(dtype, p)
    yield "positions are counted from 0", 1, lambda p: p - p[0]
    yield "positions are the places of the tokens", 1, lambda p: np.arange(len(p), dtype=float)
    yield "positions run the other way", 1, lambda p: p[::-1]
    for step in (1, -1):
        which = "before" if step > 0 else "after"
        yield f"every token has the position of the token {which} it", 1, lambda p, step=step: np.roll(p, step)
    first = float(found[0])
    yield f"positions count tokens from {told(first)}", 2, lambda p: first + np.arange(len(p))
    where = span_of("token", wrong)
    shifts, values = np.unique(found[wrong] - ids[wrong]), np.unique(found[wrong])

    if where and len(values) == 1:
        yield (
            f"{where.those} read position {told(values[0])}",
            2,
            lambda p: np.where(where.of(len(p)), values[0], p),
        )
    elif where and len(shifts) == 1:
        yield (
            f"{where.those} are shifted by {told(shifts[0])}",
            2,
            lambda p: np.where(where.of(len(p)), p + shifts[0], p),
        )
