"""Hypotheses about the embeddings of times and of the places of latents."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch, nothing
from parity.lance.hypotheses.tools import around, forward, on_input, rounded
from reference.embeddings import FEATURES, MAX_PERIOD
from reference.positions import LATENT_SIDE

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

TIME = ("time_embedder*",)
PLACE = ("latent_pos_embed",)


def timed(
    period: float = MAX_PERIOD,
    scale: float = 1.0,
    spacing: int = 0,
    arrange: Callable[[Tensor], Tensor] = lambda angles: torch.cat([angles.cos(), angles.sin()], -1),
    of: Callable[[Tensor], Tensor] = lambda t: t,
) -> Patch:
    """Features of a time made in another way; `spacing` is taken off the number that the frequencies are spaced by."""

    def embedded(site: "TapProbe", module: nn.Module, original: Callable, timestep: Tensor) -> Tensor:
        if not hasattr(module, "mlp"):
            raise DoesNotApply
        half = FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32)
        frequencies = torch.exp(-math.log(period) * steps / (half - spacing))
        return module.mlp(arrange(scale * of(timestep)[:, None] * frequencies))

    return forward(embedded)


def rounded_features(angles: Tensor) -> Tensor:
    return rounded(torch.cat([angles.cos(), angles.sin()], -1), torch.bfloat16)


def wide_features(site: "TapProbe", module: nn.Module, original: Callable, timestep: Tensor) -> Tensor:
    """The first product reads the features as they are, and rounds its result."""
    if not hasattr(module, "mlp"):
        raise DoesNotApply
    first = module.mlp[0]

    def product(linear: Callable, x: Tensor) -> Tensor:
        return F.linear(x, first.weight.float(), first.bias.float()).to(first.weight.dtype)

    with around(first, "forward", product):
        return original(timestep)


def placed(
    order: tuple[int, int, int] = (0, 1, 2),
    rest: int = 2,
    period: float = MAX_PERIOD,
    waves: Callable[[Tensor], Tensor] = lambda angles: torch.cat([angles.sin(), angles.cos()], 1),
    exact: bool = False,
    spacing: int = 0,
    of: Callable[[list[Tensor]], list[Tensor]] = lambda places: places,
) -> Patch:
    """The position table made in another way.

    order: axes (t, h, w) of the three parts of the channels. rest: the part that gets the channels left over.
    """

    def embedded(site: "TapProbe", module: nn.Module, original: Callable, position_ids: Tensor) -> Tensor:
        ids = position_ids.long()
        places = [ids // LATENT_SIDE**2, ids // LATENT_SIDE % LATENT_SIDE, ids % LATENT_SIDE]
        third = module.widths[0]
        widths = [third] * 3
        widths[rest] = sum(module.widths) - 2 * third
        parts = []
        for axis, width in zip(order, widths, strict=True):
            omega = 1.0 / period ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2 - spacing))
            parts.append(waves(of(places)[axis][:, None].double() * omega))
        out = torch.cat(parts, 1).float()
        return out if exact else out.to(module.numerics.torch_dtype)

    return forward(embedded)


def index(name: str, change: Callable[["TapProbe", np.ndarray], np.ndarray]) -> Hypothesis:
    """A hypothesis about the places of latents in the position table, [3, latents] -> row of the table [latents].

    It is tried on the ids themselves and on what is embedded of them.
    """

    def changed(site: "TapProbe", ids: np.ndarray) -> np.ndarray:
        places = np.stack([ids // LATENT_SIDE**2, ids // LATENT_SIDE % LATENT_SIDE, ids % LATENT_SIDE])
        return np.asarray(change(site, places)).astype(ids.dtype)

    def patch(site: "TapProbe") -> AbstractContextManager[object]:
        if site.module is None:
            return nothing(site)
        return on_input(lambda site, ids: torch.from_numpy(changed(site, ids.numpy())))(site)

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray:
        return changed(site, array) if array.ndim == 1 else array

    return Hypothesis(name, PLACE, patch, transform)


def rows_of(side: int) -> Callable[["TapProbe", np.ndarray], np.ndarray]:
    return lambda site, places: (places[0] * side + places[1]) * side + places[2]


def own_rows(site: "TapProbe", places: np.ndarray) -> np.ndarray:
    """Rows as long as the grid's own."""
    t, h, w = places
    return (t * (h.max() + 1) + h) * (w.max() + 1) + w


def table_row(t: np.ndarray, h: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (t * LATENT_SIDE + h) * LATENT_SIDE + w


PERIODS = (100.0, 1000.0, 100000.0, 1000000.0)
HYPOTHESES = [
    Hypothesis("the features of t are rounded to bfloat16", TIME, timed(arrange=rounded_features)),
    Hypothesis("the features of t are not rounded", TIME, forward(wide_features)),
    *(Hypothesis(f"the longest period is {n:.0f}", TIME, timed(period=n)) for n in PERIODS),
    Hypothesis("frequencies are spaced by half - 1", TIME, timed(spacing=1)),
    Hypothesis("t is rounded to bfloat16 before it is embedded", TIME, timed(of=lambda t: rounded(t, torch.bfloat16))),
    Hypothesis("1 - t is embedded", TIME, timed(of=lambda t: 1 - t)),
    Hypothesis("the latent position table gives the rest of the channels to t", PLACE, placed(rest=0)),
    Hypothesis("the latent position table gives the rest of the channels to h", PLACE, placed(rest=1)),
    Hypothesis("the latent position table is not rounded", PLACE, placed(exact=True)),
    Hypothesis("the latent position table has no frames", PLACE, placed(
        of=lambda places: [torch.zeros_like(places[0]), *places[1:]])),
    Hypothesis("the latent position table spans 0 to 1", PLACE, placed(
        of=lambda places: [place / (place.max() + 1) for place in places])),
    *(index(f"the latent position table has rows of {n}", rows_of(n)) for n in (16, 32, 128)),
    index("the latent position table has rows as long as the grid's", own_rows),
    index("the latent position table counts pixels' frames", lambda site, places: table_row(
        4 * places[0], *places[1:])),
]  # fmt: skip
