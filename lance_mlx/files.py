"""Files that are read, none of them a pipe or a device, and files that appear under their names when they are whole.

What is written to a link goes where it points, and to a pipe or a device into that: nothing takes their place.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lance_mlx.errors import LanceError

_PART = ".lance-mlx-*.part"
_REFUSED = re.compile(r'[\x00-\x1f<>:"\\|?*]|[ .](/|$)')
"""What disks in Windows' formats take in no name of a file, whichever system writes to them."""
_SECONDS_TO_LOCK = 60
"""A file that young may not have been locked yet by the process that made it."""


def opened(path: Path) -> BinaryIO:
    """A file to read; raises OSError for what is none, such as a pipe, which might never end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return file


def read_json(path: Path, **options: Any) -> Any:
    """What a JSON file holds, `options` as for json.loads; raises OSError or ValueError where it cannot be read."""
    with opened(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_place(path: Path, overwrite: bool = True) -> Path:
    """Return `path` if a file can be written there; its folder is made when it is.

    Args:
        overwrite: let it take the place of a file.

    Raises:
        LanceError: something is there, a name is too long, or the folder cannot be written to.
    """
    try:
        there = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        there = None
    except OSError as error:
        raise _unusable(path, error.errno) from None
    if there is not None and stat.S_ISDIR(there.st_mode):
        raise LanceError(f"output {path} is a folder; name a file in it")
    if there is not None and not stat.S_ISREG(there.st_mode):
        if not os.access(path, os.W_OK):
            raise _unusable(path, errno.EACCES)
        return path
    if there is not None and not overwrite:
        raise LanceError(f"output {path} is there already; choose another name, or give --overwrite")
    place = path.resolve()
    folder = _nearest(place.parent)
    if not folder.is_dir():
        raise LanceError(f"output {path}: {folder} is not a folder; choose another one")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LanceError(f"output {path}: the folder {folder} cannot be written to; choose another one")
    # Below a folder that is missing, names have not been looked at yet.
    if max(len(os.fsencode(name)) for name in place.parts) > os.pathconf(folder, "PC_NAME_MAX"):
        raise _unusable(path, errno.ENAMETOOLONG)
    name = str(place.relative_to(folder))
    if there is None and _REFUSED.search(name):
        try:
            _try(folder, [name])
        except OSError as error:
            raise _unusable(path, error.errno) from None
    return path


def taken_for_one(folder: Path, names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that the disk of a folder, which need not be there yet, does not tell apart, such as by their capitals;
    None where it tells all apart."""
    alike: dict[str, set[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFC", name).casefold(), set()).add(name)
    for first, *others in map(sorted, alike.values()):
        for other in others:
            try:
                _try(_nearest(folder.absolute()), [first, other])
            except FileExistsError:
                return first, other
            except OSError:  # which `check_place` says better
                pass
    return None


def _nearest(folder: Path) -> Path:
    """The folder itself, or what is there above it."""
    return next(place for place in (folder, *folder.parents) if os.path.lexists(place))


def _try(folder: Path, names: Iterable[str]) -> None:
    """Make files of these names below a folder, and remove them; raises OSError for the first that cannot be made."""
    with tempfile.TemporaryDirectory(prefix=".lance-mlx-", dir=folder) as beside:
        for name in names:
            path = Path(beside, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)


def _unusable(path: Path, number: int) -> LanceError:
    return LanceError(f"output {path} cannot be written ({os.strerror(number)}); choose another name")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A hidden file in the folder of `path` to write to, which takes that name at the end, or goes after an exception.

    The folder is made where it is missing. What processes that were killed have left there goes as well: only a live
    one holds a lock on its file. For a pipe or a device the file lies elsewhere, and is copied into it at the end.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        with tempfile.TemporaryDirectory(prefix="lance-mlx-") as folder:
            yield (made := Path(folder, path.name))
            with made.open("rb") as source, path.open("wb") as stream:
                shutil.copyfileobj(source, stream)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    # In the same folder, so that the final rename cannot cross file systems; short, whatever the length of the name.
    part = path.with_name(_PART.replace("*", secrets.token_hex(4)))
    # An interrupt may come as soon as the file is there.
    try:
        with part.open("xb") as held:
            with suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX)
            yield part
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8, whole or not at all; raises OSError when that fails."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder, which is made where it is missing; on a disk that has
    no locks it does nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _remove_abandoned(folder: Path) -> None:
    for part in folder.glob(_PART):
        with suppress(OSError), part.open("rb") as file:
            if time.time() - part.stat().st_mtime > _SECONDS_TO_LOCK:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
