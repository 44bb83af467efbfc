"""Hypotheses about which expert computes a row."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses.tokens import GEN, LATENTS, Tokens, pass_tokens
from parity.lance.hypotheses.tools import forward, in_own_pass, submodule, twin_path
from reference.layout import Role

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
    Hypothesis("the brackets of latents go to the generation expert", MODULES, rows(brackets)),
    Hypothesis("ViT tokens go to the generation expert", MODULES, rows(vit)),
    Hypothesis("ViT tokens and their brackets go to the generation expert", MODULES, rows(vit_block)),
    Hypothesis("the user's text goes to the generation expert", MODULES, rows(user_text)),
    Hypothesis("clean latents go to the understanding expert", MODULES, rows(lambda tokens: tokens.clean)),
    Hypothesis("both experts compute and are averaged", MODULES, forward(both)),
]
