"""Try every fault of training on a bundle in which it shows and print the table of what was found.

    python scripts/training_faults.py [FOLDER] [--fault NAME]... [--output FILE]

FOLDER holds oracles of training, by default ../shared/oracles/training. Every bundle is run clean first. With --output
the table goes between two comments of that file.
Exit status: 0 when nothing is found in clean runs and every fault is found and named, 1 otherwise.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from tables import replace_between, table

from parity.bundle.reading import find_bundles
from parity.cli.errors import one_line_errors
from parity.comparison.verdict import AGREE
from parity.errors import ParityError
from parity.lance.ports import PORTS
from parity.lance.training.bundle import read_training_bundle
from parity.lance.training.faults import CATALOGUE, TrainingFault
from parity.lance.training.localize import findings_of, localize_training
from parity.report.runner import limit_threads

FOLDER = Path(__file__).parents[2] / "shared" / "oracles" / "training"
HEADS = ("fault", "bundle", "wrong first", "cause", "findings", "named")


def named(fault: TrainingFault, found: Sequence[tuple[str, str]]) -> bool:
    """Whether the first finding is the fault's component and says its cause."""
    return bool(found) and fnmatchcase(found[0][0], fault.component) and bool(re.search(fault.explanation, found[0][1]))


def trials(paths: Sequence[Path], faults: Sequence[TrainingFault]) -> Iterator[tuple[object, ...]]:
    """A row of HEADS for each clean run and each fault, on the smallest float32 bundle in which it shows."""
    bundles = sorted(
        (read_training_bundle(path) for path in paths), key=lambda each: len(each.outputs["hidden_in"].array)
    )
    for bundle in bundles:
        found = localize_training(bundle.path, PORTS["mlx"])
        yield "none", bundle.name, *(next(findings_of(found), ("", found.reason))), len(found.findings), (
            "yes" if found.verdict == AGREE else "no")  # fmt: skip
    for fault in faults:
        bundle = next((b for b in bundles if b.dtype == "float32" and fault.suits(b)), None)
        if bundle is None:
            yield fault.name, "", "", f"no bundle {fault.needs}", 0, "no"
            continue
        found = list(findings_of(localize_training(bundle.path, PORTS["mlx"], [fault.name])))
        first = found[0] if found else ("", "")
        yield fault.name, bundle.name, *first, len(found), "yes" if named(fault, found) else "no"


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of oracles of training.")] = FOLDER,
    fault: Annotated[list[str] | None, typer.Option("--fault", metavar="NAME", help="Try only these.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="File that holds the table.")] = None,
) -> None:
    """Try the faults and print the table."""
    with one_line_errors():
        limit_threads()
        if unknown := [name for name in fault or [] if name not in CATALOGUE]:
            raise ParityError(f"there is no fault of training {unknown[0]!r}: name one of {', '.join(CATALOGUE)}")
        rows = list(trials(find_bundles([folder]), [CATALOGUE[name] for name in fault or CATALOGUE]))
        if output:
            replace_between(output, "training faults", table(HEADS, rows))
        else:
            print(table(HEADS, rows), end="")
        raise typer.Exit(0 if rows and all(row[-1] == "yes" for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
