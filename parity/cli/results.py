"""Options of all commands that have results, and where those go."""

from pathlib import Path
from typing import Annotated

import typer

from parity.report.output import Format

IMPL_HELP = "mlx, reference, or FILE.py:NAME, which loads a port of yours (examples/README.md)."
PythonOption = Annotated[
    Path | None,
    typer.Option(
        "--python",
        metavar="PATH",
        help="The Python that has the packages of FILE.py's port, which then runs in a process of its own.",
        show_default=False,
    ),
]
FormatOption = Annotated[
    Format | None,
    typer.Option("--format", help="Print the result in this form, in place of the table.", show_default=False),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the result there too, in --format or in the form that the name ends in: .md, .json, .csv, .xml.",
        show_default=False,
    ),
]


def deliver(items: object, form: Format | None, output: Path | None) -> bool:
    """Print or write results in a form, and tell whether that took the place of the table; see formats.render.

    Without a form a file is written in the one that its name ends in.
    """
    if form is None and output is None:
        return False
    from parity.errors import ParityError
    from parity.report.formats import render
    from parity.report.output import emit

    if form is None:
        endings = {".md": Format.MD, ".json": Format.JSON, ".csv": Format.CSV, ".xml": Format.JUNIT}
        if output.suffix.lower() not in endings:
            raise ParityError(f"{output} ends in none of {', '.join(endings)}: say --format {', '.join(Format)}")
        form = endings[output.suffix]
    emit(render(items, form), output)
    return output is None
