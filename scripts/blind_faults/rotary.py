"""Rotary embeddings of the transformer that turn by other angles."""

import math
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from blind_faults.common import pair, plain, precision, small
from lance_mlx.backend.numerics import Numerics
from lance_mlx.config import LanceConfig
from lance_mlx.model import rope
from lance_mlx.model.rope import Rotary, RotaryTable
from parity.lance.faults.base import DRAWS, FLOAT32, Patch, calls, function, together

_TURNED = "layers.*.self_attn.?_rope"
_LONG = 64
"""Positions that the prompts of the bundles' pictures go beyond."""


def _frequencies(change: Callable[[np.ndarray, LanceConfig], np.ndarray]) -> Patch:
    def changed(original: Callable, config: LanceConfig, numerics: Numerics) -> np.ndarray:
        return change(original(config, numerics), config).astype(np.float32)

    return function(rope, "inverse_frequencies", changed)


def _angles(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """A patch of the angles float32 [n, head_dim // 2], with upstream's axes and frequencies."""

    def table(original: Callable, ids: np.ndarray, config: LanceConfig, numerics: Numerics) -> RotaryTable:
        axes = np.repeat(np.arange(3), config.mrope_section)
        angles = ids[axes].T.astype(np.float32) * rope.inverse_frequencies(config, numerics)
        return _table(ids, change(angles), numerics)

    return function(rope, "rotary_table", table)


def _table(ids: np.ndarray, angles: np.ndarray, numerics: Numerics) -> RotaryTable:
    wide = angles.astype(np.float64)
    cos, sin = (mx.array(f(wide).astype(np.float32)[:, None]).astype(numerics.dtype) for f in (np.cos, np.sin))
    return RotaryTable(ids, cos, sin)


def _places(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """A patch of the ids that the angles come from; those that are told stay as they are."""

    def table(original: Callable, ids: np.ndarray, config: LanceConfig, numerics: Numerics) -> RotaryTable:
        return replace(original(change(ids), config, numerics), position_ids=ids)

    return function(rope, "rotary_table", table)


def _inclusive(frequencies: np.ndarray, config: LanceConfig) -> np.ndarray:
    n = len(frequencies)
    return config.rope_theta ** -(np.arange(n) / (n - 1))


def _llama3(frequencies: np.ndarray, config: LanceConfig) -> np.ndarray:
    turns = 8192 * frequencies / (2 * np.pi)
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    return frequencies * (smooth + (1 - smooth) / 8)


def _yarn(original: Callable, ids: np.ndarray, config: LanceConfig, numerics: Numerics) -> RotaryTable:
    table, factor = original(ids, config, numerics), 0.1 * math.log(4) + 1
    return replace(table, cos=table.cos * factor, sin=table.sin * factor)


def _half_precision(frequencies: np.ndarray, config: LanceConfig) -> np.ndarray:
    return frequencies.astype(np.float16)


def _to_bfloat16(angles: np.ndarray) -> np.ndarray:
    return np.array(mx.array(angles).astype(mx.bfloat16).astype(mx.float32))


def _without_last_head(original: Callable, module: Rotary, x: mx.array, table: RotaryTable) -> mx.array:
    return mx.concatenate([original(module, x, table)[:, :-1], x[:, -1:]], axis=1)


def _pairs_first(original: Callable, module: Rotary, x: mx.array, table: RotaryTable) -> mx.array:
    turned = original(module, x, table)
    width = x.shape[-1] // 4
    kept = [x[..., width : 2 * width], x[..., 3 * width :]]
    first, second = turned[..., :width], turned[..., 2 * width : 3 * width]
    return mx.concatenate([first, kept[0], second, kept[1]], axis=-1)


FAULTS = [
    plain(
        "blind-rope-inclusive-frequencies",
        _TURNED,
        _frequencies(_inclusive),
        "The exponents of the rotary frequencies run from 0 to 1 inclusive, i / (head_dim / 2 - 1), so that the last "
        "frequency is 1 / theta, instead of i / (head_dim / 2).",
    ),
    plain(
        "blind-rope-llama3-scaling",
        _TURNED,
        _frequencies(_llama3),
        "Rotary frequencies that turn less than once in 8192 positions are divided by 8, as Llama 3.1 scales them (low "
        "factor 1, high factor 4).",
    ),
    plain(
        "blind-rope-yarn-magnitude",
        _TURNED,
        function(rope, "rotary_table", _yarn),
        "The rotary cosines and sines are multiplied by YaRN's 0.1 * ln(4) + 1 = 1.139, so that rotated queries and "
        "keys are that much longer.",
    ),
    plain(
        "blind-rope-half-of-the-pairs",
        _TURNED,
        calls(Rotary, _pairs_first, _TURNED),
        "The fast half of a head's rotary pairs is rotated alone (a partial factor of 0.5); the slow half is left as "
        "it is.",
    ),
    small(
        "blind-rope-table-ends-at-64",
        _TURNED,
        _places(lambda ids: np.minimum(ids, _LONG - 1)),
        "The rotary table holds 64 positions and is read with a clipped index: tokens at 64 and beyond are all turned "
        "as if they were at 63.",
        tasks=DRAWS,
    ),
    small(
        "blind-rope-last-query-head-still",
        "layers.*.self_attn.q_rope",
        calls(Rotary, _without_last_head, "layers.*.self_attn.q_rope"),
        "The last query head is not rotated; the three others and all keys are.",
    ),
    precision(
        "blind-rope-frequencies-float16",
        _TURNED,
        _frequencies(_half_precision),
        "The rotary frequencies are rounded to float16 before the angles are computed from them.",
        dtypes=FLOAT32,
    ),
    precision(
        "blind-rope-angles-bfloat16",
        _TURNED,
        _angles(_to_bfloat16),
        "The rotary angles, position times frequency, are rounded to bfloat16 before their cosines are taken: up to "
        "0.25 radians at position 90.",
    ),
    pair(
        "blind-pair-rope-short-and-slow",
        _TURNED,
        together(_places(lambda ids: np.minimum(ids, _LONG - 1)), _frequencies(lambda f, config: f * 0.5)),
        "Two faults of the rotary table at once: positions beyond 63 are clipped to 63, and all frequencies are halved "
        "(linear scaling by 2).",
        tasks=DRAWS,
    ),
]
