"""Faults of routing: rows that go through the other expert's modules."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from lance_mlx.model.layers import Linear
from parity.lance.faults.base import ALL, DRAWS, LOOKS, Fault, Patch, Target, wrapped
from parity.lance.faults.passes import Pass, watched

_SUFFIX = "_moe_gen"
_OTHER = "the other expert's module"
_Rows = Callable[[Callable, nn.Module, nn.Module, mx.array, Pass], mx.array]


def _twins(target: Target) -> dict[str, nn.Module]:
    """The twin in the other expert of every module without children, by component."""
    leaves = {
        name: module
        for name, module in target.modules("layers.*", "norm*").items()
        if isinstance(module, Linear | nn.RMSNorm)
    }
    return {
        name: twin
        for name in leaves
        if (twin := leaves.get(name.replace(_SUFFIX, "") if _SUFFIX in name else _to_gen(name))) is not None
    }


def _to_gen(name: str) -> str:
    # The suffix stands at the part of the path that exists twice: the MLP, not its projections.
    head, mlp, projection = name.partition(".mlp.")
    return f"{head}.mlp{_SUFFIX}.{projection}" if mlp else f"{name}{_SUFFIX}"


def _through_twins(rows: _Rows, *components: str) -> Patch:
    """Let `rows` decide what a module computes, given its twin; for all modules below the named components."""

    @contextmanager
    def patch(target: Target) -> Iterator[None]:
        chosen = target.modules(*components, *(f"{component}.*" for component in components))
        twins = _twins(target)
        others = {id(module): twins[name] for name, module in chosen.items() if name in twins}
        with ExitStack() as stack:
            running = stack.enter_context(watched())

            def call(original: Callable, module: nn.Module, x: mx.array) -> mx.array:
                other = others.get(id(module))
                return original(module, x) if other is None else rows(original, module, other, x, running())

            stack.enter_context(wrapped(Linear, "__call__", call))
            stack.enter_context(wrapped(nn.RMSNorm, "__call__", call))
            yield

    return patch


def _all_rows(original: Callable, module: nn.Module, other: nn.Module, x: mx.array, running: Pass) -> mx.array:
    return original(other, x)


def _beside_latents(original: Callable, module: nn.Module, other: nn.Module, x: mx.array, running: Pass) -> mx.array:
    return original(other if running.holds_latents else module, x)


def _vit_tokens(original: Callable, module: nn.Module, other: nn.Module, x: mx.array, running: Pass) -> mx.array:
    y = original(module, x)
    if running is not Pass.VIT:
        return y
    return mx.concatenate([y[:1], original(other, x[1:-1]), y[-1:]])


def _swap(name: str, component: str, whose: str, first: str = "", tasks: frozenset[str] = DRAWS) -> Fault:
    return Fault(
        name,
        f"{whose} go through the other expert's {component.rpartition('.')[2].removesuffix(_SUFFIX)}.",
        first or component,
        _through_twins(_all_rows, component),
        tasks,
        explanation=_OTHER,
    )


_latents = partial(_swap, whose="Latents")
_text = partial(_swap, whose="Text, ViT tokens and brackets", tasks=ALL)


FAULTS = [
    _latents("latents-through-und-q-proj", "layers.*.self_attn.q_proj_moe_gen"),
    _latents("latents-through-und-k-proj", "layers.*.self_attn.k_proj_moe_gen"),
    _latents("latents-through-und-v-proj", "layers.*.self_attn.v_proj_moe_gen"),
    _latents("latents-through-und-o-proj", "layers.*.self_attn.o_proj_moe_gen"),
    _latents("latents-through-und-q-norm", "layers.*.self_attn.q_norm_moe_gen"),
    _latents("latents-through-und-k-norm", "layers.*.self_attn.k_norm_moe_gen"),
    _latents("latents-through-und-input-layernorm", "layers.*.input_layernorm_moe_gen"),
    _latents("latents-through-und-post-attention-layernorm", "layers.*.post_attention_layernorm_moe_gen"),
    _latents("latents-through-und-mlp", "layers.*.mlp_moe_gen", first="layers.*.mlp_moe_gen.gate_proj"),
    _latents("latents-through-und-final-norm", "norm_moe_gen"),
    _text("text-through-gen-q-norm", "layers.*.self_attn.q_norm"),
    _text("text-through-gen-mlp", "layers.*.mlp", first="layers.*.mlp.gate_proj"),
    Fault(
        "brackets-through-gen",
        "The two brackets around a latent block go through the generation expert.",
        "layers.*.input_layernorm",
        _through_twins(_beside_latents, "layers.*.input_layernorm", "layers.*.post_attention_layernorm",
                       "layers.*.self_attn.?_proj", "layers.*.self_attn.?_norm", "layers.*.mlp", "norm"),
        DRAWS,
        explanation=_OTHER,
    ),
    Fault(
        "vit-tokens-through-gen",
        "ViT tokens go through the generation expert, for being visual.",
        "layers.*.input_layernorm",
        _through_twins(_vit_tokens, "layers.*.input_layernorm", "layers.*.post_attention_layernorm",
                       "layers.*.self_attn.?_proj", "layers.*.self_attn.?_norm", "layers.*.mlp", "norm"),
        LOOKS,
        explanation="ViT tokens go to the generation expert",
    ),
    Fault(
        "one-expert-for-all",
        "Latents go through the understanding expert: there is one expert for all tokens.",
        "layers.*.input_layernorm_moe_gen",
        _through_twins(_all_rows, "*_moe_gen", "*_moe_gen.*"),
        DRAWS,
        explanation=_OTHER,
    ),
]  # fmt: skip
