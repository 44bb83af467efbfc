"""Files and folders that appear under their names when they are whole."""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from parity.errors import ParityError

_PART = ".lance-parity-*.part"
_SECONDS_TO_LOCK = 60
"""A part that young may not have been locked yet by the process that made it."""


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder in that of `path` to fill and to move there, which goes at the end.

    The folder that holds it is made where it is missing. What processes that were killed have left there goes as well:
    only a live one holds a lock on its own. Raises OSError.
    """
    with _part(path) as part:
        part.mkdir()
        with _locked(part):
            yield part


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` that takes its place at the end, or goes when an exception passes.

    Of a link that is the place of what it points to. A stream is itself written to: see is_stream. Raises ParityError
    when it cannot be written.
    """
    try:
        if is_stream(path):
            with path.open("wb") as file:
                yield file
            return
        place = path.resolve()
        with _part(place) as part:
            with part.open("xb") as file, _locked(part):
                yield file
            os.replace(part, place)
    except OSError as error:
        raise ParityError(f"{path} cannot be written: {error.strerror}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it there; raises ParityError when that fails."""
    with replacing(path) as file:
        file.write(data)


def is_stream(path: Path) -> bool:
    """Whether a path is a terminal, a pipe or a device, or a link to one, whose place no file may take."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def check_place(path: Path) -> None:
    """Raise ParityError where no file can be written, as far as that is seen before it is; nothing is made."""
    if os.path.isdir(path):
        raise ParityError(f"{path} is a folder: name a file in it")
    place = path.resolve()
    there = place if is_stream(place) else next(above for above in place.parents if os.path.lexists(above))
    if not is_stream(place) and not there.is_dir():
        raise ParityError(f"{path} cannot be written: {there} is not a folder: name another file")
    if not os.access(there, os.W_OK):
        raise ParityError(f"{path} cannot be written: {there} takes nothing: name another file")


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(_PART):
        with suppress(OSError), _locked(left):
            if time.time() - left.stat().st_mtime > _SECONDS_TO_LOCK:
                _remove(left)
    # Short, whatever the length of the name.
    part = path.with_name(_PART.replace("*", secrets.token_hex(4)))
    try:
        yield part
    finally:
        _remove(part)


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Hold a lock on a part; raises BlockingIOError where another process does."""
    number = os.open(part, os.O_RDONLY | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(number)


def _remove(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    with suppress(OSError):
        part.unlink()
