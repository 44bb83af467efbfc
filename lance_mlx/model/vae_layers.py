"""What the encoder and the decoder of Wan 2.2's VAE are made of.

Activations are [frames, height, width, channels]. What a causal convolution has to remember of earlier frames lives
in a StreamState, so that memory does not grow with the number of frames.
"""

import math
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from lance_mlx.backend.numerics import runs_on_cpu, scaled
from lance_mlx.errors import LanceError
from lance_mlx.model.attention import attention
from lance_mlx.model.layers import SiLU

PATCH = 2
"""Pixels along each side that the first and last convolution see packed into channels."""
PACKED_CHANNELS = 3 * PATCH * PATCH
MAX_VALUES = 2**31 - 1
"""Values of an array that MLX's convolutions address. Beyond, the 32-bit indices of GPU kernels wrap, and the output
has zeros or values from elsewhere (ml-explore/mlx issues 3248 and 3138)."""


@dataclass
class StreamState:
    """What a stream keeps from one chunk of frames to the next.

    Attributes:
        first_chunk: whether the next chunk is the first one, a single frame that temporal resampling passes by.
        past: the last input frames of each temporal convolution, by the identity of its module.
    """

    first_chunk: bool = True
    past: dict[int, mx.array] = field(default_factory=dict)


def convolve(
    x: mx.array, weight: mx.array, bias: mx.array, padding: tuple, stride: tuple[int, int, int] = (1, 1, 1)
) -> mx.array:
    """Convolution of [frames, h, w, c] with an (o, t, h, w, c) weight; padding = (low, high) for time, height and
    width.

    Where more values meet the kernel than MLX addresses or a GPU has room for, some rows are computed at a time.

    Raises:
        LanceError: the input or the output alone has more than `MAX_VALUES`.
    """
    sides = zip(x.shape[:3], weight.shape[1:4], padding, stride, strict=True)
    frames, rows, columns = ((size + sum(pads) - taps) // step + 1 for size, taps, pads, step in sides)
    unfolded = frames * columns * math.prod(weight.shape[1:])
    largest = max(x.size, frames * rows * columns * len(weight), unfolded)
    if largest > MAX_VALUES:
        raise LanceError(
            f"a convolution of the VAE holds {largest:,} values, and MLX addresses {MAX_VALUES:,} at most: "
            "choose a smaller size, or smaller tiles for the VAE"
        )
    at_once = max(1, _most_at_once(x.dtype) // unfolded)
    if at_once >= rows:
        return _convolve(x, weight, bias, padding, stride)
    (low, _), taps, step = padding[1], weight.shape[2], stride[1]
    pieces = []
    for start in range(0, rows, at_once):
        first = start * step - low
        last = (min(start + at_once, rows) - 1) * step - low + taps
        pads = max(-first, 0), max(last - x.shape[1], 0)
        seen = x[:, max(first, 0) : min(last, x.shape[1])]
        pieces.append(_convolve(seen, weight, bias, (padding[0], pads, padding[2]), stride))
        mx.eval(pieces[-1])
    return mx.concatenate(pieces, axis=1)


def _most_at_once(dtype: mx.Dtype) -> int:
    """Values that meet a kernel at once. On Metal a quarter of its working set: a convolution that finds no room there
    leaves zeros and tells nobody (ml-explore/mlx issue 3979)."""
    room = None if runs_on_cpu() else mx.device_info().get("max_recommended_working_set_size")
    return min(MAX_VALUES, room // (4 * dtype.size)) if room else MAX_VALUES


def _convolve(x: mx.array, weight: mx.array, bias: mx.array, padding: tuple, stride: tuple[int, int, int]) -> mx.array:
    dtype = x.dtype
    if dtype != mx.float32 and runs_on_cpu():
        x, weight, bias = (a.astype(mx.float32) for a in (x, weight, bias))
    low, high = zip(*padding, strict=True)
    if weight.shape[1] == 1:
        y = mx.conv_general(x, weight[:, 0], stride[1:], padding=(low[1:], high[1:]))
    else:
        y = mx.conv_general(x[None], weight, stride, padding=(low, high))[0]
    return (y + bias).astype(dtype)


class CausalConv3d(nn.Module):
    """3-D convolution that sees earlier frames and never later ones; spatial size is kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = mx.zeros((out_channels, *kernel, in_channels))
        self.bias = mx.zeros((out_channels,))

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[t, h, w, in] -> [t, h, w, out]; frames before the stream's start count as zero."""
        weight = self.weight
        depth, height, width = weight.shape[1:4]
        missing = depth - 1
        if depth > 1:
            past = state.past.get(id(self))
            if past is not None:
                x = mx.concatenate([past, x], axis=0)
                missing -= len(past)
            state.past[id(self)] = x[1 - depth :]
        if missing and len(x) + missing == depth:
            # One output frame: drop the taps that would meet the zeros instead of multiplying by them.
            weight, missing = weight[:, missing:], 0
        padding = ((missing, 0), (height // 2, height // 2), (width // 2, width // 2))
        return convolve(x, weight, self.bias, padding)


class Conv2d(nn.Module):
    """Frame by frame convolution that keeps the spatial size, or halves it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, halves: bool = False) -> None:
        super().__init__()
        self.weight = mx.zeros((out_channels, kernel, kernel, in_channels))
        self.bias = mx.zeros((out_channels,))
        self._halves = halves

    def __call__(self, x: mx.array) -> mx.array:
        """[t, h, w, in] -> [t, h, w, out] or [t, h/2, w/2, out]."""
        if self._halves:
            # Upstream pads below and on the right only.
            return convolve(x, self.weight[:, None], self.bias, ((0, 0), (0, 1), (0, 1)), stride=(1, 2, 2))
        pad = self.weight.shape[1] // 2
        return convolve(x, self.weight[:, None], self.bias, ((0, 0), (pad, pad), (pad, pad)))


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(channels) * gamma over the channels (upstream's RMS_norm)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = mx.ones((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """Same shape and dtype; half precision rounds after every operation, as upstream does."""
        channels = x.shape[-1]
        if x.dtype == mx.float32:
            return mx.fast.rms_norm(x, self.gamma, 1e-24 / channels)
        wide = x.astype(mx.float32)
        length = mx.sqrt(mx.sum(wide * wide, axis=-1, keepdims=True)).astype(x.dtype)
        return scaled(x / mx.maximum(length, 1e-12), channels**0.5) * self.gamma


class Identity(nn.Module):
    """Keeps the numbering of the checkpoint where upstream has dropout."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


class ResidualBlock(nn.Module):
    """Two normalised causal convolutions around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = [
            ChannelNorm(in_channels),
            SiLU(),
            CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            ChannelNorm(out_channels),
            SiLU(),
            Identity(),
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        ]
        if in_channels != out_channels:
            self.shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[t, h, w, in] -> [t, h, w, out]."""
        shortcut = self.shortcut(x, state) if "shortcut" in self else x
        return run_layers(self.residual, x, state) + shortcut


class AttentionBlock(nn.Module):
    """Single-head attention among the cells of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = Conv2d(channels, 3 * channels, 1)
        self.proj = Conv2d(channels, channels, 1)

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[t, h, w, c] -> [t, h, w, c]; the stream plays no part."""
        t, h, w, c = x.shape
        q, k, v = mx.split(self.to_qkv(self.norm(x)).reshape(t, 1, h * w, 3 * c), 3, axis=-1)
        return self.proj(attention(q, k, v, causal=False).reshape(t, h, w, c)) + x


def middle_blocks(channels: int) -> list[nn.Module]:
    """The blocks at the narrowest place of either coder."""
    return [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]


def head_layers(in_channels: int, out_channels: int) -> list[nn.Module]:
    """The layers that end either coder."""
    return [ChannelNorm(in_channels), SiLU(), CausalConv3d(in_channels, out_channels, (3, 3, 3))]


def run_layers(layers: list[nn.Module], x: mx.array, state: StreamState) -> mx.array:
    """Apply layers in order; the causal ones get the stream's state."""
    for layer in layers:
        x = layer(x, state) if isinstance(layer, CausalConv3d) else layer(x)
    return x
