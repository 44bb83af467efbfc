"""What was measured of quantizing, and what follows from it: shares, sizes, the frontier."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from parity.errors import ParityError
from parity.lance.sensitivity.budget import Choice, Option, frontier
from parity.lance.sensitivity.cases import Effect, Inputs
from parity.lance.sensitivity.groups import AS_IS, Group, options_of

CLEARLY = 0.8
"""Of a cost: runs that are nearer by less may be so by how bfloat16 rounded in them."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        widths: bits that are tried, rising.
        bands: of layers that are told apart.
        group_size: of weights that share a scale; smaller where rows do not part into such.
    """

    inputs: Inputs
    widths: tuple[int, ...] = (4, 6, 8)
    bands: int = 4
    group_size: int = 64


@dataclass(frozen=True)
class Solved:
    """A recipe within a budget.

    Attributes:
        bits: of each group, in their order.
        scaled: the groups that are quantized behind scales.
        size: bytes of the whole checkpoint.
        choice: how it was solved; its costs are shares of what the smallest width does.
        predicted: by the sum of its groups, and `measured`: by a run, what it does to each case.
        recipe: as convert --quant-predicate takes it.
    """

    bits: tuple[int, ...]
    scaled: tuple[str, ...]
    size: int
    choice: Choice
    predicted: tuple[float, ...]
    measured: tuple[Effect, ...]
    recipe: dict[str, Any]


@dataclass
class Measured:
    """What came of it.

    Attributes:
        single: what quantizing a group alone does to each case, by the group's name and bits.
        scaled: the same behind scales, of the groups for which any were found.
        pairs: of two groups at the smallest width, what both do over the sum of what each does.
        even: what all at one width do, by bits, and `even_scaled`: behind scales where they win.
        unread: groups that no case reads, which stay as they are.
        fixed: bytes of what belongs to no group.
    """

    plan: Plan
    groups: tuple[Group, ...]
    fixed: int
    single: dict[tuple[str, int], tuple[Effect, ...]] = field(default_factory=dict)
    scaled: dict[tuple[str, int], tuple[Effect, ...]] = field(default_factory=dict)
    pairs: dict[tuple[str, str], float] = field(default_factory=dict)
    even: dict[int, tuple[Effect, ...]] = field(default_factory=dict)
    even_scaled: dict[int, tuple[Effect, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    solved: Solved | None = None

    def cost(self, group: Group, bits: int) -> float:
        """A group's share, over all cases alike, of what all groups do at the smallest width; behind scales where
        they win."""
        return 0.0 if bits == AS_IS else self._share(self.effects(group, bits))

    def effects(self, group: Group, bits: int) -> tuple[Effect, ...]:
        """What quantizing a group alone does to each case, behind scales where they win."""
        return (self.scaled if self.wins(group, bits) else self.single)[group.name, bits]

    def wins(self, group: Group, bits: int) -> bool:
        """Whether quantizing a group does clearly less behind its scales, over all cases alike."""
        key = group.name, bits
        return key in self.scaled and self._share(self.scaled[key]) < CLEARLY * self._share(self.single[key])

    def winners(self, widths: Mapping[str, int]) -> set[str]:
        """The groups whose scales win at their widths."""
        return {each.name for each in self.groups if each.name in widths and self.wins(each, widths[each.name])}

    def _share(self, effects: tuple[Effect, ...]) -> float:
        shares = []
        for case, effect in enumerate(effects):
            total = sum(self.single[each.name, self.plan.widths[0]][case].cost for each in self.groups)
            if total:
                shares.append(effect.cost / total)
        return sum(shares) / len(shares) if shares else 0.0

    def cost_of_all(self, bits: int) -> float:
        """The share of all groups at one width, by their sum."""
        return sum(self.cost(group, bits) for group in self.groups if group.name not in self.unread)

    def told(self, case: int, cost: float) -> str:
        """A cost in words: the relative error of latents, or a divergence."""
        drawn = not self.plan.inputs.cases[case].request.task.answers
        return f"{100 * cost**0.5:.3g} %" if drawn else f"{cost:.3g} nats"

    @property
    def options(self) -> list[list[Option]]:
        """What each group may be: every width, and as it is; of one that nothing reads as it is alone."""
        found = []
        for group in self.groups:
            costs = {bits: self.cost(group, bits) for bits in (*self.plan.widths, AS_IS)}
            every = options_of(group, self.plan.widths, self.plan.group_size, costs)
            found.append(every[-1:] if group.name in self.unread else every)
        return found

    @property
    def frontier(self) -> list[tuple[int, float]]:
        """Bytes of the whole checkpoint, rising, and the least cost within each."""
        return [(self.fixed + size, cost) for size, cost in frontier(self.options)]

    def size(self, bits: int) -> int:
        """Bytes of the whole checkpoint at one width for all groups that are read."""
        widths = (AS_IS if group.name in self.unread else bits for group in self.groups)
        return self.fixed + sum(g.size(b, self.plan.group_size) for g, b in zip(self.groups, widths, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""

        def alone(found: Mapping[tuple[str, int], tuple[Effect, ...]]) -> list[dict[str, Any]]:
            return [{"group": name, "bits": bits, "effects": [asdict(each) for each in effects]}
                    for (name, bits), effects in found.items()]  # fmt: skip

        def everything(found: Mapping[int, tuple[Effect, ...]]) -> list[dict[str, Any]]:
            return [{"bits": bits, "bytes": self.size(bits), "effects": [asdict(each) for each in effects]}
                    for bits, effects in found.items()]  # fmt: skip

        return {
            "cases": [case.name for case in self.plan.inputs.cases],
            "groups": [{"name": g.name, "weights": g.weights, "unread": g.name in self.unread} for g in self.groups],
            "single": alone(self.single),
            "scaled": alone(self.scaled),
            "pairs": [{"groups": list(names), "over_sum": ratio} for names, ratio in self.pairs.items()],
            "even": everything(self.even),
            "even_scaled": everything(self.even_scaled),
            "frontier": [{"bytes": size, "cost": cost} for size, cost in self.frontier],
            "solved": self.solved and asdict(self.solved),
        }


def bytes_of(budget: str, measured: Measured) -> int:
    """Bytes of the whole checkpoint that a budget says: such as 7.5GB, or 5.2bits a weight of what can be quantized.

    Raises ParityError for anything else.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+) ?(GB|MB|kB|bits)", budget)
    if not match or not float(match[1]):
        raise ParityError(f"budget {budget!r} is neither a size, such as 7.5GB, nor bits a weight, such as 5.2bits")
    number, unit = float(match[1]), match[2]
    if unit != "bits":
        return int(number * {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit])
    read = [group for group in measured.groups if group.name not in measured.unread]
    unread = sum(g.size(AS_IS, measured.plan.group_size) for g in measured.groups if g not in read)
    return measured.fixed + unread + int(number / 8 * sum(group.weights for group in read))
