"""Decoded pixels and 8-bit frames: what they are made of value by value."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from parity.hypotheses.base import DoesNotApply
from parity.lance.components.base import Known
from reference.vae_layers import PATCH, unpack

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

# How the decoder's channels hold a square of pixels.
PACKED = {"packed": ("colour", "column", "row"), "side": PATCH}


def pixels(site: "TapProbe") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """x [3, frames, h, w], the decoder's pixels before they are clipped."""
    chunks = [site.value(f"vae.decode.chunk{index}/decoder") for index in range(site.layout.target.grid.frames)]
    if any(chunk is None for chunk in chunks):
        raise DoesNotApply
    return {"x": torch.cat([unpack(torch.from_numpy(chunk))[0] for chunk in chunks], 1).numpy()}, PACKED


def frames(site: "TapProbe") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """x [3, frames, h, w], the pixels in [-1, 1]."""
    decoded = site.value("pixels")
    if decoded is None:
        raise DoesNotApply
    return {"x": decoded}, PACKED


KNOWN = (Known("pixel_curve", ("vae.pixels",), pixels), Known("pixel_curve", ("frames",), frames))
