"""Linear layers whose weights were merged, quantized, cut or laid out otherwise."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import mlx.core as mx

from blind_faults.common import (
    affine,
    fp8,
    half,
    int8,
    low_rank,
    outputs,
    pair,
    parameters,
    plain,
    precision,
    small,
    zeroed,
)
from lance_mlx.model.layers import Linear
from parity.lance.faults.base import DRAWS, FLOAT32, Target, calls, parameter, together


def _permuted(bias: mx.array) -> mx.array:
    return bias.reshape(-1, 2, 8).swapaxes(1, 2).reshape(-1)


def _patches_last(y: mx.array) -> mx.array:
    return y.reshape(*y.shape[:-1], 4, 12).swapaxes(-1, -2).reshape(y.shape)


def _folded(target: Target) -> AbstractContextManager[object]:
    patches = []
    for path, norm in target.modules("layers.*.input_layernorm*").items():
        gain = norm.weight.astype(mx.float32)
        patches.append(parameters(partial(mx.multiply, gain), path.replace("input_layernorm", "self_attn.q_proj")))
    return together(*patches)(target)


def _other_experts(target: Target) -> AbstractContextManager[object]:
    found = target.modules("layers.2.mlp.up_proj", "layers.2.mlp_moe_gen.up_proj")
    return parameter(found["layers.2.mlp_moe_gen.up_proj"], "weight", found["layers.2.mlp.up_proj"].weight)


def _without_bias(original: Callable, module: Linear, x: mx.array) -> mx.array:
    y = original(module, x)
    return (y.astype(mx.float32) - module.bias.astype(mx.float32)).astype(y.dtype)


def _rows_averaged(weight: mx.array) -> mx.array:
    trained = weight[:443]
    return mx.concatenate([trained, mx.broadcast_to(trained.mean(axis=0), (len(weight) - 443, weight.shape[1]))])


_Q = "layers.*.self_attn.q_proj"
_K = "layers.*.self_attn.k_proj"

FAULTS = [
    plain(
        "blind-weights-qk-bias-permuted",
        "layers.*.self_attn.[qk]_proj",
        together(
            parameters(_permuted, _Q, name="bias"),
            parameters(_permuted, _K, name="bias"),
        ),
        "The biases of the understanding expert's q_proj and k_proj are still in llama.cpp's order of rotary pairs, "
        "(0, 8, 1, 9 ...) within each head of 16; their weights are not.",
    ),
    plain(
        "blind-weights-latent-channels-regrouped",
        "llm2vae",
        outputs(Linear, _patches_last, "llm2vae"),
        "The 48 outputs of llm2vae are taken for 4 groups of 12 channels and transposed to 12 of 4.",
        tasks=DRAWS,
    ),
    plain(
        "blind-weights-input-norm-folded-and-kept",
        "layers.*.self_attn.q_proj*",
        _folded,
        "The weight of input_layernorm was multiplied into the columns of q_proj and is still applied by the norm as "
        "well.",
    ),
    small(
        "blind-weights-one-row-zero",
        "layers.1.self_attn.k_proj*",
        parameters(zeroed(11), "layers.1.self_attn.k_proj*"),
        "Row 11 of layer 1's k_proj is zero in both experts.",
    ),
    small(
        "blind-weights-o-proj-of-layer-one-transposed",
        "layers.1.self_attn.o_proj*",
        parameters(lambda w: w.T, "layers.1.self_attn.o_proj*"),
        "Layer 1's o_proj, which is square, is stored transposed in both experts.",
    ),
    small(
        "blind-weights-v-bias-of-the-last-layer-lost",
        "layers.2.self_attn.v_proj*",
        calls(Linear, _without_bias, "layers.2.self_attn.v_proj*"),
        "The bias of v_proj is not added in layer 2, the last one, in either expert.",
    ),
    small(
        "blind-weights-up-proj-of-the-other-expert",
        "layers.2.mlp_moe_gen.up_proj",
        _other_experts,
        "In layer 2 the generation expert's up_proj holds the understanding expert's weight.",
        tasks=DRAWS,
    ),
    small(
        "blind-weights-special-rows-averaged",
        "embed_tokens",
        parameters(_rows_averaged, "embed_tokens"),
        "embed_tokens was resized when the tokenizer was: its rows from 443 on, those of the added tokens but the "
        "first, are the mean of the rows before them.",
    ),
    small(
        "blind-weights-vae2llm-channel-sign",
        "vae2llm",
        parameters(lambda w: mx.concatenate([w[:, :7], -w[:, 7:8], w[:, 8:]], axis=1), "vae2llm"),
        "vae2llm reads latent channel 7 with the opposite sign.",
        tasks=DRAWS,
    ),
    precision(
        "blind-lora-left-in-q-proj",
        "layers.*.self_attn.q_proj",
        parameters(low_rank(4, 0.02), _Q),
        "A LoRA of rank 4, 2 % as long as the weight, is still merged into the understanding expert's q_proj of every "
        "layer.",
    ),
    precision(
        "blind-lora-of-one-layer",
        "layers.1.mlp_moe_gen.down_proj",
        parameters(low_rank(1, 0.005, seed=5), "layers.1.mlp_moe_gen.down_proj"),
        "A LoRA of rank 1, 0.5 % as long as the weight, remains in layer 1's down_proj of the generation expert.",
        tasks=DRAWS,
    ),
    precision(
        "blind-weights-o-proj-fp8",
        "layers.*.self_attn.o_proj*",
        parameters(fp8, "layers.*.self_attn.o_proj*"),
        "o_proj of both experts went through E4M3 with one scale for the whole matrix.",
    ),
    precision(
        "blind-weights-mlp-four-bits",
        "layers.*.mlp.*_proj",
        parameters(affine(4, 32), "layers.*.mlp.*_proj"),
        "The understanding expert's MLP went through 4-bit quantization in groups of 32, scale and bias per group.",
    ),
    precision(
        "blind-weights-head-int8",
        "llm2vae",
        parameters(int8, "llm2vae"),
        "llm2vae went through int8 with one scale for the whole matrix.",
        tasks=DRAWS,
    ),
    precision(
        "blind-weights-attention-float16",
        "layers.*.self_attn.?_proj*",
        parameters(half, "layers.*.self_attn.?_proj*"),
        "The projections of attention were stored in float16 on the way to float32.",
        dtypes=FLOAT32,
    ),
    pair(
        "blind-pair-lora-and-int8",
        "layers.*.self_attn.[qv]_proj",
        together(
            parameters(low_rank(4, 0.02), _Q),
            parameters(int8, "layers.*.self_attn.v_proj"),
        ),
        "Two faults of one kind in two places of the understanding expert: a LoRA of rank 4, 2 % as long as the "
        "weight, is merged into q_proj, and v_proj went through int8 with one scale for the matrix.",
    ),
    pair(
        "blind-pair-lora-on-four-bits",
        "layers.*.mlp.down_proj",
        parameters(lambda w: low_rank(2, 0.05, seed=9)(affine(4, 32)(w)), "layers.*.mlp.down_proj"),
        "Two faults of one weight: the understanding expert's down_proj went through 4 bits in groups of 32, and a "
        "LoRA of rank 2, 5 % as long as the weight, was merged into it afterwards.",
    ),
    pair(
        "blind-pair-o-proj-transposed-and-fp8",
        "layers.*.self_attn.o_proj*",
        together(
            parameters(fp8, "layers.0.self_attn.o_proj*"),
            parameters(lambda w: w.T, "layers.1.self_attn.o_proj*"),
        ),
        "Two faults of o_proj in two layers: layer 0's went through E4M3 with one scale, layer 1's is transposed.",
    ),
]
