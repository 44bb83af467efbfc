"""How a command of lance-parity ends that cannot go on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from parity.errors import ParityError, interrupted

UNUSABLE_STATUS, INTERRUPTED_STATUS = 2, 130


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line on stderr: status 2 for a ParityError, 130 for an interrupt."""
    try:
        yield
    except ParityError as error:
        _end(str(error), UNUSABLE_STATUS)
    except ModuleNotFoundError as error:
        _end(f"{error.name} is not installed: pip install 'lance-mlx[parity]'", UNUSABLE_STATUS)
    except (KeyboardInterrupt, RuntimeError) as error:
        if not interrupted(error):
            raise
        _end("interrupted", INTERRUPTED_STATUS)


def _end(message: str, status: int) -> NoReturn:
    print(f"lance-parity: {message}", file=sys.stderr)
    raise typer.Exit(status)
