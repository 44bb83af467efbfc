"""What localize says of a port on some bundles, as the table of examples/README.md.

    LANCE_PEER=CLONE python scripts/peer_table.py BUNDLE... [--impl FILE.py:NAME] [--python PATH] [--output FILE]

Every finding of every bundle, with what explains it and, in bundles of the kv_cache entry in float32, what part of the
error of the latent and of the pixels it makes (localize --attribute). Exit status: 0 written, 2 when a bundle cannot be
used.
"""

from pathlib import Path
from typing import Annotated

import tables
import typer

from parity.bundle.reading import read_bundle
from parity.cli.errors import one_line_errors
from parity.cli.results import PythonOption
from parity.localize.attribution import Attribution
from parity.localize.findings import Localization
from parity.localize.investigation import localize
from parity.ports.loading import port_loader
from parity.report.runner import limit_threads
from parity.report.terminal import progress_bar
from parity.report.words import percent

EXAMPLES = Path(__file__).parents[1] / "examples"


def main(
    bundles: Annotated[list[Path], typer.Argument(help="Folders of single bundles.")],
    impl: Annotated[str, typer.Option(metavar="FILE.py:NAME")] = str(EXAMPLES / "xocialize_lance_mlx.py:Port"),
    python: PythonOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE")] = EXAMPLES / "README.md",
) -> None:
    """Look at a port on bundles and write the table."""
    with one_line_errors():
        limit_threads()
        load, found = port_loader(impl, python), []
        with progress_bar(len(bundles), "bundle") as start:
            for path in bundles:
                bundle = read_bundle(path)
                owed = bundle.entry == "kv_cache" and bundle.dtype == "float32" and not bundle.task.startswith("x2t")
                found.append(localize(path, load, progress=start(path.name), attribute=owed))
        tables.replace_between(output, "port", table(found))


def table(found: list[Localization]) -> str:
    """The findings as Markdown."""
    rows, notes = [], []
    for one in found:
        for number, finding in enumerate(one.findings, 1):
            why = finding.explanations[0] if finding.explained else None
            parts = parts_of(one.attribution, number)
            named = why.name.replace("|", "\\|") if why else "–"
            removed = percent(why.residual_removed) if why else "–"
            rows.append((one.bundle, f"`{finding.component}`", named, removed, *parts))
        if one.attribution is not None:
            left = ", ".join(f"{name} {error:.2g}" for name, error in one.attribution.left.items())
            notes.append(f"{one.bundle}: {one.attribution.sentence()} (relative error left: {left}).")
    heads = ("bundle", "finding", "explanation", "removes", "of the latent", "of the pixels")
    return tables.table(heads, rows) + "".join(f"\n{note}\n" for note in notes)


def parts_of(attribution: Attribution | None, number: int) -> list[str]:
    """The parts of the latent's and the pixels' error that a finding makes."""
    for worth in attribution.worths if attribution else ():
        if number in worth.numbers:
            before = attribution.before
            return [percent(worth.share[n] / before[n]) if before.get(n) else "–" for n in ("latent", "pixels")]
    return ["–", "–"]


if __name__ == "__main__":
    typer.run(main)
