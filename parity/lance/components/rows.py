"""What works row by row: products with a weight, norms, gated products, sums; and parameters as they are."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

import reference.mot
import reference.vae_layers
import reference.vit
from parity.hypotheses.base import DoesNotApply
from parity.lance.components.base import Known, called_with, parameter
from parity.lance.hypotheses.tools import module_of, parent_of

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

Read = tuple[dict[str, np.ndarray], dict[str, Any]]
STREAM, ATTENTION, MLP = "the stream", "the attention branch", "the MLP branch"


def linear(site: "TapProbe") -> Read:
    """x [n, in]; weight [out, in], bias [out] or None."""
    if not isinstance(module_of(site), nn.Linear):
        raise DoesNotApply
    module, (x, *_) = called_with(site)
    return {"x": x}, {"weight": parameter(module, "weight"), "bias": parameter(module, "bias")}


def norm(site: "TapProbe") -> Read:
    """x [n, ..., channels]; weight [channels], eps, axis of the channels; by_length: x over its length."""
    if not isinstance(module_of(site), (reference.mot.RMSNorm, reference.vae_layers.RMSNorm)):
        raise DoesNotApply
    module, (x, *_) = called_with(site)
    if isinstance(module, reference.mot.RMSNorm):
        return {"x": x}, {"weight": parameter(module, "weight"), "eps": module.eps}
    if x.ndim == 4 and site.expected.ndim == 5:
        # Frame by frame, [T, C, H, W], where the tap has the frames third.
        x = x.swapaxes(0, 1)[None]
    return {"x": x}, {"weight": parameter(module, "gamma").ravel(), "eps": 0.0, "axis": 1, "by_length": True}


def gated(site: "TapProbe") -> Read:
    """gate, up and their product x [n, inner]; the product behind them."""
    parent = parent_of(site)
    if not isinstance(parent, reference.mot.MLP):
        raise DoesNotApply
    inputs, facts = linear(site)
    gate, up = (site.near(_beside(site, f"{name}_proj")) for name in ("gate", "up"))
    if gate is None or up is None:
        raise DoesNotApply
    return {**inputs, "gate": gate, "up": up}, {**facts, "activation": "SiLU"}


def activated(site: "TapProbe") -> Read:
    """What goes into an activation, and x that comes out of it, [n, inner]; the product behind it."""
    inputs, facts = linear(site)
    gate = site.near(_beside(site, "0"))
    if gate is None or not isinstance(parent_of(site), nn.Sequential):
        raise DoesNotApply
    return {**inputs, "gate": gate}, {**facts, "activation": "GELU"}


def layer(site: "TapProbe") -> Read:
    """The stream [n, hidden] before a layer, and what its two branches add."""
    number = site.tap.layer
    if not isinstance(module_of(site), reference.mot.DecoderLayer) or number is None:
        raise DoesNotApply
    root = "language_model.model.layers"
    before = site.near(f"{root}.{number - 1}" if number else "hidden_in")
    attended = site.near(f"{root}.{number}.self_attn")
    if before is None or attended is None:
        raise DoesNotApply
    return _terms(site, before, attended)


def block(site: "TapProbe") -> Read:
    """The stream [n, hidden] before a block of the vision tower, and what its two branches add."""
    if not isinstance(module_of(site), reference.vit.Block):
        raise DoesNotApply
    root, _, number = site.tap.name.partition(".")[2].rpartition(".")
    attended = site.near(f"{root}.{number}.attn")
    fed = site.near(f"{root}.{number}.mlp")
    if attended is None or fed is None:
        raise DoesNotApply
    return _terms(site, site.expected - attended - fed, attended)


def _terms(site: "TapProbe", before: np.ndarray, attended: np.ndarray) -> Read:
    middle = before + attended
    # Both experts' rows in the sequence's order: what is left of the sum.
    inputs = {STREAM: before, ATTENTION: attended, MLP: site.expected - middle}
    return inputs, {"terms": (STREAM, ATTENTION, MLP)}


def weight(site: "TapProbe") -> Read:
    """A parameter has no inputs; its name."""
    name = site.tap.name.rpartition(".")[2].replace("gamma", "weight")
    return {}, {"name": name, "what": f"the {name}"}


def _beside(site: "TapProbe", name: str) -> str:
    """The path of another part of the module that holds the site's."""
    path = site.tap.path if "/" in site.tap.name else site.tap.name.partition(".")[2]
    return f"{path.rpartition('.')[0]}.{name}"


KNOWN = (
    Known("weight", ("*",), weight, weights=True),
    Known("gated", ("*.down_proj",), gated),
    Known("gated", ("vit_model.merger.mlp.2",), activated),
    Known("sum", ("layers.*", "vit_model.blocks.*"), layer),
    Known("sum", ("vit_model.blocks.*",), block),
    Known("linear", ("*",), linear),
    Known("norm", ("*",), norm),
)
