"""The command lance-parity port: a pair of models of anybody's."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from parity.cli.errors import one_line_errors
from parity.cli.results import (
    FormatOption,
    OutputOption,
    check_outputs,
    finish,
    nothing_found,
    report_option,
    unusable_as,
)

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
        from parity.errors import ParityError
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
        with unusable_as(json_file, partial(nothing_found, pair.stem)), progress_bar(1, "pair") as start:
            tell = start(pair.stem)
            tell("models")
            found = localize_pair(load_pair(pair, dtype), pair.stem, progress=tell)
        finish(found, json_file, form, output, print_localization, partial(write_localization, report, found))
