"""Faults of the RMSNorms of the language model and the ViT."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lance_mlx.model.mot import ExpertRows, SelfAttention
from parity.lance.faults.base import (
    ALL,
    BFLOAT16,
    DRAWS,
    FLOAT32,
    KV_CACHE,
    LOOKS,
    Fault,
    Patch,
    Target,
    calls,
    wrapped,
)

_INPUT_NORMS = "layers.*.input_layernorm*"
_LLM_NORMS = ("layers.*norm*", "norm", "norm_moe_gen")


def _instead(compute: Callable[[nn.RMSNorm, mx.array], mx.array], *patterns: str) -> Patch:
    """Compute something else than the norms that match, in the dtype that they have."""

    def call(original: Callable, module: nn.RMSNorm, x: mx.array) -> mx.array:
        return compute(module, x)

    return calls(nn.RMSNorm, call, *patterns)


def _with_eps(eps: float) -> Callable[[nn.RMSNorm, mx.array], mx.array]:
    return lambda module, x: mx.fast.rms_norm(x, module["weight"], eps)


def _no_norm(module: nn.RMSNorm, x: mx.array) -> mx.array:
    return x


def _over_all_heads(module: nn.RMSNorm, x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    mean = mx.mean(wide * wide, axis=(-2, -1), keepdims=True)
    return (wide * mx.rsqrt(mean + module.eps)).astype(x.dtype) * module["weight"]


def _weight_plus_one(module: nn.RMSNorm, x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, 1 + module["weight"], module.eps)


def _without_weight(module: nn.RMSNorm, x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, None, module.eps)


def _minus_mean(module: nn.RMSNorm, x: mx.array) -> mx.array:
    return mx.fast.layer_norm(x, module["weight"], None, module.eps)


def _in_bfloat16(module: nn.RMSNorm, x: mx.array) -> mx.array:
    narrow = x.astype(mx.bfloat16)
    mean = mx.mean(narrow * narrow, axis=-1, keepdims=True).astype(mx.bfloat16)
    scale = mx.rsqrt((mean.astype(mx.float32) + module.eps).astype(mx.bfloat16))
    return ((narrow * scale) * module["weight"].astype(mx.bfloat16)).astype(x.dtype)


def _rounded_once(module: nn.RMSNorm, x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x.astype(mx.float32), module["weight"].astype(mx.float32), module.eps).astype(x.dtype)


def _stay_bfloat16(target: Target) -> AbstractContextManager[None]:
    def attend(original: Callable, module: SelfAttention, *args: Any, **values: Any) -> tuple:
        x, contexts, causal, _ = args
        return original(module, x, contexts, causal, False)

    return wrapped(SelfAttention, "__call__", attend)


def _float32_in_text(target: Target) -> AbstractContextManager[None]:
    def normed(original: Callable, module: SelfAttention, heads: ExpertRows, kind: str, wide: bool) -> ExpertRows:
        if heads.gen is not None:
            return original(module, heads, kind, wide)
        return ExpertRows(module[f"{kind}_norm"](heads.und.astype(mx.float32)), None)

    return wrapped(SelfAttention, "_normed", normed)


FAULTS = [
    Fault(
        "norm-eps-1e-5",
        "The language model's norms have eps 1e-5 instead of the configuration's 1e-6.",
        _INPUT_NORMS,
        _instead(_with_eps(1e-5), *_LLM_NORMS),
        explanation="norm eps is 1e-5",
        dtypes=FLOAT32,
    ),
    Fault(
        "vit-norm-eps-1e-4",
        "The norms of the ViT's blocks have eps 1e-4 instead of 1e-6.",
        "vit_model.blocks.*.norm1",
        _instead(_with_eps(1e-4), "vit_model.blocks.*.norm?"),
        LOOKS,
        dtypes=FLOAT32,
        explanation="norm eps is 1e-4",
    ),
    Fault(
        "merger-norm-eps-1e-3",
        "The norm of the ViT's merger has eps 1e-3 instead of 1e-6.",
        "vit_model.merger.ln_q",
        _instead(_with_eps(1e-3), "vit_model.merger.ln_q"),
        LOOKS,
        dtypes=FLOAT32,
        explanation="norm eps is 1e-3",
    ),
    Fault(
        "query-norm-missing",
        "Queries are not normed.",
        "layers.*.self_attn.q_norm*",
        _instead(_no_norm, "layers.*.self_attn.q_norm*"),
        explanation="the norm is missing",
    ),
    Fault(
        "key-norm-missing",
        "Keys are not normed.",
        "layers.*.self_attn.k_norm*",
        _instead(_no_norm, "layers.*.self_attn.k_norm*"),
        explanation="the norm is missing",
    ),
    Fault(
        "query-norm-over-all-heads",
        "Queries are normed over all heads together instead of head by head.",
        "layers.*.self_attn.q_norm*",
        _instead(_over_all_heads, "layers.*.self_attn.q_norm*"),
        explanation="the mean is over heads and channels",
    ),
    Fault(
        "norm-weight-plus-one",
        "The norms multiply by 1 + weight, as Gemma's do.",
        _INPUT_NORMS,
        _instead(_weight_plus_one, *_LLM_NORMS),
        explanation="the weight counts from 1",
    ),
    Fault(
        "norm-weight-missing",
        "The norms before the MLPs do not multiply by their weight.",
        "layers.*.post_attention_layernorm*",
        _instead(_without_weight, "layers.*.post_attention_layernorm*"),
        explanation="the weight is missing",
    ),
    Fault(
        "layer-norm-for-rms-norm",
        "The norms subtract the mean first: they are LayerNorms without a bias.",
        _INPUT_NORMS,
        _instead(_minus_mean, *_LLM_NORMS),
        explanation="the mean is subtracted",
    ),
    Fault(
        "final-norm-missing",
        "What the last layer puts out is not normed.",
        "norm*",
        _instead(_no_norm, "norm", "norm_moe_gen"),
        explanation="the norm is missing",
    ),
    Fault(
        "norm-in-bfloat16",
        "The norms square, average and divide in bfloat16 in a float32 model.",
        _INPUT_NORMS,
        _instead(_in_bfloat16, *_LLM_NORMS),
        dtypes=FLOAT32,
        explanation="the norm computes in bfloat16",
    ),
    Fault(
        "norm-rounded-once",
        "The norms multiply by their weight in float32 and round once, where upstream rounds before as well.",
        _INPUT_NORMS,
        _instead(_rounded_once, *_LLM_NORMS),
        dtypes=BFLOAT16,
        explanation="the norm multiplies by its weight before rounding",
    ),
    Fault(
        "queries-stay-bfloat16-with-latents",
        "Queries and keys are normed and rotated in bfloat16 beside latents, where upstream raises them to float32.",
        "layers.*.self_attn.?_norm*",
        _stay_bfloat16,
        DRAWS,
        dtypes=BFLOAT16,
        entries=KV_CACHE,
        explanation="queries and keys stay bfloat16 beside latents",
    ),
    Fault(
        "queries-float32-in-text",
        "Queries and keys are normed and rotated in float32 in passes without latents too.",
        "layers.*.self_attn.?_norm",
        _float32_in_text,
        ALL,
        dtypes=BFLOAT16,
        explanation="queries and keys are raised to float32 in text passes",
    ),
]
