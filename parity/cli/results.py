"""Options of all commands that have results, and where those go."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

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
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="WHAT",
        help="Quantize the weights, and let lance_mlx run them packed, the reference dequantized: bits, a recipe's "
        "name or JSON file, or the folder of what lance-mlx convert -q wrote.",
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


def report_option(default: str) -> Any:
    """The option of a report's folder, which is `default` where it is not given."""
    return typer.Option(metavar="DIR", help="Folder of the HTML report, written anew.", show_default=default)


@contextmanager
def quantized_as(bundle: Path, what: str | None, tell: Callable[[str], None]) -> Iterator[Path]:
    """A bundle, or what is recorded of its request with weights that are quantized as an option says."""
    if what is None:
        yield bundle
        return
    from parity.model import definition

    with definition().quantized_bundle(bundle, what, tell) as recorded:
        yield recorded


def check_outputs(form: Format | None, output: Path | None, *others: Path | None, report: Path | None = None) -> None:
    """Raise ParityError, before anything runs, where results cannot be written to a file, or not in the form that its
    name ends in, or a report not to its folder."""
    from parity.errors import ParityError
    from parity.files import check_place
    from parity.report.output import require_own

    if report is not None:
        require_own(report)
        check_place(report / "index.html")
    if output is not None:
        _form(form, output)
    for path in filter(None, (output, *others)):
        if report is not None and path.resolve().is_relative_to(report.resolve()):
            raise ParityError(f"{path} is in {report}, which the report takes for itself: name another place")
        check_place(path)


def write_json(path: Path | None, document: dict[str, Any]) -> None:
    """Write a document, if there is a place for it."""
    from parity.files import write_atomically

    if path is not None:
        write_atomically(path, json.dumps(document, indent=1, allow_nan=False).encode())


@contextmanager
def unusable_as(json_file: Path | None, document: Callable[[str], dict[str, Any]]) -> Iterator[None]:
    """Write why something cannot be used, where JSON is asked for; the error goes on."""
    from parity.errors import ParityError

    try:
        yield
    except ParityError as error:
        write_json(json_file, document(str(error)))
        raise


def nothing_found(name: str, reason: str) -> dict[str, Any]:
    """The JSON of a localization that could not be made."""
    from parity.comparison.verdict import UNUSABLE

    return {"verdict": UNUSABLE, "reason": reason, "findings": [], "bundle": name}


def finish(
    found: Any,
    json_file: Path | None,
    form: Format | None,
    output: Path | None,
    show: Callable[[Any], None],
    page: Callable[[], Path] | None = None,
) -> NoReturn:
    """Write a result and its page, or show them, and leave with the status of the verdict."""
    from parity.report.runner import exit_status

    write_json(json_file, found.to_json())
    written = page() if page else None
    if not deliver(found, form, output):
        show(found)
        if written is not None:
            print(written)
    raise typer.Exit(exit_status([found.verdict]))


def _form(form: Format | None, output: Path) -> Format:
    from parity.errors import ParityError

    endings = {".md": Format.MD, ".json": Format.JSON, ".csv": Format.CSV, ".xml": Format.JUNIT}
    found = form or endings.get(output.suffix.lower())
    if found is None:
        raise ParityError(f"{output} ends in none of {', '.join(endings)}: say --format {', '.join(Format)}")
    return found


def deliver(items: object, form: Format | None, output: Path | None) -> bool:
    """Print or write results in a form, and tell whether that took the place of the table; see formats.render.

    Without a form a file is written in the one that its name ends in.
    """
    if form is None and output is None:
        return False
    from parity.report.formats import render
    from parity.report.output import emit

    emit(render(items, form if output is None else _form(form, output)), output)
    return output is None
