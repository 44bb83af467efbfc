"""Faults of what goes into the language model: times, latents, places, tokens."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.config import MAX_LATENT_FRAMES, MAX_LATENT_SIDE
from lance_mlx.model.lance import Lance, LatentPositionEmbedding, TimestepEmbedder
from lance_mlx.sampling import conditions
from lance_mlx.sampling.conditions import Conditions
from lance_mlx.sequence.positions import latent_position_ids
from lance_mlx.sequence.segments import Segment
from parity.lance.faults.base import (
    BFLOAT16,
    DRAWS,
    ENCODES,
    FLOAT32,
    LOOKS,
    Fault,
    Patch,
    Target,
    calls,
    function,
    method,
    wrapped,
)
from parity.lance.faults.vision import ROWS_OF_TOKENS

_FEATURES = 256


def _time(
    max_period: float = 10000.0,
    scale: float = 1.0,
    sines_first: bool = False,
    shift: int = 0,
) -> Patch:
    """Embed times from other features; `shift` is taken off the number of frequencies where they are spaced."""

    def call(original: Callable, module: TimestepEmbedder, timesteps: np.ndarray) -> mx.array:
        half = _FEATURES // 2
        exponents = -math.log(max_period) * np.arange(half) / (half - shift)
        t = np.float32(scale) * timesteps.astype(np.float32)
        angles = t[:, None] * np.exp(exponents).astype(np.float32)
        parts = [np.cos(angles), np.sin(angles)]
        x = mx.array(np.concatenate(parts[::-1] if sines_first else parts, axis=-1).astype(np.float32))
        for layer in module.mlp:
            x = layer(x)
        return x

    return method(TimestepEmbedder, "__call__", call)


def _embed(
    assemble: Callable[[Callable, Lance, mx.array, np.ndarray, mx.array], mx.array],
) -> Patch:
    return method(Lance, "embed_latents", assemble)


@contextmanager
def _clean_at_t(target: Target) -> Iterator[None]:
    """Embed given latents at the time of those beside them, or at 1 where there are none."""
    # The embedder as it is now: its own call goes on to be made with the right times.
    embed = TimestepEmbedder.__call__

    def assemble(
        original: Callable, model: Lance, latents: mx.array, timesteps: np.ndarray, positions: mx.array
    ) -> mx.array:
        right = original(model, latents, timesteps, positions)
        given = timesteps == 0
        if not given.any():
            return right
        wrong = embed(model.time_embedder, np.array([timesteps.max() or 1], np.float32))
        return mx.where(mx.array(given)[:, None], model.vae2llm(latents) + wrong + positions, right)

    with wrapped(Lance, "embed_latents", assemble):
        yield


def _without_positions(
    original: Callable, model: Lance, latents: mx.array, timesteps: np.ndarray, positions: mx.array
) -> mx.array:
    return original(model, latents, timesteps, mx.zeros_like(positions))


def _summed_in_float32(
    original: Callable, model: Lance, latents: mx.array, timesteps: np.ndarray, positions: mx.array
) -> mx.array:
    times, index = np.unique(timesteps, return_inverse=True)
    parts = model.vae2llm(latents), model.time_embedder(times)[mx.array(index)], positions
    return sum(part.astype(mx.float32) for part in parts).astype(parts[0].dtype)


def _times_sqrt_hidden(original: Callable, module: nn.Embedding, ids: mx.array) -> mx.array:
    y = original(module, ids)
    return (y.astype(mx.float32) * math.sqrt(y.shape[-1])).astype(y.dtype)


def _column_by_column(original: Callable, model: Lance, segments: Sequence[Segment], contents: Conditions) -> list:
    blocks = [segment.grid for segment in segments if segment.grid is not None and not segment.is_latent]
    turned = []
    for tokens, (t, h, w) in zip(contents.vit, blocks, strict=False):
        turned.append(tokens.reshape(t, h, w, -1).swapaxes(1, 2).reshape(t * h * w, -1))
    return original(model, segments, replace(contents, vit=tuple(turned)))


def _table(
    order: tuple[int, int, int] = (0, 1, 2),
    rest_to: int = 2,
    cosines_first: bool = False,
    interleaved: bool = False,
    side: int = MAX_LATENT_SIDE,
    exact: bool = False,
) -> Patch:
    """Embed places from another table.

    Args:
        order: axes (t, h, w = 0, 1, 2) of the three parts of the channels.
        rest_to: which part gets the channels that a third leaves over.
        side: cells of a row when the index into the table is computed.
    """

    def call(original: Callable, module: LatentPositionEmbedding, grid: tuple[int, int, int]) -> mx.array:
        hidden = module._hidden_size
        third = hidden // 3 // 2 * 2
        widths = [third] * 3
        widths[rest_to] = hidden - 2 * third
        shape = (MAX_LATENT_FRAMES, MAX_LATENT_SIDE, MAX_LATENT_SIDE)
        places = latent_position_ids(grid)
        if side != MAX_LATENT_SIDE:
            t, h, w = np.indices(grid).reshape(3, -1)
            places = (t * side + h) * side + w
        cells = np.unravel_index(places, shape)
        parts = []
        for axis, width in zip(order, widths, strict=True):
            angles = np.arange(shape[axis])[:, None] / 10000 ** (np.arange(width // 2) / (width / 2))
            waves = [np.sin(angles), np.cos(angles)]
            if cosines_first:
                waves.reverse()
            values = np.stack(waves, axis=-1) if interleaved else np.stack(waves, axis=1)
            parts.append(values.reshape(shape[axis], width)[cells[axis]])
        values = mx.array(np.concatenate(parts, axis=-1).astype(np.float32))
        return values if exact else values.astype(module._dtype)

    return method(LatentPositionEmbedding, "__call__", call)


def _timestep(
    name: str, explanation: str, patch: Patch, about: str, dtypes: tuple[str, ...] = ("float32", "bfloat16")
) -> Fault:
    return Fault(name, about, "time_embedder", patch, DRAWS, dtypes, explanation=explanation)


def _place(
    name: str, explanation: str, patch: Patch, about: str, dtypes: tuple[str, ...] = ("float32", "bfloat16")
) -> Fault:
    return Fault(name, about, "latent_pos_embed", patch, DRAWS, dtypes, explanation=explanation)


FAULTS = [
    _timestep(
        "timestep-sines-first",
        "in the embedding of t sines come first",
        _time(sines_first=True),
        "The features of a time hold sines before cosines.",
    ),
    _timestep(
        "timestep-times-1000",
        "in the embedding of t t counts 1000 times",
        _time(scale=1000.0),
        "Times are multiplied by 1000 before they are embedded.",
    ),
    _timestep(
        "timestep-max-period-1000000",
        "the longest period is 1000000",
        _time(max_period=1e6),
        "The longest period of a time's features is 1000000 instead of 10000.",
    ),
    _timestep(
        "timestep-frequencies-to-the-end",
        "frequencies are spaced by half - 1",
        _time(shift=1),
        "The frequencies of a time's features reach the longest period, one step farther than upstream's.",
        FLOAT32,
    ),
    Fault(
        "clean-latents-at-t",
        "Clean latents are embedded at the time of the noise instead of at 0.",
        "embeddings",
        _clean_at_t,
        ENCODES,
        explanation="clean latents are embedded at t",
    ),
    Fault(
        "latent-positions-missing",
        "Latents get no embedding of their place.",
        "embeddings",
        _embed(_without_positions),
        DRAWS,
        explanation="latents have no position embedding",
    ),
    Fault(
        "embeddings-summed-in-float32",
        "The parts of a latent's embedding are summed in float32 and rounded once.",
        "embeddings",
        _embed(_summed_in_float32),
        DRAWS,
        BFLOAT16,
        explanation="embeddings are summed in float32 and rounded once",
    ),
    Fault(
        "token-embeddings-scaled",
        "Token embeddings are multiplied by the square root of the hidden size, as Gemma's are.",
        "embed_tokens",
        calls(nn.Embedding, _times_sqrt_hidden, "embed_tokens"),
        explanation="token embeddings are multiplied by sqrt(hidden)",
    ),
    Fault(
        "vit-tokens-column-by-column",
        "The ViT's tokens are put into the sequence column by column.",
        "embeddings",
        function(conditions, "embed_prefix", _column_by_column),
        LOOKS,
        explanation="ViT tokens are put in column by column",
        needs=ROWS_OF_TOKENS,
    ),
    _place(
        "latent-table-axes-w-h-t",
        "of frames the places are those of columns and of columns the places are those of frames",
        _table(order=(2, 1, 0)),
        "The channels of a place stand for column, row, time instead of time, row, column.",
    ),
    _place(
        "latent-table-cosines-first",
        "cosines come first",
        _table(cosines_first=True),
        "The channels of a place hold cosines before sines.",
    ),
    _place(
        "latent-table-interleaved",
        "sines and cosines alternate",
        _table(interleaved=True),
        "The channels of a place alternate sines and cosines.",
    ),
    _place(
        "latent-table-rest-to-t",
        "the latent position table gives the rest of the channels to t",
        _table(rest_to=0),
        "The channels that a third leaves over go to time instead of to the columns.",
    ),
    _place(
        "latent-table-rows-of-32",
        "the latent position table has rows of 32",
        _table(side=32),
        "Places are counted in rows of 32 cells in a table whose rows have 64.",
    ),
    _place(
        "latent-table-not-rounded",
        "the latent position table is not rounded",
        _table(exact=True),
        "The table of places stays float32 where upstream's launcher rounds it to bfloat16.",
        BFLOAT16,
    ),
]
