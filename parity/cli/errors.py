"""How a command of lance-parity ends that cannot go on."""

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from parity.errors import ParityError, interrupted

UNUSABLE_STATUS = 2
_BY_SIGNAL = 128
"""Of a shell's status for what a signal ended."""
_caught = signal.SIGINT


@contextmanager
def signals_taken() -> Iterator[None]:
    """Let what tells a process to end interrupt it as Ctrl-C does, so that it cleans up."""

    def interrupt(number: int, _: object) -> NoReturn:
        global _caught
        _caught = number
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    taken = [number for number, old in before.items() if old is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line on stderr: status 2 for a ParityError, 128 and its number for a signal.

    Anything else is an error of the engine's own: a traceback stands before the line, and the status is 2, since 1
    would say that something diverges.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except ParityError as error:
        _end(str(error), UNUSABLE_STATUS)
    except ModuleNotFoundError as error:
        _end(f"{error.name} is not installed: pip install 'lance-mlx[parity]'", UNUSABLE_STATUS)
    except (KeyboardInterrupt, RuntimeError) as error:
        if not interrupted(error):
            _end_unexpected(error)
        _end("interrupted", _BY_SIGNAL + _caught)
    except Exception as error:
        _end_unexpected(error)


def _end_unexpected(error: BaseException) -> NoReturn:
    """Tell of an error of the engine's own where it was, with the status that says that nothing was found out."""
    traceback.print_exception(error)
    _end(f"this should not happen: {type(error).__name__}, as told above", UNUSABLE_STATUS)


def _end(message: str, status: int) -> NoReturn:
    print(f"lance-parity: {message}", file=sys.stderr)
    raise typer.Exit(status)
