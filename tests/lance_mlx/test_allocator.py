"""Freed arrays are kept for the next ones, and given back when told to."""

import subprocess
import sys

import pytest

from lance_mlx.backend.numerics import runs_on_cpu

REUSE = """
import lance_mlx, mlx.core as mx, resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch():
    mx.eval(mx.zeros((16 << 20,)) + 1)
    mx.clear_cache()
touch(); before = faults(); touch(); kept = faults() - before
lance_mlx.backend.allocator.release(); before = faults(); touch()
print(kept, faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.skipif(not runs_on_cpu(), reason="on a GPU MLX has an allocator of its own")
def test_large_arrays_are_used_again_until_they_are_released():
    done = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kept, released = map(int, done.stdout.split())
    # 64 MiB are 16,384 pages, unless the kernel gives larger ones.
    assert kept < 100 < released or kept == released == 0
