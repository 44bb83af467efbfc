"""Laws of splits that end elsewhere: tokens that count to the split beside theirs, the tokens as they should be."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.edit_words import is_plural
from parity.laws.segments import segments_of

Blocks = dict[str, tuple[int, int]]
"""Where the splits of a sequence start and stop, by their names, in order."""


def bordered(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Roles [n] or lengths of splits, in which a split takes in tokens of the one before or behind it; facts segments,
    field."""
    own, blocks = component.own, blocks_of(component)
    if own.ndim != 1 or own.shape != got.shape or np.array_equal(own, got):
        return
    for (first, (start, border)), (second, (_, stop)) in pairwise(blocks.items()):
        for by in _moves(component, got, list(blocks).index(first), border):
            taker, giver, end = (first, second, "first") if by > 0 else (second, first, "last")
            if not start < border + by < stop:
                continue
            verb = "take" if is_plural(taker) else "takes"
            tokens = f"{end} token" if abs(by) == 1 else f"{end} {abs(by)} tokens"

            def apply(other: Component, first: str = first, second: str = second, by: int = by) -> np.ndarray | None:
                return _moved(other, first, second, by)

            law = Law(f"{taker} {verb} in the {tokens} of {giver}", 1.5, apply)
            if (made := law.apply(component)) is not None and np.array_equal(made, got):
                yield law


def blocks_of(component: Component) -> Blocks:
    """The splits of a component's sequence."""
    found: Blocks = {}
    for segment in segments_of(component):
        found[segment.block] = (found.get(segment.block, (segment.start,))[0], segment.stop)
    return found


def _moves(component: Component, got: np.ndarray, place: int, border: int) -> Sequence[int]:
    """By how much the border behind a split may have moved."""
    if component.facts.get("field") == "lengths":
        return [by] if (by := int(got[place] - component.own[place])) else []
    differs = np.flatnonzero(got != component.own)
    return [int(differs[-1]) + 1 - border] if differs[0] >= border else [int(differs[0]) - border]


def _moved(other: Component, first: str, second: str, by: int) -> np.ndarray | None:
    """What follows for token ids, roles, lengths and ways of attending where the border behind a split moves."""
    blocks, field = blocks_of(other), other.facts.get("field")
    if first not in blocks or second not in blocks or field == "answer":
        return None
    made, border = other.own.copy(), blocks[second][0]
    if field == "roles":
        made[min(border, border + by) : max(border, border + by)] = made[border - 1 if by > 0 else border]
    elif field == "lengths":
        made[list(blocks).index(first)] += by
        made[list(blocks).index(second)] -= by
    return made
