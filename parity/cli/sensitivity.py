"""The command of lance-parity that says where bits are needed."""

from pathlib import Path
from typing import Annotated

import typer

from parity.cli.errors import one_line_errors
from parity.cli.results import check_outputs, write_json


def register(app: typer.Typer) -> None:
    """Add the command to an app."""
    app.command(epilog="Exit status: 0 measured, 2 bad input: one line says what and how to mend it.")(sensitivity)


def sensitivity(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help="Bundles, or JSON files with a list of requests or questions."),
    ],
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The checkpoint, in any layout.", show_default="the bundles'"),
    ] = None,
    numerics: Annotated[
        str | None, typer.Option(metavar="NAME", help="float32 or bfloat16.", show_default="the bundles', or bfloat16")
    ] = None,
    bits: Annotated[str, typer.Option(metavar="LIST", help="Widths to try, of 3, 4, 5, 6 and 8.")] = "4,6,8",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    bands: Annotated[int, typer.Option(help="Bands of layers that are told apart.")] = 4,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Solve for the least error within all files' size, such as 7.5GB, or within bits a weight that can be "
            "quantized, scales included, such as 5.2bits, and write OUT/recipe.json.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Search for scales of input channels too, on what goes through each tower in these runs, and have the "
            "recipe keep those of the groups that do clearly less behind theirs.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the page and the recipe.")] = Path(
        "reports/sensitivity"
    ),
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.", show_default=False)
    ] = None,
) -> None:
    """Measure what quantizing each group of weights by itself does to whole runs, and find the recipe of a budget.

    A group is a tower's matrices of one kind in a band of layers; the embeddings, the head and the ViT are one each.
    Each is quantized alone at every width, and every input is run whole: the velocity of each step, the final latents,
    and an answer's probabilities are held against those of the weights as they are. The worst groups are also quantized
    two at a time, which says how far their errors add up.

    What is measured is kept in OUT/measured.json: a call that was ended goes on from there.
    """
    with one_line_errors():
        from tqdm import tqdm

        from parity.errors import ParityError
        from parity.lance.sensitivity.command import PAGE, RECIPE, measure
        from parity.lance.sensitivity.terminal import print_measured

        check_outputs(None, None, json_file)
        widths = bits.split(",")
        if not all(each.strip().isdecimal() for each in widths):
            raise ParityError(f"--bits {bits} must be numbers with commas between them, such as 4,6,8")
        with tqdm(unit="run", leave=False, dynamic_ncols=True, disable=None) as bar:

            def tell(what: str, done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)
                bar.set_description(what)

            numbers = [int(each) for each in widths]
            measured = measure(inputs, out, tell, model, numerics, numbers, bands, group_size, budget, calibrate)
        write_json(json_file, measured.to_json())
        print_measured(measured)
        if measured.solved:
            print(out / RECIPE)
        print(out / PAGE)
