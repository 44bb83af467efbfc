"""The command lance-parity port: a pair of models of anybody's."""

import json
from pathlib import Path
from typing import Annotated

import typer

from parity.cli.errors import one_line_errors
from parity.cli.results import FormatOption, OutputOption, check_outputs, deliver, report_option

REPORTS = Path("reports/port")


def register(app: typer.Typer) -> None:
    """Add the command to an app."""
    app.command(epilog="Exit status: 0 agrees, 1 diverges, 2 inconclusive or unusable.")(port)


def port(
    pair: Annotated[Path, typer.Argument(metavar="PAIR.py", help="A Python file with a function pair(dtype).")],
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32 or bfloat16: what pair() is asked for.")
    ] = "float32",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.", show_default=False)
    ] = None,
    report: Annotated[Path | None, report_option(f"{REPORTS}/PAIR")] = None,
    form: FormatOption = None,
    output: OutputOption = None,
) -> None:
    """Compare a port of any model to MLX with the PyTorch model that it is a port of.

    The file's pair(dtype) returns a parity.Pair: both models with the same weights, and what they are given. Every part
    of the port is given what the trusted model's is given, and what comes of it is held against that; how far apart
    right code may be is measured. What is wrong by itself is listed in order, with what it does instead.
    """
    with one_line_errors():
        from parity.comparison.verdict import AGREE, DIVERGE, UNUSABLE
        from parity.errors import ParityError
        from parity.files import write_atomically
        from parity.pairs.localize import localize_pair
        from parity.pairs.pair import load_pair
        from parity.report.localization_page import write_localization
        from parity.report.runner import limit_threads
        from parity.report.terminal import progress_bar
        from parity.report.terminal_localize import print_localization

        limit_threads()
        report = report or REPORTS / pair.stem
        check_outputs(form, output, json_file, report=report)
        for written in filter(None, (json_file, output)):
            if written.is_file() and written.suffix != ".json" or written.resolve() == pair.resolve():
                raise ParityError(f"{written} is there already, and no result of this command: choose another name")
        try:
            with progress_bar(1, "pair") as start:
                tell = start(pair.stem)
                tell("models")
                found = localize_pair(load_pair(pair, dtype), pair.stem, progress=tell)
        except ParityError as error:
            if json_file:
                document = {"verdict": UNUSABLE, "reason": str(error), "findings": [], "bundle": pair.stem}
                write_atomically(json_file, json.dumps(document, indent=1).encode())
            raise
        if json_file:
            write_atomically(json_file, json.dumps(found.to_json(), indent=1, allow_nan=False).encode())
        page = write_localization(report, found)
        if not deliver(found, form, output):
            print_localization(found)
            print(page)
        raise typer.Exit({AGREE: 0, DIVERGE: 1}.get(found.verdict, 2))
