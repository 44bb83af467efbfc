"""Run right code under the settings of other processors, and count how often it is called wrong.

    python scripts/false_alarms.py [FOLDER...] [--settings NAME]... [--every N] [--output FILE]

FOLDERs hold oracle bundles (by default oracles/). Every bundle is run by both implementations as this machine is and
under the settings of parity.oracle.machines.settings, with one and with two threads, by `check` and by `localize`. With
--every N each setting gets every Nth bundle, the next setting those after them. Floors are those of this machine as it
is: no run gets floors of its own setting by itself.
Exit status: 0 when no run is called wrong and at least one was made, 1 otherwise.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from tables import README, replace_between, table, upper_bound

from parity.bundle.reading import find_bundles
from parity.cli.errors import one_line_errors
from parity.comparison.verdict import AGREE
from parity.errors import ParityError
from parity.oracle.machines import facts, machine, settings

PLAIN = "as it is"
THREADS = (1, 2)


def main(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of bundles.", show_default="oracles/")] = None,
    chosen: Annotated[list[str] | None, typer.Option("--settings", metavar="NAME", help="Only these.")] = None,
    every: Annotated[int, typer.Option(help="Give a setting only every Nth bundle.")] = 1,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="File that holds the table.")] = None,
) -> None:
    """Run the matrix and write the table."""
    with one_line_errors():
        paths = find_bundles(folders or [Path("oracles")])
        known = {PLAIN: {}} | settings()
        environments = {name: known[name] for name in chosen} if chosen else known
        # As it is comes first, and by itself: it measures the floors that the others are judged by.
        first = _run(PLAIN, {}, paths)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            rest = [(name, env) for name, env in environments.items() if name != PLAIN]
            shares = [(*item, paths[i % every :: every]) for i, item in enumerate(rest)]
            more = list(pool.map(lambda share: _run(*share), shares))
        runs = [*first, *(run for each in more for run in each)]
        wrong = [run for run in runs if run["verdict"] != AGREE]
        for run in wrong:
            print(f"{run['bundle']}, {run['setting']}, {run['impl']}, {run['command']}: {run['why']}", file=sys.stderr)
        rows = []
        for name in dict.fromkeys(run["setting"] for run in runs):
            for command in ("check", "localize"):
                own = [run for run in runs if (run["setting"], run["command"]) == (name, command)]
                rows.append((name, command, len(own), sum(run["verdict"] != AGREE for run in own)))
        bound = upper_bound(len(wrong), len(runs))
        text = f"{len(runs)} clean runs of {len(paths)} bundles on {facts()['processor']}, PyTorch "
        text += f"{facts()['torch']}; {len(wrong)} called wrong: at most {bound:.2%} (95 %).\n\n"
        text += table(("setting", "command", "runs", "called wrong"), rows)
        if output or not chosen:
            replace_between(output or README, "false_alarms", text)
        print(text, end="")
        raise typer.Exit(bool(wrong) or not runs)


def _run(name: str, environment: dict[str, str], paths: list[Path]) -> list[dict[str, str]]:
    """All bundles in a process with a setting."""
    command = [sys.executable, __file__, "--in-process", name, machine(), *map(str, paths)]
    # A waiting thread that spins takes its core from another process.
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | environment
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return [{"setting": name, "verdict": "died", "bundle": "", "impl": "", "command": "check", "why": "it died"}]
    return json.loads(done.stdout.splitlines()[-1])


def _checked(path: Path, impl: str) -> tuple[str, str]:
    from parity.comparison.check import check_bundle

    checked = check_bundle(path, impl)
    return checked.verdict, checked.reason or str(checked.first_divergence)


def _localized(path: Path, impl: str) -> tuple[str, str]:
    from parity.localize.investigation import localize

    found = localize(path, impl, hypotheses=())
    return found.verdict, found.reason or str(found.first and found.first.tap)


def in_process(name: str, measured_on: str, paths: list[str]) -> None:
    """Run the bundles in this process, with the floors of the machine that is named."""
    import torch

    from parity.oracle import floors_file
    from parity.ports.loading import known_ports

    floors_file.machine = lambda: measured_on
    runs = []
    for path in map(Path, paths):
        for impl in known_ports():
            for threads in THREADS:
                torch.set_num_threads(threads)
                for command, run in (("check", _checked), ("localize", _localized)):
                    try:
                        verdict, why = run(path, impl)
                    except ParityError as error:
                        verdict, why = "refused", str(error)
                    runs.append({"setting": name, "bundle": path.name, "impl": f"{impl} ({threads} threads)",
                                 "command": command, "verdict": verdict, "why": why})  # fmt: skip
        print(f"{name}: {path.name}", file=sys.stderr)
    print(json.dumps(runs))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-process"]:
        in_process(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        typer.run(main)
