"""Where results go: the forms that they can be written in, and the place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from parity.errors import ParityError
from parity.files import folder_beside, write_atomically

_LIST = ".written-by-lance-parity"


class Format(StrEnum):
    """The forms that a result can be written in."""

    MD = "md"
    JSON = "json"
    CSV = "csv"
    JUNIT = "junit"


def emit(text: str, output: Path | None) -> None:
    """Print a document, or write it to a file; see write_atomically."""
    if output is None:
        print(text, end="")
        return
    write_atomically(output, text.encode())


def require_own(folder: Path) -> None:
    """Raise ParityError where a folder is none, or holds anything that was not written there by new_folder, or the
    process itself, which would be left in none."""
    if Path.cwd().is_relative_to(os.path.realpath(folder)):
        raise ParityError(f"{folder} cannot take a report (it is where the command runs): name another folder")
    if not (folder.exists() or folder.is_symlink()):
        return
    listed = folder / _LIST
    try:
        written = set(listed.read_text(encoding="utf-8").splitlines()) if listed.is_file() else set()
        foreign = sorted({path.name for path in folder.iterdir()} - written - {_LIST})
    except (OSError, ValueError) as error:
        raise ParityError(f"{folder} cannot take a report ({error}): name another folder") from error
    if foreign:
        raise ParityError(f"{folder} holds {foreign[0]}, which lance-parity did not write: name another folder")


GENERATOR = '<meta name="generator" content="lance-parity">'
"""What tells a page of ours."""


def require_own_page(path: Path) -> None:
    """Raise ParityError where a page would take the place of anything but one of ours."""
    if not path.exists():
        return
    try:
        if GENERATOR in path.read_text(encoding="utf-8")[:1000]:
            return
    except (OSError, ValueError):
        pass
    raise ParityError(f"{path} is no report that lance-parity wrote: name another file")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the place of `folder` at the end, or leaves no trace after an exception.

    Raises ParityError where `folder` holds anything but what was written there so, or nothing can be written there.
    """
    if folder.is_symlink():
        folder = folder.resolve()
    require_own(folder)
    try:
        with folder_beside(folder) as beside:
            new, old = beside / "new", beside / "old"
            new.mkdir()
            yield new
            names = sorted(path.name for path in new.iterdir())
            (new / _LIST).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(new, folder)
            except OSError:
                # What was there before is not lost.
                if old.exists():
                    os.replace(old, folder)
                raise
    except OSError as error:
        raise ParityError(f"the report {folder} cannot be written: {error.strerror}") from error
