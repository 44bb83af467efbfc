"""How often explanations turned out right, counted over faults whose author had read nothing that explains them.

What is told of a kind of component is counted over the other kinds: it holds for what was not tried. Counted are what
scripts/blind_table.py has from a reader.
"""

from functools import cache
from typing import NamedTuple

from parity.model import definition

LEAST = 0.85
"""Part of the explanations of a sort that have to be right; of another sort they are hints."""
FEWEST = 20
"""So many have to be graded to tell."""


class Record(NamedTuple):
    """How many explanations were right, of how many."""

    right: int
    told: int

    @property
    def good(self) -> bool:
        """Whether so many are right that such an explanation is more than a hint."""
        return self.right >= LEAST * self.told


@cache
def record_of(read: bool, kind: str) -> Record | None:
    """Of explanations of other kinds of components, said beforehand or `read` from the data; None where too few are
    graded."""
    counts = [count for name, count in definition().CONFIDENCE[_SORTS[read]].items() if name != kind]
    found = Record(*(sum(part) for part in zip(*counts, strict=True))) if counts else Record(0, 0)
    return found if found.told >= FEWEST else None


_SORTS = {False: "said", True: "read"}


def counted(graded: list[tuple[bool, str, bool]]) -> dict[str, dict[str, list[int]]]:
    """What record_of reads: right and told by sort and kind, of (read, kind, right)."""
    found: dict[str, dict[str, list[int]]] = {sort: {} for sort in _SORTS.values()}
    for read, kind, right in sorted(graded):
        count = found[_SORTS[read]].setdefault(kind, [0, 0])
        count[0] += right
        count[1] += 1
    return found
