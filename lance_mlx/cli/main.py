"""How the `lance-mlx` command ends: with one line and a status."""

import signal
import sys
from typing import NoReturn

from lance_mlx.cli.app import app
from lance_mlx.cli.console import Interrupted
from lance_mlx.cli.meaning import in_options
from lance_mlx.cli.usage import UsageError, usage_line
from lance_mlx.errors import LanceError

_BY_SIGNAL = 128
"""Of a shell's status for what a signal ended."""


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

    # Python's own handler of Ctrl-C, which does the same, is known to asyncio.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    taken = [number for number, old in before.items() if old is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
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
        print("lance-mlx: interrupted, nothing written", file=sys.stderr)
        sys.exit(_BY_SIGNAL + caught)
    finally:
        for number in taken:
            signal.signal(number, before[number])
