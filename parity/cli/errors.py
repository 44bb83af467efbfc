"""How a command of lance-parity ends that cannot go on."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from lance_command import Interrupts
from parity.errors import ParityError, interrupted, printable

UNUSABLE_STATUS = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line on stderr: status 2 for a ParityError or a file that cannot be used, 128 and its
    number for a signal.

    Anything else is an error of the engine's own: a traceback stands before the line, and the status is 2, since 1
    would say that something diverges.
    """
    with Interrupts() as interrupts:
        try:
            yield
        except (typer.Exit, typer.Abort):
            raise
        except ParityError as error:
            _end(str(error), UNUSABLE_STATUS)
        except ModuleNotFoundError as error:
            _end(f"{error.name} is not installed: pip install 'lance-mlx[parity]'", UNUSABLE_STATUS)
        except OSError as error:
            # What no file system takes or lets be read, such as a name that is too long, wherever it is first touched.
            if error.filename is None:
                _end_unexpected(error)
            _end(printable(f"{error.filename} cannot be used: {error.strerror}"), UNUSABLE_STATUS)
        except (KeyboardInterrupt, RuntimeError) as error:
            if not interrupted(error):
                _end_unexpected(error)
            _end("interrupted", interrupts.status)
        except Exception as error:
            _end_unexpected(error)


def _end_unexpected(error: BaseException) -> NoReturn:
    """Tell of an error of the engine's own where it was, with the status that says that nothing was found out."""
    traceback.print_exception(error)
    _end(f"this should not happen: {type(error).__name__}, as told above", UNUSABLE_STATUS)


def _end(message: str, status: int) -> NoReturn:
    print(f"lance-parity: {message}", file=sys.stderr)
    raise typer.Exit(status)
