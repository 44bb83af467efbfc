"""Faults of the convolutions and norms that both of the VAE's coders are made of."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from lance_mlx.model import vae_layers
from lance_mlx.model.vae_layers import CausalConv3d, ChannelNorm, StreamState, convolve
from parity.lance.faults.base import (
    DRAWS,
    VIDEOS,
    calls,
    explained,
    function,
    method,
)

_CONV1 = "vae.*coder.conv1"


_PARTS = "vae.decoder.*"


def _replicate_border(
    original: Callable, x: mx.array, weight: mx.array, bias: mx.array, padding: tuple, stride: tuple = (1, 1, 1)
) -> mx.array:
    time, *space = padding
    x = mx.pad(x, ((0, 0), *space, (0, 0)), mode="edge")
    return original(x, weight, bias, (time, (0, 0), (0, 0)), stride)


def _repeat_first(original: Callable, module: CausalConv3d, x: mx.array, state: StreamState) -> mx.array:
    depth = module["weight"].shape[1]
    if depth > 1 and id(module) not in state.past:
        state.past[id(module)] = mx.repeat(x[:1], depth - 1, axis=0)
    return original(module, x, state)


def _not_causal(original: Callable, module: CausalConv3d, x: mx.array, state: StreamState) -> mx.array:
    depth, height, width = module["weight"].shape[1:4]
    if depth == 1:
        return original(module, x, state)
    past = state.past.get(id(module), x[:0])
    missing = mx.zeros((depth - 1 - len(past), *x.shape[1:]), x.dtype)
    whole = mx.concatenate([missing, past, x])
    state.past[id(module)] = whole[1 - depth :]
    seen = mx.concatenate([whole[1:], mx.zeros_like(x[:1])])
    padding = ((0, 0), (height // 2, height // 2), (width // 2, width // 2))
    return convolve(seen, module["weight"], module["bias"], padding)


def _forget(original: Callable, module: CausalConv3d, x: mx.array, state: StreamState) -> mx.array:
    state.past.pop(id(module), None)
    return original(module, x, state)


def _without_sqrt(original: Callable, module: ChannelNorm, x: mx.array) -> mx.array:
    y = original(module, x)
    return (y.astype(mx.float32) * x.shape[-1] ** -0.5).astype(y.dtype)


def _eps_1e_3(original: Callable, module: ChannelNorm, x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, module["gamma"], 1e-3)


_fault = partial(explained, tasks=DRAWS)

FAULTS = [
    _fault(
        "vae-replicates-at-the-border",
        _CONV1,
        "the convolution repeats the border",
        function(vae_layers, "convolve", _replicate_border),
        "Convolutions repeat the picture's border around it instead of padding with zeros.",
    ),
    _fault(
        "vae-repeats-the-first-frame",
        _CONV1,
        "convolutions repeat the first frame before the start",
        method(CausalConv3d, "__call__", _repeat_first),
        "Convolutions repeat the first frame before the start instead of padding with zeros.",
    ),
    _fault(
        "vae-not-causal",
        _CONV1,
        "the convolution reads 1 frame ahead, zeros after the present",
        method(CausalConv3d, "__call__", _not_causal),
        "Convolutions are padded by one frame at each end instead of by two at the start.",
    ),
    _fault(
        "vae-cache-dropped",
        _CONV1,
        "the convolution takes zeros for the frames before",
        method(CausalConv3d, "__call__", _forget),
        "Every chunk is coded as if it were the first one: nothing is kept between chunks.",
        tasks=VIDEOS,
    ),
    _fault(
        "vae-norm-without-sqrt",
        "vae.decoder.middle.0.residual.0",
        "the norm lacks its factor sqrt(channels)",
        calls(ChannelNorm, _without_sqrt, _PARTS),
        "The decoder's norms divide by the length of the channels, without the factor sqrt(channels).",
    ),
    _fault(
        "vae-norm-eps-1e-3",
        "vae.decoder.middle.0.residual.0",
        "norm eps is 1e-3",
        calls(ChannelNorm, _eps_1e_3, _PARTS),
        "The decoder's norms add 1e-3 to the mean square.",
    ),
]
