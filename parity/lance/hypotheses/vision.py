"""Hypotheses about the vision tower: patches, the order of tokens in its blocks and of its output, merging."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses.tools import module_of, on_input, on_output
from reference.layout import MERGE
from reference.vit import NORM_EPS, VisionTower

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

EMBED = ("vit_model.patch_embed*",)
FIRST = ("vit_model.blocks.0.norm1",)
MERGED = ("vit_model.merger.mlp.0",)
OUTPUT = ("vit_model.merger",)
Thw = tuple[int, int, int]


def grids_of(site: "TapProbe") -> list[Thw]:
    """Frames, rows and columns of the visuals, in patches."""
    grids = [split.grid for split in site.layout.vit_splits]
    return [(grid.frames, MERGE * grid.rows, MERGE * grid.columns) for grid in grids]


def windows_of(site: "TapProbe", factor: float = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the tokens by window, and of each in that order the ids of its window and of its frame."""
    tower = site.pipeline.vit_model
    config = tower.config
    unit = config.patch_size * config.spatial_merge_size
    size = max(int(config.window_size * factor) // unit, 1) * unit
    stub = SimpleNamespace(config=replace(config, window_size=size))
    return VisionTower.windows(stub, grids_of(site), torch.device("cpu"))


def patches(x: Tensor) -> Tensor:
    """[n, 1176] -> [n, channels, frames, rows, columns]."""
    return x.unflatten(1, (3, -1, 14, 14))


def embedded(change: Callable[[Tensor], Tensor]) -> Patch:
    """Values of patches [n, 3, 2, 14, 14] in another order."""
    return on_input(lambda site, x: change(patches(x)).reshape(x.shape))


def read_as(*order: int) -> Callable[[Tensor], Tensor]:
    """Values taken to be laid out with these axes (0 channel, 1 frame, 2 row, 3 column)."""

    def change(x: Tensor) -> Tensor:
        sides = [x.shape[1 + axis] for axis in order]
        back = [1 + order.index(axis) for axis in range(4)]
        return x.reshape(len(x), *sides).permute(0, *back)

    return change


def put_as(*order: int) -> Callable[[Tensor], Tensor]:
    """Values laid out with these axes."""
    return lambda x: x.permute(0, *(1 + axis for axis in order))


def tokens_reordered(order: Callable[["TapProbe"], Tensor]) -> Patch:
    """What the first block is given, four patches a token, in another order of tokens."""
    return on_input(lambda site, x: x.unflatten(0, (-1, MERGE**2))[order(site)].flatten(0, 1))


def reading_order(site: "TapProbe") -> Tensor:
    return torch.argsort(windows_of(site)[0])


def columns_first(site: "TapProbe") -> Tensor:
    """Order of tokens column by column within every frame."""
    orders, start = [], 0
    for t, h, w in grids_of(site):
        places = torch.arange(t * h * w // MERGE**2).view(t, h // MERGE, w // MERGE)
        orders.append(start + places.transpose(1, 2).flatten())
        start += places.numel()
    return torch.cat(orders)


def columns_first_in_windows(site: "TapProbe") -> Tensor:
    """Places in window order of tokens that go column by column in each window."""
    tokens, windows, _ = windows_of(site)
    rank = torch.argsort(columns_first(site))  # of each token in reading order, its place column by column
    return torch.argsort(windows * len(tokens) + rank[tokens])


def other_windows(factor: float) -> Callable[["TapProbe"], Tensor]:
    """Places in window order of tokens that go by windows of another size."""

    def order(site: "TapProbe") -> Tensor:
        return torch.argsort(windows_of(site)[0])[windows_of(site, factor)[0]]

    return order


def output(order: Callable[["TapProbe"], Tensor]) -> Patch:
    """The tower's output in another order."""

    def change(site: "TapProbe", x: Tensor) -> Tensor:
        if not isinstance(module_of(site), VisionTower):
            raise DoesNotApply
        return x[order(site)]

    return on_output(change)


def grouped(change: Callable[[Tensor], Tensor]) -> Patch:
    """The four patches [n, row, column, hidden] of every token in another order."""
    return on_input(lambda site, x: change(x.unflatten(1, (MERGE, MERGE, -1))).reshape(x.shape))


def strided(site: "TapProbe", x: Tensor) -> Tensor:
    """Patches a quarter of the sequence apart are merged."""
    return x.unflatten(1, (MERGE**2, -1)).flatten(0, 1).unflatten(0, (MERGE**2, -1)).transpose(0, 1).flatten(1)


def normed_together(site: "TapProbe", x: Tensor) -> Tensor:
    """What the merger is given where the patches of a token have one norm."""
    tower = site.pipeline.vit_model
    before = site.near(f"blocks.{len(tower.blocks) - 1}")
    if before is None or len(before) != len(x) * MERGE**2:
        raise DoesNotApply
    wide = torch.from_numpy(before).to(x.device).unflatten(0, (len(x), MERGE**2))
    wide = wide * torch.rsqrt(wide.pow(2).mean((1, 2), keepdim=True) + NORM_EPS)
    return (wide * tower.merger.ln_q.weight.float()).flatten(1).to(x.dtype)


HYPOTHESES = [
    Hypothesis("patches are laid out frame, channel", EMBED, embedded(read_as(1, 0, 2, 3))),
    Hypothesis("patches are laid out channels last", EMBED, embedded(read_as(1, 2, 3, 0))),
    Hypothesis("patches are laid out row, column, frame, channel", EMBED, embedded(read_as(2, 3, 1, 0))),
    Hypothesis("patches are read frame, channel", EMBED, embedded(put_as(1, 0, 2, 3))),
    Hypothesis("patches are read channels last", EMBED, embedded(put_as(1, 2, 3, 0))),
    Hypothesis("rows and columns of patches are exchanged", EMBED, embedded(put_as(0, 1, 3, 2))),
    Hypothesis("red and blue of patches are exchanged", EMBED, embedded(lambda x: x.flip(1))),
    Hypothesis("frames of patches are exchanged", EMBED, embedded(lambda x: x.flip(2))),
    Hypothesis("patches hold their first frame alone", EMBED, embedded(
        lambda x: torch.cat([x[:, :, :1], torch.zeros_like(x[:, :, 1:])], 2))),
    Hypothesis("patches hold their first frame twice", EMBED, embedded(lambda x: x[:, :, :1].expand_as(x))),
    Hypothesis("the blocks get the tokens in reading order", FIRST, tokens_reordered(reading_order)),
    Hypothesis("the blocks get the tokens column by column", FIRST, tokens_reordered(columns_first)),
    Hypothesis("tokens of a window go column by column", FIRST, tokens_reordered(columns_first_in_windows)),
    Hypothesis("windows are half as large", FIRST, tokens_reordered(other_windows(0.5))),
    Hypothesis("windows are twice as large", FIRST, tokens_reordered(other_windows(2))),
    Hypothesis("the patches of a token are merged column by column", MERGED, grouped(lambda x: x.transpose(1, 2))),
    Hypothesis("the patches of a token are merged backwards", MERGED, grouped(lambda x: x.flip(1, 2))),
    Hypothesis("the patches of a token are merged channel by channel", MERGED, grouped(lambda x: x.flatten(1, 2).mT)),
    Hypothesis("the patches of a token are normed together", MERGED, on_input(normed_together)),
    Hypothesis("patches far apart are merged", MERGED, on_input(strided)),
    Hypothesis("the output stays in window order", OUTPUT, output(lambda site: windows_of(site)[0])),
    Hypothesis("the output is put back the wrong way", OUTPUT, output(
        lambda site: windows_of(site)[0][windows_of(site)[0]])),
    Hypothesis("the output goes column by column", OUTPUT, output(columns_first)),
]  # fmt: skip
