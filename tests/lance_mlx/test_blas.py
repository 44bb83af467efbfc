"""The BLAS that is loaded before MLX: found, chosen, refused, and never a reason to fail."""

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

from lance_mlx import blas
from lance_mlx.numerics import runs_on_cpu

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="on macOS MLX uses the system's BLAS")
NEEDS_OPENBLAS = pytest.mark.skipif(find_library("openblas") is None, reason="there is no OpenBLAS on this machine")
SHOW = "import lance_mlx; from lance_mlx import blas; print(blas.describe())"


def run(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", blas.VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@LINUX
@NEEDS_OPENBLAS
def test_an_openblas_is_loaded_before_mlx_and_named():
    assert run(SHOW).startswith("OpenBLAS, /")
    assert run("import parity; from lance_mlx import blas; print(blas.describe())").startswith("OpenBLAS, /")


@LINUX
@NEEDS_OPENBLAS
@pytest.mark.skipif(not runs_on_cpu(), reason="a GPU multiplies by itself")
def test_mlx_multiplies_with_it():
    code = (
        "import lance_mlx, mlx.core as mx, time\n"
        "a = mx.random.normal((512, 512)); mx.eval(a, a @ a); t = time.process_time(); mx.eval(a @ a @ a @ a)\n"
        "print(time.process_time() - t)"
    )
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # Some twenty times as fast; a factor of 3 is there on a busy machine too.
    assert 3 * float(run(code, **threads)) < float(run(code, **threads, **{blas.VARIABLE: "none"}))


@LINUX
def test_it_can_be_turned_off_and_what_is_no_library_is_named():
    assert run(SHOW, **{blas.VARIABLE: "none"}).startswith("MLX's own, which is slow: apt install")
    assert "names /nowhere.so, which is no BLAS" in run(SHOW, **{blas.VARIABLE: "/nowhere.so"})
    # A library, but no BLAS.
    assert "names libc.so.6, which is no BLAS" in run(SHOW, **{blas.VARIABLE: "libc.so.6"})


@LINUX
@NEEDS_OPENBLAS
def test_nothing_is_loaded_once_mlx_is_there():
    assert run(f"import mlx.core; {SHOW}") == "MLX's own, which is slow: import lance_mlx before mlx.core"


def test_a_machine_without_any_goes_on(monkeypatch):
    monkeypatch.setattr(blas, "find_library", lambda name: None)
    monkeypatch.setattr(blas, "_is_plain", lambda name: False)
    monkeypatch.setattr(Path, "read_text", lambda path, **values: (_ for _ in ()).throw(OSError()))
    blas.load()
    assert blas.loaded() is None
