"""Faults of the position ids: integers that are compared exactly."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from lance_mlx.requests.request import Entry
from lance_mlx.sampling import flow, text
from lance_mlx.sampling.text import AnswerDecoder
from lance_mlx.sequence import positions
from lance_mlx.sequence.segments import Role, Segment, Sequence
from parity.lance.faults.base import (
    ASKS,
    DRAWS,
    EDITS,
    KV_CACHE,
    VIDEOS,
    Fault,
    Patch,
    function,
    method,
    replaced,
    together,
    wrapped,
)

_MOVING = VIDEOS | {"x2t_video"}


def _blocks(change: Callable[[np.ndarray, Segment], np.ndarray]) -> Patch:
    """Change the ids of every visual block, counted from its opening bracket; the text after it follows."""

    def segment_positions(original: Callable, segment: Segment, tokens_per_second: int) -> np.ndarray:
        ids = original(segment, tokens_per_second)
        return ids if segment.grid is None else change(np.array(ids), segment)

    return function(positions, "_segment_positions", segment_positions)


def stride(tokens_per_second: int) -> Patch:
    """Let t advance by that much a latent frame, whatever the configuration says."""
    return function(positions, "_segment_positions", lambda original, segment, _: original(segment, tokens_per_second))


def shifted(change: Callable[[np.ndarray, np.ndarray, Sequence], np.ndarray]) -> Patch:
    """Change the ids after the shift by role; `change` is given those, the ids before it, and the sequence."""

    def shift(original: Callable, ids: np.ndarray, sequence: Sequence) -> np.ndarray:
        before = ids.copy()
        return change(original(ids, sequence), before, sequence)

    return function(positions, "_shift_by_role", shift)


def _final(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """Change the finished ids, of what is drawn and of questions."""

    def changed(original: Callable, *args: object) -> np.ndarray:
        return change(original(*args))

    return together(function(positions, "position_ids", changed), lambda target: wrapped(text, "rope_index", changed))


def _one_too_early(ids: np.ndarray, segment: Segment) -> np.ndarray:
    ids[:, 1:] -= 1
    return ids


def _counted(ids: np.ndarray, segment: Segment) -> np.ndarray:
    ids[:, -1] = len(segment) - 1
    return ids


def _doubled(ids: np.ndarray, segment: Segment) -> np.ndarray:
    ids[1:, 1:-1] = 2 * ids[1:, 1:-1] - 1
    ids[:, -1] = ids[:, :-1].max() + 1
    return ids


def _one_dimensional(ids: np.ndarray, segment: Segment) -> np.ndarray:
    return np.tile(np.arange(len(segment)), (3, 1))


def origin_zero(ids: np.ndarray, before: np.ndarray, sequence: Sequence) -> np.ndarray:
    """Let the denoised grid begin at 0 on all axes; its brackets stay."""
    latents = np.flatnonzero(sequence.roles == Role.NOISE)[1:-1]
    ids[:, latents] -= ids[:, latents].min(axis=1, keepdims=True)
    return ids


def anchored(
    anchor: int, roles: tuple[Role, ...], ids: np.ndarray, before: np.ndarray, sequence: Sequence
) -> np.ndarray:
    """Move blocks in time so that the opening bracket of those roles' first block is at `anchor`."""
    for role in roles:
        tokens = sequence.roles == role
        if tokens.any():
            ids[0, tokens] += anchor - ids[0, tokens][0]
    return ids


def _cells_anchored(anchor: int, ids: np.ndarray, before: np.ndarray, sequence: Sequence) -> np.ndarray:
    """Move the denoised latents in time so that the first is at `anchor`; their brackets stay."""
    latents = np.flatnonzero(sequence.roles == Role.NOISE)[1:-1]
    ids[0, latents] += anchor - ids[0, latents[0]]
    return ids


def _closing_restarts(ids: np.ndarray, before: np.ndarray, sequence: Sequence) -> np.ndarray:
    _, *latents, closing = np.flatnonzero(sequence.roles == Role.NOISE)
    ids[:, closing] = (ids[:, latents] - ids[:, latents[:1]]).max() + 1
    return ids


def own_ids(*roles: Role) -> Callable[[np.ndarray, np.ndarray, Sequence], np.ndarray]:
    """Let the tokens of those roles keep the ids that they have before the shift by role."""

    def change(ids: np.ndarray, before: np.ndarray, sequence: Sequence) -> np.ndarray:
        tokens = np.isin(sequence.roles, roles)
        ids[:, tokens] = before[:, tokens]
        return ids

    return change


def _on_the_grid(ids: np.ndarray, before: np.ndarray, sequence: Sequence) -> np.ndarray:
    ids[0, sequence.roles == Role.VIT] -= 1
    return ids


def _prefix_recomputed(original: Callable, sequence: Sequence, tokens_per_second: int, entry: Entry) -> np.ndarray:
    return original(sequence, tokens_per_second, Entry.FULL_SEQUENCE)


def _conditional_ids(original: Callable, sequence: Sequence, tokens_per_second: int, entry: Entry) -> np.ndarray:
    return positions.position_ids(sequence, tokens_per_second)[:, sequence.roles != Role.TEXT]


def _one_later(original: Callable, reader: AnswerDecoder, step: int, token: mx.array) -> mx.array:
    return original(reader, step + 1, token)


def _fault(name: str, explanation: str, patch: Patch, tasks: frozenset[str], about: str, **only: tuple) -> Fault:
    return Fault(name, about, "positions", patch, tasks, explanation=explanation, **only)


FAULTS = [
    _fault(
        "temporal-stride-1",
        "the temporal stride is 1",
        stride(1),
        _MOVING,
        "Time advances by 1 a latent frame instead of by 2.",
    ),
    _fault(
        "temporal-stride-4",
        "the temporal stride is 4",
        stride(4),
        _MOVING,
        "Time advances by 4 a latent frame, by the frames that it stands for, instead of by 2.",
    ),
    _fault(
        "grid-origin-0",
        "the target's grid starts at 0",
        shifted(origin_zero),
        DRAWS,
        "The denoised grid starts at 0 on all axes instead of after the text.",
    ),
    _fault(
        "grid-one-too-early",
        "visual grids start at their opening bracket",
        _blocks(_one_too_early),
        DRAWS | ASKS,
        "A grid starts at the position of its opening bracket instead of one later.",
    ),
    _fault(
        "text-counts-visual-tokens",
        "text after a visual block counts its tokens",
        _blocks(_counted),
        DRAWS | ASKS,
        "What follows a visual block counts its tokens instead of going on after its largest id.",
    ),
    _fault(
        "position-axes-t-w-h",
        "position axes are t, w, h",
        _final(lambda ids: ids[[0, 2, 1]]),
        DRAWS | ASKS,
        "Rows and columns of the ids are exchanged.",
    ),
    _fault(
        "position-axes-h-w-t",
        "position axes are h, w, t",
        _final(lambda ids: ids[[1, 2, 0]]),
        DRAWS | ASKS,
        "The ids are in the order row, column, time.",
    ),
    _fault(
        "rows-and-columns-doubled",
        "rows and columns advance by 2",
        _blocks(_doubled),
        DRAWS | ASKS,
        "Rows and columns advance by 2 a cell: the doubled grid is not divided by the merge size.",
    ),
    _fault(
        "positions-one-dimensional",
        "positions count tokens on all axes",
        _blocks(_one_dimensional),
        DRAWS | ASKS,
        "Tokens of a grid are counted one by one, the same on all three axes.",
    ),
    _fault(
        "vit-anchor-missing",
        "the ViT block is not anchored",
        shifted(own_ids(Role.VIT)),
        EDITS,
        "The ViT block stays where it is in time instead of beginning at 1000.",
    ),
    _fault(
        "vit-anchor-2000",
        "the ViT block is anchored at 2000",
        lambda target: replaced(positions, "VIT_ANCHOR", positions.REFERENCE_ANCHOR),
        EDITS,
        "The ViT block begins at t = 2000, where reference images belong.",
    ),
    _fault(
        "vit-anchor-on-the-grid",
        "the ViT anchor is on the grid instead of its bracket",
        shifted(_on_the_grid),
        EDITS,
        "The first ViT token sits at 1000 instead of the bracket before it.",
    ),
    _fault(
        "source-ids-not-taken-over",
        "the target does not take over the source's ids",
        shifted(own_ids(Role.NOISE)),
        EDITS,
        "The target keeps ids of its own instead of taking over the source's.",
    ),
    _fault(
        "target-anchored-1000",
        "the target is anchored at 1000",
        shifted(partial(anchored, 1000, (Role.NOISE,))),
        DRAWS,
        "The denoised block is moved in time so that it begins at 1000.",
    ),
    _fault(
        "target-cells-anchored-1000",
        "the target's first cell is anchored at 1000",
        shifted(partial(_cells_anchored, 1000)),
        DRAWS,
        "The denoised latents are moved in time so that the first is at 1000; their brackets stay.",
    ),
    _fault(
        "closing-bracket-restarts",
        "the target's closing bracket restarts behind its grid",
        shifted(_closing_restarts),
        DRAWS,
        "The denoised block's closing bracket is where it would be if the block's grid began at 0.",
    ),
    _fault(
        "target-anchored-2000",
        "the target is anchored at 2000",
        shifted(partial(anchored, 2000, (Role.NOISE,))),
        DRAWS,
        "The denoised block is moved in time so that it begins at 2000.",
    ),
    _fault(
        "source-and-target-anchored-1000",
        "source and target are anchored at 1000",
        together(
            shifted(own_ids(Role.NOISE)),
            shifted(partial(anchored, 1000, (Role.SOURCE, Role.NOISE))),
        ),
        EDITS,
        "Source and target both begin at t = 1000 and keep rows and columns of their own.",
    ),
    _fault(
        "unconditional-prefix-recomputed",
        "the unconditional prefix is recomputed",
        lambda target: wrapped(flow, "unconditional_position_ids", _prefix_recomputed),
        DRAWS,
        "The cached unconditional prefix gets ids of its own instead of keeping the conditional ones.",
        entries=KV_CACHE,
    ),
    _fault(
        "unconditional-block-keeps-conditional-ids",
        "the unconditional block keeps the conditional ids",
        lambda target: wrapped(flow, "unconditional_position_ids", _conditional_ids),
        DRAWS,
        "The unconditional arm's denoised block keeps the ids that it has with the text.",
    ),
    _fault(
        "answer-positions-off-by-one",
        "answer positions are off by +1",
        method(AnswerDecoder, "decode", _one_later),
        ASKS,
        "Tokens of an answer are one position too late.",
    ),
]
