"""The `lance-mlx` command: what it is made of."""

from importlib.metadata import version
from typing import Annotated

import typer

from lance_mlx.cli import benchmark as cli_benchmark
from lance_mlx.cli import convert as cli_convert
from lance_mlx.cli import generate as cli_generate
from lance_mlx.cli import info as cli_info
from lance_mlx.cli import serve as cli_serve
from lance_mlx.cli import train as cli_train

_EXIT = (
    "Exit status: 0 done, 2 bad input, or an output that is there already (one line on stderr says what and how to "
    "mend it), 75 where another process of mlx.launch is gone, 128 and its number where a signal ends it: 130 for "
    "Ctrl-C, 143 for SIGTERM."
)
app = typer.Typer(
    help=f"Lance on MLX: make and edit images and videos, and ask about them. {_EXIT}",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lance-mlx {version('lance-mlx')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Lance on MLX."""


cli_generate.register(app, _EXIT)
cli_benchmark.register(app, _EXIT)
cli_convert.register(app, _EXIT)
cli_train.register(app, _EXIT)
cli_info.register(app, _EXIT)
cli_serve.register(app, _EXIT)
