"""Hypotheses about which expert computes a row."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses.layers import LAYERS, of_layer
from parity.lance.hypotheses.tokens import GEN, LATENTS, Tokens, pass_tokens
from parity.lance.hypotheses.tools import around, forward, in_own_pass, module_of, submodule, twin_path
from reference.layout import Role
from reference.mot import MLP, DecoderLayer, by_expert

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

MODULES = ("layers.*_proj*", "layers.*norm*", "norm*")


def twin(site: "TapProbe") -> nn.Module:
    """The module of the other expert."""
    return submodule(site, twin_path(site.path))


def other(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    return twin(site).forward(x)


def rows(which: Callable[[Tokens], np.ndarray]) -> Patch:
    """Some of the rows go to the other expert."""

    def mixed(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        tokens = pass_tokens(site)
        gen = tokens.rows(tokens.gen)
        chosen = tokens.rows(which(tokens))[gen if GEN in site.path else ~gen]
        if not chosen.any():
            raise DoesNotApply
        # Under other hypotheses the module may hand back its input, or another dtype than its twin does.
        out = original(x).clone()
        out[chosen] = twin(site).forward(x[chosen]).to(out.dtype)
        return out

    return in_own_pass(mixed)


@contextmanager
def exchanged(site: "TapProbe") -> Iterator[None]:
    """A layer whose experts have each other's MLP."""
    layer = module_of(site)
    if not isinstance(layer, DecoderLayer):
        raise DoesNotApply

    def by_hand(mlp: MLP) -> Callable[[Tensor], Tensor]:
        # What a module gives when it is called is the oracle's.
        return lambda x: mlp.down_proj.forward(F.silu(mlp.gate_proj.forward(x)) * mlp.up_proj.forward(x))

    def forward(original: Callable, x: Tensor, shared: Any) -> Tensor:
        parts = of_layer(layer, x, shared)
        return parts.middle + by_expert(parts.normed, shared.gen, by_hand(layer.mlp_moe_gen), by_hand(layer.mlp))

    with around(layer, "forward", forward):
        yield


def both(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor) -> Tensor:
    return (original(x) + twin(site).forward(x)) / 2


def brackets(tokens: Tokens) -> np.ndarray:
    return np.isin(tokens.mode, LATENTS) & ~tokens.inner


def vit(tokens: Tokens) -> np.ndarray:
    return tokens.inner & (tokens.role == Role.VIT)


def vit_block(tokens: Tokens) -> np.ndarray:
    return tokens.role == Role.VIT


def user_text(tokens: Tokens) -> np.ndarray:
    return tokens.role == Role.TEXT


HYPOTHESES = [
    Hypothesis("the other expert's module", MODULES, forward(other)),
    Hypothesis("the other expert's MLP", LAYERS, exchanged),
    Hypothesis("the brackets of latents go to the generation expert", MODULES, rows(brackets)),
    Hypothesis("ViT tokens go to the generation expert", MODULES, rows(vit)),
    Hypothesis("ViT tokens and their brackets go to the generation expert", MODULES, rows(vit_block)),
    Hypothesis("the user's text goes to the generation expert", MODULES, rows(user_text)),
    Hypothesis("clean latents go to the understanding expert", MODULES, rows(lambda tokens: tokens.clean)),
    Hypothesis("both experts compute and are averaged", MODULES, forward(both)),
]
