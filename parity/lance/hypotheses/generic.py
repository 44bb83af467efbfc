"""Hypotheses that may be true of any part: left out, twice, added to; parity.laws reads what is done to a result."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis
from parity.lance.hypotheses.norms import KINDS
from parity.lance.hypotheses.tools import forward, leaf

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

MODULES = ("layers.*", "norm*", "vit_model.*", "vae.*", "time_embedder*", "vae2llm", "llm2vae", "lm_head")


def passed(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, *rest: Any) -> Tensor:
    """The input passes on; of a norm its law says so."""
    if isinstance(module, KINDS) or original(x, *rest).shape != x.shape:
        raise DoesNotApply
    return x


def twice(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, *rest: Any) -> Tensor:
    leaf(module)
    out = original(x, *rest)
    if out.shape != x.shape:
        raise DoesNotApply
    return original(out, *rest)


def added(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, *rest: Any) -> Tensor:
    """The input is added to the output."""
    out = original(x, *rest)
    if out.shape != x.shape:
        raise DoesNotApply
    return out + x


HYPOTHESES = [
    Hypothesis("the part is left out", MODULES, forward(passed)),
    Hypothesis("the part is applied twice", MODULES, forward(twice)),
    Hypothesis("the part's input is added to its result", MODULES, forward(added)),
]
