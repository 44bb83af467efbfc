"""Faults of the weights: parameters that are compared exactly with the checkpoint's."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn

from parity.lance.faults.base import ALL, ASKS, DRAWS, FLOAT32, LOOKS, Fault, Patch, Target, parameter, rounded

_Change = Callable[[Target, str, mx.array], mx.array]


def weight(change: _Change, component: str, *names: str) -> Patch:
    """Change parameters of one module; `change` is given the target, the module's component and the right array.

    Nothing changes where the checkpoint lacks the module: an image task loads no ViT.
    """

    @contextmanager
    def patch(target: Target) -> Iterator[None]:
        with ExitStack() as stack:
            for found, module in target.modules(component).items():
                for name in names or ("weight",):
                    stack.enter_context(parameter(module, name, change(target, found, module[name])))
            yield

    return patch


def _of(target: Target, component: str) -> nn.Module:
    return target.modules(component)[component]


def _rows_for_pairs(target: Target, component: str, array: mx.array) -> mx.array:
    head_dim = target.config.head_dim
    return array.reshape(-1, 2, head_dim // 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


def _quantized(target: Target, component: str, array: mx.array) -> mx.array:
    packed = mx.quantize(array, group_size=32, bits=8)
    return mx.dequantize(*packed, group_size=32, bits=8).astype(array.dtype)


def _queries_for_keys(target: Target, component: str, array: mx.array) -> mx.array:
    queries, keys, values = mx.split(array, 3)
    return mx.concatenate([keys, queries, values])


@contextmanager
def _gate_and_up_exchanged(target: Target) -> Iterator[None]:
    gate, up = (_of(target, f"layers.1.mlp.{name}_proj") for name in ("gate", "up"))
    right = gate["weight"], up["weight"]
    with parameter(gate, "weight", right[1]), parameter(up, "weight", right[0]):
        yield


def _fault(
    name: str,
    component: str,
    explanation: str,
    change: _Change,
    about: str,
    tasks: frozenset[str] = ALL,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    names: tuple[str, ...] = ("weight",),
) -> Fault:
    return Fault(name, about, component, weight(change, component, *names), tasks, dtypes, explanation=explanation)


FAULTS = [
    _fault(
        "weight-transposed",
        "layers.1.self_attn.q_proj",
        "the weight is transposed",
        lambda target, component, array: array.T,
        "A square weight is stored transposed.",
    ),
    _fault(
        "weight-rows-for-pairs",
        "layers.1.self_attn.k_proj",
        "the weight's outputs of every 16 are read as 2 x 8 transposed",
        _rows_for_pairs,
        "The rows of a weight are permuted as for a RoPE that turns neighbouring pairs.",
    ),
    _fault(
        "weight-of-the-other-expert",
        "layers.1.self_attn.k_norm_moe_gen",
        "the other expert's weight",
        lambda target, component, array: _of(target, component.removesuffix("_moe_gen"))["weight"],
        "A weight of the generation expert is the understanding expert's.",
    ),
    _fault(
        "weight-of-the-next-layer",
        "layers.1.mlp.down_proj",
        "the next layer's weight",
        lambda target, component, array: _of(target, component.replace(".1.", ".2."))["weight"],
        "A weight is the one of the next layer.",
    ),
    _fault(
        "weight-zero",
        "layers.1.self_attn.o_proj_moe_gen",
        "the weight is 0",
        lambda target, component, array: mx.zeros_like(array),
        "A weight is zero, as one that was never loaded.",
    ),
    _fault(
        "weight-rounded-to-bfloat16",
        "layers.1.mlp_moe_gen.up_proj",
        "the weight is rounded to bfloat16",
        lambda target, component, array: rounded(array),
        "A weight of a float32 model was stored in bfloat16.",
        dtypes=FLOAT32,
    ),
    _fault(
        "weight-quantized",
        "layers.1.mlp_moe_gen.gate_proj",
        "the weight is quantized to 8 bits in groups of 32, zero kept",
        _quantized,
        "A weight was quantized to 8 bits in groups of 32.",
    ),
    Fault(
        "gate-and-up-exchanged",
        "The weights of gate_proj and up_proj are exchanged.",
        "layers.1.mlp.gate_proj",
        _gate_and_up_exchanged,
        explanation="gate and up are exchanged",
    ),
    _fault(
        "bias-missing",
        "layers.1.self_attn.v_proj",
        "the bias is 0",
        lambda target, component, array: mx.zeros_like(array),
        "A projection has no bias.",
        names=("bias",),
    ),
    _fault(
        "llm2vae-bias-missing",
        "llm2vae",
        "the bias is 0",
        lambda target, component, array: mx.zeros_like(array),
        "The projection to a velocity has no bias.",
        DRAWS,
        names=("bias",),
    ),
    _fault(
        "vae2llm-bias-missing",
        "vae2llm",
        "the bias is 0",
        lambda target, component, array: mx.zeros_like(array),
        "The projection of latents has no bias.",
        DRAWS,
        names=("bias",),
    ),
    _fault(
        "vae2llm-reversed",
        "vae2llm",
        "the weight's outputs are reversed",
        lambda target, component, array: array[::-1],
        "The channels that the projection of latents puts out are in the opposite order.",
        DRAWS,
    ),
    _fault(
        "vit-queries-and-keys-exchanged",
        "vit_model.blocks.0.attn.qkv",
        "the weight's outputs 0 to 31 and 32 to 63 are exchanged",
        _queries_for_keys,
        "Queries and keys are exchanged in the ViT's fused projection.",
        LOOKS,
        names=("weight", "bias"),
    ),
    _fault(
        "head-tied",
        "lm_head",
        "the head is tied to the token embeddings",
        lambda target, component, array: target.language_model.model.embed_tokens["weight"],
        "The output head has the weight of the token embeddings instead of its own.",
        ASKS,
    ),
    _fault(
        "vae-kernel-reversed-in-time",
        "vae.decoder.conv1",
        "the weight's frames are reversed",
        lambda target, component, array: array[:, ::-1],
        "The kernel of a temporal convolution is reversed in time.",
        DRAWS,
    ),
]
