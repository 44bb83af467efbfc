"""The commands of lance-parity that say where and why: localize, faults, floors."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from parity.cli.errors import one_line_errors
from parity.cli.results import (
    IMPL_HELP,
    FormatOption,
    OutputOption,
    PythonOption,
    QuantizeOption,
    check_outputs,
    finish,
    nothing_found,
    quantized_as,
    report_option,
    unusable_as,
)

REPORTS = Path("reports/localize")


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command(
        epilog="Exit status: 0 agrees, 1 diverges, 2 inconclusive or unusable.",
    )(localize)
    app.command(epilog="Exit status: 0.")(faults)
    app.command(epilog="Exit status: 0 written, 2 bad input: one line says what and how to mend it.")(floors)


def localize(
    bundle: Annotated[Path, typer.Argument(help="Folder of one bundle.")],
    impl: Annotated[str, typer.Option(metavar="NAME", help=IMPL_HELP)] = "mlx",
    python: PythonOption = None,
    quantize: QuantizeOption = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            "--fault",
            metavar="NAME",
            help="Break lance_mlx by a fault of the catalogue, or by FILE.py:NAME; may be given several times.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Break it as another port departs from upstream.", show_default=False),
    ] = None,
    hypotheses: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A .py file with hypotheses of your own.", show_default=False),
    ] = None,
    attribute: Annotated[
        bool,
        typer.Option(
            "--attribute",
            help="Also tell how much of the result's error each finding makes, by mending them: up to 8 in every way, "
            "which is 256 runs, more in some orders.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.", show_default=False)
    ] = None,
    report: Annotated[Path | None, report_option(f"{REPORTS}/BUNDLE")] = None,
    form: FormatOption = None,
    output: OutputOption = None,
) -> None:
    """Find the first component that is wrong by itself, and everything else that is, with what explains it.

    The bundle's request is replayed with every part given what the oracle has before it: what then differs by more than
    rounding is wrong by itself, whatever went wrong earlier. Weights, tokens, positions and times are compared exactly
    before that. At each place hypotheses are tried on the reference and ranked by how much of the difference they
    remove. With several faults at once the list is complete and in order.

    Of a bundle of training the backward pass is steered as well: the right gradient goes on where one arrives, so that
    the first part whose own gradient is wrong is named; then what is added up, checkpointed, and stepped.

    A fault in a file is a callable that is given the loaded model and returns a context manager; the model's attributes
    are those of the checkpoint (`model.language_model.model.layers[0]`), and `model.vae`, `model.pipeline`.
    """
    with one_line_errors():
        from parity.errors import ParityError
        from parity.hypotheses import check_unique, load_hypotheses
        from parity.localize.investigation import localize as run
        from parity.model import definition
        from parity.ports.loading import port_loader
        from parity.report.localization_page import write_localization
        from parity.report.runner import limit_threads
        from parity.report.terminal import progress_bar
        from parity.report.terminal_localize import print_localization

        limit_threads()
        report = report or REPORTS / bundle.name
        check_outputs(form, output, json_file, report=report)
        with unusable_as(json_file, partial(nothing_found, bundle.name)):
            training = definition().is_training(bundle)
            if training and (quantize or profile or attribute or python):
                raise ParityError(
                    f"{bundle.name} is a bundle of training: leave --quantize, --profile, --attribute and --python out"
                )
            chosen = [definition().load_fault(name) for name in fault or [] if not training]
            if profile is not None:
                if profile not in definition().PROFILES:
                    raise ParityError(
                        f"there is no profile {profile!r}: name one of {', '.join(definition().PROFILES)}"
                    )
                chosen += _departures(definition().PROFILES[profile], bundle)
            own = [h for path in hypotheses or [] for h in load_hypotheses(path)]
            with progress_bar(1, "bundle") as start:
                every = check_unique([*own, *definition().HYPOTHESES])
                tell = start(f"{bundle.name} {impl}")
                load = port_loader(impl, python)
                if training:
                    found = definition().localize_training(bundle, load, fault or [], tell, own)
                else:
                    with quantized_as(bundle, quantize, tell) as judged:
                        found = run(judged, load, chosen, every, tell, attribute)
        finish(found, json_file, form, output, print_localization, partial(write_localization, report, found))


def _departures(profile: object, path: Path) -> list:
    from parity.bundle.reading import read_bundle
    from parity.errors import ParityError

    bundle = read_bundle(path)
    found = profile.faults_of(bundle)
    if not found:
        raise ParityError(f"profile {profile.name} does nothing to a bundle of {bundle.task} in {bundle.dtype}")
    return found


def faults() -> None:
    """List the faults of the catalogue and the profiles: what each does, and in which runs it shows."""
    with one_line_errors():
        from parity.report.terminal_localize import print_faults

        print_faults()


def floors(
    folders: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Folders of bundles, or single bundles.")],
) -> None:
    """Measure what rounding alone does to bundles, and keep it beside their taps, in floors.safetensors.

    The reference runs in every order of rounding, and in processes that compute as other processors do. Without that
    file, or on another machine than it was measured on, the other commands measure once and keep it in
    ~/.cache/lance-parity (LANCE_PARITY_CACHE names another folder). What is there is measured again. Nothing is kept
    where the oracle and the reference disagree.
    """
    with one_line_errors():
        from parity.bundle.reading import find_bundles, read_bundle
        from parity.bundle.store import relist
        from parity.errors import ParityError
        from parity.files import check_place
        from parity.oracle.floors import carrying, measure
        from parity.oracle.floors_file import FILE, write_floors
        from parity.oracle.judgement import judge
        from parity.oracle.machines import machine, settings
        from parity.oracle.oracle import LOCAL, Oracle
        from parity.report.runner import limit_threads
        from parity.report.terminal import progress_bar

        limit_threads()
        paths = find_bundles(folders)
        lines = []
        with progress_bar(len(paths), "bundle") as start:
            for path in paths:
                tell = start(path.name)
                oracle = Oracle.of(read_bundle(path))
                check_place(path / FILE)
                floors = measure(oracle, tell, settings())
                if not (judgement := judge(oracle, carrying(oracle, floors))).agree:
                    raise ParityError(f"floors of bundle {path.name} are not kept: {judgement.sentence()}")
                write_floors(path / FILE, oracle, floors)
                relist(path / FILE)
                local = floors[LOCAL]
                lines.append(
                    f"{path / FILE}: {len(local.levels)} taps, {len(local.variants)} variants, machine {machine()}"
                )
        print("\n".join(lines))
