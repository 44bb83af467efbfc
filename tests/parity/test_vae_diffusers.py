"""Both VAEs against diffusers' AutoencoderKLWan in the form of Wan 2.2, with the same random weights."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from lance_mlx.backend.numerics import FLOAT32
from lance_mlx.checkpoint.layouts import read_vae
from lance_mlx.checkpoint.weights import load_vae as load_mlx
from reference.numerics import Numerics
from reference.vae import DEVIATION, MEAN
from reference.weights import load_vae as load_reference

# Shapes and names of Wan's own state dict; the values are replaced.
STORED = Path(__file__).parents[2] / "oracles" / "checkpoint-a" / "Wan2.2_VAE.pth"
# Encoder and decoder differ in width, so that neither can pass for the other.
SIZES = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": list(MEAN),
    "latents_std": list(DEVIATION),
}
BOUND = 2e-5
# Wan's names to diffusers'; the first pattern that matches the start of what is left takes it.
RENAMED = [
    (r"conv1\.", "quant_conv."),
    (r"conv2\.", "post_quant_conv."),
    (r"(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    (r"encoder\.downsamples\.(\d)\.downsamples\.\d\.(resample|time_conv)", r"encoder.down_blocks.\1.downsampler.\2"),
    (r"decoder\.upsamples\.(\d)\.upsamples\.\d\.(resample|time_conv)", r"decoder.up_blocks.\1.upsampler.\2"),
    (r"encoder\.downsamples\.(\d)\.downsamples\.(\d)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"decoder\.upsamples\.(\d)\.upsamples\.(\d)\.", r"decoder.up_blocks.\1.resnets.\2."),
]
INSIDE = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
INSIDE["shortcut"] = "conv_shortcut"


def diffusers_name(name: str) -> str:
    """What diffusers calls a parameter of Wan's state dict."""
    renamed = next(re.sub(f"^{wan}", other, name) for wan, other in RENAMED if re.match(wan, name))
    for wan, other in INSIDE.items():
        renamed = renamed.replace(f".{wan}.", f".{other}.")
    return renamed


def random_values(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values that keep activations near unit size: norms around 1, biases around 0.1, none of them exactly there."""
    values = torch.randn(shape, generator=generator)
    if name.endswith("gamma"):
        return 1 + 0.2 * values
    if name.endswith("bias"):
        return 0.1 + 0.1 * values
    # Few of the pixels are to reach the bounds of [-1, 1], where errors are cut off.
    return values * shape[1:].numel() ** -0.5 * (0.3 if name.startswith("decoder.conv_out") else 1)


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    """diffusers' autoencoder, the reference's and lance_mlx's, with the same weights."""
    from diffusers import AutoencoderKLWan

    theirs = AutoencoderKLWan(**SIZES).eval()
    generator = torch.Generator().manual_seed(0)
    weights = {name: random_values(name, value.shape, generator) for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    names = {name: diffusers_name(name) for name in torch.load(STORED, weights_only=True)}
    assert sorted(names.values()) == sorted(weights)
    path = tmp_path_factory.mktemp("checkpoint") / "Wan2.2_VAE.pth"
    torch.save({name: weights[other] for name, other in names.items()}, path)
    reference = load_reference(path, Numerics("float32"), torch.device("cpu"))
    ours = load_mlx(read_vae(path), FLOAT32, with_encoders=True)
    return theirs, reference, ours


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


several_lengths = pytest.mark.parametrize("frames", [1, 2, 5, 13])


@several_lengths
@pytest.mark.parametrize(("height", "width", "left_over"), [(32, 48, 0), (64, 32, 3)])
@torch.inference_mode()
def test_encodes_as_diffusers_does(autoencoders, frames, height, width, left_over):
    theirs, reference, ours = autoencoders
    shape = (4 * frames - 3 + left_over, height, width, 3)
    pixels = np.random.default_rng(frames).uniform(-1, 1, shape).astype(np.float32)
    channels_first = torch.from_numpy(pixels).movedim(-1, 0)
    # diffusers leaves normalising the mean to its pipelines, and would clamp the log-variance that is asked of it.
    moments = theirs.encode(channels_first[None]).latent_dist.parameters[0]
    mean, logvar = np.split(moments.movedim(0, -1).numpy(), 2, axis=-1)
    mean = (mean - np.float32(MEAN)) / np.float32(DEVIATION)

    posteriors = list(reference.encode_frames(channels_first))
    assert len(posteriors) == frames
    for name, expected in (("mean", mean), ("logvar", logvar)):
        found = torch.cat([getattr(part, name) for part in posteriors], 2)[0].movedim(0, -1).numpy()
        assert relative_error(found, expected) <= BOUND, f"reference {name}"
        assert relative_error(np.array(getattr(ours.encode(pixels), name)), expected) <= BOUND, f"lance_mlx {name}"


@several_lengths
@pytest.mark.parametrize(("height", "width"), [(32, 48), (64, 32)])
@torch.inference_mode()
def test_decodes_as_diffusers_does(autoencoders, frames, height, width):
    theirs, reference, ours = autoencoders
    shape = (frames, height // 16, width // 16, 48)
    latents = np.random.default_rng(frames).standard_normal(shape).astype(np.float32)
    raw = torch.from_numpy(latents * np.float32(DEVIATION) + np.float32(MEAN))
    expected = theirs.decode(raw.movedim(-1, 0)[None]).sample[0].numpy()
    assert expected.shape == (3, 4 * frames - 3, height, width)
    assert 0.1 < expected.std() and np.mean(np.abs(expected) == 1) < 0.05

    found = torch.cat(list(reference.decode_frames(torch.from_numpy(latents))), 1)
    assert relative_error(found.numpy(), expected) <= BOUND, "reference"
    found = np.concatenate([np.array(chunk) for chunk in ours.decode(mx.array(latents))])
    assert relative_error(found.transpose(3, 0, 1, 2), expected) <= BOUND, "lance_mlx"
