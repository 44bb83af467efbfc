"""Counting rotary ids in ways that differ from upstream's, and where a tap's ids lie in their sequence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from parity.lance.hypotheses.tokens import arm_splits, calls_of
from reference.layout import Mode, Role, Split
from reference.positions import SUBJECT_ANCHOR, VIT_ANCHOR

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

# Which recipe made which ids at a site: hypotheses that are tried on top of each other change one recipe.
_MADE_BY: WeakKeyDictionary["TapProbe", dict[bytes, "Recipe"]] = WeakKeyDictionary()
VISUAL = (Role.VIT, Role.SOURCE, Role.SUBJECT, Role.NOISE)
CLEAN = (Role.SOURCE, Role.SUBJECT)


@dataclass(frozen=True)
class Recipe:
    """How ids are counted; the defaults are upstream's.

    Attributes:
        stride: ids from one frame to the next, None for the configuration's.
        spacing: ids from one row or column to the next.
        lead: ids from a block's opening bracket to its first cell.
        flat: whether cells are counted on, on all axes.
        reading: order of a grid's axes in which its cells follow each other.
        after: what follows a block goes on from its "largest" id, its largest "time", its number of "cells", or its
            "opening" bracket.
        anchors: where the t axis of the first token with a role is put.
        uncounted: roles whose blocks what follows does not go on from, as if they were not there.
        on_grid: roles whose first cell is put there, and not their bracket.
        taken_over: whether the target takes over the ids of a source of its size.
        always: whether ids are moved by role in a sequence without given visuals too.
        unconditional: ids of the unconditional arm: "entry" as the run's entry has them, "recomputed" throughout,
            "prefix" conditional before the target, "conditional" throughout, or the "first" of the conditional ones.
    """

    stride: float | None = None
    spacing: int = 1
    lead: int = 1
    flat: bool = False
    reading: tuple[int, int, int] = (0, 1, 2)
    after: str = "largest"
    anchors: tuple[tuple[Role, int], ...] = ((Role.VIT, VIT_ANCHOR), (Role.SUBJECT, SUBJECT_ANCHOR))
    uncounted: tuple[Role, ...] = ()
    on_grid: tuple[Role, ...] = ()
    taken_over: bool = True
    always: bool = False
    unconditional: str = "entry"

    def ids(self, splits: Sequence[Split], tokens_per_second: int, moves: bool = True) -> np.ndarray:
        """Rotary ids int32 [3, n] of splits; `moves` tells whether any is moved by role at all."""
        parts, start = [], 0
        for split in splits:
            if split.grid is None:
                part = np.broadcast_to(np.arange(split.length), (3, split.length)) + start
                start += split.length
            else:
                part = self._block(split, tokens_per_second) + start
                start = start if split.role in self.uncounted else int(part[0, -1]) + 1
            parts.append(part)
        ids = np.concatenate(parts, 1).astype(np.int32)
        given = any(split.mode in (Mode.FULL, Mode.FULL_NOISE) for split in splits)
        return self._moved(ids, splits) if moves and (given or self.always) else ids

    def _block(self, split: Split, tokens_per_second: int) -> np.ndarray:
        """Ids of a block counted from its opening bracket."""
        grid = split.grid
        if self.flat:
            return np.broadcast_to(np.arange(split.length), (3, split.length))
        sides = (grid.frames, grid.rows, grid.columns)
        cells = np.indices([sides[axis] for axis in self.reading]).reshape(3, -1)[np.argsort(self.reading)]
        stride = tokens_per_second if self.stride is None else self.stride
        cells = (cells * np.array([[stride], [self.spacing], [self.spacing]])).astype(int) + self.lead
        closing = {
            "largest": cells.max() + 1,
            "time": cells[0].max() + 1,
            "cells": split.length - 1,
            "opening": 1,
        }[self.after]
        return np.concatenate([np.zeros((3, 1), int), cells, np.full((3, 1), closing)], 1)

    def _moved(self, ids: np.ndarray, splits: Sequence[Split]) -> np.ndarray:
        roles = np.concatenate([np.full(split.length, split.role) for split in splits])
        for role, anchor in self.anchors:
            if (rows := roles == role).any():
                ids[0, rows] += anchor - ids[0, rows][int(role in self.on_grid)]
        source, noise = roles == Role.SOURCE, roles == Role.NOISE
        if self.taken_over and source.any() and source.sum() == noise.sum():
            ids[:, noise] = ids[:, source]
        return ids


def counted(site: "TapProbe", recipe: Recipe) -> np.ndarray:
    """Rotary ids of the site's arm by a recipe, as its entry puts them together; an answer's go on behind them."""
    tokens_per_second = site.pipeline.model.config.tokens_per_second
    moves, layout = not site.request.understanding, site.layout
    cond = recipe.ids(layout.splits, tokens_per_second, moves)
    if site.tap.arm != "uncond":
        return cond
    way = recipe.unconditional
    if way == "entry":
        way = "recomputed" if site.entry == "full_sequence" else "prefix"
    if way == "conditional":
        return cond[:, layout.kept]
    if way == "first":
        return cond[:, : len(layout.kept)]
    own = recipe.ids(arm_splits(site), tokens_per_second, moves)
    if way == "prefix":
        prefix = sum(split.length for split in layout.prefix if split.role is not Role.TEXT)
        own[:, :prefix] = cond[:, layout.kept][:, :prefix]
    return own


def columns(site: "TapProbe", ids: np.ndarray) -> slice:
    """Which tokens of the arm's sequence a tap's ids [3, n] belong to."""
    total = sum(split.length for split in arm_splits(site))
    rows = dict(calls_of(site)).get(site.tap.call) if "/position_ids" in site.tap.name else None
    if rows is not None and rows.stop - rows.start == ids.shape[1]:
        return rows
    if site.layout.answer is None and ids.shape[1] != total:
        return slice(total - ids.shape[1], total)
    return slice(0, ids.shape[1])


def of_tap(site: "TapProbe", ids: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The part of a sequence's ids [3, m] that a tap with ids of this shape holds; text goes on behind it."""
    rows = columns(site, ids)
    answer = site.layout.answer
    if answer is not None and rows.stop > answer:
        more = whole[:, answer - 1 : answer] + np.arange(1, rows.stop - answer + 1)
        whole = np.concatenate([whole[:, :answer], more], 1)
    return whole[:, rows]


def recounted(site: "TapProbe", ids: np.ndarray, changes: dict[str, object]) -> np.ndarray:
    """Ids counted with changes to the recipe that made them; where none did, as much is added as the changes make."""
    made_by = _MADE_BY.setdefault(site, {})

    def by(recipe: Recipe) -> np.ndarray:
        own = of_tap(site, ids, counted(site, recipe)).astype(np.int32)
        made_by.setdefault(digest(own), recipe)
        return own

    upstream = by(Recipe())
    recipe = made_by.get(digest(ids))
    if recipe is not None:
        return by(replace(recipe, **changes))
    return (ids + by(Recipe(**changes)) - upstream).astype(np.int32)


def digest(ids: np.ndarray) -> bytes:
    return blake2b(np.ascontiguousarray(ids, np.int32).tobytes()).digest()


@dataclass(frozen=True)
class Run:
    """The tokens of a split that a tap of ids holds: all of it, and its cells alone."""

    split: Split
    whole: np.ndarray
    cells: np.ndarray


def runs(site: "TapProbe", ids: np.ndarray) -> list[Run]:
    """The splits of the site's arm that lie within a tap's ids, as columns of it."""
    rows, found, start = columns(site, ids), [], 0
    splits = arm_splits(site)
    for split in splits:
        stop = max(start + split.length, rows.stop) if split is splits[-1] else start + split.length
        if start >= rows.start and min(stop, rows.stop) > start:
            whole = np.arange(start, min(stop, rows.stop)) - rows.start
            found.append(Run(split, whole, whole[1:-1] if split.grid else whole[:0]))
        start = stop
    return found


def chosen(roles: Sequence[Role]) -> Callable[["TapProbe", np.ndarray], list[Run]]:
    """The visual blocks of some roles within a tap's ids."""
    return lambda site, ids: [run for run in runs(site, ids) if run.split.grid and run.split.role in roles]
