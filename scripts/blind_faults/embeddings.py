"""Embeddings of times, places and tokens that are made otherwise."""

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from blind_faults.common import pair, plain, precision, small
from lance_mlx.model.lance import Lance, LatentPositionEmbedding, TimestepEmbedder
from parity.lance.faults.base import DRAWS, ENCODES, FLOAT32, VIDEOS, Patch, method, rounded, together

Features = Callable[[np.ndarray, int], np.ndarray]


def _times(features: Features) -> Patch:
    """A patch of the sinusoidal features of t, float32 [n, 256], of times and half their number."""

    def call(original: Callable, module: TimestepEmbedder, timesteps: np.ndarray) -> mx.array:
        x = mx.array(features(timesteps.astype(np.float32), 128).astype(np.float32))
        for layer in module.mlp:
            x = layer(x)
        return x

    return method(TimestepEmbedder, "__call__", call)


def _angles(times: np.ndarray, half: int, steps: int) -> np.ndarray:
    return times[:, None] * np.exp(-math.log(10000) * np.arange(half) / steps)


def _shifted(times: np.ndarray, half: int) -> np.ndarray:
    angles = _angles(times, half, half - 1)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def _alternating(times: np.ndarray, half: int) -> np.ndarray:
    angles = _angles(times, half, half)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(len(times), -1)


def _clean_untimed(
    original: Callable, model: Lance, latents: mx.array, timesteps: np.ndarray, positions: mx.array
) -> mx.array:
    embedded = original(model, latents, timesteps, positions)
    untimed = model.vae2llm(latents) + positions
    return mx.where(mx.array(timesteps == 0)[:, None], untimed, embedded)


def _untimed_frame(
    original: Callable, model: Lance, latents: mx.array, timesteps: np.ndarray, positions: mx.array
) -> mx.array:
    # The last latent is where a padded batch would have had its time cut off.
    embedded = original(model, latents, timesteps, positions)
    return mx.concatenate([embedded[:-1], (model.vae2llm(latents[-1:]) + positions[-1:]).astype(embedded.dtype)])


Grid = tuple[int, int, int]
Places = Callable[[Callable, LatentPositionEmbedding, Grid], mx.array]


def _places(compute: Places) -> Patch:
    return method(LatentPositionEmbedding, "__call__", compute)


def _at(module: LatentPositionEmbedding, cells: list[np.ndarray], width: int) -> mx.array:
    """The embedding of fractional coordinates (t, h, w)."""
    third = width // 3 // 2 * 2
    parts = []
    for places, size in zip(cells, (third, third, width - 2 * third), strict=True):
        angles = places.reshape(-1)[:, None] / 10000 ** (np.arange(size // 2) / (size / 2))
        parts.append(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
    return mx.array(np.concatenate(parts, axis=1).astype(np.float32)).astype(module._dtype)


def _stretched(original: Callable, module: LatentPositionEmbedding, grid: Grid) -> mx.array:
    t, h, w = np.indices(grid).astype(np.float64)
    return _at(module, [t, h * 16 / grid[1], w * 16 / grid[2]], module._hidden_size)


def _half_cells(original: Callable, module: LatentPositionEmbedding, grid: Grid) -> mx.array:
    t, h, w = np.indices(grid).astype(np.float64)
    return _at(module, [t, h + 0.5, w + 0.5], module._hidden_size)


def _class_row(original: Callable, module: LatentPositionEmbedding, grid: Grid) -> mx.array:
    y = original(module, grid)
    return mx.concatenate([mx.zeros_like(y[:1]), y[:-1]])


def _last_frame_repeated(original: Callable, module: LatentPositionEmbedding, grid: Grid) -> mx.array:
    y, cells = original(module, grid), grid[1] * grid[2]
    return y if grid[0] == 1 else mx.concatenate([y[:-cells], y[-2 * cells : -cells]])


def _rounded_places(original: Callable, module: LatentPositionEmbedding, grid: Grid) -> mx.array:
    return rounded(original(module, grid))


def _times_bfloat16(times: np.ndarray, half: int) -> np.ndarray:
    low = np.array(mx.array(_angles(times, half, half).astype(np.float32)).astype(mx.bfloat16).astype(mx.float32))
    return np.concatenate([np.cos(low), np.sin(low)], axis=-1)


FAULTS = [
    plain(
        "blind-time-frequencies-inclusive",
        "time_embedder*",
        _times(_shifted),
        "The exponents of the time embedding's frequencies are divided by 127 instead of by 128 (diffusers' "
        "downscale_freq_shift of 1), so that the last one is exactly 1e-4.",
        tasks=DRAWS,
    ),
    plain(
        "blind-time-features-alternate",
        "time_embedder*",
        _times(_alternating),
        "Cosine and sine of each frequency follow each other in the time features, instead of all cosines before all "
        "sines.",
        tasks=DRAWS,
    ),
    plain(
        "blind-places-stretched-to-16",
        "latent_pos_embed",
        _places(_stretched),
        "Rows and columns of latent cells are stretched to a base grid of 16 by 16 before they are embedded, as "
        "PixArt does.",
        tasks=DRAWS,
    ),
    plain(
        "blind-places-at-cell-centres",
        "latent_pos_embed",
        _places(_half_cells),
        "Rows and columns of latent cells are embedded at their centres, 0.5, 1.5 and so on.",
        tasks=DRAWS,
    ),
    plain(
        "blind-places-behind-a-class-token",
        "latent_pos_embed",
        _places(_class_row),
        "The table of places begins with the row of zeros of a class token: every cell of a block gets the place of "
        "the cell before it, the first one zeros.",
        tasks=DRAWS,
    ),
    plain(
        "blind-embeddings-clean-latents-untimed",
        "embeddings",
        method(Lance, "embed_latents", _clean_untimed),
        "Given latents, those at t = 0, get no time embedding at all instead of that of t = 0.",
        tasks=ENCODES,
    ),
    small(
        "blind-embeddings-last-latent-untimed",
        "embeddings",
        method(Lance, "embed_latents", _untimed_frame),
        "The last latent of every block gets no time embedding.",
        tasks=DRAWS,
    ),
    small(
        "blind-places-last-frame-repeated",
        "latent_pos_embed",
        _places(_last_frame_repeated),
        "The last latent frame of a block gets the places of the frame before it: the table is one frame short and "
        "its index is clipped.",
        tasks=VIDEOS,
    ),
    precision(
        "blind-places-bfloat16",
        "latent_pos_embed",
        _places(_rounded_places),
        "The table of places is held in bfloat16 in a float32 run.",
        tasks=DRAWS,
        dtypes=FLOAT32,
    ),
    precision(
        "blind-time-angles-bfloat16",
        "time_embedder*",
        _times(_times_bfloat16),
        "The angles of the time features are rounded to bfloat16 before cosine and sine.",
        tasks=DRAWS,
    ),
    pair(
        "blind-pair-places-and-times",
        "*_embed*",
        together(_places(_half_cells), _times(_shifted)),
        "Two faults of embeddings in two places: cells are embedded at their centres (latent_pos_embed), and the time "
        "frequencies' exponents are divided by 127 instead of by 128 (time_embedder).",
        tasks=DRAWS,
    ),
]
