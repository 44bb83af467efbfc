"""What every layout of a checkpoint gives: configurations, tokenizer files and tensors under the official names."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lance_mlx.backend.numerics import Numerics
from lance_mlx.checkpoint.recipe import Recipe
from lance_mlx.checkpoint.safetensors import Tensors
from lance_mlx.errors import LanceError
from lance_mlx.requests.request import Variant

Config = TypeVar("Config")
VIT = "vit_model."
POSITION_TABLE = "latent_pos_embed.pos_embed"
"""Recomputed whatever its stored size."""


class ViTSource(StrEnum):
    """Whose ViT weights win where both the Lance file and the ViT file hold them.

    Upstream reads the ViT file first and the Lance file over it; the video checkpoint holds a ViT, the image one does
    not.
    """

    LANCE = "lance"
    VIT_FILE = "vit_file"


class Part(NamedTuple):
    """Tensors of one part of the model by their official names, and the file or folder that errors name."""

    path: Path
    tensors: Tensors


class Checkpoint(ABC):
    """A checkpoint of one variant in some layout; tensors are found, not read.

    Attributes:
        folder: where the tokenizer's files lie.
        variant: which of the two models it is.
        rounded: whether its weights were rounded to bfloat16 when it was made.
        quantization: what it says of its packed weights, None where it has none.
    """

    folder: Path
    variant: Variant
    rounded: bool
    quantization: Recipe | None = None

    @abstractmethod
    def llm_config(self, build: Callable[[dict[str, Any]], Config]) -> Config:
        """What `build` makes of the keys of llm_config.json; every LanceError names the file."""

    @abstractmethod
    def vit_config(self, build: Callable[[dict[str, Any]], Config]) -> Config:
        """What `build` makes of the keys of the ViT's config.json; every LanceError names the file."""

    @abstractmethod
    def lance(self) -> Part:
        """The language model and the projections of latents."""

    @abstractmethod
    def vit(self, source: ViTSource) -> Part:
        """The ViT, names beginning with `vit_model.`; raises LanceError where there is none."""

    @abstractmethod
    def vit_origin(self, source: ViTSource) -> ViTSource:
        """Which file `vit` takes, or the checkpoint was made from."""

    @abstractmethod
    def vae(self) -> Part:
        """The VAE, kernels (o, ..., i) and a norm's gamma as a vector."""

    def rgb_factors(self) -> np.ndarray | None:
        """The map of latents to colours that is stored with the VAE, float32 [49, 3]; None where there is none."""
        return None

    def check(self, numerics: Numerics) -> None:
        """Raise LanceError for a policy that would be given rounded weights without knowing."""
        if self.rounded and numerics.name == "float32":
            raise LanceError(
                f"{self.folder} holds weights rounded to bfloat16: ask for bfloat16, or convert the official "
                "checkpoint with lance-mlx convert --dtype float32"
            )


def is_lance(name: str) -> bool:
    """Whether a tensor of a Lance file belongs to `Checkpoint.lance`."""
    return name != POSITION_TABLE and not name.startswith(VIT)


def channels_last(tensors: Tensors) -> Tensors:
    """PyTorch's (o, i, t, h, w) and (o, i, h, w) kernels as (o, ..., i); a norm's gamma as a vector."""

    def moved(name: str):
        tensor = tensors[name]
        if name.endswith(".gamma"):
            return tensor.flat()
        rank = len(tensor.shape)
        return tensor.permuted(0, *range(2, rank), 1) if rank > 2 else tensor

    return {name: moved(name) for name in tensors}
