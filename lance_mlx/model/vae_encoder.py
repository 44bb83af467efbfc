"""Encoder of the Wan 2.2 VAE: a first frame, then four frames at a time, to one latent frame each.

Activations are [frames, height, width, channels].
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from lance_mlx.config import LATENT_CHANNELS
from lance_mlx.model.vae_layers import (
    PACKED_CHANNELS,
    CausalConv3d,
    Conv2d,
    Identity,
    ResidualBlock,
    StreamState,
    convolve,
    head_layers,
    middle_blocks,
    run_layers,
)


@dataclass(frozen=True)
class DownBlockShape:
    """One stage of the encoder: residual blocks, then down-sampling in space and maybe in time."""

    in_channels: int
    out_channels: int
    num_residual_blocks: int
    downsamples_space: bool
    downsamples_time: bool


@dataclass(frozen=True)
class EncoderShape:
    """Widths of the encoder, as found in a state dict."""

    channels: int
    down_blocks: tuple[DownBlockShape, ...]


class TimeConv(nn.Module):
    """Temporal convolution that halves the frame rate; the stream's first frame passes by and is only remembered."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, 3, 1, 1, channels))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[t, h, w, c] -> [t/2, h, w, c], but [1, h, w, c] for the first chunk."""
        past = state.past.get(id(self))
        state.past[id(self)] = x[-1:]
        if past is None:
            return x
        x = mx.concatenate([past, x], axis=0)
        return convolve(x, self.weight, self.bias, ((0, 0), (0, 0), (0, 0)), stride=(2, 1, 1))


class Downsample(nn.Module):
    """Halves height and width, and for `downsamples_time` the frame rate."""

    def __init__(self, channels: int, downsamples_time: bool) -> None:
        super().__init__()
        self.resample = [Identity(), Conv2d(channels, channels, 3, halves=True)]
        if downsamples_time:
            self.time_conv = TimeConv(channels)

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[t, h, w, c] -> [t or t/2, h/2, w/2, c]."""
        x = self.resample[1](x)
        return self.time_conv(x, state) if "time_conv" in self else x


class DownBlock(nn.Module):
    """An encoder stage whose shortcut averages values down to the new size (upstream's Down_ResidualBlock)."""

    def __init__(self, shape: DownBlockShape) -> None:
        super().__init__()
        self._shape = shape
        channels = [shape.in_channels] + [shape.out_channels] * shape.num_residual_blocks
        self.downsamples = [ResidualBlock(*pair) for pair in zip(channels[:-1], channels[1:], strict=True)]
        if shape.downsamples_space:
            self.downsamples.append(Downsample(shape.out_channels, shape.downsamples_time))

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[t, h, w, in] -> [t', h/2, w/2, out]; t' is t/2 where time is down-sampled, but 1 for the stream's first
        frame."""
        y = x
        for block in self.downsamples:
            y = block(y, state)
        return y + self._averaged(x)

    def _averaged(self, x: mx.array) -> mx.array:
        t, h, w, c = x.shape
        factor_t = 2 if self._shape.downsamples_time else 1
        factor_s = 2 if self._shape.downsamples_space else 1
        # A single frame is averaged with a frame of zeros before it.
        x = mx.pad(x, ((t % factor_t, 0), (0, 0), (0, 0), (0, 0)))
        x = x.reshape(-1, factor_t, h // factor_s, factor_s, w // factor_s, factor_s, c).transpose(0, 2, 4, 6, 1, 3, 5)
        groups = x.reshape(*x.shape[:3], self._shape.out_channels, -1)
        return groups.astype(mx.float32).mean(axis=-1).astype(x.dtype)


class Encoder(nn.Module):
    """From packed pixels to the statistics of one latent frame."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(PACKED_CHANNELS, shape.channels, (3, 3, 3))
        self.downsamples = [DownBlock(block) for block in shape.down_blocks]
        width = shape.down_blocks[-1].out_channels
        self.middle = middle_blocks(width)
        self.head = head_layers(width, 2 * LATENT_CHANNELS)

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[1 or 4, 8h, 8w, 12] -> [1, h, w, 96]; updates `state`."""
        x = self.mix(self.narrow(x, state), state)
        state.first_chunk = False
        return x

    def narrow(self, x: mx.array, state: StreamState) -> mx.array:
        """What sees no further than 9 cells, [1 or 4, 8h, 8w, 12] -> [1, h, w, c]."""
        x = self.conv1(x, state)
        for block in self.downsamples:
            x = block(x, state)
        return x

    def mix(self, x: mx.array, state: StreamState) -> mx.array:
        """What sees the whole frame, the attention among its cells: [1, h, w, c] -> [1, h, w, 96]."""
        for block in self.middle:
            x = block(x, state)
        return run_layers(self.head, x, state)
