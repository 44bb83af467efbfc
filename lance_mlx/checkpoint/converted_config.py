"""config.json of a converted checkpoint: every fact about the architecture, checked against this version on reading."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lance_mlx.checkpoint.recipe import KEYS, Plan
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.config import (
    LATENT_CHANNELS,
    MAX_LATENT_FRAMES,
    MAX_LATENT_SIDE,
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
)
from lance_mlx.errors import LanceError
from lance_mlx.model.lance import MAX_PERIOD, TIMESTEP_FEATURES
from lance_mlx.model.vae_constants import LATENT_MEAN, LATENT_STD
from lance_mlx.model.vae_decoder import DecoderShape
from lance_mlx.model.vae_encoder import EncoderShape
from lance_mlx.model.vae_layers import PATCH
from lance_mlx.model.vit import NORM_EPS
from lance_mlx.requests.request import Variant

MODEL_TYPE = "lance"
_CHOICES = {
    "variant": list(Variant),
    "dtype": ["float32", "bfloat16"],
    "vit_source": list(ViTSource),
}
# What this version computes; a checkpoint that says something else is another model.
_FACTS = {
    "latent_config": {
        "channels": LATENT_CHANNELS,
        "spatial_stride": SPATIAL_STRIDE,
        "temporal_stride": TEMPORAL_STRIDE,
        "mean": list(LATENT_MEAN),
        "std": list(LATENT_STD),
        "position_table": [MAX_LATENT_FRAMES, MAX_LATENT_SIDE, MAX_LATENT_SIDE],
        "position_embedding": "sin-cos: a third of the channels, rounded down to even, for frames and rows each",
    },
    "timestep_config": {"features": TIMESTEP_FEATURES, "max_period": MAX_PERIOD},
    "expert_suffixes": {"understanding": "", "generation": "_moe_gen"},
    "vit_norm_eps": NORM_EPS,
    "vae_patch_size": PATCH,
}


def converted_config(
    variant: Variant,
    dtype: str,
    vit_source: ViTSource,
    llm: dict[str, Any],
    vit: dict[str, Any],
    decoder: DecoderShape,
    encoder: EncoderShape,
    quantized: Plan,
) -> dict[str, Any]:
    """The keys of config.json; `llm` and `vit` are the official files' own."""
    return ({KEYS[0]: quantized.to_dict()} if quantized else {}) | {
        "model_type": MODEL_TYPE,
        "variant": str(variant),
        "dtype": dtype,
        "vit_source": str(vit_source),
        # The output head is a tensor of its own, whatever the official file says.
        "llm_config": llm | {"tie_word_embeddings": False},
        "vit_config": vit,
        "vae_config": {"decoder": asdict(decoder), "encoder": asdict(encoder)},
        **_FACTS,
    }


def check_facts(values: dict[str, Any], path: Path) -> None:
    """Raise LanceError for a key of config.json that is missing, unknown, or not what this version computes."""
    objects = {"llm_config", "vit_config", "vae_config"}
    known = {"model_type", *_CHOICES, *_FACTS, *objects}
    for complaint, keys in (("is missing", known - set(values)), ("is unknown", set(values) - known - set(KEYS))):
        if keys:
            raise LanceError(f"{path}: key '{min(keys)}' {complaint}: convert the checkpoint again")
    for key, allowed in _CHOICES.items():
        if values[key] not in allowed:
            raise LanceError(f"{path}: '{key}' is {values[key]!r}, but must be one of {', '.join(allowed)}")
    for key, fact in _FACTS.items():
        if values[key] != fact:
            raise LanceError(f"{path}: '{key}' is not what this version computes: convert the checkpoint again")
    for key in sorted(objects):
        if not isinstance(values[key], dict):
            raise LanceError(f"{path}: '{key}' must be an object")


def check_vae(config: dict[str, Any], decoder: DecoderShape, encoder: EncoderShape, path: Path) -> None:
    """Raise LanceError where config.json's vae_config contradicts the tensors."""
    for name, shape in {"decoder": decoder, "encoder": encoder}.items():
        if config.get(name) != _plain(shape):
            raise LanceError(f"{path}: vae_config.{name} contradicts the tensors: convert the checkpoint again")


def _plain(shape: DecoderShape | EncoderShape) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(shape).items()}
