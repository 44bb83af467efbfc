"""Faults of the language model's MLPs, of its residual stream, and products in another dtype."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lance_mlx.model.layers import MLP, Linear, silu
from lance_mlx.model.mot import ExpertRows, MoTDecoderLayer, _by_expert
from lance_mlx.model.vae_layers import CausalConv3d, StreamState
from parity.lance.faults.base import (
    ALL,
    BFLOAT16,
    DRAWS,
    FLOAT32,
    LOOKS,
    Fault,
    Patch,
    calls,
    method,
    parameter,
    rounded,
    tf32,
)

_MLPS = "layers.*.mlp*"
_DOWN = "layers.*.mlp*.down_proj"


def mlp(activate: Callable[[mx.array, mx.array], mx.array], *patterns: str) -> Patch:
    """Compute what the MLPs put into their last projection from gate and up by another function."""

    def call(original: Callable, module: MLP, x: mx.array) -> mx.array:
        return module.down_proj(activate(module.gate_proj(x), module.up_proj(x)))

    return calls(MLP, call, *patterns)


def gelu_gate(gate: mx.array, up: mx.array) -> mx.array:
    """GELU(gate) * up, the activation in float32."""
    return nn.gelu(gate.astype(mx.float32)).astype(gate.dtype) * up


def _on_up(gate: mx.array, up: mx.array) -> mx.array:
    return gate * silu(up)


def _in_bfloat16(gate: mx.array, up: mx.array) -> mx.array:
    return rounded(rounded(gate * rounded(mx.sigmoid(rounded(gate)))) * up)


def _rounded_stream(original: Callable, layer: MoTDecoderLayer, *args: Any, **values: Any) -> tuple:
    x, kv = original(layer, *args, **values)
    return ExpertRows(rounded(x.und), None if x.gen is None else rounded(x.gen)), kv


def _layer(add: Callable[[ExpertRows, ExpertRows, ExpertRows], ExpertRows]) -> Patch:
    """Add up the stream, its norm and the MLP's output by another function."""

    def call(
        original: Callable, layer: MoTDecoderLayer, x: ExpertRows, contexts: Any, causal: bool, wide: bool
    ) -> tuple:
        attended, kv = layer.self_attn(_by_expert(layer, "input_layernorm", x), contexts, causal, wide)
        x = x + attended
        normed = _by_expert(layer, "post_attention_layernorm", x)
        return add(x, normed, _by_expert(layer, "mlp", normed)), kv

    return method(MoTDecoderLayer, "__call__", call)


def _unrounded_sum(x: ExpertRows, normed: ExpertRows, y: ExpertRows) -> ExpertRows:
    return _wide(x) + y


def _wide(x: ExpertRows) -> ExpertRows:
    return ExpertRows(x.und.astype(mx.float32), None if x.gen is None else x.gen.astype(mx.float32))


def _product_in_bfloat16(original: Callable, module: Linear, x: mx.array) -> mx.array:
    bias = rounded(module["bias"]) if "bias" in module else 0
    return rounded(rounded(x) @ rounded(module["weight"]).T + bias)


def _product_in_tf32(original: Callable, module: Linear, x: mx.array) -> mx.array:
    with parameter(module, "weight", tf32(module["weight"])):
        return original(module, tf32(x))


def _product_unrounded(original: Callable, module: Linear, x: mx.array) -> mx.array:
    x, weight, bias = (a.astype(mx.float32) for a in (x, module["weight"], module["bias"]))
    return mx.addmm(bias, x, weight.T)


def _convolution_in_bfloat16(original: Callable, module: CausalConv3d, x: mx.array, state: StreamState) -> mx.array:
    with parameter(module, "weight", rounded(module["weight"])):
        return rounded(original(module, rounded(x), state))


FAULTS = [
    Fault(
        "activation-gelu",
        "The MLPs' gate is a GELU instead of a SiLU.",
        _DOWN,
        mlp(gelu_gate, _MLPS),
        explanation="GELU instead of SiLU",
    ),
    Fault(
        "activation-on-up",
        "The activation is on up_proj instead of on gate_proj.",
        _DOWN,
        mlp(_on_up, _MLPS),
        explanation="the activation is on up instead of the gate",
    ),
    Fault(
        "activation-in-bfloat16",
        "The MLPs' activation is computed in bfloat16, operation by operation, in a float32 model.",
        _DOWN,
        mlp(_in_bfloat16, _MLPS),
        dtypes=FLOAT32,
        explanation="the activation computes in bfloat16",
    ),
    Fault(
        "residual-in-bfloat16",
        "The residual stream is bfloat16 after every layer of a float32 model.",
        "layers.?",
        method(MoTDecoderLayer, "__call__", _rounded_stream),
        dtypes=FLOAT32,
        explanation="the residual stream is rounded to bfloat16",
    ),
    Fault(
        "residual-in-float32",
        "The residual stream is not rounded to bfloat16 after a layer.",
        "layers.?",
        _layer(_unrounded_sum),
        dtypes=BFLOAT16,
        explanation="the residual stream is not rounded",
    ),
    Fault(
        "residual-after-the-norm",
        "The MLP's output is added to the normed stream instead of to the stream.",
        "layers.?",
        _layer(lambda x, normed, y: normed + y),
        explanation="the residual adds the normed stream",
    ),
    Fault(
        "linear-in-bfloat16",
        "The values' projection multiplies in bfloat16 in a float32 model.",
        "layers.*.self_attn.v_proj*",
        calls(Linear, _product_in_bfloat16, "layers.*.self_attn.v_proj*"),
        ALL,
        dtypes=FLOAT32,
        explanation="the product computes in bfloat16",
    ),
    Fault(
        "linear-in-tf32",
        "The layers' projections multiply float32 in TF32, as MLX does on a GPU unless it is told not to.",
        "layers.*.self_attn.?_proj*",
        calls(Linear, _product_in_tf32, "layers.*"),
        ALL,
        dtypes=FLOAT32,
        explanation="the product computes in TF32",
    ),
    Fault(
        "vit-linear-in-bfloat16",
        "A projection of the ViT multiplies in bfloat16 in a float32 model.",
        "vit_model.blocks.*.attn.qkv",
        calls(Linear, _product_in_bfloat16, "vit_model.blocks.*.attn.qkv"),
        LOOKS,
        dtypes=FLOAT32,
        explanation="the product computes in bfloat16",
    ),
    Fault(
        "convolution-in-bfloat16",
        "The decoder's first convolution multiplies in bfloat16 in a float32 model.",
        "vae.decoder.conv1",
        calls(CausalConv3d, _convolution_in_bfloat16, "vae.decoder.conv1"),
        DRAWS,
        dtypes=FLOAT32,
        explanation="the product computes in bfloat16 but for its bias",
    ),
    Fault(
        "llm2vae-in-float32",
        "The velocity is not rounded to bfloat16 after its projection.",
        "llm2vae",
        calls(Linear, _product_unrounded, "llm2vae"),
        DRAWS,
        dtypes=BFLOAT16,
        explanation="the product is not rounded",
    ),
]
