"""Where the `lance-mlx` command begins and ends: with one line and a status, also while the libraries are imported."""

import os
import signal
import sys
from typing import NoReturn

from lance_mlx.errors import LanceError

INTERRUPTED = 130
_INTERRUPTED_LINE = "lance-mlx: interrupted, nothing written"


def main(arguments: list[str] | None = None) -> None:
    """Run the command; bad input ends it with one line on stderr and status 2.

    Args:
        arguments: those of the process when None.
    """
    # An answer may hold any character, whatever the locale.
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        # Half-imported libraries make anything of an exception.
        signal.signal(signal.SIGINT, _leave)
    from lance_mlx.cli.app import app
    from lance_mlx.cli.console import Interrupted
    from lance_mlx.cli.meaning import in_options
    from lance_mlx.cli.usage import UsageError, usage_line

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(app(given or ["--help"], prog_name="lance-mlx", standalone_mode=False))
    except (LanceError, UsageError) as error:
        line = in_options(str(error)) if isinstance(error, LanceError) else usage_line(error)
        print(f"lance-mlx: {line}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"lance-mlx: {stopped}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as status:
        if status.code == INTERRUPTED:
            print(_INTERRUPTED_LINE, file=sys.stderr)
        raise


def _leave(*_: object) -> NoReturn:
    os.write(2, f"{_INTERRUPTED_LINE}\n".encode())
    os._exit(INTERRUPTED)
