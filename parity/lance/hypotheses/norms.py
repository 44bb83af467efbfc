"""Hypotheses about the norms: the language model's, the vision tower's and the VAE's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import reference.mot
import reference.vae_layers
from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses.tokens import GEN, in_pass, pass_tokens
from parity.lance.hypotheses.tools import forward, in_own_pass
from reference.mot import Rope

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

ROWS = ("*_norm", "*_norm_moe_gen", "*layernorm", "*layernorm_moe_gen", "norm", "norm_moe_gen", "vit_model.*.norm?",
        "vit_model.merger.ln_q")  # fmt: skip
VAE = ("vae.*.residual.0", "vae.*.residual.3", "vae.*.norm", "vae.*.head.0")
ANY = (*ROWS, *VAE)
QK = ("layers.*.q_norm", "layers.*.q_norm_moe_gen", "layers.*.k_norm", "layers.*.k_norm_moe_gen")
KINDS = (reference.mot.RMSNorm, reference.vae_layers.RMSNorm)


@dataclass(frozen=True)
class Way:
    """How a norm may be computed; the defaults are upstream's but for the orders of rounding.

    eps: added to the mean square, None for the module's own. axes: normed together, None for the channels alone.
    """

    eps: float | None = None
    eps_on_length: bool = False
    centred: bool = False
    summed: bool = False
    axes: tuple[int, ...] | None = None
    weight: Callable[[Tensor], Tensor] = staticmethod(lambda weight: weight)
    dtype: torch.dtype = torch.float32
    rounded: bool = True


def normed(module: nn.Module, x: Tensor, way: Way) -> Tensor:
    """x normed in a way; the module gives weight, eps and which axis holds the channels."""
    if not isinstance(module, KINDS):
        raise DoesNotApply
    rows = isinstance(module, reference.mot.RMSNorm)
    weight, eps = (module.weight, module.eps) if rows else (module.gamma, 0.0)
    axes = way.axes or ((-1,) if rows else (1,))
    if max(-axis if axis < 0 else axis + 1 for axis in axes) > x.ndim:
        raise DoesNotApply
    eps = eps if way.eps is None else way.eps
    wide = x.to(way.dtype)
    if way.centred:
        wide = wide - wide.mean(axes, keepdim=True)
    square = wide.pow(2).sum(axes, keepdim=True) if way.summed else wide.pow(2).mean(axes, keepdim=True)
    root = square.sqrt() + eps if way.eps_on_length else (square + eps).sqrt()
    # The reciprocal of a root, each rounded where the dtype is narrow.
    wide = wide * (1 / root)
    return way.weight(weight) * (wide.to(x.dtype) if way.rounded else wide)


def as_way(way: Way) -> Patch:
    return forward(lambda site, module, original, x: normed(module, x, way))


def eps_is(eps: float) -> Patch:
    def other(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        if getattr(module, "eps", None) == eps:
            raise DoesNotApply
        return normed(module, x, Way(eps=eps))

    return forward(other)


def rounded_once(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    return normed(module, x, Way(rounded=False)).to(x.dtype)


def weight_in_float32(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    return normed(module, x, Way(rounded=False, weight=Tensor.float))


def stepwise(dtype: torch.dtype) -> Patch:
    """Every operation rounds to a dtype."""

    def computed(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        return normed(module, x.to(dtype), Way(dtype=dtype, weight=lambda weight: weight.to(dtype))).to(x.dtype)

    return forward(computed)


def kept(dtype: torch.dtype) -> Patch:
    """The norm's input is in a dtype, and so is its result."""

    def computed(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        return original(x.to(dtype))

    return forward(computed)


def own_rows(site: "TapProbe", whole: Tensor) -> Tensor:
    """The rows of the site's expert."""
    tokens = pass_tokens(site)
    gen = tokens.rows(tokens.gen)
    return whole[gen if GEN in site.component else ~gen]


def layer_input(site: "TapProbe") -> Tensor:
    """What goes into the site's layer, [rows, hidden]."""
    layer = site.tap.layer
    if layer is None:
        raise DoesNotApply
    return in_pass(site, f"language_model.model.layers.{layer - 1}" if layer else "hidden_in")


def of_layer_input(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    """The attention branch is not yet in the stream."""
    return original(own_rows(site, layer_input(site)).to(x.dtype))


def of_branch(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    """Only the attention branch is normed."""
    return original(x - own_rows(site, layer_input(site)).to(x.dtype))


def after_rope(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    """What RoPE made is normed."""
    root, _, name = site.path.rpartition(".")
    return original(own_rows(site, in_pass(site, f"{root}.{name[0]}_rope")).to(x.dtype))


def before_norm(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE turns what was projected; with the norm behind it."""
    root, _, name = site.path.rpartition(".")
    whole = in_pass(site, f"{root}.{name[0]}_proj", experts=True).reshape(x.shape).to(x.dtype)
    attention = site.pipeline.model.get_submodule(root)
    turned = Rope().forward(whole, cos, sin)
    tokens = pass_tokens(site)
    gen = tokens.rows(tokens.gen)
    norms = [getattr(attention, f"{name[0]}_norm{expert}") for expert in ("", GEN)]
    out = norms[0].forward(turned)
    out[gen] = norms[1].forward(turned[gen])
    return out


def not_normed(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE turns what was projected."""
    root, _, name = site.path.rpartition(".")
    return original(in_pass(site, f"{root}.{name[0]}_proj", experts=True).reshape(x.shape).to(x.dtype), cos, sin)


ROPES = ("layers.*.q_rope", "layers.*.k_rope")
EPS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


def written(value: float) -> str:
    """A small number as people write it: 0, 1e-5."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


HYPOTHESES = [
    *(Hypothesis(f"norm eps is {written(eps)}", ANY, eps_is(eps)) for eps in EPS),
    Hypothesis("norm eps is added to the root", ROWS, forward(
        lambda site, module, original, x: normed(module, x, Way(eps_on_length=True)))),
    Hypothesis("the norm lacks its factor sqrt(channels)", ANY, as_way(Way(summed=True))),
    Hypothesis("the norm runs over the whole frame in one group", VAE, as_way(Way(axes=(1, -1, -2), centred=True))),
    Hypothesis("queries and keys stay bfloat16 beside latents", QK, kept(torch.bfloat16)),
    Hypothesis("queries and keys are raised to float32 in text passes", QK, kept(torch.float32)),
    Hypothesis("the norm multiplies by its weight before rounding", ANY, forward(rounded_once)),
    Hypothesis("the norm's result is not rounded", ANY, forward(weight_in_float32)),
    Hypothesis("the norm computes in bfloat16", ANY, stepwise(torch.bfloat16)),
    Hypothesis("the norm computes in float16", ANY, stepwise(torch.float16)),
    Hypothesis("the query and key norms come after RoPE", (*QK, *ROPES), lambda site: (
        in_own_pass(before_norm) if site.component.endswith("_rope") else in_own_pass(after_rope))(site)),
    Hypothesis("RoPE turns what was not normed", ROPES, in_own_pass(not_normed)),
    Hypothesis("the norm reads the layer's input", ("*post_attention_layernorm*",), in_own_pass(of_layer_input)),
    Hypothesis("the norm reads the attention branch alone", ("*post_attention_layernorm*",), in_own_pass(of_branch)),
]  # fmt: skip
