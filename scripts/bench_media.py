"""The cases of bench.py for what comes before and behind the transformer: the ViT, the VAE."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
from bench_work import Work, randomized

from lance_mlx.backend.numerics import policy
from lance_mlx.estimate.cost import decoder_convolutions, encoder_convolutions
from lance_mlx.estimate.estimate import OFFICIAL
from lance_mlx.model.vae import VAE
from lance_mlx.model.vae_decoder import DecoderShape
from lance_mlx.model.vae_encoder import EncoderShape
from lance_mlx.model.vit import VisionTransformer

# The VAE at a quarter of its width, where the question is how memory grows.
NARROW = DecoderShape(
    OFFICIAL.decoder.channels // 4,
    tuple(
        replace(block, in_channels=block.in_channels // 4, out_channels=block.out_channels // 4)
        for block in OFFICIAL.decoder.up_blocks
    ),
)


def vit(side: int, dtype: str) -> Work:
    """The official ViT on a picture of side x side pixels, at an eighth of its depth."""
    numerics, patches = policy(dtype), side // 14
    config = replace(OFFICIAL.vit, depth=4, fullatt_block_indexes=(3,))
    model = randomized(VisionTransformer(config, numerics), numerics.dtype)
    values = mx.random.normal((patches * patches, 1176))
    n, h = patches * patches, config.hidden_size
    products = 2 * n * config.depth * (4 * h * h + 3 * h * config.intermediate_size)
    return Work(lambda: mx.eval(model(values, [(1, patches, patches)])), products)


def vae_decode(frames: int, side: int, dtype: str, narrow: bool = False) -> Work:
    """Wan's decoder on latent frames of side x side pixels."""
    numerics = policy(dtype)
    vae = randomized(VAE(NARROW if narrow else OFFICIAL.decoder, None, numerics), numerics.dtype)
    latents = mx.random.normal((frames, side // 16, side // 16, 48)).astype(numerics.dtype)

    def run() -> None:
        for pixels in vae.decode(latents):
            # As when frames are written one by one.
            np.asarray(pixels)

    shape = NARROW if narrow else OFFICIAL.decoder
    return Work(run, _coding_operations(decoder_convolutions, shape, frames, side), frames)


def vae_encode(frames: int, side: int, dtype: str) -> Work:
    """Wan's encoder on so many latent frames' worth of pixels."""
    numerics = policy(dtype)
    vae = randomized(VAE(NARROW, OFFICIAL.encoder, numerics), numerics.dtype)
    pixels = np.random.default_rng(0).uniform(-1, 1, (4 * frames - 3, side, side, 3)).astype(np.float32)
    operations = _coding_operations(encoder_convolutions, OFFICIAL.encoder, frames, side)
    return Work(lambda: vae.encode(pixels), operations, frames)


def _coding_operations(build: Callable, shape: DecoderShape | EncoderShape, frames: int, side: int) -> int:
    """Operations of the convolutions that code so many latent frames of side x side pixels."""
    built = (build(shape, (side // 16) ** 2, frame == 0) for frame in range(frames))
    return sum(convolution.operations for chunk in built for convolution in chunk)
