"""The command lance-parity."""

import os
import sys
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lance_command.unread import end_unread
from lance_command.usage import UsageError, usage_line
from parity.cli import localize as cli_localize
from parity.cli import port as cli_port
from parity.cli import sensitivity as cli_sensitivity
from parity.cli import store as cli_store
from parity.cli import stream as cli_stream
from parity.cli.errors import UNUSABLE_STATUS, one_line_errors
from parity.cli.results import (
    IMPL_HELP,
    FormatOption,
    OutputOption,
    PythonOption,
    QuantizeOption,
    check_outputs,
    deliver,
    finish,
    quantized_as,
    report_option,
    unusable_as,
)
from parity.errors import ParityError

if TYPE_CHECKING:
    from parity.ports.port import Loader

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compares lance_mlx and its PyTorch reference with tensors captured from bytedance/Lance.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lance-parity {version('lance-mlx')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Compares lance_mlx and its PyTorch reference with tensors captured from bytedance/Lance."""


class RanksSplit(StrEnum):
    """What processes that compute one output share."""

    ROWS = "rows"
    GUIDANCE = "guidance"


class ImplChoice(StrEnum):
    """Whose layouts are compared."""

    BOTH = "both"
    MLX = "mlx"
    REFERENCE = "reference"


@app.command(epilog="Exit status: 0 all agree, 1 some diverge, 2 some are unusable or nothing was compared.")
def run(
    oracles: Annotated[
        list[Path] | None, typer.Argument(help="Folders of bundles, or single bundles.", show_default="oracles/")
    ] = None,
    report: Annotated[Path, report_option("reports/latest")] = Path("reports/latest"),
    impl: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"{IMPL_HELP} May be given several times.", show_default="mlx, reference"),
    ] = None,
    python: PythonOption = None,
    quantize: QuantizeOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON.", show_default=False)
    ] = None,
    form: FormatOption = None,
    output: OutputOption = None,
) -> None:
    """Compare lance_mlx and the reference with every bundle and write an HTML report.

    Bundles of tasks that do not exist yet are listed as unsupported and count neither way. The last line of the output
    is the path of the report.
    """
    with one_line_errors():
        from parity.bundle.reading import find_bundles
        from parity.ports.loading import known_ports, port_loader
        from parity.report.formats import render
        from parity.report.output import Format, emit
        from parity.report.run_page import write_report
        from parity.report.runner import compare_all, exit_status
        from parity.report.terminal import print_rows, progress_bar

        check_outputs(form, output, json_file, report=report)
        folders = oracles or [Path("oracles")]
        paths = find_bundles(folders)
        known = known_ports()
        loaders = {name: known.get(name) or port_loader(name, python) for name in impl or known}
        with progress_bar(len(paths) * len(loaders), "comparison") as start:
            rows = compare_all(paths, loaders, start, lambda path, tell: quantized_as(path, quantize, tell))
        index = write_report(report, rows, [str(folder) for folder in folders])
        if json_file:
            emit(render(rows, Format.JSON), json_file)
        if not deliver(rows, form, output):
            print_rows(rows)
            print(index)
        raise typer.Exit(exit_status([row.verdict for row in rows]))


@app.command(epilog="Exit status: 0 agree, 1 diverge, 2 inconclusive (the oracle cannot be trusted) or unusable.")
def check(
    bundle: Annotated[Path, typer.Argument(help="Folder of one bundle.")],
    impl: Annotated[str | None, typer.Option(metavar="NAME", help=IMPL_HELP, show_default=False)] = None,
    python: PythonOption = None,
    quantize: QuantizeOption = None,
    ranks: Annotated[
        int | None,
        typer.Option(metavar="N", help="Let mlx compute it by so many processes of this machine.", show_default=False),
    ] = None,
    split: Annotated[
        RanksSplit, typer.Option(help="What --ranks share: the rows of the latents, or the arms of guidance.")
    ] = RanksSplit.ROWS,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
    dump: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write DIR/taps.safetensors: what the implementation computed."),
    ] = None,
    form: FormatOption = None,
    output: OutputOption = None,
) -> None:
    """Compare one implementation with one bundle, integers first.

    Replays the bundle's request from its noise under its numerics policy, twice, and compares every tap. A tap may be
    off by its floor, which is what equally right orders of rounding do to this very run, times a threshold that is
    measured as well. The first divergence is the first in order of execution. Of a bundle of training losses by token,
    activations, gradients by activations and parameters, their norm and the optimizer's steps are compared.
    """
    with one_line_errors():
        from parity.comparison.check import check_bundle, check_recording, record_bundle, unusable_json
        from parity.model import definition
        from parity.report.runner import limit_threads
        from parity.report.terminal import print_result, progress_bar
        from parity.tensors.recording import write_tensors

        if impl is None and ranks is None:
            raise ParityError("say with --impl what is compared: mlx, reference, or FILE.py:NAME")
        impl = impl or "mlx"
        limit_threads()
        check_outputs(form, output, json_file, dump and dump / "taps.safetensors")
        document = partial(unusable_json, bundle.name, impl)
        with unusable_as(json_file, document), progress_bar(1, "comparison") as start:
            tell, load = start(f"{bundle.name} {impl}"), _loader(impl, python, ranks, split)
            if definition().is_training(bundle):
                if quantize or dump or ranks is not None:
                    told = "leave --quantize, --dump and --ranks out"
                    raise ParityError(f"{bundle.name} is a bundle of training: {told}")
                result = check_bundle(bundle, load, tell)
            else:
                with quantized_as(bundle, quantize, tell) as judged:
                    replay = record_bundle(judged, load, tell)
                    result = check_recording(replay, tell)
        if dump:
            inputs = {f"inputs/{n}": tap for n, tap in replay.recording.items() if n in replay.bundle.inputs}
            taps = {tap.tap.name: replay.recording[tap.tap.name] for tap in result.taps}
            write_tensors(dump / "taps.safetensors", inputs | taps)
        finish(result, json_file, form, output, print_result)


@app.command(epilog="Exit status: 0 all equal, 1 some differ, 2 some are unusable or nothing was compared.")
def layouts(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of captured layouts (.json and .npz).")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of vocab.json and merges.txt; by default tokenizer/ in or above DIR."),
    ] = None,
    impl: Annotated[ImplChoice, typer.Option(help="The implementation to compare.")] = ImplChoice.BOTH,
) -> None:
    """Compare the integer layouts of long sequences bit for bit; needs no weights.

    Layouts of tasks that do not exist yet are listed as unsupported and count neither way.
    """
    with one_line_errors():
        from parity.comparison.verdict import UNUSABLE
        from parity.lance.sequence_layouts import BUILDERS, check_layout, find_tokenizer, read_layouts
        from parity.report.run_page import UNSUPPORTED
        from parity.report.runner import exit_status
        from parity.report.terminal import new_table, print_table, styled

        found = read_layouts(folder)
        place = find_tokenizer(folder, tokenizer)
        names = list(BUILDERS) if impl is ImplChoice.BOTH else [impl.value]
        table, verdicts = new_table("layout", "implementation", "tokens", "arrays equal", "build time", "verdict"), []
        for layout in found:
            for name in names if layout.supported else []:
                try:
                    r = check_layout(layout, name, BUILDERS[name], place)
                    shown = (str(r.tokens), str(r.compared), f"{r.seconds:.2f} s", styled(r.verdict, r.detail))
                    verdicts.append(r.verdict)
                except ParityError as error:
                    shown = (str(layout.tokens), "0", "", styled(UNUSABLE, str(error)))
                    verdicts.append(UNUSABLE)
                table.add_row(layout.name, name, *shown)
            if not layout.supported:
                task = f"task {layout.request['task']} is not supported yet"
                table.add_row(layout.name, "", str(layout.tokens), "", "", styled(UNSUPPORTED, task))
        print_table(table)
        raise typer.Exit(exit_status(verdicts))


cli_localize.register(app)
cli_port.register(app)
cli_sensitivity.register(app)
cli_store.register(app)
cli_stream.register(app)


def _loader(impl: str, python: Path | None, ranks: int | None, split: RanksSplit) -> "Loader":
    """What loads a port, or as many processes of mlx; raises ParityError for another port than that."""
    from parity.model import definition
    from parity.ports.loading import port_loader

    if ranks is None:
        return port_loader(impl, python)
    if impl != "mlx":
        raise ParityError(f"--ranks are processes of lance_mlx: give --impl mlx, not {impl}")
    return definition().ranks_port(ranks, split)


@end_unread()
def main() -> None:
    """Run the command."""
    # PyTorch reads it when it is loaded: a waiting thread that spins takes its core from another process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # A file's name may hold any bytes.
        stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="lance-parity", standalone_mode=False))
    except UsageError as error:
        print(f"lance-parity: {usage_line(error, 'lance-parity')}", file=sys.stderr)
        sys.exit(UNUSABLE_STATUS)


if __name__ == "__main__":
    main()
