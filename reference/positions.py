"""Position ids: three rotary axes for every token, and the index of a latent in the position table."""

from dataclasses import dataclass

import numpy as np

LATENT_SIDE = 64
# Where the first rotary axis of ViT tokens and of subject tokens starts.
VIT_ANCHOR = 1000
SUBJECT_ANCHOR = 2000


@dataclass(frozen=True)
class Text:
    """A run of tokens that count up one by one on all three axes."""

    length: int


@dataclass(frozen=True)
class Grid:
    """A visual grid of tokens: frames, rows, columns."""

    frames: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.frames * self.rows * self.columns


def rope_position_ids(segments: list[Text | Grid], tokens_per_second: int) -> np.ndarray:
    """Rotary ids (t, h, w) int32 [3, n] (bytedance/Lance modeling/lance/qwen2_navit.py:get_rope_index).

    Each segment starts at the largest id so far plus one. Rows and columns of a grid count one by one; its frames are
    taken to be one second apart, so they count by `tokens_per_second`.
    """
    parts: list[np.ndarray] = []
    start = 0
    for segment in segments:
        if isinstance(segment, Text):
            part = np.broadcast_to(np.arange(segment.length), (3, segment.length))
        else:
            part = np.indices((segment.frames, segment.rows, segment.columns)).reshape(3, -1)
            part = part * np.array([[tokens_per_second], [1], [1]])
        if part.size == 0:
            continue
        parts.append(part + start)
        start = int(parts[-1].max()) + 1
    return np.concatenate(parts, axis=1).astype(np.int32)


def anchored(
    position_ids: np.ndarray, vit: np.ndarray, subject: np.ndarray, source: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """Move rotary ids [3, n] by whose the tokens are, given as bool [n] (data/common.py:shift_position_ids).

    The t axis of all ViT tokens moves so that their first is at 1000, that of subject tokens so that theirs is at
    2000. Noise tokens take over the ids of a source that has as many tokens.
    """
    ids = position_ids.copy()
    for rows, anchor in ((vit, VIT_ANCHOR), (subject, SUBJECT_ANCHOR)):
        if rows.any():
            ids[0, rows] += anchor - ids[0, rows][0]
    if source.any() and source.sum() == noise.sum():
        ids[:, noise] = ids[:, source]
    return ids


def latent_position_ids(grid: Grid) -> np.ndarray:
    """Index of each latent in the position table, int32 [frames * rows * columns], in reading order.

    (bytedance/Lance data/data_utils.py:get_flattened_position_ids_extrapolate_video)
    """
    t, h, w = np.indices((grid.frames, grid.rows, grid.columns)).reshape(3, -1)
    return ((t * LATENT_SIDE + h) * LATENT_SIDE + w).astype(np.int32)
