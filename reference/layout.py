"""The sequence of one generation or question as integers: tokens, roles, splits and positions."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from reference.positions import Grid, latent_position_ids

# Four patches make a token.
MERGE = 2


class Role(IntEnum):
    """Whose a token is (bytedance/Lance validation_dataset.py:modality_map)."""

    TEMPLATE = -1
    TEXT = 0
    NOISE = 1
    SOURCE = 2
    SUBJECT = 3
    VIT = 4


class Mode(IntEnum):
    """How the tokens of a split see each other, numbered as in the oracles."""

    CAUSAL = 0
    FULL = 1
    FULL_NOISE = 2
    NOISE = 3


@dataclass(frozen=True)
class VisualSize:
    """What preprocessing makes of a visual: pixels for the VAE (frames, height, width), patches for the ViT (t, h, w).

    None stands where a task does not use one of them.
    """

    vae: tuple[int, int, int] | None = None
    vit: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Split:
    """A run of tokens with one role and one way of attending.

    A visual split is vision_start, its grid of tokens, vision_end. `size` is frames, height and width in pixels of
    what a split of latents stands for.
    """

    start: int
    length: int
    mode: Mode
    role: Role
    grid: Grid | None = None
    size: tuple[int, int, int] | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def inside(self) -> np.ndarray:
        """Indices of the tokens between the two brackets."""
        return np.arange(self.start + 1, self.stop - 1, dtype=np.int32)


@dataclass(frozen=True)
class Layout:
    """Sequence of L tokens, a question's with its answer.

    text_ids int32 [L]; position_ids int32 [3, L]; uncond_position_ids int32 [3, kept tokens], recomputed without the
    user's text; answer: index of an answer's first token; clean_frames: latent frames at the target's start that are
    given and not made.
    """

    text_ids: np.ndarray
    splits: list[Split]
    position_ids: np.ndarray
    uncond_position_ids: np.ndarray
    answer: int | None = None
    clean_frames: int = 0

    @property
    def target(self) -> Split:
        return next(split for split in self.splits if split.mode is Mode.NOISE)

    @property
    def prefix(self) -> list[Split]:
        """The splits before the target, or before the last token that a question holds."""
        if self.answer is None:
            return self.splits[: self.splits.index(self.target)]
        last, context = self.splits[-1], self.answer - 1
        rest = Split(last.start, context - last.start, last.mode, last.role)
        return [*self.splits[:-1], *([rest] if rest.length else [])]

    @property
    def roles(self) -> np.ndarray:
        return np.concatenate([np.full(split.length, split.role, np.int32) for split in self.splits])

    @property
    def kept(self) -> np.ndarray:
        """Indices of the tokens that the unconditional arm keeps."""
        return np.flatnonzero(self.roles != Role.TEXT)

    @property
    def latent_splits(self) -> list[Split]:
        """The splits of latents: clean ones, then the target."""
        return [split for split in self.splits if split.mode in (Mode.FULL_NOISE, Mode.NOISE)]

    @property
    def vit_splits(self) -> list[Split]:
        return [split for split in self.splits if split.mode is Mode.FULL]

    @property
    def latent_rows(self) -> np.ndarray:
        """Indices of all latent tokens, which is the order of the sampler's state."""
        return joined([split.inside for split in self.latent_splits])

    @property
    def vit_rows(self) -> np.ndarray:
        """Indices of the ViT's tokens."""
        return joined([split.inside for split in self.vit_splits])

    @property
    def made_rows(self) -> np.ndarray:
        """Indices of the latent tokens that denoising updates."""
        grid = self.target.grid
        return self.target.inside[self.clean_frames * grid.rows * grid.columns :]

    @property
    def latent_position_ids(self) -> np.ndarray:
        """Row of each latent in the position table, int32."""
        return joined([latent_position_ids(split.grid) for split in self.latent_splits])

    def continued_position_ids(self, count: int) -> np.ndarray:
        """Rotary ids int32 [3, answer + count] of the question and of `count` more tokens of text."""
        asked = self.position_ids[:, : self.answer]
        more = np.arange(1, count + 1, dtype=np.int32)
        return np.concatenate([asked, asked[:, -1:] + more], 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """The integers under the names of the oracles' inputs and layouts, all int32."""

        def thw(splits: list[Split]) -> list[list[int]]:
            # Upstream gives rows and columns in patches, and doubles those of latents to be halved alike.
            return [[split.grid.frames, MERGE * split.grid.rows, MERGE * split.grid.columns] for split in splits]

        arrays = {
            "text_ids": self.text_ids,
            "modality": self.roles,
            "split_lens": [split.length for split in self.splits],
            "attn_modes": [split.mode for split in self.splits],
            "video_grid_thw": [thw([split for split in self.splits if split.grid])],
            "position_ids.cond": self.position_ids,
        }
        if self.vit_splits:
            arrays["packed_vit_token_indexes"] = self.vit_rows
            arrays["vit_video_grid_thw"] = thw(self.vit_splits)
        if self.answer is None:
            arrays["packed_vae_token_indexes"] = self.latent_rows
            arrays["mse_loss_indexes"] = self.made_rows
            arrays["vae_video_grid_thw"] = thw(self.latent_splits)
            arrays["video_sizes"] = [split.size for split in self.latent_splits]
            arrays["position_ids.uncond"] = self.uncond_position_ids
            arrays["latent_position_ids"] = self.latent_position_ids
        else:
            arrays["ce_loss_indexes"] = range(self.answer - 1, len(self.text_ids) - 1)
        return {name: np.asarray(array, np.int32) for name, array in arrays.items()}


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Parts one after another, int32; none make an empty list."""
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
