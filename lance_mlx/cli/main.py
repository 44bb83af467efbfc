"""Where the `lance-mlx` command begins and ends: with one line and a status, also while the libraries are imported."""

import os
import signal
import sys
from typing import NoReturn

from lance_mlx.errors import LanceError

_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
_BY_SIGNAL = 128
"""Of a shell's status for what a signal ended."""
_INTERRUPTED_LINE = "lance-mlx: interrupted, nothing written"


def main(arguments: list[str] | None = None) -> None:
    """Run the command; bad input ends it with one line on stderr and status 2.

    Args:
        arguments: those of the process when None.
    """
    # An answer may hold any character, whatever the locale, and a file's name any bytes.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    caught = signal.SIGINT

    def interrupt(number: int, _: object) -> NoReturn:
        nonlocal caught
        caught = number
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: old for number, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler)}
    # Half-imported libraries make anything of an exception.
    for number in before:
        signal.signal(number, _leave)
    from lance_mlx.cli.app import app
    from lance_mlx.cli.console import Interrupted
    from lance_mlx.cli.meaning import in_options
    from lance_mlx.cli.usage import UsageError, usage_line

    for number, old in before.items():
        # Python's own handler of Ctrl-C is known to asyncio.
        signal.signal(number, old if number is signal.SIGINT else interrupt)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(app(given or ["--help"], prog_name="lance-mlx", standalone_mode=False))
    except (LanceError, UsageError) as error:
        line = in_options(str(error)) if isinstance(error, LanceError) else usage_line(error)
        print(f"lance-mlx: {line}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"lance-mlx: {stopped}", file=sys.stderr)
        sys.exit(_BY_SIGNAL + caught)
    except SystemExit as status:
        if status.code != _BY_SIGNAL + signal.SIGINT:  # which typer makes of every KeyboardInterrupt
            raise
        print(_INTERRUPTED_LINE, file=sys.stderr)
        sys.exit(_BY_SIGNAL + caught)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _leave(number: int, _: object) -> NoReturn:
    os.write(2, f"{_INTERRUPTED_LINE}\n".encode())
    os._exit(_BY_SIGNAL + number)
