"""The BLAS that is loaded before MLX: found, chosen, refused, and never a reason to fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lance_mlx.backend import blas
from lance_mlx.backend.numerics import runs_on_cpu

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="on macOS MLX uses the system's BLAS")
SHOW = "import lance_mlx; from lance_mlx import blas; print(blas.describe())"


def run(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", blas.VARIABLE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@LINUX
def test_an_openblas_is_loaded_before_mlx_and_named():
    assert run(SHOW).startswith("OpenBLAS, /")
    assert run("import parity; from lance_mlx import blas; print(blas.describe())").startswith("OpenBLAS, /")


@LINUX
@pytest.mark.skipif(not runs_on_cpu(), reason="a GPU multiplies by itself")
def test_mlx_multiplies_with_it():
    code = (
        "import lance_mlx, mlx.core as mx, numpy as np, zlib\n"
        "a = mx.random.normal((512, 512), key=mx.random.key(0)); print(zlib.crc32(np.array(a @ a).tobytes()))"
    )
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # Each sums in its own order, always the same.
    assert run(code, **threads) == run(code, **threads) != run(code, **threads, **{blas.VARIABLE: "none"})


@LINUX
def test_the_packaged_one_comes_before_the_systems():
    assert str(blas.cache_folder()) in run(SHOW)


@LINUX
def test_its_copy_is_made_once_and_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = Path(blas._packaged())
    before = made.stat().st_mtime_ns
    assert blas._packaged() == str(made) and made.stat().st_mtime_ns == before
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    assert blas._is_plain(str(made))
    made.unlink()
    monkeypatch.setattr(blas.subprocess, "run", lambda *given, **how: (_ for _ in ()).throw(OSError()))
    assert blas._packaged() is None and not list(made.parent.iterdir())


@LINUX
def test_it_can_be_turned_off_and_what_is_no_library_is_named():
    assert run(SHOW, **{blas.VARIABLE: "none"}).startswith("MLX's own, which is slow: pip install scipy-openblas32")
    assert "names /nowhere.so, which is no BLAS" in run(SHOW, **{blas.VARIABLE: "/nowhere.so"})
    # A library, but no BLAS.
    assert "names libc.so.6, which is no BLAS" in run(SHOW, **{blas.VARIABLE: "libc.so.6"})


@LINUX
def test_nothing_is_loaded_once_mlx_is_there():
    assert run(f"import mlx.core; {SHOW}") == "MLX's own, which is slow: import lance_mlx before mlx.core"


def test_a_machine_without_any_goes_on(monkeypatch):
    monkeypatch.setattr(blas, "find_library", lambda name: None)
    monkeypatch.setattr(blas, "_is_plain", lambda name: False)
    monkeypatch.setattr(Path, "read_text", lambda path, **values: (_ for _ in ()).throw(OSError()))
    blas.load()
    assert blas.loaded() is None
