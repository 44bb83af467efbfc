"""Memory of this process: its peak, where the system tells it, and giving back what is free."""

import gc
import resource
import sys
from pathlib import Path

from lance_mlx.backend import allocator


def reset_peak() -> None:
    """Start a new peak at the present use, where the kernel can (Linux); elsewhere the peak is of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def give_back() -> None:
    """Return freed memory to the system.

    What only refers to itself is freed first: Python would do so at any time, with the next layer in memory as well.
    """
    gc.collect()
    allocator.release()


def peak() -> int | None:
    """Return the largest resident memory since `reset_peak`, in bytes; None where it is not known."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def peak_of_children() -> int | None:
    """Return the largest resident memory that a process started by this one has had, in bytes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (used if sys.platform == "darwin" else used * 1024) or None
