"""Some tokens of a sequence and where they stand, in words."""

from collections.abc import Sequence

from parity.laws.segments import CELLS, Segment

# Tokens that are told one by one.
LISTED = 4


def said_count(cells: Segment, count: int) -> str:
    if cells.grid is not None:
        _, rows, columns = cells.grid
        for one, many, unit in (("frame", "frames", rows * columns), ("row", "rows", columns)):
            if unit > 1 and count % unit == 0:
                return f"{count // unit} {one if count == unit else many} of cells"
    return f"{count} {'cell' if count == 1 else 'cells'}"


def cells_of(segments: Sequence[Segment], start: int, stop: int) -> list[Segment]:
    return [s for s in segments if s.kind == CELLS and s.start <= start and stop <= s.stop and stop > start
            and stop - start < s.length]  # fmt: skip


def range_of(segments: Sequence[Segment], start: int, stop: int) -> tuple[str, float]:
    """The name of some tokens, and how many numbers are in it."""
    whole = [segment for segment in segments if start <= segment.start and segment.stop <= stop and segment.length]
    if whole and whole[0].start == start and whole[-1].stop == stop:
        blocks = list(dict.fromkeys(segment.block for segment in whole))
        full = [
            block
            for block in blocks
            if all(segment in whole for segment in segments if segment.block == block and segment.length)
        ]
        names = list(dict.fromkeys(s.block if s.block in full else s.name for s in whole))
        return " and ".join(names) if len(names) < 4 else f"all from {names[0]} to {names[-1]}", float(
            min(len(names), 3)
        )
    inside = [segment for segment in segments if segment.start <= start < segment.stop]
    if inside and stop <= inside[0].stop:
        segment, count = inside[0], stop - start
        if start == segment.start:
            return f"the first {_many(count)}of {segment.name}", 1.5
        if stop == segment.stop:
            return f"the last {_many(count)}of {segment.name}", 1.5
        first = start - segment.start
        where = f"token {first}" if count == 1 else f"tokens {first} to {first + count - 1}"
        return f"{where} of {segment.name}", 2.0
    first, last = inside[0].name if inside else "the start", _last(segments, stop)
    return f"{stop - start} tokens from {first} to {last}", 3.0


def _last(segments: Sequence[Segment], stop: int) -> str:
    return next((segment.name for segment in segments if segment.start < stop <= segment.stop), "the end")


def _many(count: int) -> str:
    return "token " if count == 1 else f"{count} tokens "


def is_plural(name: str) -> bool:
    return " and " in name or "tokens " in name or name.startswith(("all from", "the cells"))


def stands(name: str) -> str:
    return "stand" if is_plural(name) else "stands"


def stand(new: Sequence[int]) -> str:
    return "stands" if len(new) == 1 else "stand"


def said_tokens(new: Sequence[int]) -> str:
    if len(set(new)) == 1 and len(new) > 1:
        return f"{len(new)} times token {new[0]}"
    if len(new) > LISTED:
        return f"{len(new)} other tokens"
    return ("token " if len(new) == 1 else "tokens ") + " ".join(map(str, new))


def said_before(segments: Sequence[Segment], at: int) -> str:
    inside = [segment for segment in segments if segment.start <= at < segment.stop]
    if not inside:
        return "at the end"
    segment = inside[0]
    if segment.start == at:
        block = [other for other in segments if other.block == segment.block]
        return f"before {segment.block if block[0] is segment else segment.name}"
    return f"before token {at - segment.start} of {segment.name}"
