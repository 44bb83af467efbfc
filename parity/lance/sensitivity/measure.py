"""What quantizing does to whole runs: one group at a time, the worst two by two, and the recipe that comes of it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

from lance_mlx.backend.numerics import policy
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.pipeline import Pipeline, load
from lance_mlx.requests.request import Variant
from parity.errors import ParityError, one_line
from parity.files import write_atomically
from parity.lance.sensitivity.budget import Choice, Option, frontier, solve
from parity.lance.sensitivity.cases import Case, Effect, Inputs, Ran, effect, run
from parity.lance.sensitivity.groups import AS_IS, Group, as_quantized, groups_of, options_of, recipe_json
from parity.lance.weights_mlx import packed_modules

FORMAT = "lance-sensitivity/1"
WORST = 4
"""Groups that are measured two by two."""
Tell = Callable[[str, int, int], None]
"""Told what is run, how many runs are done, and how many there will be."""
Widths = Mapping[str, int]
"""Bits by a group's name; a group that is not named stays as it is."""


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
        size: bytes of the whole checkpoint.
        choice: how it was solved; its costs are shares of what the smallest width does.
        predicted: by the sum of its groups, and `measured`: by a run, what it does to each case.
        recipe: as convert --quant-predicate takes it.
    """

    bits: tuple[int, ...]
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
        pairs: of two groups at the smallest width, what both do over the sum of what each does.
        even: what all at one width do, by bits.
        unread: groups that no case reads, which stay as they are.
        fixed: bytes of what belongs to no group.
    """

    plan: Plan
    groups: tuple[Group, ...]
    fixed: int
    single: dict[tuple[str, int], tuple[Effect, ...]] = field(default_factory=dict)
    pairs: dict[tuple[str, str], float] = field(default_factory=dict)
    even: dict[int, tuple[Effect, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    solved: Solved | None = None

    def cost(self, group: Group, bits: int) -> float:
        """A group's share, over all cases alike, of what all groups do at the smallest width."""
        if bits == AS_IS:
            return 0.0
        shares = []
        for case in range(len(self.plan.inputs.cases)):
            total = sum(self.single[each.name, self.plan.widths[0]][case].cost for each in self.groups)
            if total:
                shares.append(self.single[group.name, bits][case].cost / total)
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
        return {
            "cases": [case.name for case in self.plan.inputs.cases],
            "groups": [{"name": g.name, "weights": g.weights, "unread": g.name in self.unread} for g in self.groups],
            "single": [{"group": name, "bits": bits, "effects": [asdict(each) for each in effects]}
                       for (name, bits), effects in self.single.items()],
            "pairs": [{"groups": list(names), "over_sum": ratio} for names, ratio in self.pairs.items()],
            "even": [{"bits": bits, "bytes": self.size(bits), "effects": [asdict(each) for each in effects]}
                     for bits, effects in self.even.items()],
            "frontier": [{"bytes": size, "cost": cost} for size, cost in self.frontier],
            "solved": self.solved and asdict(self.solved),
        }  # fmt: skip


class Session:
    """Measurements of one model, kept in a file as they are made, so that one that was ended goes on.

    Args:
        kept: the file; what it holds must be of the same model and cases.
    """

    def __init__(self, plan: Plan, kept: Path, tell: Tell) -> None:
        self.plan, self._kept, self._tell = plan, kept, tell
        inputs = plan.inputs
        with one_line(f"{inputs.model} cannot be measured"):
            looks = any(case.request.task.takes is not None for case in inputs.cases)
            self.pipeline: Pipeline = load(inputs.model, Variant(inputs.variant), policy(inputs.dtype), looks)
        if packed_modules(self.pipeline.model):
            raise ParityError(f"{inputs.model} is quantized already: name the one that it was made from")
        self.groups = tuple(groups_of(self.pipeline.model, plan.bands, plan.group_size))
        if not self.groups:
            raise ParityError(f"no rows of {inputs.model} part into groups of {plan.group_size} or 32")
        self._facts = {
            "model": str(inputs.model),
            "files": sorted([str(f.relative_to(inputs.model)), f.stat().st_size, f.stat().st_mtime_ns]
                            for f in inputs.model.rglob("*") if f.is_file() and f.suffix in (".safetensors", ".pth")),
            "cases": [[case.name, case.request.to_dict()] for case in inputs.cases],
            "numerics": inputs.dtype,
            "bands": plan.bands,
            "group_size": plan.group_size,
        }  # fmt: skip
        # As JSON has it: tuples are lists there.
        self._facts = json.loads(json.dumps(self._facts))
        self._runs: dict[str, list[Effect]] = self._read()
        self._base: dict[str, Ran] = {}
        self._done, self._total = 0, 0

    def run(self, budget: "str | None") -> Measured:
        """Measure every group at every width, pairs of the worst, all at one width, and the recipe of a budget."""
        plan, smallest = self.plan, self.plan.widths[0]
        count = min(WORST, len(self.groups))
        self._total = len(self.groups) * len(plan.widths) + count * (count - 1) // 2 + len(plan.widths) + bool(budget)
        measured = Measured(plan, self.groups, self._fixed())
        for group in self.groups:
            for bits in plan.widths:
                measured.single[group.name, bits] = self.effects({group.name: bits})
        measured.unread = tuple(group.name for group in self.groups if not any(
            each.cost for bits in plan.widths for each in measured.single[group.name, bits]))  # fmt: skip
        if len(measured.unread) == len(self.groups):
            raise ParityError("quantizing changes nothing in these runs")
        worst = sorted(self.groups, key=lambda group: -measured.cost(group, smallest))[:count]
        for one, other in combinations([group for group in worst if group.name not in measured.unread], 2):
            both = self.effects({one.name: smallest, other.name: smallest})
            alone = [measured.single[each.name, smallest] for each in (one, other)]
            ratios = [b.cost / (x.cost + y.cost) for b, x, y in zip(both, *alone, strict=True) if x.cost + y.cost]
            measured.pairs[one.name, other.name] = sum(ratios) / len(ratios)
        for bits in plan.widths:
            measured.even[bits] = self.effects({g.name: bits for g in self.groups if g.name not in measured.unread})
        if budget:
            measured.solved = self._solve(measured, bytes_of(budget, measured))
        return measured

    def effects(self, widths: Widths) -> tuple[Effect, ...]:
        """What groups at some widths do to each case; kept where it was measured before."""
        key = ", ".join(f"{name}: {bits}" for name, bits in sorted(widths.items()))
        self._tell(key if len(widths) < 3 else f"{len(widths)} groups", self._done, self._total)
        self._done += 1
        if key not in self._runs:
            schemes = {path: scheme for group in self.groups if group.name in widths
                       for path, scheme in group.schemes(widths[group.name], self.plan.group_size).items()}  # fmt: skip
            bases = [self._baseline(case) for case in self.plan.inputs.cases]
            with as_quantized(self.pipeline.model, schemes):
                self._runs[key] = [effect(base, self._ran(case, base.tokens or None))
                                   for case, base in zip(self.plan.inputs.cases, bases, strict=True)]  # fmt: skip
            self._keep()
        return tuple(self._runs[key])

    def _baseline(self, case: Case) -> Ran:
        if case.name not in self._base:
            self._base[case.name] = self._ran(case, None)
        return self._base[case.name]

    def _ran(self, case: Case, tokens: Sequence[int] | None) -> Ran:
        with one_line(f"mlx cannot run {case.name}"):
            return run(case, self.pipeline, tokens)

    def _solve(self, measured: Measured, room: int) -> Solved:
        choice = solve(measured.options, room - measured.fixed)
        every = (*self.plan.widths, AS_IS)
        bits = tuple(AS_IS if group.name in measured.unread else every[index]
                     for group, index in zip(self.groups, choice.picked, strict=True))  # fmt: skip
        if set(bits) == {AS_IS}:
            raise ParityError("the budget holds all the weights as they are: nothing needs to be quantized")
        widths = {group.name: b for group, b in zip(self.groups, bits, strict=True) if b < AS_IS}
        alone = [measured.single[each] for each in widths.items()]
        predicted = tuple(sum(each[case].cost for each in alone) for case in range(len(self.plan.inputs.cases)))
        ran = self.effects(widths)
        recipe = recipe_json(self.groups, bits, self.plan.group_size)
        return Solved(bits, measured.fixed + choice.size, choice, predicted, ran, recipe)

    def _fixed(self) -> int:
        """Bytes in bfloat16 of what no group holds, of the whole checkpoint."""
        with one_line(f"{self.plan.inputs.model} cannot be measured"):
            checkpoint = find_checkpoint(self.plan.inputs.model, Variant(self.plan.inputs.variant))
            parts = checkpoint.lance(), checkpoint.vit(ViTSource.LANCE), checkpoint.vae()
            total = sum(2 * prod(tensor.shape) for part in parts for tensor in part.tensors.values())
        return total - sum(group.size(AS_IS, self.plan.group_size) for group in self.groups)

    def _read(self) -> dict[str, list[Effect]]:
        if not self._kept.exists():
            return {}
        try:
            held = json.loads(self._kept.read_text(encoding="utf-8"))
            ours = isinstance(held, dict) and held.get("format") == FORMAT
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise ParityError(f"{self._kept} holds no measurements of this command: name another folder with --out")
        if held["facts"] != self._facts:
            raise ParityError(f"{self._kept} holds measurements of other runs or another model: name another --out")
        return {key: [Effect(each["cost"], tuple(each["steps"])) for each in effects]
                for key, effects in held["runs"].items()}  # fmt: skip

    def _keep(self) -> None:
        runs = {key: [asdict(each) for each in effects] for key, effects in self._runs.items()}
        document = {"format": FORMAT, "facts": self._facts, "runs": runs}
        write_atomically(self._kept, json.dumps(document, indent=1).encode())


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
