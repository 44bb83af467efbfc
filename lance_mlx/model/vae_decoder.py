"""Decoder of the Wan 2.2 VAE: one latent frame in, one or four frames of packed pixels out.

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
    head_layers,
    middle_blocks,
    run_layers,
)


@dataclass(frozen=True)
class UpBlockShape:
    """One stage of the decoder: residual blocks, then up-sampling in space and maybe in time."""

    in_channels: int
    out_channels: int
    num_residual_blocks: int
    upsamples_space: bool
    upsamples_time: bool


@dataclass(frozen=True)
class DecoderShape:
    """Widths of the decoder, as found in a state dict."""

    channels: int
    up_blocks: tuple[UpBlockShape, ...]


class Resample(nn.Module):
    """Doubles height and width, and for `upsamples_time` the frame rate, except for the stream's first frame."""

    def __init__(self, channels: int, upsamples_time: bool) -> None:
        super().__init__()
        self.resample = [Identity(), Conv2d(channels, channels, 3)]
        if upsamples_time:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[t, h, w, c] -> [t or 2t, 2h, 2w, c]."""
        # The first frame passes by the temporal convolution, and the second does not see it there either.
        if "time_conv" in self and not state.first_chunk:
            t, h, w, c = x.shape
            x = self.time_conv(x, state).reshape(t, h, w, 2, c).transpose(0, 3, 1, 2, 4).reshape(2 * t, h, w, c)
        x = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
        return self.resample[1](x)


class UpBlock(nn.Module):
    """A decoder stage whose shortcut repeats values to the new size (upstream's Up_ResidualBlock)."""

    def __init__(self, shape: UpBlockShape) -> None:
        super().__init__()
        self._shape = shape
        channels = [shape.in_channels] + [shape.out_channels] * shape.num_residual_blocks
        self.upsamples = [ResidualBlock(*pair) for pair in zip(channels[:-1], channels[1:], strict=True)]
        if shape.upsamples_space:
            self.upsamples.append(Resample(shape.out_channels, shape.upsamples_time))

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[t, h, w, in] -> [t', 2h, 2w, out]; t' is 2t where time is up-sampled, but t for the stream's first frame."""
        y = x
        for block in self.upsamples:
            y = block(y, state)
        return y + self._repeated(x, state) if self._shape.upsamples_space else y

    def _repeated(self, x: mx.array, state: StreamState) -> mx.array:
        t, h, w, _ = x.shape
        factor_t = 2 if self._shape.upsamples_time else 1
        out = self._shape.out_channels
        x = mx.repeat(x, out * factor_t * 4 // self._shape.in_channels, axis=-1)
        x = x.reshape(t, h, w, out, factor_t, 2, 2).transpose(0, 4, 1, 5, 2, 6, 3)
        x = x.reshape(t * factor_t, 2 * h, 2 * w, out)
        return x[factor_t - 1 :] if state.first_chunk else x


class Decoder(nn.Module):
    """From one latent frame to packed pixels."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        width = shape.channels
        self.conv1 = CausalConv3d(LATENT_CHANNELS, width, (3, 3, 3))
        self.middle = middle_blocks(width)
        self.upsamples = [UpBlock(block) for block in shape.up_blocks]
        self.head = head_layers(shape.up_blocks[-1].out_channels, PACKED_CHANNELS)

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[1, h, w, 48] -> [1 or 4, 8h, 8w, 12]; updates `state`."""
        x = self.widen(self.mix(x, state), state)
        state.first_chunk = False
        return x

    def mix(self, x: mx.array, state: StreamState) -> mx.array:
        """What sees the whole frame, the attention among its cells: [1, h, w, 48] -> [1, h, w, c]."""
        x = self.conv1(x, state)
        for block in self.middle:
            x = block(x, state)
        return x

    def widen(self, x: mx.array, state: StreamState) -> mx.array:
        """What sees no further than 13 cells, [1, h, w, c] -> [1 or 4, 8h, 8w, 12]."""
        for block in self.upsamples:
            x = block(x, state)
        return run_layers(self.head, x, state)
