"""Laws of a sequence whose tokens are others: parts left out, doubled, moved, put in, cut or written otherwise.

An edit is read from token ids, and what follows of it for roles, lengths of splits and ways of attending.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.edit_words import cells_of, is_plural, range_of, said_before, said_count, said_tokens, stand, stands
from parity.laws.segments import CELLS, CLOSING, OPENING, TEXT, Segment, segments_of

# Separate places that an edit may have, and tokens that are aligned.
MOST, LONGEST = 4, 6000


@dataclass(frozen=True)
class Place:
    """A place between tokens: before the token `offset` of a segment, counted from its end where it is negative.

    Closing places, at a segment's end, have the offset None.
    """

    segment: str
    offset: int | None

    def of(self, segments: Sequence[Segment]) -> int | None:
        found = [segment for segment in segments if segment.name == self.segment]
        if not found:
            return None
        segment = found[0]
        at = segment.length if self.offset is None else self.offset + segment.length * (self.offset < 0)
        return segment.start + at if 0 <= at <= segment.length else None


KINDS = {
    (OPENING, CLOSING): "all brackets are missing",
    (OPENING,): "all opening brackets are missing",
    (CLOSING,): "all closing brackets are missing",
    (TEXT,): "all text is missing",
    (CELLS,): "all cells are missing",
}
Source = tuple[str, int] | int
"""Where a token that is put in comes from: a segment's name and an offset in it, or a token id of no segment."""


@dataclass(frozen=True)
class Hunk:
    """Tokens from `start` up to `stop` replaced by others, in words."""

    start: Place
    stop: Place
    new: tuple[Source, ...]
    words: str
    size: float

    def keeps_length(self, segments: Sequence[Segment]) -> bool:
        """Whether as many tokens are put in as are taken out."""
        start, stop = self.start.of(segments), self.stop.of(segments)
        return start is not None and stop is not None and stop - start == len(self.new)


def edited(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Token ids [n], edited; facts segments, field "ids", words: what some tokens are called."""
    own, segments = component.own, segments_of(component)
    if component.facts.get("field") != "ids" or own.ndim != 1 or got.ndim != 1 or np.array_equal(own, got):
        return
    if not segments or segments[-1].stop != len(own) or not len(got) or max(len(own), len(got)) > LONGEST:
        return
    found = False
    for hunks, words, size in _direct(segments):
        law = Law(words, size, lambda other, hunks=hunks: _applied(other, hunks))
        if (made := law.apply(component)) is not None and np.array_equal(made, got):
            found = True
            yield law
    hunks = None if found else _hunks(own.tolist(), got.tolist(), segments)
    if hunks is None or not 0 < len(hunks) <= MOST:
        return
    # Where most is written otherwise nothing was read.
    if sum(len(set(hunk.new)) for hunk in hunks) > 0.3 * len(own) + 1:
        return
    said = [hunk.words for hunk in hunks if hunk.words]
    sentence = ", ".join(said[:-1]) + (" and " if said[1:] else "") + said[-1]
    law = Law(sentence, sum(hunk.size for hunk in hunks), lambda other: _applied(other, hunks))
    if (made := law.apply(component)) is not None and np.array_equal(made, got):
        yield law
        if len(hunks) > 1 and all(hunk.keeps_length(segments) for hunk in hunks):
            yield from (Law(hunk.words, hunk.size, lambda other, hunk=hunk: _applied(other, [hunk])) for hunk in hunks)


def _direct(segments: Sequence[Segment]) -> Iterator[tuple[list[Hunk], str, float]]:
    """Edits of whole parts by name: all of a kind left out, one left out, doubled or elsewhere."""

    def out(segment: Segment) -> Hunk:
        return Hunk(Place(segment.name, 0), Place(segment.name, None), (), "", 0)

    for kinds, words in KINDS.items():
        of_kind = [segment for segment in segments if segment.kind in kinds and segment.length]
        if len(of_kind) > 1:
            yield [out(segment) for segment in of_kind], words, 0.9
    blocks = {name: [s for s in segments if s.block == name and s.length] for name in {s.block: None for s in segments}}
    units = blocks | {segment.name: [segment] for segment in segments if segment.length}
    for name, parts in units.items():
        are = "are" if is_plural(name) else "is"
        yield [out(segment) for segment in parts], f"{name} {are} missing", 1
        copy = tuple((segment.name, i) for segment in parts for i in range(segment.length))
        behind = Place(parts[-1].name, None)
        yield [Hunk(behind, behind, copy, "", 0)], f"{name} {stands(name)} twice", 1
        for other, target in units.items():
            if set(map(id, target)).isdisjoint(map(id, parts)) and (other in blocks) == (name in blocks):
                here = Place(target[0].name, 0)
                moved = [Hunk(here, here, copy, "", 0), *(out(segment) for segment in parts)]
                yield moved, f"{name} {stands(name)} before {other}", 1.5
    for first, second in zip(list(units), list(units)[1:], strict=False):
        parts = [*units[first], *units[second]]
        if first in blocks and second in blocks:
            yield [out(segment) for segment in parts], f"{first} and {second} are missing", 1.5


def _runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of equal ids: the id, from where, up to where."""
    found: list[tuple[int, int, int]] = []
    for place, token in enumerate(ids):
        if found and found[-1][0] == token:
            found[-1] = (token, found[-1][1], place + 1)
        else:
            found.append((token, place, place + 1))
    return found


def _hunks(own: list[int], got: list[int], segments: Sequence[Segment]) -> list[Hunk] | None:
    """The places in which two lists differ; None where hardly anything is shared."""
    ways = [_aligned(own, got, segments)]
    if len(own) == len(got) and len(runs := _differing(own, got)) <= MOST:
        ways.append(_named(own, segments, [(start, stop, got[start:stop]) for start, stop in runs]))
    return min(filter(None, ways), key=lambda hunks: sum(hunk.size for hunk in hunks), default=None)


def _aligned(own: list[int], got: list[int], segments: Sequence[Segment]) -> list[Hunk] | None:
    ours, theirs = _runs(own), _runs(got)
    matcher = SequenceMatcher(None, [run[0] for run in ours], [run[0] for run in theirs], autojunk=False)
    changes: list[tuple[int, int, list[int]]] = []
    kept = 0
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            for a, b in zip(ours[i1:i2], theirs[j1:j2], strict=True):
                kept += min(a[2] - a[1], b[2] - b[1])
                if (more := (b[2] - b[1]) - (a[2] - a[1])) > 0:
                    changes.append((a[2], a[2], [a[0]] * more))
                elif more < 0:
                    changes.append((a[2] + more, a[2], []))
            continue
        start = ours[i1][1] if i1 < len(ours) else len(own)
        stop = ours[i2 - 1][2] if i2 > i1 else start
        new = got[theirs[j1][1] : theirs[j2 - 1][2]] if j2 > j1 else []
        changes.append((start, stop, new))
    if kept < 0.3 * len(own):
        return None
    changes = [change for start, stop, new in changes for change in _split(own, start, stop, new)]
    return _named(own, segments, changes)


def _differing(own: list[int], got: list[int]) -> list[tuple[int, int]]:
    """The runs of places at which two lists of one length differ."""
    flags = np.concatenate([[False], np.array(own) != np.array(got), [False]])
    edges = np.flatnonzero(flags[1:] != flags[:-1])
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _named(
    own: list[int], segments: Sequence[Segment], changes: Sequence[tuple[int, int, list[int]]]
) -> list[Hunk] | None:
    hunks = []
    for start, stop, new in changes:
        first, last = _place(segments, start), _place(segments, stop, closing=True)
        if first is None or last is None:
            return None
        hunks.append(_hunk(own, segments, start, stop, new, first, last))
    return hunks


def _split(own: list[int], start: int, stop: int, new: list[int]) -> Iterator[tuple[int, int, list[int]]]:
    """A replacement by as many tokens as what differs in it alone."""
    if len(new) != stop - start:
        yield start, stop, new
        return
    differs = [a != b for a, b in zip(own[start:stop], new, strict=True)]
    first, last = differs.index(True), len(differs) - differs[::-1].index(True)
    yield start + first, start + last, new[first:last]


def _hunk(
    own: list[int], segments: Sequence[Segment], start: int, stop: int, new: list[int], first: Place, last: Place
) -> Hunk:
    name, size = range_of(segments, start, stop) if stop > start else ("", 1.0)
    if not new:
        cells = cells_of(segments, start, stop)
        if cells:
            return Hunk(first, last, (), f"{cells[0].block} has {said_count(cells[0], stop - start)} too few", 1.5)
        verb = "are" if is_plural(name) else "is"
        return Hunk(first, last, (), f"{name} {verb} missing", size)
    if start == stop:
        cells = cells_of(segments, max(start - len(new), 0), start) or cells_of(segments, start, start + len(new))
        if cells and len(set(new)) == 1 and new[0] == own[cells[0].start]:
            copies = tuple((cells[0].name, 0) for _ in new)
            return Hunk(first, first, copies, f"{cells[0].block} has {said_count(cells[0], len(new))} too many", 1.5)
        source = _copy(own, segments, start, new)
        if source is not None:
            what = range_of(segments, source, source + len(new))[0]
            twice = source + len(new) == start or source == start
            words = (
                f"{what} {stands(what)} twice" if twice else f"{what} {stands(what)} {said_before(segments, start)} too"
            )
            return Hunk(first, first, _sources(segments, own, source, source + len(new)), words, 1.5)
        return Hunk(
            first, first, tuple(new), f"{said_tokens(new)} {stand(new)} {said_before(segments, start)}", 1 + len(new)
        )
    return Hunk(
        first, last, tuple(new), f"{name} {'are' if is_plural(name) else 'is'} {said_tokens(new)}", size + len(set(new))
    )


def _copy(own: list[int], segments: Sequence[Segment], at: int, new: list[int]) -> int | None:
    """Where tokens that are put in stand elsewhere: beside them, or as a whole segment or block."""
    n = len(new)
    beside = [at - n, at]
    starts = [segment.start for segment in segments]
    for start in [*beside, *(starts if n > 1 else [])]:
        if 0 <= start and own[start : start + n] == new:
            ends = {segment.stop for segment in segments}
            if start in beside or start + n in ends:
                return start
    return None


def _sources(segments: Sequence[Segment], own: list[int], start: int, stop: int) -> tuple[Source, ...]:
    found: list[Source] = []
    for at in range(start, stop):
        segment = next(segment for segment in segments if segment.start <= at < segment.stop)
        found.append((segment.name, at - segment.start))
    return tuple(found)


def _place(segments: Sequence[Segment], at: int, closing: bool = False) -> Place | None:
    """A place, by the segment that ends there where it closes something, else by the one that begins there."""
    ending = [segment for segment in segments if segment.stop == at and segment.length]
    if ending and (closing or at == segments[-1].stop):
        return Place(ending[-1].name, None)
    inside = [segment for segment in segments if segment.start <= at < segment.stop]
    if not inside:
        return None
    segment = inside[0]
    late = at - segment.stop
    return Place(segment.name, late if -late < at - segment.start else at - segment.start)


def _applied(other: Component, hunks: Sequence[Hunk]) -> np.ndarray | None:
    """What follows of an edit for token ids, roles, lengths and modes of splits, or the place of an answer."""
    segments, field = segments_of(other), other.facts.get("field")
    if not segments or field is None:
        return None
    total = segments[-1].stop
    replaced = []
    for hunk in hunks:
        start, stop = hunk.start.of(segments), hunk.stop.of(segments)
        if start is None or stop is None:
            if hunk.new:
                return None
            continue
        replaced.append((start, max(start, stop), hunk))
    split_of = np.concatenate([np.full(segment.length, segment.split) for segment in segments])
    taken: list[int] = []
    written: dict[int, int] = {}
    splits: list[int] = []
    at = 0
    for start, stop, hunk in sorted(replaced, key=lambda item: item[:2]):
        if start < at:
            return None
        taken += range(at, start)
        splits += split_of[at:start].tolist()
        # What is put in becomes a part of what it stands behind, but at the start of a text.
        beside = split_of[start if start < stop or not start or hunk.start.offset == 0 and start < total else start - 1]
        for source in hunk.new:
            if isinstance(source, tuple):
                found = [s for s in segments if s.name == source[0]]
                if not found or source[1] >= found[0].length:
                    return None
                taken.append(found[0].start + source[1])
                splits.append(found[0].split)
            else:
                written[len(taken)] = source
                taken.append(min(start, total - 1))
                splits.append(int(beside))
        at = stop
    taken += range(at, total)
    splits += split_of[at:].tolist()
    return _field(other, field, np.array(taken, int), written, splits)


def _field(
    other: Component, field: str, taken: np.ndarray, written: dict[int, int], splits: list[int]
) -> np.ndarray | None:
    own = other.own
    if field in ("ids", "roles"):
        if own.ndim != 1 or not len(taken) or taken.max() >= len(own):
            return None
        new = own[taken].copy()
        for place, token in written.items():
            if field == "ids":
                new[place] = token
            else:
                role = [own[i] for i, split in zip(taken, splits, strict=True) if split == splits[place]]
                new[place] = role[0]
        return new.astype(own.dtype)
    order = [split for i, split in enumerate(splits) if not i or splits[i - 1] != split]
    if field == "lengths":
        counts = np.diff(np.flatnonzero(np.diff(splits, prepend=-1, append=-1) != 0))
        return counts.astype(own.dtype)
    if field == "modes":
        known = list(dict.fromkeys(segment.split for segment in segments_of(other)))
        if len(known) != len(own):
            return None
        return np.array([own[known.index(split)] for split in order], own.dtype)
    if field == "answer":
        return (own + int(np.searchsorted(taken, own[0])) - own[0]).astype(own.dtype) if len(own) == 1 else None
    return None
