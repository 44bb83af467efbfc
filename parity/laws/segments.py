"""The parts of a sequence by name, and classes of them that something may be true of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from parity.laws.base import Component

TEXT, OPENING, CELLS, CLOSING = "text", "opening", "cells", "closing"


@dataclass(frozen=True)
class Segment:
    """A run of tokens.

    Attributes:
        name: "the instruction", "the closing bracket of the target".
        kind: TEXT, or the part of a visual block that it is.
        block: the name of the split that it is a part of: "the target".
        order: its place among the segments of the whole sequence.
        split: the place of its split among those of the whole sequence.
        start, stop: its columns of an array.
        grid: frames, rows and columns of cells.
    """

    name: str
    kind: str
    block: str
    order: int
    split: int
    start: int
    stop: int
    grid: tuple[int, int, int] | None = None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Class:
    """Some segments, in words that follow "positions ": "of the cells", "from the target on", "" for all of them."""

    words: str
    size: float
    holds: Callable[[Segment], bool] = field(repr=False)

    def among(self, segments: Sequence[Segment]) -> list[Segment]:
        return [segment for segment in segments if self.holds(segment)]


def segments_of(component: Component) -> Sequence[Segment]:
    return component.facts.get("segments", ())


def classes(segments: Sequence[Segment]) -> Iterator[Class]:
    """The classes of segments that are told by name or by place, the plainest first."""
    yield Class("", 0, lambda segment: True)
    kinds = {segment.kind for segment in segments}
    if len(kinds) > 1:
        yield Class("of text", 0.5, lambda segment: segment.kind == TEXT)
        yield Class("of visual blocks", 0.5, lambda segment: segment.kind != TEXT)
        for kind, words in ((CELLS, "of cells"), (OPENING, "of opening brackets"), (CLOSING, "of closing brackets")):
            yield Class(words, 0.5, lambda segment, kind=kind: segment.kind == kind)
        yield Class("of brackets", 0.5, lambda segment: segment.kind in (OPENING, CLOSING))
        yield Class("of cells and closing brackets", 0.7, lambda segment: segment.kind in (CELLS, CLOSING))
        yield Class("of text and closing brackets", 0.7, lambda segment: segment.kind in (TEXT, CLOSING))
    for block in dict.fromkeys(segment.block for segment in segments):
        yield Class(f"of {block}", 0.8, lambda segment, block=block: segment.block == block)
    for segment in segments:
        if segment.name != segment.block:
            yield Class(f"of {segment.name}", 0.8, lambda other, name=segment.name: other.name == name)
    for segment in segments:
        yield Class(f"from {segment.name} on", 0.9, lambda other, order=segment.order: other.order >= order)
        yield Class(f"up to {segment.name}", 0.9, lambda other, order=segment.order: other.order <= order)
    seen = [segment for segment in segments if segment.kind == CELLS]
    if len(seen) > 1:
        late = seen[0].split
        yield Class("of text behind a visual block", 0.9, lambda other: other.kind == TEXT and other.split > late)
        yield Class("of every visual block but the first", 0.9, lambda other: other.kind != TEXT and other.split > late)
        yield Class("of the cells of every visual block but the first", 0.9, lambda other: (
            other.kind == CELLS and other.split > late))  # fmt: skip
