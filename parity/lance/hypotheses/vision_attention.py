"""Hypotheses about the vision tower's attention: who sees whom, its rotary embedding, and the fused projection."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import Tensor

import reference.vit
from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses.tools import parent_of
from parity.lance.hypotheses.vision import grids_of, windows_of
from reference.layout import MERGE

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

ATTENTION = ("vit_model.blocks.*.attn.proj",)
ROPES = ("vit_model.blocks.*.attn.?_rope",)
Split = Callable[[Tensor, int], Sequence[Tensor]]
"""Queries, keys and values [n, heads, d] of a product [n, 3 hidden]."""
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries or keys [n, heads, d] turned by cos and sin [n, d]."""


def thirds(*order: int) -> Split:
    """Queries, keys and values found in the thirds of the product, in this order."""

    def split(qkv: Tensor, heads: int) -> Sequence[Tensor]:
        parts = qkv.unflatten(1, (3, heads, -1)).unbind(1)
        return [parts[i] for i in order]

    return split


def per_head(qkv: Tensor, heads: int) -> Sequence[Tensor]:
    return qkv.unflatten(1, (heads, 3, -1)).unbind(2)


def halves(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = y.chunk(2, -1)
    return y * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def neighbours(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second, half = y[..., 0::2], y[..., 1::2], y.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    return torch.stack([first * c - second * s, second * c + first * s], -1).flatten(-2)


@dataclass(frozen=True)
class Plan:
    """How a block attends; the defaults are upstream's. `wide` tells whether it rotates in float32."""

    split: Split = thirds(0, 1, 2)
    turn: Turn = halves
    wide: bool = True
    mask: Callable[[Tensor], Tensor] = lambda mask: mask
    tables: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda cos, sin: (cos, sin)


def attention(parent: reference.vit.Attention, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, plan: Plan) -> Tensor:
    """reference.vit.Attention by a plan."""
    q, k, v = plan.split(parent.qkv(x), parent.heads)
    dtype = torch.float32 if plan.wide else v.dtype
    cos, sin = (table.to(dtype) for table in plan.tables(cos, sin))
    # The modules are called all the same: what they make is a tap.
    with patch.object(reference.vit.Rope, "forward", lambda _, *given: plan.turn(*given)):
        q, k = (rope(y.to(dtype), cos, sin).to(v.dtype) for rope, y in ((parent.q_rope, q), (parent.k_rope, k)))
    return parent.proj(reference.vit.attend(q, k, v, plan.mask(mask), "math").flatten(1))


def planned(change: Callable[["TapProbe", Plan], Plan]) -> Patch:
    """A patch of the attention that a site belongs to; plans are changed one on top of the other."""

    @contextmanager
    def patched(site: "TapProbe") -> Iterator[None]:
        parent = parent_of(site)
        if not isinstance(parent, reference.vit.Attention):
            raise DoesNotApply
        now = vars(parent).get("forward")
        plan = now.keywords["plan"] if isinstance(now, partial) else Plan()
        with patch.object(parent, "forward", partial(attention, parent, plan=change(site, plan))):
            yield

    return patched


def computed(**changes: object) -> Patch:
    return planned(lambda site, plan: replace(plan, **changes))


def masked(change: Callable[["TapProbe", Tensor], Tensor]) -> Patch:
    return planned(lambda site, plan: replace(plan, mask=lambda mask: change(site, plan.mask(mask))))


def turned(change: Callable[[Tensor], Tensor]) -> Patch:
    """Another arrangement of both cos and sin [n, d]."""

    def changed(site: "TapProbe", plan: Plan) -> Plan:
        return replace(plan, tables=lambda cos, sin: tuple(change(table) for table in plan.tables(cos, sin)))

    return planned(changed)


def backwards(site: "TapProbe", plan: Plan) -> Plan:
    def tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = plan.tables(cos, sin)
        return cos, -sin

    return replace(plan, tables=tables)


def same(ids: Tensor) -> Tensor:
    """Mask of patches whose tokens have one id."""
    ids = ids.repeat_interleave(MERGE**2)
    return ids[:, None] == ids[None]


def visuals(site: "TapProbe") -> Tensor:
    """Which visual each token belongs to."""
    counts = torch.tensor([t * h * w // MERGE**2 for t, h, w in grids_of(site)])
    return torch.arange(len(counts)).repeat_interleave(counts)


def is_full(site: "TapProbe") -> bool:
    """Whether the site's block attends to whole frames."""
    return site.tap.numbers.get("block") in site.pipeline.vit_model.config.fullatt_block_indexes


def across_frames(site: "TapProbe", mask: Tensor) -> Tensor:
    if not is_full(site):
        raise DoesNotApply
    return same(visuals(site)[windows_of(site)[0]])


def places_of(site: "TapProbe", line_by_line: bool = False) -> Tensor:
    """Row and column [n, 2] of the patches in input order, or by the lines of a frame instead of in groups of four."""
    parts = []
    for t, h, w in grids_of(site):
        places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
        if not line_by_line:
            places = places.unflatten(1, (-1, MERGE)).unflatten(0, (-1, MERGE)).transpose(1, 2)
        parts.append(places.reshape(-1, 2).repeat(t, 1))
    return torch.cat(parts)


def gathered_by_window(site: "TapProbe", rows: Tensor) -> Tensor:
    """Rows of patches in input order [n, ...], in the order of the windows."""
    return rows.unflatten(0, (-1, MERGE**2))[windows_of(site)[0]].flatten(0, 1)


def rotation(
    site: "TapProbe",
    exact: bool = False,
    theta: float | None = None,
    line_by_line: bool = False,
    scale: float = 1,
    offset: int = 0,
    spacing: int = 0,
) -> tuple[Tensor, Tensor]:
    """cos and sin [n, d] of the patches in input order, in upstream's way but for what is said.

    line_by_line: as of places_of. scale and offset are applied to positions; `spacing` is taken off the number of
    frequencies where they are spaced.
    """
    tower = site.pipeline.vit_model
    dtype = torch.float32 if exact else tower.numerics.torch_dtype
    d = tower.config.hidden_size // tower.config.num_heads
    exponents = torch.arange(0, d // 2, 2).float() / (d // 2 - 2 * spacing)
    frequencies = (1.0 / (theta or reference.vit.ROPE_THETA) ** exponents).to(dtype)
    places = ((places_of(site, line_by_line) + offset) * scale).floor().to(dtype)
    angles = (places[:, :, None] * frequencies).flatten(1)
    angles = torch.cat([angles, angles], 1)
    rounding = tower.numerics.torch_dtype
    return angles.cos().to(rounding), angles.sin().to(rounding)


def made(gathered: bool = True, **way: object) -> Patch:
    """The rotation made in another way, and put in the order of the windows or not."""

    def changed(site: "TapProbe", plan: Plan) -> Plan:
        tables = rotation(site, **way)
        if gathered:
            tables = gathered_by_window(site, torch.stack(tables, 1)).unbind(1)
        return replace(plan, tables=lambda cos, sin: tables)

    return planned(changed)


def quarters(order: Callable[[Tensor], Tensor]) -> Patch:
    """Rows and columns among the pairs of a head in another order: `order` is given the numbers of the pairs."""

    def change(table: Tensor) -> Tensor:
        chosen = order(torch.arange(table.shape[1] // 2))
        return torch.cat([table[:, chosen], table[:, chosen]], 1)

    return turned(change)


def columns_then_rows(pairs: Tensor) -> Tensor:
    return pairs.view(2, -1).flip(0).flatten()


def alternating(pairs: Tensor) -> Tensor:
    return pairs.view(2, -1).T.flatten()


def rows_alone(pairs: Tensor) -> Tensor:
    return pairs.view(2, -1)[0].repeat(2)


THETAS = (100.0, 1000.0, 100000.0, 1000000.0)
HYPOTHESES = [
    Hypothesis("every block attends to the whole slice", ATTENTION, masked(
        lambda site, mask: same(windows_of(site)[2]))),
    Hypothesis("every block attends to windows", ATTENTION, masked(lambda site, mask: same(windows_of(site)[1]))),
    Hypothesis("blocks attend across frames", ATTENTION, masked(across_frames)),
    Hypothesis("every block attends to everything", ATTENTION, masked(lambda site, mask: torch.ones_like(mask))),
    Hypothesis("blocks attend causally", ATTENTION, masked(lambda site, mask: mask.tril())),
    Hypothesis("the ViT's RoPE takes columns before rows", ROPES, quarters(columns_then_rows)),
    Hypothesis("the ViT's RoPE alternates rows and columns", ROPES, quarters(alternating)),
    Hypothesis("the ViT's RoPE takes rows alone", ROPES, quarters(rows_alone)),
    Hypothesis("the ViT's RoPE turns neighbouring pairs", ROPES, computed(turn=neighbours)),
    Hypothesis("the ViT's RoPE turns the other way", ROPES, planned(backwards)),
    Hypothesis("the ViT's RoPE is missing", ROPES, computed(turn=lambda y, cos, sin: y)),
    Hypothesis("the ViT's RoPE turns in bfloat16", ROPES, computed(wide=False)),
    Hypothesis("the ViT's RoPE frequencies are not rounded", ROPES, made(exact=True)),
    Hypothesis("the ViT's RoPE counts patches in reading order", ROPES, made(gathered=False, line_by_line=True)),
    Hypothesis("the ViT's RoPE counts patches line by line", ROPES, made(line_by_line=True)),
    Hypothesis("the ViT's RoPE keeps the reading order of tokens", ROPES, made(gathered=False)),
    Hypothesis("the ViT's RoPE counts tokens instead of patches", ROPES, made(scale=0.5)),
    Hypothesis("the ViT's RoPE counts from 1", ROPES, made(offset=1)),
    Hypothesis("the ViT's RoPE frequencies are spaced by one less", ROPES, made(spacing=1)),
    *(Hypothesis(f"the ViT's RoPE theta is {theta:.0f}", ROPES, made(theta=theta)) for theta in THETAS),
    Hypothesis("qkv is split head by head", (*ROPES, *ATTENTION), computed(split=per_head)),
    Hypothesis("qkv is split into queries, values, keys", (*ROPES, *ATTENTION), computed(split=thirds(0, 2, 1))),
    Hypothesis("qkv is split into values, keys, queries", (*ROPES, *ATTENTION), computed(split=thirds(2, 1, 0))),
]  # fmt: skip
