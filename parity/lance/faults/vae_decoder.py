"""Faults of the VAE's decoder, of its pixels and of the frames that they become."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.errors import LanceError
from lance_mlx.media import write as media
from lance_mlx.model import vae
from lance_mlx.model.vae import VAE
from lance_mlx.model.vae_constants import LATENT_MEAN, LATENT_STD
from lance_mlx.model.vae_decoder import Resample, UpBlock
from lance_mlx.model.vae_layers import AttentionBlock, CausalConv3d, StreamState
from parity.lance.faults.base import (
    BFLOAT16,
    DRAWS,
    VIDEOS,
    Fault,
    Patch,
    Target,
    calls,
    explained,
    function,
    method,
    parameter,
    wrapped,
)

_UPSAMPLES = "vae.decoder.upsamples.*"


def _first_through_time_conv(
    kept: int, original: Callable, module: Resample, x: mx.array, state: StreamState
) -> mx.array:
    if "time_conv" in module and state.first_chunk:
        t, h, w, c = x.shape
        x = module.time_conv(x, state).reshape(t, h, w, 2, c)[..., kept, :]
        # What the second chunk sees is right, so that nothing else is wrong.
        del state.past[id(module.time_conv)]
    return original(module, x, state)


def _remembers_the_first(original: Callable, module: Resample, x: mx.array, state: StreamState) -> mx.array:
    if "time_conv" in module and state.first_chunk:
        state.past[id(module.time_conv)] = x
    return original(module, x, state)


def _resampled(
    spread: Callable[[mx.array], mx.array] = lambda x: mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2),
    halves_alternate: bool = False,
) -> Patch:
    def call(original: Callable, module: Resample, x: mx.array, state: StreamState) -> mx.array:
        if "time_conv" in module and not state.first_chunk:
            t, h, w, c = x.shape
            x = module.time_conv(x, state)
            x = x.reshape(t, h, w, c, 2).moveaxis(-1, -2) if halves_alternate else x.reshape(t, h, w, 2, c)
            x = x.transpose(0, 3, 1, 2, 4).reshape(2 * t, h, w, c)
        return module.resample[1](spread(x))

    return method(Resample, "__call__", call)


def _bilinear(x: mx.array) -> mx.array:
    return nn.Upsample(scale_factor=2, mode="linear")(x.astype(mx.float32)).astype(x.dtype)


def _without_shortcut(original: Callable, module: UpBlock, x: mx.array, state: StreamState) -> mx.array:
    return mx.zeros_like(original(module, x, state))


def _tiled_shortcut(original: Callable, module: UpBlock, x: mx.array, state: StreamState) -> mx.array:
    repeats = module._shape.out_channels * (8 if module._shape.upsamples_time else 4) // module._shape.in_channels
    # Repeating in turn what is then repeated each by itself gives the order of a tile.
    t, h, w, c = x.shape
    factor_t, out = (2 if module._shape.upsamples_time else 1), module._shape.out_channels
    y = mx.tile(x, (1, 1, 1, repeats)).reshape(t, h, w, out, factor_t, 2, 2).transpose(0, 4, 1, 5, 2, 6, 3)
    y = y.reshape(t * factor_t, 2 * h, 2 * w, out)
    return y[factor_t - 1 :] if state.first_chunk else y


def _decode_with(statistics: Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]) -> Patch:
    """Decode with another mean and inverse deviation, made of the right ones; the encoder keeps those."""

    def decode(original: Callable, module: VAE, latents: mx.array) -> Iterator[mx.array]:
        mean, inverse_std = statistics(module["_mean"], module["_inverse_std"])
        with parameter(module, "_mean", mean), parameter(module, "_inverse_std", inverse_std):
            yield from original(module, latents)

    return method(VAE, "decode", decode)


@contextmanager
def _exact_statistics(target: Target) -> Iterator[None]:
    exact = _decode_with(lambda mean, inverse_std: (mx.array(LATENT_MEAN), 1 / mx.array(LATENT_STD)))

    def cast(original: Callable, module: CausalConv3d, x: mx.array, state: StreamState) -> mx.array:
        return original(module, x.astype(module["weight"].dtype), state)

    with ExitStack() as stack:
        stack.enter_context(exact(target))
        stack.enter_context(calls(CausalConv3d, cast, "vae.conv2")(target))
        yield


def _no_attention(original: Callable, module: AttentionBlock, x: mx.array, state: StreamState) -> mx.array:
    original(module, x, state)
    return x


def _colour_last(original: Callable, x: mx.array) -> mx.array:
    t, h, w, _ = x.shape
    return original(x.reshape(t, h, w, 2, 2, 3).transpose(0, 1, 2, 5, 4, 3).reshape(x.shape))


def _rows_for_columns(original: Callable, x: mx.array) -> mx.array:
    t, h, w, _ = x.shape
    return original(x.reshape(t, h, w, 3, 2, 2).swapaxes(-1, -2).reshape(x.shape))


def _not_clipped(original: Callable, module: VAE, latents: mx.array) -> Iterator[mx.array]:
    state = StreamState()
    for index in range(len(latents)):
        frame = latents[index : index + 1] / module["_inverse_std"] + module["_mean"]
        pixels = vae._unpack(module.decoder(module.conv2(frame, state), state)).astype(mx.float32)
        mx.eval(pixels, list(state.past.values()))
        yield pixels


def _truncated(original: Callable, pixels: np.ndarray) -> np.ndarray:
    pixels = np.asarray(pixels, np.float32)
    if not np.isfinite(pixels).all():
        raise LanceError("the decoded pixels hold NaN or infinite values")
    return np.clip((pixels * 0.5 + 0.5) * 255, 0, 255).astype(np.uint8)


def _blue_first(target: Target) -> AbstractContextManager[None]:
    """Exchange the colours of a picture, whichever axis holds them."""

    def to_uint8(original: Callable, pixels: np.ndarray) -> np.ndarray:
        frames = original(pixels)
        axis = -1 if frames.shape[-1] == 3 else 0
        return np.flip(frames, axis)

    return function(media, "to_uint8", to_uint8)(target)


_fault = partial(explained, tasks=DRAWS)

FAULTS = [
    _fault(
        "vae-first-frame-through-time-conv",
        _UPSAMPLES,
        "the first frame goes through the temporal convolution",
        method(Resample, "__call__", partial(_first_through_time_conv, 1)),
        "The first latent frame goes through the temporal convolutions, and the last frame that comes out is kept.",
    ),
    _fault(
        "vae-first-frame-through-time-conv-first-kept",
        _UPSAMPLES,
        "the first frame goes through the temporal convolution and the first of two is kept",
        method(Resample, "__call__", partial(_first_through_time_conv, 0)),
        "The first latent frame goes through the temporal convolutions, and the first frame that comes out is kept.",
    ),
    _fault(
        "vae-second-chunk-sees-the-first",
        "vae.decoder.upsamples.*.time_conv",
        "the temporal convolution remembers the first frame",
        method(Resample, "__call__", _remembers_the_first),
        "The temporal convolutions of the second latent frame see the first one instead of zeros.",
        tasks=VIDEOS,
    ),
    _fault(
        "vae-latents-not-unnormalised",
        "vae.conv2",
        "the latents are not un-normalised",
        _decode_with(lambda mean, inverse_std: (mx.zeros_like(mean), mx.ones_like(inverse_std))),
        "Latents are decoded without being scaled by the deviation and moved by the mean.",
    ),
    _fault(
        "vae-mean-added-first",
        "vae.conv2",
        "the mean is added before scaling",
        _decode_with(lambda mean, inverse_std: (mean / inverse_std, inverse_std)),
        "The mean is added to the latents before they are multiplied by the deviation.",
    ),
    _fault(
        "vae-divides-by-the-deviation",
        "vae.conv2",
        "the latents are divided by the deviation",
        _decode_with(lambda mean, inverse_std: (mean, 1 / inverse_std)),
        "Latents are divided by the deviation instead of multiplied.",
    ),
    Fault(
        "vae-statistics-not-rounded",
        "The decoder's mean and deviation stay float32 where upstream's launcher rounds them to bfloat16.",
        "vae.conv2",
        _exact_statistics,
        DRAWS,
        BFLOAT16,
        explanation="the VAE's mean and deviation are not rounded",
    ),
    _fault(
        "vae-attention-missing",
        "vae.decoder.middle.1",
        "the part is left out",
        calls(AttentionBlock, _no_attention, "vae.decoder.middle.1"),
        "The decoder's attention adds nothing.",
    ),
    _fault(
        "vae-upsampling-bilinear",
        _UPSAMPLES,
        "up-sampling is bilinear",
        _resampled(spread=_bilinear),
        "Height and width are doubled by bilinear interpolation instead of by repeating.",
    ),
    _fault(
        "vae-upsampling-frames-transposed",
        _UPSAMPLES,
        "the temporal up-sampling splits channels alternately",
        _resampled(halves_alternate=True),
        "The two frames that a temporal convolution makes take its channels in turn instead of half each.",
        tasks=VIDEOS,
    ),
    _fault(
        "vae-shortcut-missing",
        _UPSAMPLES,
        "the shortcut is missing",
        method(UpBlock, "_repeated", _without_shortcut),
        "A decoder stage has no shortcut around its up-sampling.",
    ),
    _fault(
        "vae-shortcut-tiles",
        _UPSAMPLES,
        "the shortcut tiles channels instead of repeating them",
        method(UpBlock, "_repeated", _tiled_shortcut),
        "The shortcut around an up-sampling tiles all channels instead of repeating each.",
    ),
    _fault(
        "vae-unpack-colour-last",
        "vae.pixels",
        "packed channels are (row, column, colour)",
        function(vae, "_unpack", _colour_last),
        "The 12 channels that become 2x2 pixels are read as row, column, colour.",
    ),
    _fault(
        "vae-unpack-rows-and-columns-exchanged",
        "vae.pixels",
        "rows and columns of packed pixels are exchanged",
        function(vae, "_unpack", _rows_for_columns),
        "The 12 channels that become 2x2 pixels are read with rows and columns exchanged.",
    ),
    _fault(
        "pixels-not-clipped",
        "vae.pixels",
        "pixels are not clipped",
        lambda target: wrapped(VAE, "decode", _not_clipped),
        "Decoded pixels are not clipped to [-1, 1].",
    ),
    _fault(
        "pixels-truncated",
        "frames",
        "each value is (127.5 x + 127.5) rounded down within [0, 255] of what it is made of",
        function(media, "to_uint8", _truncated),
        "8-bit pixels are cut off instead of rounded.",
    ),
    _fault(
        "frames-blue-first",
        "frames",
        "colours are reversed",
        _blue_first,
        "The colours of the frames are in the order blue, green, red.",
    ),
]
