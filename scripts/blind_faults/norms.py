"""Norms over other axes, with other weights, or once too often."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from blind_faults.common import inputs, pair, parameters, plain, precision, small
from lance_mlx.model.vae_layers import ChannelNorm
from parity.lance.faults.base import DRAWS, FLOAT32, LOOKS, Patch, Target, calls, parameter, rounded, together

Norm = Callable[[mx.array, nn.RMSNorm], mx.array]
_HEADS = ("layers.*.self_attn.q_norm*", "layers.*.self_attn.k_norm*")


def _norms(compute: Norm, *patterns: str) -> Patch:
    """A patch that computes something else of the input, in float32 and rounded once."""

    def call(original: Callable, module: nn.RMSNorm, x: mx.array) -> mx.array:
        return compute(x.astype(mx.float32), module).astype(x.dtype)

    return calls(nn.RMSNorm, call, *patterns)


def _scaled(x: mx.array, mean: mx.array, module: nn.RMSNorm) -> mx.array:
    return x * mx.rsqrt(mean + module.eps) * module.weight.astype(mx.float32)


def _all_heads(x: mx.array, module: nn.RMSNorm) -> mx.array:
    return _scaled(x, mx.mean(x * x, axis=(-2, -1), keepdims=True), module)


def _unbiased(x: mx.array, module: nn.RMSNorm) -> mx.array:
    return _scaled(x, mx.sum(x * x, axis=-1, keepdims=True) / (x.shape[-1] - 1), module)


def _own_eps(eps: float) -> Norm:
    return lambda x, module: _scaled(x, mx.mean(x * x, axis=-1, keepdims=True) + eps, module)


def _twice(original: Callable, module: nn.RMSNorm, x: mx.array) -> mx.array:
    return original(module, original(module, x))


def _borrowed(source: str, owner: str) -> Patch:
    """A patch that gives a norm the weight of another one."""

    def patch(target: Target):
        found = target.modules(source, owner)
        return parameter(found[owner], "weight", found[source].weight)

    return patch


def _over_space(original: Callable, module: ChannelNorm, x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    mean = mx.mean(wide * wide, axis=(1, 2, 3), keepdims=True)
    return (wide * mx.rsqrt(mean + 1e-12) * module["gamma"].astype(mx.float32)).astype(x.dtype)


FAULTS = [
    plain(
        "blind-norm-qk-over-all-heads",
        "layers.*.self_attn.?_norm*",
        _norms(_all_heads, *_HEADS),
        "Queries and keys are normed over all heads of a token at once, as OLMo 2 does, instead of over each head.",
    ),
    plain(
        "blind-norm-qk-unbiased",
        "layers.*.self_attn.?_norm*",
        _norms(_unbiased, *_HEADS),
        "The mean square of queries and keys is taken as the sum divided by head_dim - 1 = 15 instead of by 16.",
    ),
    plain(
        "blind-norm-final-twice",
        "norm*",
        calls(nn.RMSNorm, _twice, "norm", "norm_moe_gen"),
        "The final norms are applied twice: once by the decoder, and once more before the head.",
    ),
    plain(
        "blind-norm-vae-over-the-frame",
        "vae.decoder.*.residual.?",
        calls(ChannelNorm, _over_space, "vae.decoder.*.residual.?"),
        "The norms of the VAE decoder's residual blocks take one mean square for a whole frame, over channels, rows "
        "and columns, instead of one for each place.",
        tasks=DRAWS,
    ),
    plain(
        "blind-vit-norm2-is-norm1",
        "vit_model.blocks.*.norm2",
        together(*(_borrowed(f"vit_model.blocks.{i}.norm1", f"vit_model.blocks.{i}.norm2") for i in range(4))),
        "The norm before the MLP of every ViT block has the weight of the norm before its attention.",
        tasks=LOOKS,
    ),
    small(
        "blind-norm-layer-two-has-layer-ones",
        "layers.2.input_layernorm",
        _borrowed("layers.1.input_layernorm", "layers.2.input_layernorm"),
        "Layer 2's input_layernorm of the understanding expert has the weight of layer 1's.",
    ),
    small(
        "blind-norm-weights-clipped-at-one",
        "layers.*.self_attn.k_norm*",
        parameters(lambda w: mx.minimum(w, 1.0), "layers.*.self_attn.k_norm*"),
        "Weights of k_norm above 1 are clipped to 1 by the conversion; those below are kept.",
    ),
    precision(
        "blind-norm-input-bfloat16",
        "layers.*.input_layernorm*",
        inputs(nn.RMSNorm, rounded, "layers.*.input_layernorm*"),
        "The residual stream is rounded to bfloat16 before input_layernorm reads it, in a float32 run; the stream "
        "itself is kept.",
        dtypes=FLOAT32,
    ),
    pair(
        "blind-pair-norm-queries-and-keys",
        "layers.*.self_attn.?_norm*",
        together(
            _norms(_all_heads, "layers.*.self_attn.q_norm*"),
            _norms(_own_eps(1e-2), "layers.*.self_attn.k_norm*"),
        ),
        "Two faults of one kind in two places: queries are normed over all heads of a token at once, and the norm of "
        "keys adds 1e-2 to the mean square.",
    ),
]
