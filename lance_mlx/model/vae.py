"""Wan 2.2's VAE, streaming in both directions (bytedance/Lance modeling/vae/wan/vae2_2.py).

Frames are [t, height, width, channels]; a latent frame stands for one frame at the start of a video and for four
after it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.backend.numerics import Numerics
from lance_mlx.config import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE
from lance_mlx.model.vae_constants import LATENT_MEAN, LATENT_STD
from lance_mlx.model.vae_decoder import Decoder, DecoderShape
from lance_mlx.model.vae_encoder import Encoder, EncoderShape
from lance_mlx.model.vae_layers import PATCH, CausalConv3d, StreamState
from lance_mlx.model.vae_tiles import Tiles

Grid = tuple[int, int, int]
"""Latent frames, rows and columns."""
TileChooser = Callable[[Grid, bool], int | None]
"""Side in cells of the tiles in which latents of a grid are decoded, or encoded where the second is True; None for one
piece."""


class LatentStatistics(NamedTuple):
    """Distribution of latents, float32 [t, h, w, 48] each: the normalised mean and the raw log-variance."""

    mean: mx.array
    logvar: mx.array

    def sample(self, eps: mx.array) -> mx.array:
        """mean + exp(logvar / 2) * eps, float32, for standard normal `eps` of the same shape."""
        return self.mean + mx.exp(0.5 * self.logvar) * eps


class VAE(nn.Module):
    """Decoder, and for tasks that look at pixels the encoder; either may be left out.

    Latents are normalised by the statistics of Wan 2.2's 48 channels; the log-variance is not, as upstream leaves it.

    Attributes:
        tile_for: what is coded in tiles; nothing, unless another choice is put in its place.
    """

    def __init__(self, decoder: DecoderShape | None, encoder: EncoderShape | None, numerics: Numerics) -> None:
        super().__init__()
        self.tile_for: TileChooser = lambda grid, encodes: None
        self._dtype = numerics.dtype
        self._mean = mx.array(LATENT_MEAN).astype(numerics.dtype)
        self._inverse_std = 1.0 / mx.array(LATENT_STD).astype(numerics.dtype)
        if decoder is not None:
            self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1))
            self.decoder = Decoder(decoder)
        if encoder is not None:
            self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, (1, 1, 1))
            self.encoder = Encoder(encoder)

    def decode(self, latents: mx.array) -> Iterator[mx.array]:
        """Yield the pixels of each latent frame in turn, evaluated: one frame for the first, four for every later one.

        Args:
            latents: [t, h, w, 48], normalised.

        Yields:
            float32 [1 or 4, 16h, 16w, 3] in [-1, 1].
        """
        state = StreamState()
        frames = (latents[index : index + 1] / self._inverse_std + self._mean for index in range(len(latents)))
        chunks = (self.conv2(frame, state) for frame in frames)
        tile = self.tile_for(latents.shape[:3], False)
        if tile is None:
            decoded = (self.decoder(chunk, state) for chunk in chunks)
        else:
            decoded = Tiles(*latents.shape[1:3], tile).decode(self.decoder, chunks)
        for packed in decoded:
            pixels = mx.clip(_unpack(packed).astype(mx.float32), -1.0, 1.0)
            mx.eval(pixels, list(state.past.values()))
            yield pixels

    def encode_frames(self, pixels: np.ndarray) -> Iterator[LatentStatistics]:
        """Yield the statistics of each latent frame in turn, [1, h, w, 48], evaluated.

        Args:
            pixels: [t, 16h, 16w, 3] in [-1, 1]; frames past the last whole group of four are left out. Anything that
                slices into such arrays will do, so that a long video need not be in memory as floats.
        """
        state = StreamState()

        def chunks() -> Iterator[mx.array]:
            for start in range(-3, len(pixels) - 3, TEMPORAL_STRIDE):
                yield _pack(mx.array(pixels[max(start, 0) : start + TEMPORAL_STRIDE]).astype(self._dtype))

        rows, columns = (side // SPATIAL_STRIDE for side in np.shape(pixels[:1])[1:3])
        tile = self.tile_for(((len(pixels) - 1) // TEMPORAL_STRIDE + 1, rows, columns), True)
        if tile is None:
            encoded = (self.encoder(chunk, state) for chunk in chunks())
        else:
            encoded = Tiles(rows, columns, tile).encode(self.encoder, chunks)
        for features in encoded:
            moments = self.conv1(features, state)
            mean, logvar = mx.split(moments, 2, axis=-1)
            mean = ((mean - self._mean) * self._inverse_std).astype(mx.float32)
            logvar = logvar.astype(mx.float32)
            mx.eval(mean, logvar, list(state.past.values()))
            yield LatentStatistics(mean, logvar)

    def encode(self, pixels: np.ndarray) -> LatentStatistics:
        """The statistics of all latent frames, [t, h, w, 48]; see `encode_frames`."""
        frames = list(self.encode_frames(pixels))
        return LatentStatistics(*(mx.concatenate(parts) for parts in zip(*frames, strict=True)))


def _pack(x: mx.array) -> mx.array:
    """[t, 2h, 2w, 3] -> [t, h, w, 12]; a packed channel counts (colour, column, row)."""
    t, h, w, _ = x.shape
    x = x.reshape(t, h // PATCH, PATCH, w // PATCH, PATCH, 3).transpose(0, 1, 3, 5, 4, 2)
    return x.reshape(t, h // PATCH, w // PATCH, -1)


def _unpack(x: mx.array) -> mx.array:
    """[t, h, w, 12] -> [t, 2h, 2w, 3], the inverse of `_pack`."""
    t, h, w, _ = x.shape
    return x.reshape(t, h, w, 3, PATCH, PATCH).transpose(0, 1, 5, 2, 4, 3).reshape(t, h * PATCH, w * PATCH, 3)


def num_decoded_frames(latent_frames: int) -> int:
    """Frames that so many latent frames decode to."""
    return TEMPORAL_STRIDE * (latent_frames - 1) + 1
