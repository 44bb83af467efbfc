"""Which machine computes, and the reference as other machines compute it.

How a product is summed depends on the processor's instructions, which PyTorch, oneDNN, MKL and OpenBLAS each choose for
themselves when they are loaded. Their environment variables make one machine compute as older ones do, in a process of
its own: such processes are variants like any other order of rounding.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from lance_mlx.backend.blas import cpu_flags
from parity.bundle.reading import Bundle, read_bundle
from parity.errors import ParityError
from parity.model import definition
from parity.oracle.oracle import KINDS
from parity.tensors.recording import Recording, read_tensors, write_tensors

Environment = dict[str, str]
# What each library calls the instruction sets, from the least on.
_NAMES = {
    "baseline": ("default", "SSE41", "COMPATIBLE", "PRESCOTT"),
    "AVX2": ("avx2", "AVX2", "AVX2", "HASWELL"),
    "AVX-512": ("avx512", "AVX512_CORE", "AVX512", "SKYLAKEX"),
}
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "OPENBLAS_CORETYPE")
"""Environment variables that choose the instructions of PyTorch, oneDNN, MKL and OpenBLAS."""
_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")


def others() -> dict[str, Environment]:
    """Settings under which this machine computes as lesser ones do, by the name of their instructions."""
    return {name: environment for name, environment in _combined().items() if name != _own_instructions()}


def settings() -> dict[str, Environment]:
    """All settings: those of `others`, and every variable by itself."""
    single = {
        f"{variable}={value}": {variable: value}
        for values in _supported().values()
        for variable, value in zip(VARIABLES, values, strict=True)
    }
    return _combined() | single


def _combined() -> dict[str, Environment]:
    return {name: dict(zip(VARIABLES, values, strict=True)) for name, values in _supported().items()}


def _own_instructions() -> str:
    """The setting that changes nothing here; none where there are instructions beyond all of them."""
    flags = cpu_flags()
    return "" if "amx_tile" in flags or "avx512_bf16" in flags else list(_supported() or [""])[-1]


def _supported() -> dict[str, tuple[str, ...]]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    flags = cpu_flags()
    known = {"baseline": True, "AVX2": "avx2" in flags, "AVX-512": "avx512f" in flags}
    return {name: values for name, values in _NAMES.items() if known[name]}


@cache
def facts() -> dict[str, str]:
    """What decides how this process rounds: processor, kernels, versions and threads."""
    flags = cpu_flags()
    return {
        "processor": f"{platform.system()} {platform.machine()} " + " ".join(f for f in _FEATURES if f in flags),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "BLAS": f"{'MKL' if torch.backends.mkl.is_available() else 'no MKL'}, "
        f"{'oneDNN' if torch.backends.mkldnn.is_available() else 'no oneDNN'}",
        "settings": " ".join(f"{name}={os.environ[name]}" for name in VARIABLES[:3] if name in os.environ),
    }


def machine() -> str:
    """A name for all that: eight hexadecimal digits, the same for machines that round alike."""
    return hashlib.sha256(json.dumps(facts(), sort_keys=True).encode()).hexdigest()[:8]


def record_elsewhere(
    bundle: Bundle,
    passes: Recording,
    environments: Mapping[str, Environment],
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[Recording]]:
    """What the reference computes of a bundle under other settings: local, segment and free recordings of each.

    `passes` are the values that the local one is given; see floors.py. A setting under which the process dies, as
    one with instructions that the processor lacks, is left out. Raises ParityError where none can be run.
    """
    with tempfile.TemporaryDirectory(prefix="lance-parity-") as folder:
        place = Path(folder)
        write_tensors(place / "passes.safetensors", passes)
        told = progress or (lambda what: None)
        running: list[subprocess.Popen] = []

        def run(item: tuple[str, Environment]) -> tuple[str, list[Recording] | None, str]:
            name, environment = item
            out = place / hashlib.sha256(name.encode()).hexdigest()[:12]
            told(name)
            command = [sys.executable, "-m", "parity.oracle.machines", str(bundle.path), str(place), str(out)]
            added = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
            # Its input ends when this process does, however that is.
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            with subprocess.Popen(command, env=os.environ | environment | added, text=True, **pipes) as process:
                running.append(process)
                said = process.stderr.read()
            if process.returncode:
                return name, None, (said.strip().splitlines() or ["it died"])[-1]
            return name, [read_tensors(out / f"{kind}.safetensors") for kind in KINDS], ""

        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            try:
                found = list(pool.map(run, environments.items()))
            except BaseException:
                for process in running:
                    process.kill()
                raise
    if environments and all(recordings is None for _, recordings, _ in found):
        raise ParityError(f"bundle {bundle.name} cannot be run in a process of its own: {found[0][2]}")
    return {name: recordings for name, recordings, _ in found if recordings is not None}


def main(arguments: Sequence[str]) -> None:
    """Record a bundle in this process: BUNDLE, the folder of its passes, and the folder to write to."""
    from parity.oracle.floors import own_runs

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    path, given, out = map(Path, arguments)
    bundle = read_bundle(path)
    run = definition().load_trusted(bundle)
    for kind, recording in zip(KINDS, own_runs(run, bundle, read_tensors(given / "passes.safetensors")), strict=True):
        write_tensors(out / f"{kind}.safetensors", recording)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
