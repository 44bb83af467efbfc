"""Try every fault of the catalogue on two bundles and write the table of what was found into reports/README.md.

    python scripts/fault_table.py [FOLDER...] [--fault NAME]... [--output FILE] [--rows FILE.jsonl] [--workers N]

Beside the bundles given, a few are recorded from the reference: some faults need what no captured bundle has.
FOLDERs hold oracle bundles (by default oracles/). With --fault only these are tried and the table is printed, and where
FOLDERs are named as well, these are all that is looked at. With --rows every trial is appended to a file as it ends,
and trials that are in it are not tried again, so that it may be interrupted. --workers N processes try one each at a
time, each with its own model in memory; the table is the same. What a process died at is tried again.
Exit status: 0 when every fault is tried, detected and named, 1 otherwise.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from fault_trials import Rows, markdown, record_more, summary, try_faults, untried
from fault_workers import try_by_workers
from tables import README, replace_between

from parity.bundle.reading import find_bundles, read_bundle
from parity.cli.errors import one_line_errors
from parity.lance.faults import CATALOGUE, load_fault
from parity.report.runner import limit_threads
from parity.report.terminal import progress_bar

ORACLES = Path(__file__).parents[1] / "oracles"


def main(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of bundles.", show_default="oracles/")] = None,
    fault: Annotated[list[str] | None, typer.Option("--fault", metavar="NAME", help="Try only these.")] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="File that holds the table.")] = README,
    rows: Annotated[Path | None, typer.Option(metavar="FILE", help="File of the trials that have been made.")] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes that try faults.")] = 1,
) -> None:
    """Try the faults and write the table."""
    with one_line_errors():
        limit_threads()
        paths = find_bundles(folders or [Path("oracles")])
        by_name = {name: load_fault(name) for name in fault or CATALOGUE}
        faults = list(by_name.values())
        trials = []
        with tempfile.TemporaryDirectory() as folder, progress_bar(len(paths), "bundle") as start:
            if not (folders and fault):
                paths += record_more(Path(folder), ORACLES, start)
            left_out = untried(faults, [read_bundle(path) for path in paths])
            print("".join(f"{line}\n" for line in left_out), end="", file=sys.stderr)
            if workers == 1:
                tried = try_faults(paths, faults, start, Rows(rows))
            else:
                tried = try_by_workers(paths, by_name, start, Rows(rows), workers)
            for trial in tried:
                trials.append(trial)
                if trial.further:
                    print(f"{trial.fault.name} on {trial.bundle}: also {', '.join(trial.further)}", file=sys.stderr)
                if not (trial.detected and trial.named):
                    print(f"{trial.fault.name} on {trial.bundle}: found {trial.first or 'nothing'}", file=sys.stderr)
        table = markdown(trials)
        if fault:
            print(table, end="")
        else:
            replace_between(output, "faults", table)
        print(summary(trials))
        found = all(trial.detected and trial.named for trial in trials)
        raise typer.Exit(0 if trials and found and not left_out else 1)


if __name__ == "__main__":
    typer.run(main)
