"""What the ranks of a run share: its outputs, or of each output the arms of guidance, or the rows of the latents.

Of an output that is shared every rank has the state; what it computes of the velocities goes to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import mlx.core as mx
import numpy as np

from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.distributed.ranks import Ranks, share_bounds
from lance_mlx.errors import LanceError
from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ArmInput, ExpertRows, KeyValues, LayerInput
from lance_mlx.model.rope import RotaryTable
from lance_mlx.sampling import flow
from lance_mlx.sampling.flow import Arm, State


class Split(StrEnum):
    """What the ranks share."""

    OUTPUTS = "outputs"
    GUIDANCE = "guidance"
    ROWS = "rows"


def split_velocities(split: Split, ranks: Ranks) -> flow.Velocities | None:
    """What computes the velocities of a step with the other ranks, None where each computes its own.

    Raises:
        LanceError: there is another number of ranks than arms.
    """
    if split is Split.OUTPUTS or ranks.size == 1:
        return None
    if split is Split.ROWS:
        return RowsSplit(ranks)
    if ranks.size != 2:
        raise LanceError(f"guidance has two arms, for two ranks: choose another split for {ranks.size}")
    return ArmsSplit(ranks)


@dataclass(frozen=True)
class ArmsSplit:
    """Rank 0 computes what guidance goes towards, rank 1 what it goes away from; a step without guidance both."""

    ranks: Ranks

    def __call__(self, model: Lance, arms: Sequence[Arm], state: State) -> list[mx.array]:
        if len(arms) == state.pictures:
            return flow.velocities(model, arms, state)
        own = mx.stack(flow.velocities(model, arms[self.ranks.rank :: 2], state))
        whole = self.ranks.gather(own)
        return [whole[rank * state.pictures + picture] for picture in range(state.pictures) for rank in range(2)]


@dataclass(frozen=True)
class RowsSplit:
    """Every rank computes its rows of the latents, and both brackets; keys and values of all rows are gathered one
    layer at a time."""

    ranks: Ranks

    def __call__(self, model: Lance, arms: Sequence[Arm], state: State) -> list[mx.array]:
        count = len(state.x_t) // state.pictures
        bounds = share_bounds(count, self.ranks.size)
        if count < self.ranks.size:
            raise LanceError(f"{count} latents are too few to be split among {self.ranks.size} ranks")
        rows = slice(*bounds[self.ranks.rank : self.ranks.rank + 2])
        parts = state.split_pictures()
        embeds = [ExpertRows(part.inputs_embeds.und, part.inputs_embeds.gen[rows]) for part in parts]
        own = replace(
            state,
            timestep=state.timestep[: rows.stop - rows.start],
            x_t=mx.concatenate([part.x_t[rows] for part in parts]),
            inputs_embeds=ExpertRows.concat_arms(embeds),
        )
        mine = [_ArmRows(arm.name, _BlockRows(self, arm.block, rows, count), arm.qk_float32) for arm in arms]
        # By the longest share, so that all ranks do it alike.
        if state.pictures > 1 or flow.goes_in_one_pass(-(-count // self.ranks.size), runs_on_cpu()):
            found = flow.velocities_of_pass(model, mine, own)
        else:
            found = [velocity for arm in mine for velocity in flow.velocities_of_pass(model, [arm], own)]
        whole = self.gather(mx.stack(found, axis=1), count)
        return [whole[:, index] for index in range(len(arms))]

    def gather(self, x: mx.array, count: int) -> mx.array:
        """All rows [count, ...] from each rank's own [n, ...], of which some ranks have one less."""
        bounds = share_bounds(count, self.ranks.size)
        longest = -(-count // self.ranks.size)
        padded = mx.pad(x, [(0, longest - len(x))] + [(0, 0)] * (x.ndim - 1))
        whole = self.ranks.gather(padded)
        if count % self.ranks.size == 0:
            return whole
        lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        return mx.concatenate([whole[rank * longest :][:length] for rank, length in enumerate(lengths)])


@dataclass(frozen=True, eq=False)
class _ArmRows:
    """An arm as a pass over some rows of its block uses it."""

    name: str
    block: "_BlockRows"
    qk_float32: bool


@dataclass(frozen=True, eq=False)
class _BlockRows:
    """Some rows of a denoised block, as ArmInput has the whole of it."""

    split: RowsSplit
    whole: ArmInput
    rows: slice
    count: int

    @cached_property
    def rotary(self) -> RotaryTable:
        """The rotations of these rows between those of the brackets."""
        table = self.whole.rotary
        tokens = np.r_[0, 1 + self.rows.start : 1 + self.rows.stop, self.count + 1]
        index = mx.array(tokens)
        return RotaryTable(table.position_ids[:, tokens], table.cos[index], table.sin[index])

    def at(self, index: int) -> "_LayerRows":
        return _LayerRows(self, self.whole.at(index))


@dataclass(frozen=True, eq=False)
class _LayerRows:
    """The same as LayerInput has it; its brackets are the whole block's, which every rank computes."""

    block: _BlockRows
    whole: LayerInput

    @property
    def rotary(self) -> RotaryTable:
        return self.block.rotary

    def followed_by(self, keys: mx.array, values: mx.array) -> KeyValues:
        """Keys and values of what was read before and of all ranks' rows."""
        own = mx.stack([keys[1:-1], values[1:-1]], axis=1)
        rows = self.block.split.gather(own, self.block.count)
        keys = mx.concatenate([keys[:1], rows[:, 0], keys[-1:]])
        values = mx.concatenate([values[:1], rows[:, 1], values[-1:]])
        return self.whole.followed_by(keys, values)
