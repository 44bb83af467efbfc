"""Multimodal RoPE position ids of a sequence, and indexes into the latent position table."""

import numpy as np

from lance_mlx.config import MAX_LATENT_SIDE
from lance_mlx.requests.request import Entry
from lance_mlx.sequence.segments import AttentionMode, Role, Segment, Sequence

VIT_ANCHOR = 1000
REFERENCE_ANCHOR = 2000


def position_ids(sequence: Sequence, tokens_per_second: int) -> np.ndarray:
    """RoPE ids (t, h, w) of every token of a sequence that is denoised, shifted by role; int32 [3, n]."""
    return _shift_by_role(rope_index(sequence, tokens_per_second), sequence)


def rope_index(sequence: Sequence, tokens_per_second: int) -> np.ndarray:
    """RoPE ids (t, h, w) of every token before any shift, int32 [3, n].

    Text counts on from the largest id so far, on all three axes; so does a block's opening bracket. A block's grid
    starts one later: t advances by `tokens_per_second` a latent frame, h and w by one a cell
    (bytedance/Lance modeling/lance/qwen2_navit.py:get_rope_index).
    """
    pieces, following = [], 0
    for segment in sequence.segments:
        piece = _segment_positions(segment, tokens_per_second) + following
        pieces.append(piece)
        following = int(piece.max()) + 1
    return np.concatenate(pieces, axis=1).astype(np.int32)


def _segment_positions(segment: Segment, tokens_per_second: int) -> np.ndarray:
    """Ids of one segment counted from 0, int64 [3, n]."""
    if segment.grid is None:
        return np.broadcast_to(np.arange(len(segment)), (3, len(segment)))
    frames, rows, columns = segment.grid
    grid = np.indices(segment.grid).reshape(3, -1)
    grid[0] *= tokens_per_second
    largest = max((frames - 1) * tokens_per_second, rows - 1, columns - 1)
    opening, closing = np.zeros((3, 1), np.int64), np.full((3, 1), largest + 2)
    return np.concatenate([opening, grid + 1, closing], axis=1)


def _shift_by_role(positions: np.ndarray, sequence: Sequence) -> np.ndarray:
    """Anchor ViT and reference tokens in time and let the target take over the source's ids.

    Nothing is anchored for being a generated image or video: the shift needs a full or full_noise block in the
    sequence.
    """
    modes = {segment.mode for segment in sequence.segments}
    if not modes & {AttentionMode.FULL, AttentionMode.FULL_NOISE}:
        return positions
    roles = sequence.roles
    for role, anchor in ((Role.VIT, VIT_ANCHOR), (Role.REFERENCE, REFERENCE_ANCHOR)):
        tokens = roles == role
        if tokens.any():
            positions[0, tokens] += anchor - positions[0, tokens][0]
    source, noise = roles == Role.SOURCE, roles == Role.NOISE
    if source.any() and source.sum() == noise.sum():
        positions[:, noise] = positions[:, source]
    return positions


def unconditional_position_ids(sequence: Sequence, tokens_per_second: int, entry: Entry) -> np.ndarray:
    """RoPE ids of the sequence without the user's text, int32 [3, n - text tokens].

    The full-sequence entry recomputes them all. The KV-cache entry feeds the segments before the denoised block the
    ids they have in the conditional arm, and recomputes those of the block alone
    (bytedance/Lance modeling/lance/lance.py:validation_gen_KVcache).
    """
    kept = sequence.without(Role.TEXT)
    recomputed = position_ids(kept, tokens_per_second)
    if entry is Entry.FULL_SEQUENCE:
        return recomputed
    conditional = position_ids(sequence, tokens_per_second)[:, sequence.roles != Role.TEXT]
    prefix = kept.starts[kept.target_index]
    return np.concatenate([conditional[:, :prefix], recomputed[:, prefix:]], axis=1)


def latent_position_ids(grid: tuple[int, int, int]) -> np.ndarray:
    """Row of the 3-D latent position table for every cell of a block, int32 [t*h*w]."""
    t, h, w = np.indices(grid).reshape(3, -1)
    return ((t * MAX_LATENT_SIDE + h) * MAX_LATENT_SIDE + w).astype(np.int32)
