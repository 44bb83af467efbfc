"""How the `lance-mlx` command ends: with one line and a status."""

import sys
from typing import NoReturn

from lance_command import Interrupts
from lance_command.unread import end_unread
from lance_command.usage import UsageError, usage_line
from lance_mlx.cli.app import app
from lance_mlx.cli.console import Interrupted
from lance_mlx.cli.meaning import in_options
from lance_mlx.distributed.ranks import lost, told_how_it_ends
from lance_mlx.distributed.watch import STATUS
from lance_mlx.errors import LanceError, printable

_INTERRUPTED = 130
"""What typer makes of every KeyboardInterrupt."""


@end_unread()
def main(arguments: list[str] | None = None) -> None:
    """Run the command; bad input ends it with one line on stderr and status 2.

    Args:
        arguments: those of the process when None.
    """
    # An answer may hold any character, whatever the locale, and a file's name any bytes.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    with Interrupts() as interrupts, told_how_it_ends():
        try:
            status = app(given or ["--help"], prog_name="lance-mlx", standalone_mode=False)
            # Typer's own refusal, of a shell that it has no completion for, is 1.
            sys.exit(2 if status == 1 else status)
        except (LanceError, UsageError) as error:
            line = in_options(str(error)) if isinstance(error, LanceError) else usage_line(error, "lance-mlx")
            print(f"lance-mlx: {line}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            # What no file system takes or lets be read, such as a name that is too long, wherever it is first touched.
            if error.filename is None:
                raise
            print(f"lance-mlx: {printable(f'{error.filename} cannot be used: {error.strerror}')}", file=sys.stderr)
            sys.exit(2)
        except Interrupted as stopped:
            _end_interrupted(str(stopped), interrupts)
        except SystemExit as status:
            if status.code != _INTERRUPTED:
                raise
            _end_interrupted("interrupted, nothing written", interrupts)


def _end_interrupted(said: str, interrupts: Interrupts) -> NoReturn:
    """End with a line, by the user's wish or since another process of mlx.launch is gone."""
    gone = lost()
    print(f"lance-mlx: {said if gone is None else f'{gone}; {said}'}", file=sys.stderr)
    sys.exit(interrupts.status if gone is None else STATUS)
