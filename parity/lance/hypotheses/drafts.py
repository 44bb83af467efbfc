"""A sequence as pieces that can be changed, the integers that follow from them, and how changes add up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from reference.layout import Layout, Mode, Role
from reference.positions import Grid
from reference.prompt import template
from reference.sequence import asked

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe


@dataclass(frozen=True)
class Piece:
    """A split: its tokens, role and mode; a visual one's is bracket, cells, bracket, and has a grid."""

    tokens: tuple[int, ...]
    role: Role
    mode: Mode
    grid: Grid | None = None

    @property
    def visual(self) -> bool:
        return self.grid is not None


Draft = list[Piece]
Edit = Callable[["TapProbe", Draft], Draft | None]
"""Another draft of the same request; None where it does not apply."""


@dataclass(frozen=True)
class Texts:
    """The texts of a request as token ids: the template before the user's content, between it and the target, and at
    the end; the user's own."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    end: tuple[int, ...]
    user: tuple[int, ...]


def encoded(site: "TapProbe", text: str) -> tuple[int, ...]:
    return tuple(site.pipeline.tokenizer.encode(text))


def user_text(site: "TapProbe") -> str:
    """What the user wrote."""
    return next(asked(element) for element in site.request.elements if element.medium.value == "text")


def texts_of(site: "TapProbe") -> Texts:
    """The texts of the site's request."""
    return Texts(*(encoded(site, text) for text in (*template(site.request), user_text(site))))


def draft_of(site: "TapProbe", arm: str) -> Draft:
    """Upstream's sequence of an arm, as pieces."""
    layout = site.layout
    return [
        Piece(
            tuple(layout.text_ids[split.rows].tolist()),
            split.role,
            split.mode,
            split.grid,
        )
        for split in layout.splits
        if arm == "cond" or split.role is not Role.TEXT
    ]


def array_of(name: str, draft: Draft) -> np.ndarray | None:
    """The integers of a draft under a name of the oracles' inputs, int32; None for others."""
    arrays = {
        "text_ids": lambda: [token for piece in draft for token in piece.tokens],
        "text_ids.uncond": lambda: [token for piece in draft for token in piece.tokens],
        "modality": lambda: [role for piece in draft for role in [piece.role] * len(piece.tokens)],
        "split_lens": lambda: [len(piece.tokens) for piece in draft],
        "attn_modes": lambda: [piece.mode for piece in draft],
        "grids_thw": lambda: [(g.frames, g.rows, g.columns) for g in (piece.grid for piece in draft) if g],
    }
    if name not in arrays:
        return None
    array = np.array(arrays[name](), np.int32)
    # Without any visual there are no grids, of three sides still.
    return array.reshape(-1, 3) if name == "grids_thw" else array


def answer_of(layout: Layout, draft: Draft) -> np.ndarray | None:
    """Index of an answer's first token in a draft, int32 [1]; None where what follows it is not upstream's."""
    if layout.answer is None:
        return None
    after = layout.text_ids[layout.answer :]
    tokens = [token for piece in draft for token in piece.tokens]
    start = len(tokens) - len(after)
    return np.array([start], np.int32) if np.array_equal(tokens[start:], after) else None


def added(base: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray | None:
    """What two changes of a list make together; None where they touch the same part of it."""
    if np.array_equal(base, second):
        return first
    if np.array_equal(base, first):
        return second
    if len(first) == len(base) == len(second):
        return np.where(second != base, second, first)
    ours, theirs = hunk(base, first), hunk(base, second)
    early, late = sorted((ours, theirs), key=lambda change: change[:2])
    if early[1] > late[0]:
        return None
    return np.concatenate([base[: early[0]], early[2], base[early[1] : late[0]], late[2], base[late[1] :]])


def hunk(base: np.ndarray, changed: np.ndarray) -> tuple[int, int, np.ndarray]:
    """The part of a list that changed: from where to where, and into what."""
    shared = min(len(base), len(changed))

    def differing(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        return np.flatnonzero((ours != theirs).any(tuple(range(1, ours.ndim))))

    differ = differing(base[:shared], changed[:shared])
    start = int(differ[0]) if len(differ) else shared
    differ = differing(base[::-1][: shared - start], changed[::-1][: shared - start])
    end = int(differ[0]) if len(differ) else shared - start
    return start, len(base) - end, changed[start : len(changed) - end]


def swapped(tokens: Sequence[int], old: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """Tokens with the first run of some replaced; None where there is no such run."""
    tokens, old = tuple(tokens), tuple(old)
    for i in range(len(tokens) - len(old) + 1) if old else ():
        if tokens[i : i + len(old)] == old:
            return tokens[:i] + tuple(new) + tokens[i + len(old) :]
    return None


def replaced(draft: Draft, old: Sequence[int], new: Sequence[int], last: bool = False) -> Draft | None:
    """A draft with a run of text replaced in the first piece, or the last, that holds it; empty pieces vanish."""
    if tuple(old) == tuple(new):
        return None
    for i in reversed(range(len(draft))) if last else range(len(draft)):
        if draft[i].visual:
            continue
        tokens = swapped(draft[i].tokens, old, new)
        if tokens is not None:
            changed = replace(draft[i], tokens=tokens)
            return [*draft[:i], *([changed] if tokens else []), *draft[i + 1 :]]
    return None
