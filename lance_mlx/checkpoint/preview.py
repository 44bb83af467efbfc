"""The map of latents to colours of `lance_mlx.sampling.preview`, stored with the VAE so that it is fitted once."""

import hashlib
import json

import numpy as np

from lance_mlx.checkpoint.safetensors import Tensors
from lance_mlx.sampling.preview import FACTORS

RGB_FACTORS = "latent_rgb_factors"
"""Key of the metadata that hold it: of Wan2.2_VAE.safetensors, or of a converted checkpoint's index."""
_HEAD = 4096
_DECIMALS = 6
"""A millionth moves no colour of 8 bits."""


def to_text(factors: np.ndarray, vae: Tensors) -> str:
    """A fitted map, float32 [49, 3], with what tells the VAE that it was fitted on."""
    return json.dumps({"factors": factors.astype(float).round(_DECIMALS).tolist(), "vae": _fingerprint(vae)})


def from_text(text: object, vae: Tensors) -> np.ndarray | None:
    """The map that `to_text` wrote; None where that is none, or of another VAE."""
    try:
        values = json.loads(text)
        factors = np.array(values["factors"], np.float32)
        fits = factors.shape == FACTORS and bool(np.isfinite(factors).all()) and values["vae"] == _fingerprint(vae)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
        return None
    return factors if fits else None


def _fingerprint(vae: Tensors) -> str:
    """A checksum of how each tensor is called, stored and begins: training moves every value, and no more is read."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.items()):
        digest.update(f"{name} {tensor.info}".encode())
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            digest.update(file.read(min(_HEAD, tensor.info.nbytes)))
    return digest.hexdigest()
