"""A request as one token sequence: segments with a role and an attention mode."""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np


class Role(IntEnum):
    """What a token is to the request (upstream's sample_modality)."""

    TEMPLATE = -1
    TEXT = 0
    NOISE = 1
    SOURCE = 2
    REFERENCE = 3
    VIT = 4


class AttentionMode(IntEnum):
    """How the tokens of a segment see each other; every segment also sees all earlier ones that are not noise."""

    CAUSAL = 0
    FULL = 1
    FULL_NOISE = 2
    NOISE = 3


LATENT_MODES = (AttentionMode.FULL_NOISE, AttentionMode.NOISE)
"""Modes of the segments whose inner tokens are VAE latents and belong to the generation expert."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive tokens of one role: a run of text, or a visual block with its two bracket tokens.

    Attributes:
        ids: int32 [n].
        grid: (t, h, w) cells of a visual block, n = t*h*w + 2; None for text.
        clean_frames: latent frames at the start of a denoised block that are given and never change.
    """

    role: Role
    mode: AttentionMode
    ids: np.ndarray
    grid: tuple[int, int, int] | None = None
    clean_frames: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_latent(self) -> bool:
        """Whether the inner tokens are VAE latents."""
        return self.mode in LATENT_MODES

    @property
    def clean_tokens(self) -> int:
        """Inner tokens that are given: all of a clean block, those of the clean frames of a denoised one."""
        if self.mode is AttentionMode.NOISE:
            return self.clean_frames * self.grid[1] * self.grid[2]
        return len(self) - 2 if self.is_latent else 0


@dataclass(frozen=True)
class Sequence:
    """The segments of one request, in order."""

    segments: tuple[Segment, ...]

    @cached_property
    def starts(self) -> list[int]:
        """Index of each segment's first token."""
        return [0, *np.cumsum([len(segment) for segment in self.segments]).tolist()][:-1]

    @property
    def ids(self) -> np.ndarray:
        """Token ids, int32 [n]."""
        return np.concatenate([segment.ids for segment in self.segments])

    @property
    def roles(self) -> np.ndarray:
        """Role of every token, int32 [n]; the brackets of a visual block carry its role."""
        return np.repeat([segment.role for segment in self.segments], [len(s) for s in self.segments]).astype(np.int32)

    @property
    def prefix(self) -> tuple[Segment, ...]:
        """The segments before the denoised block."""
        return self.segments[: self.target_index]

    @property
    def target(self) -> Segment:
        """The denoised block."""
        return self.segments[self.target_index]

    @cached_property
    def target_index(self) -> int:
        """Position of the denoised block among the segments."""
        return next(i for i, segment in enumerate(self.segments) if segment.mode is AttentionMode.NOISE)

    def denoised_indexes(self) -> np.ndarray:
        """Indexes of the latents that the sampler moves, int32."""
        return self.inner_indexes(AttentionMode.NOISE)[self.target.clean_tokens :]

    def without(self, role: Role) -> "Sequence":
        """The sequence with every segment of that role dropped."""
        return Sequence(tuple(segment for segment in self.segments if segment.role is not role))

    def inner_indexes(self, *modes: AttentionMode) -> np.ndarray:
        """Indexes of the tokens between the brackets of the visual blocks with one of these modes, int32."""
        runs = [
            np.arange(start + 1, start + len(segment) - 1)
            for start, segment in zip(self.starts, self.segments, strict=True)
            if segment.grid is not None and segment.mode in modes
        ]
        return np.concatenate(runs).astype(np.int32) if runs else np.zeros(0, np.int32)
