"""Faults of the language model's rotary embedding: they show in the rotated queries first."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.backend.numerics import Numerics
from lance_mlx.config import LanceConfig
from lance_mlx.model import rope
from lance_mlx.model.mot import ExpertRows
from lance_mlx.model.rope import Rotary, RotaryTable
from lance_mlx.sampling import flow
from parity.lance.faults.base import BFLOAT16, FLOAT32, Fault, Patch, Target, calls, function, replaced, rounded

_Q_ROPE = "layers.*.self_attn.q_rope"
_ROPES = "layers.*.self_attn.?_rope"
_Frequencies = Callable[[Callable, LanceConfig, Numerics], np.ndarray]


def _frequencies(change: _Frequencies) -> Patch:
    return function(rope, "inverse_frequencies", change)


def _exact(original: Callable, config: LanceConfig, numerics: Numerics) -> np.ndarray:
    return original(config, replace(numerics, round_rope_frequencies=False))


def _rounded(original: Callable, config: LanceConfig, numerics: Numerics) -> np.ndarray:
    return np.array(rounded(mx.array(original(config, numerics))))


def _theta_10000(original: Callable, config: LanceConfig, numerics: Numerics) -> np.ndarray:
    return original(replace(config, rope_theta=1e4), numerics)


def _axes(choose: Callable[[np.ndarray], np.ndarray], round_angles: bool = False) -> Patch:
    """Let every frequency follow another axis: `choose` maps the axes that upstream takes, [head_dim // 2]."""

    def table(original: Callable, position_ids: np.ndarray, config: LanceConfig, numerics: Numerics) -> RotaryTable:
        axes = choose(np.repeat(np.arange(3), config.mrope_section))
        angles = position_ids[axes].T.astype(np.float32) * rope.inverse_frequencies(config, numerics)
        if round_angles:
            angles = np.array(rounded(mx.array(angles)))
        return _table(position_ids, angles, numerics)

    return function(rope, "rotary_table", table)


def _sections(*order: int) -> Patch:
    def table(original: Callable, position_ids: np.ndarray, config: LanceConfig, numerics: Numerics) -> RotaryTable:
        axes = np.repeat(order, config.mrope_section)
        angles = position_ids[axes].T.astype(np.float32) * rope.inverse_frequencies(config, numerics)
        return _table(position_ids, angles, numerics)

    return function(rope, "rotary_table", table)


def _table(position_ids: np.ndarray, angles: np.ndarray, numerics: Numerics) -> RotaryTable:
    wide = angles.astype(np.float64)
    cos, sin = (mx.array(f(wide).astype(np.float32)[:, None, :]).astype(numerics.dtype) for f in (np.cos, np.sin))
    return RotaryTable(position_ids, cos, sin)


def turn_pairs(original: Callable, module: nn.Module, x: mx.array, table: RotaryTable) -> mx.array:
    """Rotate the neighbouring channels 2i and 2i+1 of every head against each other."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = even * table.cos - odd * table.sin, odd * table.cos + even * table.sin
    return mx.stack(turned, axis=-1).reshape(x.shape)


def _backwards(original: Callable, module: nn.Module, x: mx.array, table: RotaryTable) -> mx.array:
    return original(module, x, replace(table, sin=-table.sin))


@contextmanager
def _before_the_norm(target: Target) -> Iterator[None]:
    """Norm what was rotated: the rotation is given its input anew, as the norms had it.

    Norms take the rows of all readings of a pass and rotations those of one, so the arms have a pass each.
    """
    attentions = target.modules("layers.*.self_attn").values()
    parents = {id(attention[f"{kind}_rope"]): (attention, kind) for attention in attentions for kind in "qk"}
    heads: dict[int, mx.array] = {}

    def norm(original: Callable, module: nn.RMSNorm, x: mx.array) -> mx.array:
        heads[id(module)] = x
        return original(module, x)

    def rotate(original: Callable, module: Rotary, x: mx.array, table: RotaryTable) -> mx.array:
        attention, kind = parents[id(module)]
        norms = [attention[f"{kind}_norm{suffix}"] for suffix in ("", "_moe_gen")]
        rows = ExpertRows(*(heads.pop(id(each), None) for each in norms))
        parts = rows.by_expert(original(module, rows.interleave(), table))
        done = (
            None if part is None else mx.fast.rms_norm(part, each["weight"], each.eps)
            for part, each in zip(parts, norms, strict=True)
        )
        return ExpertRows(*done).interleave()

    with ExitStack() as stack:
        stack.enter_context(replaced(flow, "goes_in_one_pass", lambda *given: False))
        stack.enter_context(calls(nn.RMSNorm, norm, "layers.*.self_attn.?_norm*")(target))
        stack.enter_context(calls(Rotary, rotate, _ROPES)(target))
        yield


FAULTS = [
    Fault(
        "rope-pairs",
        "RoPE turns the neighbouring channels 2i and 2i+1 against each other instead of a head's halves.",
        _Q_ROPE,
        calls(Rotary, turn_pairs, _ROPES),
        explanation="RoPE turns neighbouring pairs instead of halves",
    ),
    Fault(
        "rope-frequencies-exact",
        "The RoPE frequencies stay float32 where upstream's launcher rounds them to bfloat16.",
        _Q_ROPE,
        _frequencies(_exact),
        dtypes=BFLOAT16,
        explanation="RoPE frequencies are not rounded",
    ),
    Fault(
        "rope-frequencies-rounded",
        "The RoPE frequencies are rounded to bfloat16 in a float32 model.",
        _Q_ROPE,
        _frequencies(_rounded),
        dtypes=FLOAT32,
        explanation="frequencies are bfloat16",
    ),
    Fault(
        "rope-theta-10000",
        "RoPE has the base 10000 instead of the configuration's 1000000.",
        _Q_ROPE,
        _frequencies(_theta_10000),
        explanation="theta is 10000",
    ),
    Fault(
        "rope-rows-and-columns-exchanged",
        "The second section of the frequencies follows the columns and the third the rows.",
        _Q_ROPE,
        _sections(0, 2, 1),
        explanation="the frequencies of h follow w and those of w follow h",
    ),
    Fault(
        "rope-sections-reversed",
        "The first section of the frequencies follows the columns and the last one time.",
        _Q_ROPE,
        _sections(2, 1, 0),
        explanation="the frequencies of t follow w and those of w follow t",
    ),
    Fault(
        "rope-axes-interleaved",
        "The frequencies take the axes t, h, w in turn instead of in sections.",
        _Q_ROPE,
        _axes(lambda axes: np.arange(len(axes)) % 3),
        explanation="RoPE axes alternate frequency by frequency",
    ),
    Fault(
        "rope-time-axis-only",
        "All frequencies follow the t axis, as in a model for text.",
        _Q_ROPE,
        _axes(np.zeros_like),
        explanation="all frequencies follow t",
    ),
    Fault(
        "rope-turns-backwards",
        "RoPE turns queries and keys the other way.",
        _Q_ROPE,
        calls(Rotary, _backwards, _ROPES),
        explanation="the rotation goes the other way",
    ),
    Fault(
        "rope-angles-rounded",
        "The RoPE angles are rounded to bfloat16 before their cosines are taken.",
        _Q_ROPE,
        _axes(lambda axes: axes, round_angles=True),
        explanation="RoPE angles are rounded to bfloat16",
    ),
    Fault(
        "rope-before-the-norm",
        "Queries and keys are rotated first and normed afterwards.",
        _Q_ROPE,
        _before_the_norm,
        explanation="the query and key norms come after RoPE",
    ),
]
