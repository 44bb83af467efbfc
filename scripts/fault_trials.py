"""The catalogue of faults put to the test: is each found, named and explained, on more than one bundle?"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from parity.bundle.reading import Bundle, read_bundle
from parity.comparison.verdict import DIVERGE
from parity.errors import ParityError
from parity.lance.faults import CATALOGUE, Fault
from parity.lance.faults.quantization import PACKED
from parity.lance.hypotheses import HYPOTHESES
from parity.lance.packed import write_dequantized
from parity.lance.ports import MlxPort
from parity.lance.record import record, record_again
from parity.lance.record_options import Options, build_request
from parity.localize.findings import Localization
from parity.localize.investigation import Investigation
from parity.oracle.floors import measure
from parity.oracle.floors_file import FILE, write_floors
from parity.oracle.oracle import Oracle

# Bundles that each fault is tried on.
BUNDLES = 2


@dataclass(frozen=True)
class Trial:
    """One fault on one bundle.

    Attributes:
        detected: the verdict was diverge.
        named: the first finding is about the component that the fault breaks.
        explained: the right explanation ranks first, alone or with others that do the same there; None where none is
            known of the fault.
        first: component of the first finding.
        why: its first explanation, and others that do the same there.
        further: components of other findings that are none that the fault breaks.
    """

    fault: Fault
    bundle: str
    detected: bool
    named: bool
    explained: bool | None
    first: str
    why: str
    seconds: float
    further: tuple[str, ...] = ()


def row_of(trial: Trial) -> dict[str, Any]:
    """A trial as plain JSON values, with the fault's name."""
    return {field.name: getattr(trial, field.name) for field in fields(trial)} | {"fault": trial.fault.name}


def trial_of(row: Mapping[str, Any], fault: Fault) -> Trial:
    """The trial that a row is of."""
    return Trial(**(dict(row) | {"fault": fault, "further": tuple(row["further"])}))


@dataclass
class Rows:
    """Trials that have been made, kept in a file where one is given: a JSON object each, with the fault's name."""

    path: Path | None = None

    def __post_init__(self) -> None:
        self._made: dict[tuple[str, str], Trial] = {}
        if self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                values = json.loads(line)
                fault = CATALOGUE.get(values["fault"])
                if fault is not None:
                    self._made[fault.name, values["bundle"]] = trial_of(values, fault)

    def of(self, fault: Fault, bundle: str) -> Trial | None:
        """What is known of a fault on a bundle."""
        return self._made.get((fault.name, bundle))

    def keep(self, trial: Trial) -> Trial:
        """Append a trial."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row_of(trial)) + "\n")
        return trial


# Requests that no embedded bundle has and some faults need: steps that are not guided, more than one attention window
# in the ViT, many of them, given frames, pictures that are not square.
_SMALL = {"steps": 4, "vae_resolution": 64}
_DRAWN = {"prompt": "a bird", "width": 64, "height": 48}
_WINDOWED = {"vit_resolution": 224, **_SMALL}
_QUESTION = {"question": "what is on the fence", "vit_resolution": 224, "max_new_tokens": 4}
RECORDED = {
    "t2i-unguided": ("t2i", "float32", {**_DRAWN, "guidance_interval": (0.8, 1.0)}),
    "t2v-unguided": ("t2v", "bfloat16", {**_DRAWN, "num_frames": 9, "guidance_interval": (0.8, 1.0)}),
    "image_edit-windows": ("image_edit", "float32", {"prompt": "make it blue", **_WINDOWED}),
    "image_edit-bf16-windows": ("image_edit", "bfloat16", {"prompt": "make it blue", **_WINDOWED}),
    "x2t_image-windows": ("x2t_image", "float32", _QUESTION),
    "x2t_image-bf16-windows": ("x2t_image", "bfloat16", _QUESTION),
    "i2v-fp32": ("i2v", "float32", {"prompt": "a bird", "num_frames": 9, **_SMALL}),
    "i2v-bf16": ("i2v", "bfloat16", {"prompt": "a bird", "num_frames": 9, **_SMALL}),
    "idip-fp32": ("image_idip", "float32", {**_DRAWN, **_WINDOWED}),
    "x2t_image-bf16-large": ("x2t_image", "bfloat16", {**_QUESTION, "vit_resolution": 672, "max_new_tokens": 1}),
    "image_edit-bf16-large": ("image_edit", "bfloat16", {"prompt": "make it blue", **_SMALL, "vit_resolution": 672}),
}
QUANTIZED = {"t2i-fp32-kv": "t2i-fp32-packed", "x2t_image-bf16-kv": "x2t_image-bf16-packed"}
"""Embedded bundles whose requests are recorded with quantized weights, and what those are called."""
TOWERS = {"bits": 4, "group_size": 32, "*_moe_gen*": {"bits": 8, "group_size": 32}}
"""A recipe in which each tower has its own width."""


def record_more(folder: Path, oracles: Path, start: Callable[[str], Callable[[str], None]]) -> list[Path]:
    """Record the requests of RECORDED from the reference into a folder, with checkpoint and media of oracles."""
    paths = []
    for name, (task, dtype, values) in RECORDED.items():
        images = () if task in ("t2i", "t2v") else (oracles / "media" / "garden.png",)
        steps = {} if task.startswith("x2t") else {"steps": 4}
        request = build_request(task, Options(images=images, **(steps | values)))
        tell = start(name)
        path = record(folder / name, oracles / "checkpoint-a", request, dtype=dtype, progress=tell)
        _keep_floors(path, tell)
        paths.append(path)
    recipe = folder / "towers.json"
    recipe.write_text(json.dumps(TOWERS), encoding="utf-8")
    for source, name in QUANTIZED.items():
        tell, bundle = start(name), read_bundle(oracles / source)
        place = folder / f"{name}-checkpoint"
        checkpoint = write_dequantized(place, bundle.checkpoint, bundle.variant, str(recipe), bundle.dtype)
        paths.append(record_again(folder / name, bundle, checkpoint, tell))
        _keep_floors(paths[-1], tell)
    return paths


def _keep_floors(path: Path, tell: Callable[[str], None]) -> None:
    oracle = Oracle.of(read_bundle(path))
    write_floors(path / FILE, oracle, measure(oracle, tell))


def plan(faults: Iterable[Fault], bundles: Sequence[Bundle]) -> list[tuple[Bundle, list[Fault]]]:
    """Which faults are tried on which bundles: each on BUNDLES of those that it touches, spread over all of them."""
    load = {bundle.path: 0 for bundle in bundles}
    chosen: dict[Path, list[Fault]] = {bundle.path: [] for bundle in bundles}
    for fault in faults:
        # Of packed weights other faults may reach nothing.
        whole = [each for each in bundles if fault.needs is PACKED or each.path.name not in QUANTIZED.values()]
        fit = [bundle for bundle in whole if fault.suits(bundle)]
        # The second bundle is of another task where there is one.
        picked: list[Bundle] = []
        for _ in range(min(BUNDLES, len(fit))):
            rest = [bundle for bundle in fit if bundle not in picked]
            rest.sort(key=lambda b: (b.task in {p.task for p in picked}, load[b.path]))
            picked.append(rest[0])
            load[rest[0].path] += 1
        for bundle in picked:
            chosen[bundle.path].append(fault)
    return [(bundle, chosen[bundle.path]) for bundle in bundles if chosen[bundle.path]]


def untried(faults: Iterable[Fault], bundles: Sequence[Bundle]) -> list[str]:
    """Say of each fault that shows in none of the bundles what it would need, in a line."""
    lines = []
    for fault in faults:
        if not any(fault.suits(bundle) for bundle in bundles):
            runs = f"a {'/'.join(sorted(fault.tasks))} run in {' or '.join(fault.dtypes)}"
            besides = f", {fault.needs.words}" if fault.needs else ""
            lines.append(f"{fault.name} is not tried: it needs {runs}{besides}")
    return lines


def try_faults(
    paths: Sequence[Path],
    faults: Sequence[Fault],
    start: Callable[[str], Callable[[str], None]],
    rows: Rows | None = None,
) -> Iterator[Trial]:
    """Try every fault on its bundles, but for trials that have been made; each bundle's oracle and model are loaded
    once.

    `start` is told the name of each bundle and returns the callback for its progress.
    """
    for bundle, chosen in plan(faults, [read_bundle(path) for path in paths]):
        tell, loaded, rows = start(bundle.name), None, rows or Rows()
        for fault in chosen:
            tell(fault.name)
            if (made := rows.of(fault, bundle.name)) is not None:
                yield made
                continue
            oracle, port = loaded = loaded or (Oracle.of(bundle), MlxPort(bundle))
            yield rows.keep(try_fault(fault, bundle, oracle, port))


def try_fault(fault: Fault, bundle: Bundle, oracle: Oracle, port: MlxPort) -> Trial:
    """Localize one fault on one bundle."""
    try:
        found = Investigation(bundle, oracle, port, [fault], HYPOTHESES, _say_nothing, thorough=False).run()
    except ParityError as error:
        explained = None if fault.explanation is None else False
        return Trial(fault, bundle.name, False, False, explained, str(error), "", 0.0)
    return judge(fault, found)


def _say_nothing(what: str) -> None:
    """The progress of a single trial is of no interest."""


def judge(fault: Fault, found: Localization) -> Trial:
    """Whether a localization tells what a fault did."""
    first = found.first
    why = first.cause_names if first else ""
    return Trial(
        fault=fault,
        bundle=found.bundle,
        detected=found.verdict == DIVERGE,
        named=first is not None and fnmatchcase(first.component, fault.component),
        explained=None if fault.explanation is None else bool(first and first.explained and fault.explanation in why),
        first=first.component if first else "",
        why=why if first and first.explained else f"({why})" if why else "",
        seconds=found.seconds or 0.0,
        further=tuple(f.component for f in found.findings[1:] if not fnmatchcase(f.component, fault.component)),
    )


def summary(trials: Sequence[Trial]) -> str:
    """Say in a few words how many faults were found, named and explained."""
    covered = [trial for trial in trials if trial.explained is not None]
    return (
        f"{len({trial.fault.name for trial in trials})} faults, {len(trials)} trials: "
        f"{_share(trial.detected for trial in trials)} detected, "
        f"{_share(trial.named for trial in trials)} with the right component first, "
        f"{_share(trial.explained for trial in covered)} of the {len(covered)} that a hypothesis covers with the right "
        f"explanation first; {sum(bool(trial.further) for trial in trials)} with a finding about another component"
    )


def markdown(trials: Sequence[Trial]) -> str:
    """Return the table, and the summary before it, in Markdown."""
    lines = [summary(trials) + ".", "", "| fault | bundle | first finding | explanation | found | named | explained |"]
    lines.append("|---|---|---|---|---|---|---|")
    signs = {True: "✓", False: "✗", None: "–"}
    for trial in sorted(trials, key=lambda t: (t.fault.name, t.bundle)):
        marks = (signs[trial.detected], signs[trial.named], signs[trial.explained])
        cells = (trial.fault.name, trial.bundle, f"`{trial.first}`" if trial.first else "–", trial.why or "–", *marks)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(values: Iterable[bool | None]) -> str:
    listed = [bool(value) for value in values]
    return f"{sum(listed) / len(listed):.1%}" if listed else "none"
