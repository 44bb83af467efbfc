"""A checkpoint, loaded."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from reference.arms import Inputs
from reference.config import LanguageConfig, VisionConfig
from reference.errors import ReferenceError
from reference.layout import Layout, VisualSize
from reference.numerics import Numerics
from reference.prompt import Tokenizer
from reference.request import Request
from reference.sequence import build_layout
from reference.transformer import Lance
from reference.vae import VAE
from reference.vit import VisionTower
from reference.weights import load_transformer, load_vae, load_vit, variant_folder

VIT_FOLDER = "Qwen2.5-VL-ViT"

__all__ = ["Lance", "Pipeline"]


@dataclass(frozen=True)
class Pipeline:
    """Everything that a request needs, loaded from one checkpoint folder; the vision tower when it is first used."""

    checkpoint: Path
    variant: str
    tokenizer: Tokenizer
    model: Lance
    vae: VAE
    numerics: Numerics
    device: torch.device

    @classmethod
    def load(cls, checkpoint: Path, variant: str, numerics: Numerics, device: str = "cpu") -> "Pipeline":
        """Load "Lance_3B" or "Lance_3B_Video" of a folder in the official layout; raises ReferenceError."""
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ReferenceError(f"device '{device}' is not available ({str(error).splitlines()[0]})") from None
        folder, place = variant_folder(checkpoint, variant), torch.device(device)
        tokenizer, model = outline(folder, numerics)
        load_transformer(model, folder / "model.safetensors", numerics, place)
        vae = load_vae(Path(checkpoint) / "Wan2.2_VAE.pth", numerics, place)
        return cls(Path(checkpoint), variant, tokenizer, model.eval(), vae, numerics, place)

    @cached_property
    def vit_model(self) -> VisionTower:
        """The vision tower; raises ReferenceError when its files are missing or do not fit."""
        folder = self.checkpoint / VIT_FOLDER
        config = VisionConfig.from_file(folder / "config.json")
        if config.out_hidden_size != self.model.config.hidden_size:
            hidden = self.model.config.hidden_size
            raise ReferenceError(
                f"{folder}: out_hidden_size is {config.out_hidden_size}, the transformer's is {hidden}"
            )
        with torch.device("meta"):
            tower = VisionTower(config, self.numerics)
        over = self.checkpoint / self.variant / "model.safetensors"
        load_vit(tower, folder / "vit.safetensors", over, self.numerics, self.device)
        return tower

    def layout(self, request: Request, visuals: list[VisualSize] | None = None) -> Layout:
        """The request's sequence with this checkpoint's tokenizer, for visuals of the given sizes."""
        return build_layout(request, self.tokenizer, visuals, self.model.config.tokens_per_second)

    def inputs(self, layout: Layout, vit: Tensor | None = None) -> Inputs:
        """What a layout's tokens are embedded from; `vit` are the vision tower's tokens."""
        return Inputs(self.model, layout, vit, self.device)


def outline(folder: Path, numerics: Numerics) -> tuple[Tokenizer, Lance]:
    """The tokenizer of a variant's folder, and its transformer on the meta device, without weights.

    Raises ReferenceError where configuration and tokenizer are missing or disagree.
    """
    config, tokenizer = LanguageConfig.from_file(folder / "llm_config.json"), Tokenizer(folder)
    for key, token in (
        ("vision_start_token_id", tokenizer.vision_start),
        ("vision_end_token_id", tokenizer.vision_end),
        ("image_token_id", tokenizer.image_pad),
        ("video_token_id", tokenizer.video_pad),
    ):
        if getattr(config, key) != token:
            raise ReferenceError(f"{folder}: {key} is {getattr(config, key)}, the tokenizer says {token}")
    with torch.device("meta"):
        return tokenizer, Lance(config, numerics)
