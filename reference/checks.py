"""Questions about values read from JSON, and about what lies at a path."""

import errno
import stat
import sys
from pathlib import Path


def is_integer(value: object) -> bool:
    """Whether a value is an integer and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a finite number and not true or false; an integer of any length is to fit a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require_file(path: Path) -> None:
    """Raise OSError unless a path is that of a file: what is read from a pipe or a device might never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, a device or a folder, not a file", str(path))
