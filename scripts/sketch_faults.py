"""Try faults of the catalogue on bundles of sketches, and count what is found as it is on the whole bundles.

    python scripts/sketch_faults.py [FOLDER...] [--every N]

FOLDERs hold oracle bundles (by default oracles/). Each is made into one of the level "sketch" first,
also the taps that are smaller than a sketch, as most are at the small width. With --every, only
every Nth fault is tried. Exit status: 0 when 95 % of what is named on the whole bundles is named from sketches too.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from fault_trials import plan, try_fault

from parity.bundle.reading import Bundle, find_bundles, read_bundle, write_bundle
from parity.cli.errors import one_line_errors
from parity.lance.faults import CATALOGUE
from parity.lance.ports import MlxPort
from parity.lance.retention import RetentionPolicy, parted
from parity.oracle.floors import measure
from parity.oracle.floors_file import FILE, write_floors
from parity.oracle.oracle import Oracle
from parity.report.runner import limit_threads
from parity.report.terminal import progress_bar
from parity.tensors.recording import DTYPES

ALIKE = 0.95


def sketched(oracle: Oracle, folder: Path) -> Bundle:
    """Write a bundle's taps as sketches, with floors that are measured by them."""
    bundle = oracle.bundle
    keeper = RetentionPolicy(oracle.layout, (), smallest=0)
    kept = {name: keeper(name, torch.from_numpy(tap.array).to(DTYPES[tap.dtype])) for name, tap in bundle.taps.items()}
    taps, sketches = parted(kept)
    for name in (bundle.checkpoint.name, "media"):
        if not (folder / name).exists():
            (folder / name).symlink_to(bundle.path.parent / name, target_is_directory=True)
    write_bundle(folder / bundle.name, bundle.manifest, bundle.inputs, taps, sketches)
    made = Oracle.of(read_bundle(folder / bundle.name))
    write_floors(made.bundle.path / FILE, made, measure(made))
    return made.bundle


def main(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of bundles.", show_default="oracles/")] = None,
    every: Annotated[int, typer.Option(help="Try only every Nth fault.")] = 1,
) -> None:
    """Try the faults on both."""
    with one_line_errors():
        limit_threads()
        bundles = [read_bundle(path) for path in find_bundles(folders or [Path("oracles")])]
        planned = plan(list(CATALOGUE.values())[::every], bundles)
        counts = dict.fromkeys(("tried", "detected whole", "detected", "named whole", "alike"), 0)
        taps = sketches = 0
        with tempfile.TemporaryDirectory() as folder, progress_bar(len(planned), "bundle") as start:
            for bundle, faults in planned:
                tell = start(bundle.name)
                oracle, port = Oracle.of(bundle), MlxPort(bundle)
                small = sketched(oracle, Path(folder))
                narrow = Oracle.of(small)
                taps, sketches = taps + len(small.expected), sketches + len(small.sketches)
                for fault in faults:
                    tell(fault.name)
                    exact = try_fault(fault, bundle, oracle, port)
                    found = try_fault(fault, small, narrow, port)
                    counts["tried"] += 1
                    counts["detected whole"] += exact.detected
                    counts["detected"] += found.detected
                    counts["named whole"] += exact.named
                    counts["alike"] += found.first == exact.first
                    if found.first != exact.first:
                        print(f"{fault.name} on {bundle.name}: {found.first or 'nothing'} from sketches, "
                              f"{exact.first or 'nothing'} from whole taps", file=sys.stderr)  # fmt: skip
        tried = max(counts["tried"], 1)
        print(f"{sketches} of {taps} taps sketched; " + ", ".join(f"{key} {count}" for key, count in counts.items()))
        print(f"{counts['alike'] / tried:.1%} localized to the same component as from whole taps")
        raise typer.Exit(0 if counts["alike"] >= ALIKE * tried and counts["tried"] else 1)


if __name__ == "__main__":
    typer.run(main)
