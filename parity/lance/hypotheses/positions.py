"""Hypotheses about rotary position ids; they change the ids as they come, so that several add up."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from parity.hypotheses.base import Hypothesis
from parity.lance.hypotheses.counting import (
    CLEAN,
    VISUAL,
    Recipe,
    Run,
    chosen,
    columns,
    counted,
    of_tap,
    recounted,
    runs,
)
from parity.lance.hypotheses.tokens import arm_splits
from reference.layout import Role
from reference.positions import SUBJECT_ANCHOR, VIT_ANCHOR

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

InPlace = Callable[[np.ndarray, Run], None]
Change = Callable[["TapProbe", np.ndarray], np.ndarray | None]
POSITIONS = ("positions",)
GROUPS = (("target", (Role.NOISE,)), ("ViT block", (Role.VIT,)), ("source", CLEAN))
ANCHORS = (0, 1000, 2000)


def recipe(name: str, needs: Role | None = None, **changes: object) -> Hypothesis:
    """A hypothesis that the whole sequence is counted in another way, where it holds a block with the role needed."""

    def transform(site: "TapProbe", ids: np.ndarray) -> np.ndarray | None:
        if not is_ids(ids) or (needs is not None and needs not in site.layout.roles):
            return None
        return recounted(site, ids, changes)

    return Hypothesis(name, POSITIONS, transform=transform)


def is_ids(ids: np.ndarray) -> bool:
    return ids.ndim == 2 and len(ids) == 3


def changed(name: str, change: Change) -> Hypothesis:
    """A hypothesis that ids [3, n] are changed in the end."""

    def transform(site: "TapProbe", ids: np.ndarray) -> np.ndarray | None:
        new = change(site, ids.copy()) if is_ids(ids) else None
        return None if new is None or new.shape != ids.shape else new.astype(np.int32)

    return Hypothesis(name, POSITIONS, transform=transform)


def blocks(name: str, roles: Sequence[Role], change: InPlace) -> Hypothesis:
    """A hypothesis that the ids of some visual blocks are changed in place."""

    def of_blocks(site: "TapProbe", ids: np.ndarray) -> np.ndarray | None:
        for run in chosen(roles)(site, ids):
            change(ids, run)
        return ids

    return changed(name, of_blocks)


def stride_alone(stride: int) -> InPlace:
    """Frames of a block at another distance; nothing else moves."""

    def change(ids: np.ndarray, run: Run) -> None:
        t = ids[0, run.cells]
        size = run.split.grid.rows * run.split.grid.columns
        ids[0, run.cells] = t[0] + np.arange(len(t)) // size * stride

    return change


def from_zero(axes: Sequence[int], part: str = "cells") -> InPlace:
    def change(ids: np.ndarray, run: Run) -> None:
        where = np.ix_(axes, getattr(run, part))
        ids[where] -= ids[where][:, :1]

    return change


def anchor(value: int, part: str, axes: Sequence[int] = (0,)) -> InPlace:
    """A block's bracket and all of it, or its cells alone, moved so that the first is at an id."""

    def change(ids: np.ndarray, run: Run) -> None:
        where = np.ix_(axes, getattr(run, part))
        ids[where] += value - ids[where][:, :1]

    return change


def later(offset: int) -> InPlace:
    def change(ids: np.ndarray, run: Run) -> None:
        ids[0, run.cells] += offset

    return change


def closing(ids: np.ndarray, run: Run) -> None:
    """A block's closing bracket counted from its grid alone, wherever that is."""
    cells = ids[:, run.cells]
    ids[:, run.whole[-1]] = (cells - cells[:, :1]).max() + 1


def as_text(ids: np.ndarray, run: Run) -> None:
    """A block's brackets count on with the text before it, its cells do not count."""
    if run.whole[0]:
        ids[:, run.whole[[0, -1]]] = ids[:, run.whole[:1] - 1] + [1, 2]


def goes_on(site: "TapProbe", ids: np.ndarray) -> np.ndarray | None:
    """Closing brackets and text count on from the largest id before them."""
    found, start = runs(site, ids), 0
    for run in found:
        if run.split.grid is None:
            ids[:, run.whole] = start + np.arange(len(run.whole))
        else:
            ids[:, run.whole[-1]] = ids[:, run.cells].max() + 1
        start = max(start, int(ids[:, run.whole].max()) + 1)
    return ids if columns(site, ids).start == 0 else None


def every_split_from_zero(site: "TapProbe", ids: np.ndarray) -> np.ndarray:
    for run in runs(site, ids):
        ids[:, run.whole] -= ids[:, run.whole[:1]]
    return ids


def answers(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Change:
    """Ids of answer tokens, given those and their places in the sequence."""

    def of_answer(site: "TapProbe", ids: np.ndarray) -> np.ndarray | None:
        answer = site.layout.answer
        if answer is None:
            return None
        rows = columns(site, ids)
        places = np.arange(rows.start, rows.stop)
        late = places >= answer - site.tap.call.startswith("cond.decode")
        if late.any():
            ids[:, late] = change(ids[:, late], places[late])
        return ids

    return of_answer


def take_over(axes: Sequence[int]) -> Change:
    """The target takes over the source's ids on some axes alone."""

    def change(site: "TapProbe", ids: np.ndarray) -> np.ndarray | None:
        own = of_tap(site, ids, counted(site, Recipe(taken_over=False)))
        rows = of_tap(site, ids, np.stack([roles_of(site)] * 3))[0] == Role.NOISE
        left = [axis for axis in range(3) if axis not in axes]
        ids[np.ix_(left, np.flatnonzero(rows))] = own[np.ix_(left, np.flatnonzero(rows))]
        return ids

    return change


def roles_of(site: "TapProbe") -> np.ndarray:
    return np.concatenate([np.full(split.length, int(split.role)) for split in arm_splits(site)])


def per_group() -> list[Hypothesis]:
    """What may happen to the blocks of one role alone."""
    found = []
    for name, roles in GROUPS:
        own = f"the {name}'s"
        found += [
            *(blocks(f"{own} temporal stride alone is {n}", roles, stride_alone(n)) for n in (0, 1, 4)),
            blocks(f"{own} grid starts at 0", roles, from_zero((0, 1, 2))),
            blocks(f"{own} frames start at 0", roles, from_zero((0,))),
            blocks(f"{own} rows and columns start at 0", roles, from_zero((1, 2))),
            blocks(f"the {name} starts at 0 with its bracket", roles, from_zero((0, 1, 2), "whole")),
            *(blocks(f"the {name} is anchored at {n}", roles, anchor(n, "whole")) for n in ANCHORS),
            *(blocks(f"{own} first cell is anchored at {n}", roles, anchor(n, "cells")) for n in ANCHORS[1:]),
            *(blocks(f"{own} first cell is anchored at {n} on all axes", roles, anchor(n, "cells", (0, 1, 2)))
              for n in ANCHORS[1:]),
            *(blocks(f"{own} frames are off by {n:+d}", roles, later(n)) for n in (-1, 1)),
            blocks(f"{own} closing bracket restarts behind its grid", roles, closing),
            blocks(f"{own} brackets count on with the text", roles, as_text),
        ]  # fmt: skip
    return found


HYPOTHESES = [
    # Before those that take a number for what comes of this one.
    changed("answer positions are places in the sequence", answers(lambda ids, places: np.stack([places] * 3))),
    *(changed(f"answer positions are off by {n:+d}", answers(lambda ids, places, n=n: ids + n))
      for n in (-2, -1, 1, 2)),
    changed("answer positions do not advance", answers(lambda ids, places: np.repeat(ids[:, :1], ids.shape[1], 1))),
    *(changed(f"position axes are {', '.join('thw'[i] for i in axes)}", lambda site, ids, axes=axes: ids[list(axes)])
      for axes in ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))),
    *(recipe(f"the temporal stride is {n}", stride=n) for n in (0, 1, 3, 4)),
    recipe("the temporal stride follows 12 frames a second", stride=2 * 4 / 12),
    recipe("the temporal stride follows 24 frames a second", stride=2 * 4 / 24),
    recipe("rows and columns advance by 2", spacing=2),
    recipe("visual grids start at their opening bracket", lead=0),
    recipe("visual grids start two behind their opening bracket", lead=2),
    recipe("text after a visual block counts its tokens", after="cells"),
    recipe("text after a visual block goes on from its frames", after="time"),
    recipe("text after a visual block goes on from its opening bracket", after="opening"),
    recipe("positions count tokens on all axes", flat=True),
    recipe("cells are counted column by column", reading=(0, 2, 1)),
    recipe("cells are counted with frames innermost", reading=(1, 2, 0)),
    recipe("what follows the ViT block does not count it", Role.VIT, uncounted=(Role.VIT,)),
    recipe("the ViT block is not anchored", anchors=((Role.SUBJECT, SUBJECT_ANCHOR),)),
    recipe("the ViT anchor is on the grid instead of its bracket", on_grid=(Role.VIT,)),
    recipe("the target does not take over the source's ids", taken_over=False),
    recipe("source and target are anchored at 1000", Role.SOURCE, always=True, taken_over=False,
           anchors=((Role.VIT, VIT_ANCHOR), (Role.SOURCE, 1000), (Role.NOISE, 1000))),
    recipe("source and target are anchored at 2000", Role.SOURCE, always=True, taken_over=False,
           anchors=((Role.VIT, VIT_ANCHOR), (Role.SOURCE, 2000), (Role.NOISE, 2000))),
    recipe("nothing is moved by its role", anchors=(), taken_over=False),
    changed("the target takes over the source's frames alone", take_over((0,))),
    changed("the target takes over the source's rows and columns alone", take_over((1, 2))),
    recipe("the unconditional prefix is recomputed", unconditional="recomputed"),
    recipe("the unconditional prefix keeps the conditional ids", unconditional="prefix"),
    recipe("the unconditional block keeps the conditional ids", unconditional="conditional"),
    recipe("the unconditional ids are the first of the conditional ones", unconditional="first"),
    changed("text goes on from the largest id of a block", goes_on),
    changed("every split starts at 0", every_split_from_zero),
    *per_group(),
    # Behind the same of one role: where only the target is visual, that says more.
    blocks("visual grids start at 0", VISUAL, from_zero((0, 1, 2))),
]  # fmt: skip
