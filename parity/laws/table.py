"""Laws of rows taken from a table."""

from collections.abc import Iterator

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.integers import Change, View, changes
from parity.laws.mixture import comparable, enough, put, where
from parity.laws.segments import TEXT, Segment

# Products that matching rows with a table may take, and how alike a row has to be.
MOST_PRODUCTS, ALIKE = 4e8, 0.999


def embedding(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Own [n, hidden] are the rows ids [n] of facts table [rows, hidden]."""
    if not comparable(component, got) or got.ndim != 2:
        return
    ids, table = component.inputs["ids"].astype(np.int64), component.facts["table"]
    if len(ids) != len(got) or table.shape[1] != got.shape[1]:
        return
    found = _rows_taken(ids, table, component.own, got)
    if found is None or np.array_equal(found, ids):
        return
    for law in _taken_by(ids, found):
        if enough(component, got, law.apply(component)):
            yield law
            return
    for part in where(component, got)[1:]:
        taken = set(found[found != ids].tolist())
        if len(taken) == 1:
            row = taken.pop()
            words = part.says(f"row {row} of the table is taken")
            yield Law(words, 1 + part.size, lambda other, part=part, row=row: put(
                other.own, part.mask(other), other.facts["table"][row]))  # fmt: skip
            return


def _rows_taken(ids: np.ndarray, table: np.ndarray, own: np.ndarray, got: np.ndarray) -> np.ndarray | None:
    """Of each row the row of the table that it is; its own where it is that. None where one is like none."""
    apart = np.linalg.norm(got.astype(np.float64) - own, axis=1)
    wrong = np.flatnonzero(apart > 0.02 * np.linalg.norm(own, axis=1).mean())
    if not len(wrong):
        return None
    near = np.unique(np.clip(ids[None] + np.arange(-16, 17)[:, None], 0, len(table) - 1))
    rows = np.arange(len(table)) if len(wrong) * table.size <= MOST_PRODUCTS else near
    known = table[rows].astype(np.float32)
    lengths = np.linalg.norm(known, axis=1)
    found = ids.copy()
    for i in wrong:
        size = float(np.linalg.norm(got[i]))
        if not size:
            return None
        likeness = known @ got[i] / (np.maximum(lengths, 1e-12) * size)
        best = int(likeness.argmax())
        if likeness[best] < ALIKE or abs(lengths[best] - size) > 0.02 * size:
            return None
        found[i] = rows[best]
    return found


def _taken_by(ids: np.ndarray, found: np.ndarray) -> Iterator[Law]:
    segment = Segment("all", TEXT, "all", 0, 0, 0, len(ids))
    view = View(ids[None], (segment,))

    def rows(other: Component, change: Change) -> np.ndarray | None:
        own, table = other.inputs["ids"].astype(np.int64), other.facts["table"]
        every = Segment("all", TEXT, "all", 0, 0, 0, len(own))
        taken = change.call(View(own[None], (every,)), every, 0)
        return None if taken is None else table[np.clip(taken, 0, len(table) - 1)].astype(np.float32)

    for change in sorted(changes(view, segment, 0, found), key=lambda change: change.size):
        words = f"the rows of the table that are taken are {change.words}"
        yield Law(words, change.size, lambda other, change=change: rows(other, change))
    for by in (1, -1, 2, -2):
        if np.array_equal(np.roll(ids, -by), found) or np.array_equal(
            ids[np.clip(np.arange(len(ids)) + by, 0, len(ids) - 1)], found
        ):
            side = "behind" if by > 0 else "before"
            yield Law(f"the token {abs(by)} {side} is embedded", 1, lambda other, by=by: other.facts["table"][
                np.roll(other.inputs["ids"], -by)].astype(np.float32))  # fmt: skip
