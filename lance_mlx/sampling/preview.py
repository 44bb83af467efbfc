"""Small pictures of unfinished latents: a linear map of a latent's channels to a colour, fitted to the VAE."""

import mlx.core as mx
import numpy as np

from lance_mlx.config import LATENT_CHANNELS, SPATIAL_STRIDE
from lance_mlx.errors import LanceError
from lance_mlx.media.write import to_uint8
from lance_mlx.sampling.flow import Step

FACTORS = LATENT_CHANNELS + 1, 3
"""Shape of the map: a row for each channel, and the colour where all of them are 0."""
_SIDE = 16
"""Cells a side of the latents that the map is fitted on: 256 of them for 49 unknowns a colour."""
_SCALE = SPATIAL_STRIDE // 2


def fit_preview(vae) -> np.ndarray:
    """The map that comes closest, by least squares, to the mean colour of the pixels of a cell, float32 [49, 3].

    It is fitted on what the VAE decodes from one frame of noise, 256x256 pixels: a moment on a GPU, some 14 seconds of
    one core at the official size.

    Raises:
        LanceError: the VAE makes no pixels of noise.
    """
    latents = mx.random.normal((1, _SIDE, _SIDE, LATENT_CHANNELS), key=mx.random.key(0))
    (pixels,) = vae.decode(latents)
    cells = np.array(pixels)[0].reshape(_SIDE, SPATIAL_STRIDE, _SIDE, SPATIAL_STRIDE, 3).mean(axis=(1, 3))
    if not np.isfinite(cells).all():
        raise LanceError("the VAE decodes noise to NaN or infinite values: fetch the checkpoint again")
    return np.linalg.lstsq(_with_ones(np.array(latents)), cells.reshape(-1, 3), rcond=None)[0].astype(np.float32)


def clean_estimate(step: Step) -> mx.array:
    """Where the latents of a step are heading: x_t less t times the velocity, float32 [n, 48]; given ones stay."""
    x_t, velocity = step.state.x_t.astype(mx.float32), step.velocity.astype(mx.float32)
    given = len(x_t) - len(velocity)
    times = mx.array(step.state.timestep[given:, None])
    return mx.concatenate([x_t[:given], x_t[given:] - times * velocity])


def preview(weights: np.ndarray, latents: mx.array, grid: tuple[int, int, int]) -> np.ndarray:
    """A picture of latents [n, 48] of a grid (t, h, w), latent frames side by side, uint8 [8h, 8tw, 3]."""
    frames, rows, columns = grid
    colours = np.clip(_with_ones(np.array(latents.astype(mx.float32))) @ weights, -1, 1)
    frames_apart = colours.reshape(frames, rows, columns, 3).transpose(1, 0, 2, 3).reshape(rows, frames * columns, 3)
    return to_uint8(frames_apart).repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)


def _with_ones(latents: np.ndarray) -> np.ndarray:
    flat = latents.reshape(-1, LATENT_CHANNELS)
    return np.concatenate([flat, np.ones((len(flat), 1), flat.dtype)], axis=1)
