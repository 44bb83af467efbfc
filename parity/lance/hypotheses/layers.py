"""Hypotheses about what lies between the modules of a layer: activations, products of gates, residuals."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses.tools import around, function, module_of, parent_of, rounded
from reference.mot import MLP, DecoderLayer, by_expert
from reference.vae_layers import AttentionBlock, ResidualBlock
from reference.vit import Block

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

DOWN = ("*.down_proj",)
SILU = (*DOWN, "vae.*.residual.2", "vae.*.residual.6", "vae.*.head.2", "vae.*coder.head", "time_embedder*")
GELU = ("vit_model.merger*",)
LAYERS = ("layers.?", "layers.??")
BLOCKS = (*LAYERS, "vit_model.blocks.?", "vit_model.blocks.??")
VAE_BLOCKS = ("vae.*coder.middle.?", "vae.*coder.*samples.*samples.?")


def gated(combine: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    """What an MLP makes of gate and up before its last product."""

    @contextmanager
    def patched(site: "TapProbe") -> Iterator[None]:
        parent = parent_of(site)
        if not isinstance(parent, MLP):
            raise DoesNotApply

        def mlp(original: Callable, x: Tensor) -> Tensor:
            return parent.down_proj(combine(parent.gate_proj(x), parent.up_proj(x)))

        with around(parent, "forward", mlp):
            yield

    return patched


def activation(name: str, other: Callable[[Tensor], Tensor]) -> Patch:
    """Another function in the place of one of torch.nn.functional's, computed in float32 and rounded once."""
    return function(F, name, lambda site, original, x, *args, **values: other(x.float()).to(x.dtype))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def stepwise(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up with the result of every operation rounded to bfloat16."""

    def step(x: Tensor) -> Tensor:
        return rounded(x, torch.bfloat16)

    return step(step(gate * step(torch.sigmoid(step(gate)))) * up)


def narrow(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up of what is rounded to bfloat16."""
    return stepwise(rounded(gate, torch.bfloat16), rounded(up, torch.bfloat16))


def stepwise_silu(x: Tensor) -> Tensor:
    narrow = x.bfloat16()
    return narrow * torch.sigmoid(narrow)


def rounded_once(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@dataclass(frozen=True)
class Stream:
    """The parts of a layer's output: its input, the attention branch, the sum of both, its norm, the MLP branch."""

    x: Tensor
    normed_x: Tensor
    attended: Tensor
    middle: Tensor
    normed: Tensor
    fed: Tensor


Sum = Callable[[Stream], Tensor]


def streams(combine: Sum) -> Patch:
    """Another sum of a layer's parts."""

    @contextmanager
    def patched(site: "TapProbe") -> Iterator[None]:
        layer = module_of(site)
        parts = {DecoderLayer: of_layer, Block: of_block}.get(type(layer))
        if parts is None:
            raise DoesNotApply
        with around(layer, "forward", lambda original, *inputs: combine(parts(layer, *inputs))):
            yield

    return patched


def of_layer(layer: nn.Module, x: Tensor, shared: object) -> Stream:
    gen = shared.gen
    normed_x = by_expert(x, gen, layer.input_layernorm, layer.input_layernorm_moe_gen)
    attended = layer.self_attn(normed_x, shared)
    middle = x + attended
    normed = by_expert(middle, gen, layer.post_attention_layernorm, layer.post_attention_layernorm_moe_gen)
    return Stream(x, normed_x, attended, middle, normed, by_expert(normed, gen, layer.mlp, layer.mlp_moe_gen))


def of_block(block: nn.Module, x: Tensor, *rest: Tensor) -> Stream:
    normed_x = block.norm1(x)
    attended = block.attn(normed_x, *rest)
    middle = x + attended
    normed = block.norm2(middle)
    return Stream(x, normed_x, attended, middle, normed, block.mlp(normed))


def residual(combine: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    """Another sum of a VAE block's input (or its shortcut) and its branch."""

    @contextmanager
    def patched(site: "TapProbe") -> Iterator[None]:
        block = module_of(site)
        if not isinstance(block, ResidualBlock | AttentionBlock):
            raise DoesNotApply

        def summed(original: Callable, x: Tensor, state: object) -> Tensor:
            shortcut = getattr(block, "shortcut", None)
            # The branch alone cannot be had: the shortcut, which the sum was made with, is taken off again. A second
            # convolution of one frame leaves no trace in the stream.
            straight = x if shortcut is None else shortcut(x, state)
            total = original(x, state)
            return combine(straight, total - straight)

        with around(block, "forward", summed):
            yield

    return patched


# Bound here: the names are patched while a hypothesis is tried.
gelu, silu = F.gelu, F.silu
ACTIVATIONS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("GELU", gelu),
    ("tanh GELU", lambda x: gelu(x, approximate="tanh")),
    ("quick GELU", quick_gelu),
    ("ReLU", F.relu),
    ("sigmoid", torch.sigmoid),
    ("nothing", lambda x: x),
)
HYPOTHESES = [
    *(Hypothesis(f"{name} instead of SiLU", SILU, activation("silu", other)) for name, other in ACTIVATIONS),
    Hypothesis("SiLU computes in bfloat16", SILU, activation("silu", stepwise_silu)),
    Hypothesis("the GELU is the tanh approximation", GELU, activation("gelu", ACTIVATIONS[1][1])),
    Hypothesis("the GELU is x * sigmoid(1.702 x)", GELU, activation("gelu", quick_gelu)),
    Hypothesis("SiLU instead of GELU", GELU, activation("gelu", silu)),
    Hypothesis("ReLU instead of GELU", GELU, activation("gelu", F.relu)),
    Hypothesis("nothing instead of GELU", GELU, activation("gelu", lambda x: x)),
    Hypothesis("the activation computes in bfloat16", DOWN, gated(stepwise)),
    Hypothesis("the activation reads and computes in bfloat16", DOWN, gated(narrow)),
    Hypothesis("activation and product are rounded once", DOWN, gated(rounded_once)),
    Hypothesis("the residual adds the normed stream", BLOCKS, streams(lambda s: s.normed + s.fed)),
    Hypothesis("the attention's residual adds the normed stream", BLOCKS, streams(
        lambda s: s.normed_x + s.attended + s.fed)),
    Hypothesis("the layer adds its input twice", BLOCKS, streams(lambda s: s.middle + s.x + s.fed)),
    Hypothesis("the residual stream is rounded to bfloat16", BLOCKS, streams(
        lambda s: rounded(s.middle + s.fed, torch.bfloat16))),
    Hypothesis("the residual stream is rounded to float16", BLOCKS, streams(
        lambda s: rounded(s.middle + s.fed, torch.float16))),
    Hypothesis("the residual stream is not rounded", BLOCKS, streams(lambda s: s.middle.float() + s.fed.float())),
    Hypothesis("the residual stream rounds once a layer", BLOCKS, streams(
        lambda s: (s.x.float() + s.attended.float() + s.fed.float()).to(s.x.dtype))),
    Hypothesis("the residual stream is kept in float32", BLOCKS, streams(
        lambda s: s.x.float() + s.attended.float() + s.fed.float())),
    Hypothesis("the block has no shortcut", VAE_BLOCKS, residual(lambda straight, branch: branch)),
]  # fmt: skip
