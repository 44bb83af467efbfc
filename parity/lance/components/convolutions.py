"""The VAE's convolutions: what they read, frames of the chunk before included, and how they pad."""

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

import reference.vae_layers
from parity.hypotheses.base import DoesNotApply, recomputed
from parity.lance.components.base import Known, array_of, parameter
from parity.lance.hypotheses.tools import around, module_of
from parity.lance.hypotheses.vae_stages import held_by
from parity.laws.rounding import bfloat16
from reference.vae import DEVIATION, MEAN
from reference.vae_encoder import Downsample
from reference.vae_layers import CausalConv3d, Conv2d

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe


def convolution(site: "TapProbe") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """x [1, in, history + T, H, W]; weight [out, in, t, h, w], bias [out] or None, stride (t, h, w), history.

    pads are ((above, below), (left, right)); x is without them.
    """
    module, seen = module_of(site), []
    if not isinstance(module, CausalConv3d | Conv2d):
        raise DoesNotApply

    def convolve(original: Callable, x: Tensor, layer: nn.Module, padding: Any, stride: Any, *rest: Any) -> Tensor:
        if layer is module:
            seen.append((x, padding, stride))
        return original(x, layer, padding, stride, *rest)

    with around(reference.vae_layers, "convolve", convolve):
        recomputed(site)
    if not seen:
        raise DoesNotApply
    x, padding, stride = seen[-1]
    sides = (padding,) * 2 if isinstance(padding, int) else tuple(padding)[-2:]
    strides = (stride,) * 2 if isinstance(stride, int) else tuple(stride)
    pads = tuple((side, side) for side in sides)
    weight = parameter(module, "weight")
    if isinstance(module, Conv2d):
        x, weight, strides = x.transpose(0, 1)[None], weight[:, :, None], (1, *strides)
        if _downsamples(site):
            x, pads = x[..., :-1, :-1], ((0, 1), (0, 1))
    frames = (site.expected.shape[2] - 1) * strides[0] + 1
    history = module.history if isinstance(module, CausalConv3d) and weight.shape[2] > 1 else 0
    if site.expected.ndim != 5 or x.shape[2] < frames:
        raise DoesNotApply
    facts = {"weight": weight, "bias": parameter(module, "bias"), "stride": strides, "pads": pads, "history": history}
    if site.component == "vae.conv2":
        # Latents are brought back before it.
        facts["statistics"] = MEAN, DEVIATION
    if site.dtype != "float32":
        facts["read_once"] = cache(partial(_read_once, site))
    return {"x": array_of(x)}, facts


def _read_once(site: "TapProbe") -> np.ndarray | None:
    """What a convolution reads where all between the taps before it is computed in float32 and rounded in the end."""
    try:
        return bfloat16(convolution(site.wider)[0]["x"])
    except DoesNotApply:
        return None


def _downsamples(site: "TapProbe") -> bool:
    try:
        return isinstance(held_by(site, Downsample), Downsample)
    except DoesNotApply:
        return False


KNOWN = (Known("convolution", ("vae.*",), convolution),)
