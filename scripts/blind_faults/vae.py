"""The VAE in both directions: statistics, shortcuts, attention, kernels and what its streams remember."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from blind_faults.common import (
    Change,
    digits,
    fp8,
    pair,
    parameters,
    plain,
    precision,
    small,
)
from lance_mlx.model import vae as vae_module
from lance_mlx.model.attention import attention
from lance_mlx.model.vae import LatentStatistics
from lance_mlx.model.vae_constants import LATENT_STD
from lance_mlx.model.vae_decoder import UpBlock
from lance_mlx.model.vae_encoder import DownBlock, TimeConv
from lance_mlx.model.vae_layers import AttentionBlock, CausalConv3d, ResidualBlock, StreamState
from parity.lance.faults.base import (
    DRAWS,
    ENCODES,
    FLOAT32,
    VIDEOS,
    Patch,
    Target,
    calls,
    method,
    parameter,
    rounded,
    together,
)

_DECODER = "vae.decoder.*"


def _constant(name: str, change: Change) -> Patch:
    def patch(target: Target):
        return parameter(target.vae, name, change(target.vae[name].astype(mx.float32)).astype(target.vae[name].dtype))

    return patch


def _four_heads(original: Callable, module: AttentionBlock, x: mx.array, state: StreamState) -> mx.array:
    t, h, w, c = x.shape
    qkv = module.to_qkv(module.norm(x)).reshape(t, h * w, 3, 4, c // 4).transpose(2, 0, 3, 1, 4)
    y = attention(*qkv, causal=False).transpose(0, 2, 1, 3)
    return module.proj(y.reshape(t, h, w, c)) + x


def _shared(original: Callable, module: ResidualBlock, x: mx.array, state: StreamState) -> mx.array:
    y = original(module, x, state)
    return (y.astype(mx.float32) * 0.5**0.5).astype(y.dtype)


def _tiled(original: Callable, module: UpBlock, x: mx.array, state: StreamState) -> mx.array:
    t, h, w, c = x.shape
    shape = module._shape
    factor_t, out = 2 if shape.upsamples_time else 1, shape.out_channels
    x = mx.tile(x, (1, 1, 1, out * factor_t * 4 // c))
    x = x.reshape(t, h, w, out, factor_t, 2, 2).transpose(0, 4, 1, 5, 2, 6, 3)
    x = x.reshape(t * factor_t, 2 * h, 2 * w, out)
    return x[factor_t - 1 :] if state.first_chunk else x


def _first_of_group(original: Callable, module: DownBlock, x: mx.array) -> mx.array:
    shape = module._shape
    factor = 2 if shape.downsamples_space else 1
    y = original(module, mx.repeat(mx.repeat(x[:, ::factor, ::factor], factor, axis=1), factor, axis=2))
    return y


def _normalised_spread(original: Callable, statistics: LatentStatistics, eps: mx.array) -> mx.array:
    std = mx.array(np.array(LATENT_STD, np.float32))
    return statistics.mean + mx.exp(0.5 * statistics.logvar) / std * eps


def _flipped(weight: mx.array) -> mx.array:
    return weight[:, :, ::-1, ::-1] if weight.ndim == 5 else weight[:, ::-1, ::-1]


def _low_past(original: Callable, module: CausalConv3d, x: mx.array, state: StreamState) -> mx.array:
    if id(module) in state.past:
        state.past[id(module)] = rounded(state.past[id(module)])
    return original(module, x, state)


def _short_past(original: Callable, module: CausalConv3d, x: mx.array, state: StreamState) -> mx.array:
    past = state.past.get(id(module))
    if past is not None and len(past) == 2:
        state.past[id(module)] = mx.concatenate([past[1:], past[1:]])
    return original(module, x, state)


def _stale_past(original: Callable, module: TimeConv, x: mx.array, state: StreamState) -> mx.array:
    past = state.past.get(id(module))
    y = original(module, x, state)
    if past is not None:
        state.past[id(module)] = past
    return y


def _decoded(change: Callable[[int, mx.array], mx.array]) -> Patch:
    """A patch of the pixels of a chunk, [1 or 4, h, w, 3], with its number."""

    def decode(original: Callable, vae: vae_module.VAE, latents: mx.array):
        for index, pixels in enumerate(original(vae, latents)):
            yield change(index, pixels)

    return method(vae_module.VAE, "decode", decode)


def _seam(index: int, pixels: mx.array) -> mx.array:
    """The two columns at the middle of a picture, which two tiles share, as their mean."""
    middle = pixels.shape[2] // 2
    mean = (pixels[:, :, middle - 1 : middle] + pixels[:, :, middle : middle + 1]) / 2
    return mx.concatenate([pixels[:, :, : middle - 1], mean, mean, pixels[:, :, middle + 1 :]], axis=2)


def _last_frame_repeats(index: int, pixels: mx.array) -> mx.array:
    return pixels if len(pixels) == 1 else mx.concatenate([pixels[:3], pixels[2:3]])


FAULTS = [
    plain(
        "blind-vae-attention-four-heads",
        "vae.*.middle.1*",
        calls(AttentionBlock, _four_heads, "vae.*coder.middle.1"),
        "The VAE's attention has four heads of a quarter of the channels, with their scale, instead of one.",
        tasks=DRAWS,
    ),
    plain(
        "blind-vae-residual-blocks-halved",
        "vae.decoder.middle.0*",
        calls(ResidualBlock, _shared, _DECODER),
        "The sum of branch and shortcut of the decoder's residual blocks is divided by sqrt(2), diffusers' "
        "output_scale_factor.",
        tasks=DRAWS,
    ),
    plain(
        "blind-vae-shortcut-tiled",
        "vae.decoder.upsamples.?",
        method(UpBlock, "_repeated", _tiled),
        "The decoder's shortcuts tile their channels, a b a b, where they should repeat each, a a b b.",
        tasks=DRAWS,
    ),
    plain(
        "blind-vae-encoder-shortcut-takes-the-first",
        "vae.encoder.downsamples.?",
        method(DownBlock, "_averaged", _first_of_group),
        "The encoder's shortcuts take the top left value of every two by two instead of their mean.",
        tasks=ENCODES,
    ),
    plain(
        "blind-vae-spread-normalised",
        "vae.encoder.sample",
        method(LatentStatistics, "sample", _normalised_spread),
        "The deviation of sampled latents is divided by the 48 constants as their mean is, where upstream leaves it.",
        tasks=ENCODES,
    ),
    plain(
        "blind-vae-kernels-flipped",
        "vae.decoder.upsamples.*.resample.1",
        parameters(_flipped, "vae.decoder.upsamples.*.resample.1"),
        "The kernels of the decoder's up-sampling are flipped in both directions: a convolution where upstream "
        "correlates.",
        tasks=DRAWS,
    ),
    small(
        "blind-vae-mean-of-one-channel",
        "vae.encoder.mean",
        _constant("_mean", digits(30, -0.2979)),
        "The mean of latent channel 30 is written -0.2979 instead of -0.2799, in both directions.",
        tasks=ENCODES,
    ),
    small(
        "blind-vae-deviation-with-swapped-digits",
        "vae.conv2",
        _constant("_inverse_std", digits(17, 1 / 0.3253)),
        "The deviation of latent channel 17 is written 0.3253 instead of 0.3523.",
        tasks=frozenset({"t2i", "t2v"}),
    ),
    small(
        "blind-vae-bias-of-one-convolution-lost",
        "vae.decoder.upsamples.0.upsamples.0.residual.2",
        parameters(lambda b: 0 * b, "vae.decoder.upsamples.0.upsamples.0.residual.2", name="bias"),
        "One convolution of the decoder's first up block, the first of its first residual block, has no bias.",
        tasks=DRAWS,
    ),
    small(
        "blind-vae-seam-of-two-tiles",
        "vae.pixels",
        _decoded(_seam),
        "The two columns in the middle of a frame, where two tiles meet, are both their mean.",
        tasks=DRAWS,
    ),
    small(
        "blind-vae-fourth-frame-repeats-the-third",
        "vae.pixels",
        _decoded(_last_frame_repeats),
        "The fourth frame of every later latent frame is a copy of the third.",
        tasks=VIDEOS,
    ),
    small(
        "blind-vae-past-of-one-frame",
        "vae.decoder.conv1",
        calls(CausalConv3d, _short_past, "vae.decoder*"),
        "The decoder's convolutions remember one frame of the chunk before and use it twice, which shows from the "
        "third latent frame on.",
        tasks=VIDEOS,
    ),
    small(
        "blind-vae-encoder-keeps-its-first-frame",
        "vae.encoder.downsamples.*.time_conv",
        calls(TimeConv, _stale_past, "vae.encoder.*"),
        "The encoder's temporal convolutions go on with the very first frame before every chunk instead of with the "
        "last one of the chunk before: it shows from the third chunk on.",
        tasks=frozenset({"i2v", "video_edit"}),
    ),
    precision(
        "blind-vae-past-bfloat16",
        "vae.decoder.*",
        calls(CausalConv3d, _low_past, _DECODER),
        "What the decoder's convolutions remember of earlier frames is held in bfloat16 in a float32 run.",
        tasks=VIDEOS,
        dtypes=FLOAT32,
    ),
    precision(
        "blind-vae-convolutions-fp8",
        "vae.decoder.middle.*",
        parameters(fp8, "vae.decoder.middle.*.residual.?"),
        "The convolutions in the middle of the decoder went through E4M3 with one scale each.",
        tasks=DRAWS,
    ),
    pair(
        "blind-pair-vae-heads-and-shortcuts",
        "vae.*.middle.1*",
        together(
            calls(AttentionBlock, _four_heads, "vae.decoder.middle.1"),
            method(UpBlock, "_repeated", _tiled),
        ),
        "Two faults of the decoder in two places: its attention has four heads (middle.1), and its shortcuts tile "
        "their channels instead of repeating each (upsamples).",
        tasks=DRAWS,
    ),
    pair(
        "blind-pair-vae-constants",
        "vae.conv2",
        together(_constant("_mean", digits(30, -0.2979)), _constant("_inverse_std", digits(17, 1 / 0.3253))),
        "Two faults of the constants at once: the mean of latent channel 30 is -0.2979 instead of -0.2799 and the "
        "deviation of channel 17 is 0.3253 instead of 0.3523.",
        tasks=frozenset({"t2i", "t2v"}),
    ),
    pair(
        "blind-pair-vae-kernels-of-two-blocks",
        "vae.decoder.upsamples.*.resample.1",
        together(
            parameters(_flipped, "vae.decoder.upsamples.0.upsamples.3.resample.1"),
            parameters(fp8, "vae.decoder.upsamples.1.upsamples.3.resample.1"),
        ),
        "Two faults of one kind in two places: the up-sampling kernel of the decoder's block 0 is flipped in both "
        "directions, that of block 1 went through E4M3.",
        tasks=DRAWS,
    ),
]
