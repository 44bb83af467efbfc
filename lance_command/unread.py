"""How a command ends whose output is not read to its end, as that of `| head` is."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 141
"""What a shell says of cat then: 128 and the number of SIGPIPE. The signal itself would also end a server."""


class _Output(io.FileIO):
    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            # What is still to be written goes nowhere, and nobody is told.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise SystemExit(STATUS) from None


@contextmanager
def end_unread() -> Iterator[None]:
    """End the process quietly with STATUS where its output is closed before all is written: libraries that print would
    make a status of their own of it, or a traceback."""
    before = sys.stdout
    if before is not sys.__stdout__:
        yield
        return
    raw = _Output(before.fileno(), "wb", closefd=False)
    how = before.encoding, before.errors, None, before.line_buffering, before.write_through
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), *how)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before
