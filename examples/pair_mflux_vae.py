"""mflux's decoder of FLUX's latents against diffusers', at the sizes that mflux writes into its code."""

import mlx.core as mx
import numpy as np
import torch
from diffusers import AutoencoderKL
from mflux.models.common.config import ModelConfig
from mflux.models.flux.model.flux_vae.decoder.decoder import Decoder

from parity.pairs import Pair, copy_weights

NAMES = {"conv_in.conv2d": "conv_in", "conv_out.conv2d": "conv_out", "conv_norm_out.norm": "conv_norm_out"}


def run_trusted(model, latents, call):
    return model(torch.from_numpy(latents).to(next(model.parameters()).dtype))


def run_port(model, latents, call):
    return model(mx.array(latents))


def pair(dtype: str) -> Pair:
    torch.manual_seed(0)
    whole = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    trusted = whole.decoder.eval()
    for parameter in trusted.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    trusted = trusted.to(getattr(torch, dtype))
    # It computes in bfloat16 whatever its weights are, unless it is told otherwise.
    ModelConfig.precision = getattr(mx, dtype)
    latents = np.random.default_rng(0).standard_normal((1, 16, 2, 3)).astype(np.float32)
    made = Pair(trusted, Decoder(), latents, run_trusted, run_port, names=NAMES)
    copy_weights(made)
    return made
