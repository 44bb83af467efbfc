"""The choice of one option for each group with the least cost within a budget: a knapsack, solved by size."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd, inf

import numpy as np

from parity.bundle.store import sizes
from parity.errors import ParityError

CELLS = 1 << 18
"""Sizes that are told apart at most; with more, sizes are rounded, and what that may lose is told."""


@dataclass(frozen=True)
class Option:
    """What a group may be: its bytes and its cost."""

    size: int
    cost: float


@dataclass(frozen=True)
class Choice:
    """One option of each group.

    Attributes:
        picked: the number of each group's option.
        bound: the least cost that any choice within the budget could have; `cost` itself where the solution is exact.
    """

    picked: tuple[int, ...]
    size: int
    cost: float
    bound: float


def solve(groups: Sequence[Sequence[Option]], budget: int) -> Choice:
    """The choice of least cost whose sizes add up to at most a budget; raises ParityError where none does."""
    least = sum(min(each.size for each in options) for options in groups)
    if budget < least:
        raise ParityError(f"the budget is too small by {sizes(least - budget)} for these widths")
    unit = _unit(groups)
    picked, cost = _table(groups, unit, round_up=True).best(budget)
    size = sum(options[i].size for options, i in zip(groups, picked, strict=True))
    exact = all(each.size % unit == options[0].size % unit for options in groups for each in options)
    bound = cost if exact else _table(groups, unit, round_up=False).best(budget)[1]
    return Choice(picked, size, cost, bound)


def frontier(groups: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """Sizes, rising, and the least cost within each, falling; sizes to within the rounding of CELLS."""
    table = _table(groups, _unit(groups), round_up=True)
    found: list[tuple[int, float]] = []
    for cell, cost in enumerate(table.costs.tolist()):
        if cost < (found[-1][1] if found else inf):
            found.append((table.base + cell * table.unit, cost))
    return found


def _unit(groups: Sequence[Sequence[Option]]) -> int:
    steps = [each.size - options[0].size for options in groups for each in options]
    span = sum(max(o.size for o in options) - min(o.size for o in options) for options in groups)
    unit = reduce(gcd, steps, 0) or 1
    return unit if span // unit < CELLS else -(-span // (CELLS - len(groups)))


@dataclass(frozen=True, eq=False)
class _Table:
    """The least cost of exactly so many units beyond the smallest sizes, and each group's option there."""

    base: int
    unit: int
    costs: np.ndarray
    options: np.ndarray
    steps: Sequence[Sequence[int]]

    def best(self, budget: int) -> tuple[tuple[int, ...], float]:
        cells = min((budget - self.base) // self.unit, len(self.costs) - 1)
        cell = int(np.argmin(self.costs[: cells + 1]))
        cost, picked = float(self.costs[cell]), []
        for options, steps in zip(self.options[::-1], self.steps[::-1], strict=True):
            picked.append(int(options[cell]))
            cell -= steps[picked[-1]]
        return tuple(picked[::-1]), cost


def _table(groups: Sequence[Sequence[Option]], unit: int, round_up: bool) -> _Table:
    smallest = [min(each.size for each in options) for options in groups]
    steps = [[-(-(o.size - least) // unit) if round_up else (o.size - least) // unit for o in options]
             for options, least in zip(groups, smallest, strict=True)]  # fmt: skip
    count = sum(map(max, steps)) + 1
    costs = np.full(count, inf)
    costs[0] = 0.0
    chosen = np.zeros((len(groups), count), np.uint8)
    for number, (options, own) in enumerate(zip(groups, steps, strict=True)):
        new = np.full(count, inf)
        for index, (option, step) in enumerate(zip(options, own, strict=True)):
            moved = np.full(count, inf)
            moved[step:] = costs[: count - step] + option.cost
            better = moved < new
            new[better] = moved[better]
            chosen[number, better] = index
        costs = new
    return _Table(sum(smallest), unit, costs, chosen, steps)
