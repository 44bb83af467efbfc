"""Laws of the integers of a sequence that have their right number: positions, roles, lengths, grids, token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.integers import Change, View, changes
from parity.laws.segments import Class, classes, segments_of
from parity.laws.support import spans

# Things that may have been done to one list of integers, and units that are looked at for what was.
MOST, SAMPLED = 3, 9
# The part of the integers that differ which a law of some of them accounts for.
LEAST = 0.1
Unit = tuple[int, int]
"""A segment's number and an axis."""


@dataclass(frozen=True)
class Piece:
    """A change, of which segments and axes."""

    change: Change
    of: Class
    axes: tuple[int, ...]
    covers: frozenset[Unit]
    size: float

    def applied(self, view: View, ids: np.ndarray) -> np.ndarray | None:
        """The integers with this change, which is made of the view's."""
        new, found = ids.copy(), False
        for segment in self.of.among(view.segments):
            for axis in self.axes:
                if axis >= len(ids) or not segment.length:
                    continue
                value = self.change.call(view, segment, axis)
                if value is None:
                    return None
                new[axis, segment.rows], found = value, True
        return new if found else None


def view_of(component: Component) -> View | None:
    """A component's integers as [axes, n]; a list has one axis, a table [n, 3] three."""
    ids, segments = component.own, tuple(component.facts.get("units") or segments_of(component))
    if ids.ndim == 1:
        ids = ids[None]
    elif component.facts.get("table"):
        ids = ids.T
    if ids.ndim != 2 or not segments or segments[-1].stop != ids.shape[1]:
        return None
    facts = component.facts
    first, counts, names = facts.get("first", 0), facts.get("counts", False), facts.get("names")
    return View(ids.astype(np.int64), segments, first, counts, names)


def elementwise(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Integers [n] or [3, n], or a table [n, 3], as many as there should be.

    facts segments, axes: what the integers of each axis are called in the plural; units: what stands in the place of
    segments where each integer is one's; table; first, counts, names: see View.
    """
    view = view_of(component)
    if view is None or component.own.shape != got.shape or np.array_equal(component.own, got):
        return
    if not np.array_equal(got, np.round(got)):
        return
    new = (got[None] if got.ndim == 1 else got.T if component.facts.get("table") else got).astype(np.int64)
    wrong = {
        (i, axis)
        for i, segment in enumerate(view.segments)
        for axis in range(len(view.ids))
        if not np.array_equal(view.of(segment, axis), new[axis, segment.rows])
    }
    counted = list(_recounted(component, view, new))
    yield from counted
    if counted:
        return
    pieces = _pieces(view, new, wrong)
    whole = [piece for piece in pieces if piece.covers >= wrong]
    for piece in whole[:6]:
        yield _law([piece], component)
    if whole:
        return
    if "units" not in component.facts and view.names is None:
        yield from _by_token(component, view, new)
    found = list(_together(pieces, wrong))
    if found:
        yield _law(found, component)
    # Of what has several causes each may be told by itself.
    weight = {unit: _differing(view, new, unit) for unit in wrong}
    for piece in _apart(pieces, wrong):
        if sum(weight[unit] for unit in piece.covers) >= LEAST * sum(weight.values()):
            yield _law([piece], component)


def _differing(view: View, new: np.ndarray, unit: Unit) -> int:
    segment = view.segments[unit[0]]
    return int(np.sum(view.of(segment, unit[1]) != new[unit[1], segment.rows]))


def _pieces(view: View, new: np.ndarray, wrong: set[Unit]) -> list[Piece]:
    """What may have been done, the plainest first."""
    groups = [
        (group, frozenset(i for i, segment in enumerate(view.segments) if group.holds(segment)))
        for group in classes(view.segments)
    ]
    found: list[Piece] = []
    tried: set[Change] = set()
    # What is true of the longest may be true of all.
    for i, axis in sorted(wrong, key=lambda unit: -view.segments[unit[0]].length)[:SAMPLED]:
        segment = view.segments[i]
        candidates = dict.fromkeys(changes(view, segment, axis, new[axis, segment.rows]))
        for change in candidates:
            if change not in tried:
                tried.add(change)
                found += _pieces_of(change, view, new, wrong, groups)
        if any(piece.covers >= wrong and not piece.of.words for piece in found):
            break
    return sorted(found, key=lambda piece: (piece.size, -len(piece.covers)))


def _pieces_of(
    change: Change, view: View, new: np.ndarray, wrong: set[Unit], groups: Sequence[tuple[Class, frozenset[int]]]
) -> Iterator[Piece]:
    """Of which segments and axes a change is true, for each set of units the plainest words."""
    count = len(view.ids)
    fits = np.zeros((len(view.segments), count), bool)
    for i, segment in enumerate(view.segments):
        for axis in range(count):
            value = change.call(view, segment, axis)
            fits[i, axis] = value is not None and np.array_equal(value, new[axis, segment.rows])
    best: dict[frozenset[Unit], Piece] = {}
    for chosen in (axes for size in range(count, 0, -1) for axes in combinations(range(count), size)):
        unfit = set(np.flatnonzero(~fits[:, chosen].all(1)).tolist())
        differing = {unit for unit in wrong if unit[1] in chosen}
        if not differing:
            continue
        for group, members in groups:
            if not unfit.isdisjoint(members):
                continue
            covers = frozenset(unit for unit in differing if unit[0] in members)
            size = change.size + group.size + (0 if len(chosen) == count else 0.5)
            if covers and (covers not in best or size < best[covers].size):
                best[covers] = Piece(change, group, chosen, covers, size)
    yield from best.values()


def _together(pieces: Sequence[Piece], wrong: set[Unit]) -> Iterator[Piece]:
    """A few pieces that account for everything; none where they do not."""
    left, chosen = set(wrong), []
    while left and len(chosen) < MOST:
        # By what each number that is read accounts for.
        best = max(pieces, key=lambda piece: (len(piece.covers & left) / piece.size, -piece.size), default=None)
        if best is None or not best.covers & left:
            return
        chosen.append(best)
        left -= best.covers
    if not left:
        yield from chosen


def _apart(pieces: Sequence[Piece], wrong: set[Unit]) -> Iterator[Piece]:
    """For every unit the piece that accounts for most beside it."""
    told: list[Piece] = []
    for unit in sorted(wrong):
        own = [piece for piece in pieces if unit in piece.covers]
        best = max(own, key=lambda piece: (len(piece.covers) / piece.size, -piece.size), default=None)
        if best is not None and best not in told:
            told.append(best)
    yield from told[:6]


def _by_token(component: Component, view: View, new: np.ndarray) -> Iterator[Law]:
    """One number added, or read, from some token on or in a few."""
    differs = new != view.ids
    columns, axes = differs.any(0), tuple(np.flatnonzero(differs.any(1)).tolist())
    ends = (view.segments[0].start, view.segments[-1].stop)
    if not np.array_equal(np.ix_(axes, np.flatnonzero(columns))[1].ravel(), np.flatnonzero(differs[axes[0]])):
        return
    gaps, values = np.unique((new - view.ids)[differs]), np.unique(new[differs])
    names = component.facts["axes"]
    whose = component.facts.get("all", names[0]) if len(axes) == len(names) else " and ".join(names[a] for a in axes)
    for span in spans("token", columns)[:1]:
        if span.size > 2 or ends[0]:
            return
        for found, words in ((gaps, "off by {:+d}"), (values, "{}")):
            if len(found) != 1:
                continue
            number, adds = int(found[0]), found is gaps

            def apply(other: Component, span=span, number=number, adds=adds) -> np.ndarray | None:
                seen = view_of(other)
                if seen is None or other.facts["axes"] != names or other.own.shape != component.own.shape:
                    return None
                chosen = span.of(seen.ids.shape[1])[None] & np.isin(np.arange(len(seen.ids)), axes)[:, None]
                return _shaped(other, np.where(chosen, seen.ids * adds + number, seen.ids))

            yield Law(f"{whose} {span.within} are {words.format(number)}", 1.7 + span.size, apply)


def _recounted(component: Component, view: View, new: np.ndarray) -> Iterator[Law]:
    """What changes how segments count, where each one goes on from the largest integer before it."""
    if len(view.ids) != 3 or not (_goes_on(view.ids, view) and _goes_on(new, view)):
        return
    starts = [segment.start for segment in view.segments if segment.length]
    if np.array_equal(view.ids[:, starts], new[:, starts]):
        return
    own, found = (_from_zero(ids, view) for ids in (view.ids, new))
    flat = View(own, view.segments, view.first)
    wrong = {
        (i, axis)
        for i, segment in enumerate(view.segments)
        for axis in range(3)
        if not np.array_equal(own[axis, segment.rows], found[axis, segment.rows])
    }
    for piece in [piece for piece in _pieces(flat, found, wrong) if piece.covers >= wrong][:2]:

        def apply(other: Component, piece: Piece = piece) -> np.ndarray | None:
            seen = view_of(other)
            if seen is None or len(seen.ids) != 3 or not _goes_on(seen.ids, seen):
                return None
            ids = _from_zero(seen.ids, seen)
            made = piece.applied(View(ids, seen.segments, seen.first), ids)
            if made is None:
                return None
            start = int(seen.ids[:, 0].min())
            for segment in seen.segments:
                made[:, segment.rows] += start
                start = int(made[:, segment.rows].max(initial=start - 1)) + 1
            return _shaped(other, made)

        said = _said(piece, component.facts["axes"], component.facts.get("all", ""))
        yield Law(f"{said}, and what follows counts on from there", piece.size + 0.2, apply)


def _goes_on(ids: np.ndarray, view: View) -> bool:
    """Whether every segment starts, on all axes, behind the largest integer of those before it."""
    start = int(ids[:, 0].min())
    for segment in view.segments:
        if segment.length and (ids[:, segment.start] != start).any():
            return False
        start = int(ids[:, segment.rows].max(initial=start - 1)) + 1
    return True


def _from_zero(ids: np.ndarray, view: View) -> np.ndarray:
    new = ids.copy()
    for segment in view.segments:
        new[:, segment.rows] -= ids[:, segment.start : segment.start + 1]
    return new


def _shaped(component: Component, ids: np.ndarray) -> np.ndarray:
    shaped = ids[0] if component.own.ndim == 1 else ids.T if component.facts.get("table") else ids
    return shaped.astype(component.own.dtype)


def _law(pieces: Sequence[Piece], component: Component) -> Law:
    names: Sequence[str] = component.facts["axes"]

    def apply(other: Component) -> np.ndarray | None:
        view = view_of(other)
        # What is said of roles says nothing of token ids.
        if view is None or other.facts["axes"] != names:
            return None
        ids = view.ids
        for piece in pieces:
            made = piece.applied(view, ids)
            if made is None:
                return None
            ids = made
        return _shaped(other, ids)

    said = [_said(piece, names, component.facts.get("all", names[0])) for piece in pieces]
    return Law(", ".join(said[:-1]) + (" and " if said[1:] else "") + said[-1], sum(p.size for p in pieces), apply)


def _said(piece: Piece, names: Sequence[str], everything: str) -> str:
    chosen = [names[axis] for axis in piece.axes]
    subject = everything if len(chosen) == len(names) else " and ".join(chosen)
    return " ".join(filter(None, [subject, piece.of.words, "are", piece.change.words]))
