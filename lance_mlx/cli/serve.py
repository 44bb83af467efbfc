"""`lance-mlx serve`: the command that starts the server."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lance_command import Importing
from lance_mlx.api import load
from lance_mlx.checkpoint.hub import is_repository
from lance_mlx.checkpoint.layouts import check_folder, variants_in
from lance_mlx.cli.options import AsUpstreamOption, LowRamOption, ModelOption
from lance_mlx.errors import LanceError
from lance_mlx.requests.request import Variant


def register(app: typer.Typer, epilog: str) -> None:
    """Add the command to an app."""
    app.command(epilog=epilog)(serve)


def serve(
    model: ModelOption,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LANCE_MLX_TOKEN",
            help="What clients must bring: API clients as their key, browsers as the password.",
            show_default=False,
        ),
    ] = None,
    idle_minutes: Annotated[
        float, typer.Option(min=0.01, help="Let the model go after so long without a request.")
    ] = 15.0,
    low_ram: LowRamOption = False,
    as_upstream: AsUpstreamOption = False,
) -> None:
    """Serve an OpenAI-compatible API, and a page for browsers, until Ctrl-C."""
    try:
        with Importing("lance-mlx"):
            from lance_mlx.serve.app import serve as run
            from lance_mlx.serve.bounds import BOUNDS
            from lance_mlx.serve.guard import is_loopback
            from lance_mlx.serve.worker import Worker
    except ModuleNotFoundError as error:
        raise LanceError(f"{error.name} is not installed: pip install '.[serve]' in the checkout") from None

    if token is not None and not (token and token.isascii() and token.isprintable()):
        raise LanceError("the token must be printable ASCII")
    if token is None and not is_loopback(host):
        raise LanceError(f"{host} can be reached by others: choose a --token, or set LANCE_MLX_TOKEN")
    if is_repository(model):
        variants = tuple(Variant)
    else:
        check_folder(Path(model))
        variants = variants_in(Path(model))
    opened = partial(load, model, quiet=True, low_ram=low_ram)
    run(Worker(opened, BOUNDS.waiting, idle_minutes * 60, as_upstream), variants, host, port, token)
