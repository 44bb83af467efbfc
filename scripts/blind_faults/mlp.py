"""Feed-forward networks of both towers with another activation, or with a part of it missing."""

from collections.abc import Callable

import mlx.core as mx

from blind_faults.common import inputs, pair, plain, small, zeroed
from lance_mlx.model import mot
from lance_mlx.model.layers import MLP, Linear
from lance_mlx.model.mot import ExpertRows
from lance_mlx.model.vit import GELU
from parity.lance.faults.base import DRAWS, LOOKS, Patch, calls, function, together

_LLM = "layers.*.mlp*"
_VIT = "vit_model.blocks.*.mlp*"


def _combined(combine: Callable[[mx.array, mx.array], mx.array], *patterns: str) -> Patch:
    """A patch of what is between the projections: gate and up, float32 each."""

    def call(original: Callable, module: MLP, x: mx.array) -> mx.array:
        gate, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(combine(gate.astype(mx.float32), up.astype(mx.float32)).astype(gate.dtype))

    return calls(MLP, call, *patterns)


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def _oss(gate: mx.array, up: mx.array) -> mx.array:
    gate, up = mx.minimum(gate, 7), mx.clip(up, -7, 7)
    return gate * mx.sigmoid(1.702 * gate) * (up + 1)


def _hard(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.clip(gate / 6 + 0.5, 0, 1) * up


def _by_hand(mlp: MLP, x: mx.array) -> mx.array:
    """What an MLP computes, without its modules being called."""
    gate, up, down = (mlp[f"{name}_proj"].weight.astype(mx.float32) for name in ("gate", "up", "down"))
    x = x.astype(mx.float32)
    return (_silu(x @ gate.T) * (x @ up.T)) @ down.T


def _closing_bracket(original: Callable, module: object, name: str, x: ExpertRows) -> ExpertRows:
    y = original(module, name, x)
    if name != "mlp" or x.gen is None:
        return y
    und = mx.array(y.und)
    und[1::2] = _by_hand(module["mlp_moe_gen"], x.und[1::2]).astype(und.dtype)
    return y._replace(und=und)


def _silu_instead(original: Callable, module: GELU, x: mx.array) -> mx.array:
    return _silu(x.astype(mx.float32)).astype(x.dtype)


def _gelu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(1.702 * gate) * up


FAULTS = [
    plain(
        "blind-mlp-gpt-oss",
        _LLM,
        _combined(_oss, "layers.*.mlp*"),
        "The MLPs of both experts are gpt-oss's: gate * sigmoid(1.702 * gate) * (up + 1), gate clipped above 7 and up "
        "to plus and minus 7.",
    ),
    plain(
        "blind-mlp-hard-swish",
        _LLM,
        _combined(_hard, "layers.*.mlp*"),
        "The MLPs of both experts use hard-swish, x * clip(x / 6 + 0.5, 0, 1), in place of SiLU.",
    ),
    plain(
        "blind-vit-mlp-quick-gelu",
        _VIT,
        _combined(_gelu, "vit_model.blocks.*.mlp"),
        "The ViT's gated MLPs use quick GELU, x * sigmoid(1.702 * x), as Qwen2-VL's tower does, in place of SiLU.",
        tasks=LOOKS,
    ),
    plain(
        "blind-vit-merger-silu",
        "vit_model.merger*",
        calls(GELU, _silu_instead, "vit_model.merger.mlp.1"),
        "The ViT's merger uses SiLU, the tower's hidden_act, in place of GELU.",
        tasks=LOOKS,
    ),
    small(
        "blind-mlp-last-four-channels-lost",
        _LLM,
        inputs(Linear, zeroed(..., slice(-4, None)), "layers.*.mlp*.down_proj"),
        "Of the 96 channels between gate and down projection the last 4 are dropped: the width was rounded down for "
        "the shards.",
    ),
    small(
        "blind-mlp-closing-bracket-to-generation",
        "layers.*",
        function(mot, "_by_expert", _closing_bracket),
        "The closing bracket of a latent block goes through the MLP of the generation expert (the slice of the latents "
        "runs one too far); the opening one does not.",
        tasks=DRAWS,
    ),
    small(
        "blind-mlp-layer-one-without-gate",
        "layers.1.mlp*",
        _combined(lambda gate, up: gate * up, "layers.1.mlp*"),
        "In layer 1 the gate meets up without its activation, gate * up, in both experts.",
    ),
    pair(
        "blind-pair-mlp-activations-of-both-experts",
        _LLM,
        together(
            _combined(_hard, "layers.*.mlp"),
            _combined(lambda gate, up: gate * mx.sigmoid(1.702 * gate) * up, "layers.*.mlp_moe_gen"),
        ),
        "Two faults of one kind in two places: the understanding expert's MLP uses hard-swish and the generation "
        "expert's x * sigmoid(1.702 * x), in place of SiLU.",
        tasks=DRAWS,
    ),
]
