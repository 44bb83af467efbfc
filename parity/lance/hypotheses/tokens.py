"""Which tokens a pass computes and sees: rows, splits and experts of a site.

In the cached entry a pass is a call. In the full-sequence entry it holds all tokens of an arm, and a call is some of
its rows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from parity.hypotheses.base import DoesNotApply
from reference.layout import Mode, Role, Split
from reference.understanding import BLOCK

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

LATENTS = (Mode.FULL_NOISE, Mode.NOISE)
GEN = "_moe_gen"


@dataclass(frozen=True)
class Tokens:
    """The tokens that a pass sees, of which it computes the last `queries`.

    split, role, mode: int [m], of each token its split's number, role and mode; inner: bool [m], whether it lies
    between two brackets; clean: bool [m], whether it is a latent that is given.
    call, index: int [m], the number of the cached entry's call that computes a token, and its place in that.
    """

    queries: int
    split: np.ndarray
    role: np.ndarray
    mode: np.ndarray
    inner: np.ndarray
    clean: np.ndarray
    call: np.ndarray
    index: np.ndarray

    @property
    def gen(self) -> np.ndarray:
        """Whether each token is the generation expert's, bool [m]."""
        return self.inner & np.isin(self.mode, LATENTS)

    def rows(self, flags: np.ndarray) -> Tensor:
        """Flags [m] of the tokens that the pass computes, bool [queries]."""
        return torch.from_numpy(flags[len(flags) - self.queries :])


def arm_splits(site: "TapProbe", arm: str | None = None) -> list[Split]:
    """The splits that an arm's sequence holds, in order."""
    arm = site.tap.arm if arm is None else arm
    return [split for split in site.layout.splits if arm != "uncond" or split.role is not Role.TEXT]


def calls_of(site: "TapProbe", arm: str | None = None) -> list[tuple[str, slice]]:
    """The calls of the cached entry up to the site's own step or answer token, and which tokens each computes."""
    layout, tap = site.layout, site.tap
    arm = arm or tap.arm
    step = tap.numbers.get("step", 0)
    if layout.answer is not None:
        calls = [(f"{arm}.prefill{i}", split.rows) for i, split in enumerate(layout.prefix)]
        first = layout.answer - 1
        return [*calls, *((f"{arm}.decode{i}", slice(first + i, first + i + 1)) for i in range(step + 1))]
    calls, start = [], 0
    for i, split in enumerate(arm_splits(site, arm)):
        rows = slice(start, start + split.length)
        if split.mode is Mode.NOISE:
            return [*calls, (f"{arm}.step{step}", rows)]
        calls.append((f"{arm}.prefix{i}", rows))
        start = rows.stop
    raise DoesNotApply


def call_rows(site: "TapProbe") -> slice:
    """Which tokens of the arm's sequence the site's call computes."""
    rows = dict(calls_of(site)).get(site.tap.call)
    if rows is None:
        raise DoesNotApply
    return rows


def pass_tokens(site: "TapProbe") -> Tokens:
    """The tokens of the pass that the site's call is, or is a part of."""
    layout = site.layout
    columns = []
    for number, split in enumerate(arm_splits(site)):
        inner, clean = np.zeros((2, split.length), bool)
        if split.grid is not None:
            inner[1:-1] = True
            given = layout.clean_frames * split.grid.rows * split.grid.columns
            clean[1 : 1 + given] = split.mode is Mode.NOISE
            clean[1:-1] |= split.mode is Mode.FULL_NOISE
        alike = (np.full(split.length, value) for value in (number, split.role, split.mode))
        columns.append(np.stack([*alike, inner, clean]))
    table = np.concatenate(columns, 1)
    if site.entry == "kv_cache":
        rows = call_rows(site)
        queries, keys = rows.stop - rows.start, rows.stop
    else:
        queries = keys = table.shape[1]
        if layout.answer is not None:
            # Padded for the longest answer; see reference.understanding.build_reader.
            queries = keys = -(-(layout.answer + site.request.max_new_tokens) // BLOCK) * BLOCK
    if table.shape[1] < keys:
        more = np.repeat(table[:, -1:], keys - table.shape[1], 1)
        table = np.concatenate([table, more], 1)
    split, role, mode, inner, clean = table[:, :keys]
    first = np.diff(split, prepend=-1) != 0
    if layout.answer is not None:
        # The last token of a question, and those of its answer, are read one by one.
        first[layout.answer - 1 :] = True
    starts = np.maximum.accumulate(np.where(first, np.arange(keys), 0))
    return Tokens(
        queries,
        split,
        role,
        mode,
        inner.astype(bool),
        clean.astype(bool),
        np.cumsum(first),
        np.arange(keys) - starts,
    )


def cached_count(site: "TapProbe") -> int:
    """How many tokens come before the site's call, which a cache would hold; raises DoesNotApply when none do."""
    start = call_rows(site).start
    if not start:
        raise DoesNotApply
    return start


def by_expert(site: "TapProbe", call: str, path: str, gen: np.ndarray) -> np.ndarray:
    """The oracle's value of a module and of its twin in the other expert, in sequence order; `gen` bool [rows]."""
    und, own = site.value(f"{call}/{path}"), site.value(f"{call}/{path}{GEN}")
    known = own if und is None else und
    if known is None or gen.any() and own is None or not gen.all() and und is None:
        raise DoesNotApply
    out = np.empty((len(gen), *known.shape[1:]), np.float32)
    if not gen.all():
        out[~gen] = und
    if gen.any():
        out[gen] = own
    return out


def in_pass(site: "TapProbe", path: str, experts: bool = False) -> Tensor:
    """The oracle's value of a module for all rows of the site's pass, [queries, ...]; what comes after its call is 0.

    `experts` tells that the module is one of two, whose rows are then put together.
    """
    tokens = pass_tokens(site)
    first = len(tokens.split) - tokens.queries
    whole: np.ndarray | None = None
    for call, rows in calls_of(site):
        if rows.start < first:
            continue
        part = by_expert(site, call, path, tokens.gen[rows]) if experts else site.value(f"{call}/{path}")
        if part is None or len(part) != rows.stop - rows.start:
            raise DoesNotApply
        if whole is None:
            whole = np.zeros((tokens.queries, *part.shape[1:]), np.float32)
        whole[rows.start - first : rows.stop - first] = part
        if call == site.tap.call:
            return torch.from_numpy(whole)
    raise DoesNotApply
