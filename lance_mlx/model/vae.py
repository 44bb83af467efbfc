"""Decoder of the Wan 2.2 VAE, streaming one latent frame at a time.

Activations are [frames, height, width, channels]. What a causal convolution has to remember of earlier frames lives
in a StreamState, so that memory does not grow with the number of frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from lance_mlx.config import LATENT_CHANNELS
from lance_mlx.model.layers import SiLU, attention
from lance_mlx.model.vae_constants import LATENT_MEAN, LATENT_STD
from lance_mlx.numerics import Numerics, runs_on_cpu, scaled

PATCH = 2
"""Pixels along each side that the decoder's last convolution packs into channels."""
_PACKED_CHANNELS = 3 * PATCH * PATCH


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


@dataclass
class StreamState:
    """What the decoder keeps between latent frames.

    Attributes:
        first_chunk: whether the next latent frame is the first one, which becomes one frame instead of four.
        past: the last input frames of each causal convolution, by the identity of its module.
    """

    first_chunk: bool = True
    past: dict[int, mx.array] = field(default_factory=dict)


def _convolve(x: mx.array, weight: mx.array, bias: mx.array, padding: tuple) -> mx.array:
    """Convolution of [frames, h, w, c] with an (o, t, h, w, c) weight; padding = ((low, high) a spatial axis)."""
    dtype = x.dtype
    if dtype != mx.float32 and runs_on_cpu():
        x, weight, bias = (a.astype(mx.float32) for a in (x, weight, bias))
    low, high = zip(*padding, strict=True)
    if weight.shape[1] == 1:
        y = mx.conv_general(x, weight[:, 0], padding=(low[1:], high[1:]))
    else:
        y = mx.conv_general(x[None], weight, padding=(low, high))[0]
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
        return _convolve(x, weight, self.bias, padding)


class Conv2d(nn.Module):
    """Frame by frame convolution that keeps the spatial size."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = mx.zeros((out_channels, kernel, kernel, in_channels))
        self.bias = mx.zeros((out_channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """[t, h, w, in] -> [t, h, w, out]."""
        pad = self.weight.shape[1] // 2
        return _convolve(x, self.weight[:, None], self.bias, ((0, 0), (pad, pad), (pad, pad)))


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
        return _run(self.residual, x, state) + shortcut


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
        self.middle = [ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)]
        self.upsamples = [UpBlock(block) for block in shape.up_blocks]
        last = shape.up_blocks[-1].out_channels
        self.head = [ChannelNorm(last), SiLU(), CausalConv3d(last, _PACKED_CHANNELS, (3, 3, 3))]

    def __call__(self, x: mx.array, state: StreamState) -> mx.array:
        """[1, h, w, 48] -> [1 or 4, 8h, 8w, 12]; updates `state`."""
        x = self.conv1(x, state)
        for block in (*self.middle, *self.upsamples):
            x = block(x, state)
        x = _run(self.head, x, state)
        state.first_chunk = False
        return x


class VAE(nn.Module):
    """The decoding half of Wan 2.2's VAE (bytedance/Lance modeling/vae/wan/vae2_2.py)."""

    def __init__(self, shape: DecoderShape, numerics: Numerics) -> None:
        super().__init__()
        self._mean = mx.array(LATENT_MEAN).astype(numerics.dtype)
        self._inverse_std = 1.0 / mx.array(LATENT_STD).astype(numerics.dtype)
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1))
        self.decoder = Decoder(shape)

    def decode(self, latents: mx.array) -> Iterator[mx.array]:
        """Yield the pixels of each latent frame in turn, evaluated: one frame for the first, four for every later one.

        Args:
            latents: [t, h, w, 48], normalised.

        Yields:
            float32 [1 or 4, 16h, 16w, 3] in [-1, 1].
        """
        state = StreamState()
        for index in range(len(latents)):
            frame = latents[index : index + 1] / self._inverse_std + self._mean
            pixels = _unpack(self.decoder(self.conv2(frame, state), state))
            pixels = mx.clip(pixels.astype(mx.float32), -1.0, 1.0)
            mx.eval(pixels, list(state.past.values()))
            yield pixels


def _run(layers: list[nn.Module], x: mx.array, state: StreamState) -> mx.array:
    for layer in layers:
        x = layer(x, state) if isinstance(layer, CausalConv3d) else layer(x)
    return x


def _unpack(x: mx.array) -> mx.array:
    """[t, h, w, 12] -> [t, 2h, 2w, 3]; a packed channel counts (colour, column, row)."""
    t, h, w, _ = x.shape
    return x.reshape(t, h, w, 3, PATCH, PATCH).transpose(0, 1, 5, 2, 4, 3).reshape(t, h * PATCH, w * PATCH, 3)


def num_decoded_frames(latent_frames: int) -> int:
    """Frames that so many latent frames decode to."""
    return 4 * (latent_frames - 1) + 1
