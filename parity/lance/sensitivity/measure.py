"""What quantizing does to whole runs: one group at a time, the worst two by two, and the recipe that comes of it."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lance_mlx.backend.numerics import policy
from lance_mlx.checkpoint.folding import followers
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.pipeline import Pipeline, load
from lance_mlx.requests.request import Variant
from parity.errors import ParityError, one_line
from parity.files import write_atomically
from parity.lance.sensitivity.budget import solve
from parity.lance.sensitivity.calibrate import Scales, calibrated, recorded
from parity.lance.sensitivity.cases import Case, Effect, Ran, effect, run
from parity.lance.sensitivity.groups import AS_IS, as_quantized, groups_of, recipe_json
from parity.lance.sensitivity.measured import Measured, Plan, Solved, bytes_of
from parity.lance.weights_mlx import packed_modules

FORMAT = "lance-sensitivity/1"
FOUND = "calibration.safetensors"
"""Beside the measurements: all scales that were found, whether they win in runs or not."""
WORST = 4
"""Groups that are measured two by two."""
Tell = Callable[[str, int, int], None]
"""Told what is run, how many runs are done, and how many there will be."""
Widths = Mapping[str, int]
"""Bits by a group's name; a group that is not named stays as it is."""


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
        self._scales: Scales = {}
        self._done, self._total = 0, 0

    def run(self, budget: str | None, calibrate: bool = False) -> Measured:
        """Measure every group at every width, pairs of the worst, all at one width, and the recipe of a budget.

        Args:
            calibrate: search for scales too, and measure every group behind its own; see sensitivity.calibrate.
        """
        plan, smallest = self.plan, self.plan.widths[0]
        count = min(WORST, len(self.groups))
        self._total = len(self.groups) * len(plan.widths) + count * (count - 1) // 2 + len(plan.widths) + bool(budget)
        measured = Measured(plan, self.groups, self._fixed())
        if calibrate:
            self._scales = self._calibrated()
        scalable = [group for group in self.groups if self.scales_of([group.name])]
        self._total += len(plan.widths) * (len(scalable) + bool(scalable))
        for group in self.groups:
            for bits in plan.widths:
                measured.single[group.name, bits] = self.effects({group.name: bits})
                if group in scalable:
                    measured.scaled[group.name, bits] = self.effects({group.name: bits}, [group.name])
        measured.unread = tuple(group.name for group in self.groups if not any(
            each.cost for bits in plan.widths for each in measured.single[group.name, bits]))  # fmt: skip
        if len(measured.unread) == len(self.groups):
            raise ParityError("quantizing changes nothing in these runs")
        worst = sorted(self.groups, key=lambda group: -measured.cost(group, smallest))[:count]
        for one, other in combinations([group for group in worst if group.name not in measured.unread], 2):
            widths = {one.name: smallest, other.name: smallest}
            both = self.effects(widths, measured.winners(widths))
            alone = [measured.effects(each, smallest) for each in (one, other)]
            ratios = [b.cost / (x.cost + y.cost) for b, x, y in zip(both, *alone, strict=True) if x.cost + y.cost]
            measured.pairs[one.name, other.name] = sum(ratios) / len(ratios)
        for bits in plan.widths:
            widths = {group.name: bits for group in self.groups if group.name not in measured.unread}
            measured.even[bits] = self.effects(widths)
            if winners := measured.winners(widths):
                measured.even_scaled[bits] = self.effects(widths, winners)
        if budget:
            measured.solved = self._solve(measured, bytes_of(budget, measured))
        return measured

    def scales_of(self, names: Collection[str]) -> Scales:
        """The scales that were found for groups of some names."""
        paths = {path for group in self.groups if group.name in names for path in group.shapes}
        return {source: scales for source, scales in self._scales.items() if paths.issuperset(followers(source))}

    def effects(self, widths: Widths, scaled: Collection[str] = ()) -> tuple[Effect, ...]:
        """What groups at some widths do to each case, those of some names behind scales; kept where it was measured
        before."""
        words = (f"{name}: {bits}" + (" scaled" if name in scaled else "") for name, bits in sorted(widths.items()))
        key = ", ".join(words)
        self._tell(key if len(widths) < 3 else f"{len(widths)} groups", self._done, self._total)
        self._done += 1
        if key not in self._runs:
            schemes = {path: scheme for group in self.groups if group.name in widths
                       for path, scheme in group.schemes(widths[group.name], self.plan.group_size).items()}  # fmt: skip
            scales = {path: each for source, each in self.scales_of(scaled).items() for path in followers(source)}
            bases = [self._baseline(case) for case in self.plan.inputs.cases]
            with as_quantized(self.pipeline.model, schemes, scales):
                self._runs[key] = [effect(base, self._ran(case, base.tokens or None))
                                   for case, base in zip(self.plan.inputs.cases, bases, strict=True)]  # fmt: skip
            self._keep()
        return tuple(self._runs[key])

    def _calibrated(self) -> Scales:
        """The scales that win on what layers are given in these runs; kept beside the measurements."""
        path = self._kept.with_name(FOUND)
        facts = {"facts": hashlib.sha256(json.dumps(self._facts).encode()).hexdigest()}
        if path.exists():
            try:
                with safe_open(path, "np") as held:
                    ours, found = held.metadata() == facts, {name: held.get_tensor(name) for name in held.keys()}
            except (OSError, SafetensorError):
                ours = False
            if not ours:
                raise ParityError(f"{path} holds no scales of these runs: name another folder with --out")
            return found
        self._tell("what layers are given", self._done, self._total)
        with recorded(self.pipeline.model) as kept:
            for case in self.plan.inputs.cases:
                self._baseline(case)
        total, done = self._total, iter(range(1, len(kept) + 1))
        found = calibrated(self.pipeline.model, kept, self.plan.group_size,
                           lambda: self._tell(f"scales, {next(done)} of {len(kept)}", self._done, total))  # fmt: skip
        write_atomically(path, save(found, facts))
        return found

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
        used = [(group, b) for group, b in zip(self.groups, bits, strict=True) if b < AS_IS]
        widths = {group.name: b for group, b in used}
        scaled, alone = sorted(measured.winners(widths)), [measured.effects(*each) for each in used]
        predicted = tuple(sum(each[case].cost for each in alone) for case in range(len(self.plan.inputs.cases)))
        ran = self.effects(widths, scaled)
        recipe = recipe_json(self.groups, bits, self.plan.group_size)
        return Solved(bits, tuple(scaled), measured.fixed + choice.size, choice, predicted, ran, recipe)

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
