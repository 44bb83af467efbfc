"""Faults of the VAE's encoder and of the latents that it gives."""

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from lance_mlx.model import vae
from lance_mlx.model.vae import VAE, LatentStatistics
from lance_mlx.model.vae_encoder import DownBlock, TimeConv
from lance_mlx.model.vae_layers import Conv2d, StreamState, convolve
from parity.lance.faults.base import ENCODES, VIDEOS, Patch, explained, function, method

_DOWNSAMPLES = "vae.encoder.downsamples.*"


def _colour_last(original: Callable, x: mx.array) -> mx.array:
    y = original(x)
    return y.reshape(*y.shape[:3], 3, 2, 2).transpose(0, 1, 2, 5, 4, 3).reshape(y.shape)


def _from_0_to_1(original: Callable, module: VAE, pixels: np.ndarray) -> Iterator[LatentStatistics]:
    return original(module, np.asarray(pixels) * np.float32(0.5) + np.float32(0.5))


def _pads_above(original: Callable, module: Conv2d, x: mx.array) -> mx.array:
    if not module._halves:
        return original(module, x)
    weight = module["weight"][:, None]
    return convolve(x, weight, module["bias"], ((0, 0), (1, 0), (1, 0)), stride=(1, 2, 2))


def _averaged(tiles: bool = False, pads_after: bool = False) -> Patch:
    """Average values down in another order, or with the missing frame of zeros at the other end."""

    def average(original: Callable, module: DownBlock, x: mx.array) -> mx.array:
        shape = module._shape
        t, h, w, c = x.shape
        factor_t = 2 if shape.downsamples_time else 1
        factor_s = 2 if shape.downsamples_space else 1
        missing = t % factor_t
        x = mx.pad(x, ((0, missing) if pads_after else (missing, 0), (0, 0), (0, 0), (0, 0)))
        x = x.reshape(-1, factor_t, h // factor_s, factor_s, w // factor_s, factor_s, c).transpose(0, 2, 4, 6, 1, 3, 5)
        groups = x.reshape(*x.shape[:3], -1)
        if tiles:
            groups = groups.reshape(*groups.shape[:3], -1, shape.out_channels).swapaxes(-1, -2)
        else:
            groups = groups.reshape(*groups.shape[:3], shape.out_channels, -1)
        return groups.astype(mx.float32).mean(axis=-1).astype(x.dtype)

    return method(DownBlock, "_averaged", average)


def _forgets(original: Callable, module: TimeConv, x: mx.array, state: StreamState) -> mx.array:
    if id(module) in state.past:
        state.past[id(module)] = mx.zeros_like(state.past[id(module)])
    return original(module, x, state)


def _statistics(change: Callable[[VAE, LatentStatistics], LatentStatistics]) -> Patch:
    def encode_frames(original: Callable, module: VAE, pixels: np.ndarray) -> Iterator[LatentStatistics]:
        for statistics in original(module, pixels):
            yield change(module, statistics)

    return method(VAE, "encode_frames", encode_frames)


def _normalised(module: VAE, x: mx.array) -> mx.array:
    return (x - module["_mean"].astype(mx.float32)) * module["_inverse_std"].astype(mx.float32)


def _raw_mean(module: VAE, statistics: LatentStatistics) -> mx.array:
    return statistics.mean / module["_inverse_std"].astype(mx.float32) + module["_mean"].astype(mx.float32)


def _not_normalised(module: VAE, statistics: LatentStatistics) -> LatentStatistics:
    return LatentStatistics(_raw_mean(module, statistics), statistics.logvar)


def _exchanged(module: VAE, statistics: LatentStatistics) -> LatentStatistics:
    return LatentStatistics(_normalised(module, statistics.logvar), _raw_mean(module, statistics))


def _logvar_normalised(module: VAE, statistics: LatentStatistics) -> LatentStatistics:
    return LatentStatistics(statistics.mean, _normalised(module, statistics.logvar))


def _sample(draw: Callable[[LatentStatistics, mx.array], mx.array]) -> Patch:
    return method(LatentStatistics, "sample", lambda original, statistics, eps: draw(statistics, eps))


_fault = partial(explained, tasks=ENCODES)

FAULTS = [
    _fault(
        "encoder-pack-colour-last",
        "vae.encoder.conv1",
        "packed channels are (row, column, colour)",
        function(vae, "_pack", _colour_last),
        "2x2 pixels are packed into 12 channels as row, column, colour.",
    ),
    _fault(
        "encoder-pixels-from-0-to-1",
        "vae.encoder.conv1",
        "the encoder's pixels are in [0, 1]",
        method(VAE, "encode_frames", _from_0_to_1),
        "The encoder is given pixels in [0, 1] instead of [-1, 1].",
    ),
    _fault(
        "encoder-pads-above-and-left",
        _DOWNSAMPLES,
        "the convolution reads 1 row higher and 1 column further left",
        method(Conv2d, "__call__", _pads_above),
        "Down-sampling pads above and on the left instead of below and on the right.",
    ),
    _fault(
        "encoder-average-tiles",
        _DOWNSAMPLES,
        "the average takes neighbouring channels in another order",
        _averaged(tiles=True),
        "The shortcut around a down-sampling averages values that lie a whole set of channels apart.",
    ),
    _fault(
        "encoder-average-pads-after",
        _DOWNSAMPLES,
        "the average pads with zeros after the frame",
        _averaged(pads_after=True),
        "The shortcut of the first frame averages it with a frame of zeros after it instead of before.",
    ),
    _fault(
        "encoder-time-conv-forgets",
        "vae.encoder.downsamples.*.time_conv",
        "the convolution takes zeros for the frames before",
        method(TimeConv, "__call__", _forgets),
        "The temporal down-sampling starts every chunk with zeros instead of with the frame before it.",
        tasks=ENCODES & VIDEOS,
    ),
    _fault(
        "encoder-mean-not-normalised",
        "vae.encoder.mean",
        "the mean is not normalised",
        _statistics(_not_normalised),
        "The encoder's mean is not normalised by the channels' statistics.",
    ),
    _fault(
        "encoder-halves-exchanged",
        "vae.encoder.mean",
        "mean and log-variance are exchanged",
        _statistics(_exchanged),
        "The first half of the encoder's channels is taken for the log-variance and the second for the mean.",
    ),
    _fault(
        "encoder-logvar-normalised",
        "vae.encoder.logvar",
        "the log-variance is normalised too",
        _statistics(_logvar_normalised),
        "The log-variance is normalised like the mean.",
    ),
    _fault(
        "encoder-takes-the-mean",
        "vae.encoder.sample",
        "the latent is the mean",
        _sample(lambda statistics, eps: statistics.mean),
        "The latents are the encoder's mean instead of a sample.",
    ),
    _fault(
        "encoder-logvar-as-deviation",
        "vae.encoder.sample",
        "the latent is the mean + the variance times the noise",
        _sample(lambda statistics, eps: statistics.mean + mx.exp(statistics.logvar) * eps),
        "The deviation of a sample is exp(logvar) instead of exp(logvar / 2).",
    ),
]
