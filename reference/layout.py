"""The sequence of one generation as integers: tokens, roles, splits and positions."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from reference.positions import Grid, Text, latent_position_ids, rope_position_ids
from reference.prompt import PromptIds, Tokenizer, encode_prompt
from reference.request import Request

TOKENS_PER_SECOND = 2


class Role(IntEnum):
    """Whose a token is (bytedance/Lance validation_dataset.py:modality_map)."""

    TEMPLATE = -1
    TEXT = 0
    NOISE = 1


class Mode(IntEnum):
    """How the tokens of a split see each other, numbered as in the oracles."""

    CAUSAL = 0
    NOISE = 3


@dataclass(frozen=True)
class Split:
    """A run of tokens with one role and one way of attending."""

    start: int
    length: int
    mode: Mode
    role: Role

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Layout:
    """Sequence of L tokens; the target split is vision_start, the latents in reading order, vision_end.

    text_ids int32 [L]; grid in latent cells; position_ids int32 [3, L]; uncond_position_ids int32 [3, kept tokens],
    recomputed without the user's text; latent_position_ids int32 [latents].
    """

    text_ids: np.ndarray
    splits: list[Split]
    grid: Grid
    frames: int
    size: tuple[int, int]
    position_ids: np.ndarray
    uncond_position_ids: np.ndarray
    latent_position_ids: np.ndarray

    @property
    def target(self) -> Split:
        return next(split for split in self.splits if split.mode is Mode.NOISE)

    @property
    def prefix(self) -> list[Split]:
        """The splits before the target."""
        return self.splits[: self.splits.index(self.target)]

    @property
    def roles(self) -> np.ndarray:
        return np.concatenate([np.full(split.length, split.role, np.int32) for split in self.splits])

    @property
    def kept(self) -> np.ndarray:
        """Indices of the tokens that the unconditional arm keeps."""
        return np.flatnonzero(self.roles != Role.TEXT)

    @property
    def latent_rows(self) -> np.ndarray:
        """Indices of the latent tokens: the target without its two brackets."""
        return np.arange(self.target.start + 1, self.target.stop - 1, dtype=np.int32)

    def arrays(self) -> dict[str, np.ndarray]:
        """The integers under the names of the oracles' inputs and layouts, all int32."""
        # Upstream gives rows and columns doubled, because the function that reads them halves them.
        thw = np.array([[self.grid.frames, 2 * self.grid.rows, 2 * self.grid.columns]], np.int32)
        return {
            "text_ids": self.text_ids,
            "modality": self.roles,
            "split_lens": np.array([split.length for split in self.splits], np.int32),
            "attn_modes": np.array([split.mode for split in self.splits], np.int32),
            "packed_vae_token_indexes": self.latent_rows,
            "mse_loss_indexes": self.latent_rows,
            "video_grid_thw": thw[None],
            "vae_video_grid_thw": thw,
            "video_sizes": np.array([[self.frames, *self.size]], np.int32),
            "position_ids.cond": self.position_ids,
            "position_ids.uncond": self.uncond_position_ids,
            "latent_position_ids": self.latent_position_ids,
        }


def build_layout(request: Request, tokenizer: Tokenizer, tokens_per_second: int = TOKENS_PER_SECOND) -> Layout:
    """Lay out a request's sequence (bytedance/Lance validation_dataset.py:t2v_sample, process_text_template).

    With the template: template, the user's text and template as three causal splits (one when the prompt is empty),
    the target, a closing split. Without: the user's text with its brackets as one causal split, the target.
    """
    ids: PromptIds = encode_prompt(request, tokenizer)
    grid = Grid(*request.latent_grid)
    latents = [tokenizer.video_pad] * (grid.frames * grid.rows * grid.columns)
    target = [tokenizer.vision_start, *latents, tokenizer.vision_end]
    if ids.text:
        pieces = [(ids.before, Role.TEMPLATE), (ids.text, Role.TEXT), (ids.after, Role.TEMPLATE)]
    else:
        pieces = [(ids.before + ids.after, Role.TEMPLATE)]
    pieces += [(target, Role.NOISE), (ids.end, Role.TEMPLATE)]

    splits: list[Split] = []
    for tokens, role in pieces:
        if tokens:
            start = splits[-1].stop if splits else 0
            splits.append(Split(start, len(tokens), Mode.NOISE if role is Role.NOISE else Mode.CAUSAL, role))

    def positions(kept_roles: tuple[Role, ...]) -> np.ndarray:
        before = sum(split.length for split in splits if split.role in kept_roles and split.mode is Mode.CAUSAL)
        before -= len(ids.end)
        # vision_start counts with the text before the grid, vision_end with the text after it.
        return rope_position_ids([Text(before + 1), grid, Text(1 + len(ids.end))], tokens_per_second)

    return Layout(
        text_ids=np.array([token for tokens, _ in pieces for token in tokens], np.int32),
        splits=splits,
        grid=grid,
        frames=request.frames,
        size=(request.height, request.width),
        position_ids=positions(tuple(Role)),
        uncond_position_ids=positions((Role.TEMPLATE, Role.NOISE)),
        latent_position_ids=latent_position_ids(grid),
    )
