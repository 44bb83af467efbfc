"""What works row by row: products with a weight and norms."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

import reference.mot
from parity.hypotheses.base import DoesNotApply
from parity.lance.components.base import Known, called_with, parameter

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe


def linear(site: "TapProbe") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """x [n, in]; weight [out, in], bias [out] or None."""
    module, (x, *_) = called_with(site)
    if not isinstance(module, nn.Linear):
        raise DoesNotApply
    return {"x": x}, {"weight": parameter(module, "weight"), "bias": parameter(module, "bias")}


def norm(site: "TapProbe") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """x [n, ..., channels]; weight [channels], eps."""
    module, (x, *_) = called_with(site)
    if not isinstance(module, reference.mot.RMSNorm):
        raise DoesNotApply
    return {"x": x}, {"weight": parameter(module, "weight"), "eps": module.eps}


KNOWN = (Known("linear", ("*",), linear), Known("norm", ("*",), norm))
