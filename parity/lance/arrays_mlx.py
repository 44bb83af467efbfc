"""Arrays of lance_mlx as taps, taps as its arrays, and the forms that both take in between."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import torch

from lance_mlx.model.mot import ExpertRows
from parity.tensors.recording import Tap

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "int32": mx.int32}

Rows = mx.array | np.ndarray | ExpertRows


def to_tap(value: Rows) -> Tap:
    """Hold an evaluated array as a tap: bfloat16 values as float32, integers as int32, experts' rows in sequence order.

    Float32 values are not copied: MLX never writes into memory that something else sees.
    """
    if isinstance(value, ExpertRows):
        und, gen = to_tap(value.und), to_tap(value.gen)
        # Rows of two dtypes merge into the wider one, as MLX concatenates them.
        wider = und if und.dtype == gen.dtype else next(tap for tap in (und, gen) if tap.dtype == "float32")
        return replace(wider, array=np.concatenate([und.array[:1], gen.array, und.array[1:]]))
    if isinstance(value, np.ndarray):
        held = np.float32 if value.dtype.kind == "f" else np.int32
        return Tap(np.array(value, held), np.dtype(held).name)
    if value.dtype == mx.bfloat16:
        return Tap.widened(torch.from_dlpack(value).float().numpy())
    if value.dtype == mx.float32:
        array = np.asarray(value)
        array.flags.writeable = False
        return Tap(array, "float32")
    if mx.issubdtype(value.dtype, mx.floating):
        return Tap(np.array(value.astype(mx.float32)), "float32")
    return Tap(np.array(value.astype(mx.int32)), "int32")


def channels_first(frames: mx.array) -> mx.array:
    """[t, h, w, c] as the oracles' [1, c, t, h, w]."""
    return frames.transpose(3, 0, 1, 2)[None]


def channels_last(codes: mx.array) -> mx.array:
    """The oracles' [1, c, t, h, w] as [t, h, w, c]."""
    return codes[0].transpose(1, 2, 3, 0)


def apart(value: Rows, readings: int) -> list[Rows]:
    """The rows of every reading of a pass by themselves."""
    return mx.split(value, readings) if isinstance(value, mx.array) else value.split_arms(readings)


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all readings of a pass, after each other."""
    return mx.concatenate(parts) if isinstance(parts[0], mx.array) else ExpertRows.concat_arms(parts)


def held(value: Rows) -> Rows:
    """Other arrays of the same memory: what is assigned to the elements of the first ones is not seen by these."""
    if isinstance(value, mx.array):
        return value.astype(value.dtype)
    return ExpertRows(*map(held, value)) if isinstance(value, ExpertRows) else value


def from_tap(tap: Tap) -> mx.array:
    """The array that a tap holds, in its dtype."""
    return mx.array(tap.array).astype(_DTYPES[tap.dtype])
