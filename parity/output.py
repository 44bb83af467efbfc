"""Where results go: the forms that they can be written in, and the place."""

from enum import StrEnum
from pathlib import Path


class Format(StrEnum):
    """The forms that a result can be written in."""

    MD = "md"
    JSON = "json"
    CSV = "csv"
    JUNIT = "junit"


def emit(text: str, output: Path | None) -> None:
    """Print a document, or write it to a file, whole or not at all; raises ParityError when that fails."""
    if output is None:
        print(text, end="")
        return
    from parity.errors import ParityError
    from parity.recording import write_atomically

    if output.is_symlink():
        output = output.resolve()
    if not output.exists() or output.is_file() or output.is_dir():
        write_atomically(output, text.encode())
        return
    # A terminal, a pipe or a device, which nothing may take the place of.
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ParityError(f"{output} cannot be written: {error.strerror}") from error
