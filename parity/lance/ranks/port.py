"""lance_mlx by several processes, which share the rows of the latents or the arms of guidance."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from parity.bundle.reading import Bundle
from parity.errors import ParityError
from parity.lance.ports import MlxPort
from parity.ports.port import Asked, Loader
from parity.tensors.metrics import bits
from parity.tensors.recording import Observed, Recording, read_tensors

FEWEST, MOST = 2, 16


class RanksPort(MlxPort):
    """Processes on this machine that MLX's ring connects; raises ParityError where one fails, or two differ.

    Of a pass over latents no rank has all that is inside, so that only its outcome is told.
    """

    partial = True

    def __init__(self, bundle: Bundle, count: int, split: str) -> None:
        super().__init__(bundle)
        if self._asked.task.answers:
            raise ParityError(f"bundle {bundle.name} is of an answer, which one process makes: leave --ranks out")
        self.name, self._count, self._split = f"mlx, {count} ranks, {split}", count, split

    def _run(self, asked: Asked) -> Observed:
        if asked.force or asked.exact is not None:
            raise ParityError("several ranks go their own way alone")
        asked.progress(self.name)
        with tempfile.TemporaryDirectory() as folder:
            recordings = self._recorded(Path(folder))
        first, *others = recordings
        for rank, other in enumerate(others, start=1):
            for name, tap in first.items():
                if not np.array_equal(bits(tap.array), bits(other[name].array)):
                    raise ParityError(f"ranks 0 and {rank} differ at {name}")
        exact = {name: tap for name, tap in first.items() if name.startswith("inputs/")}
        recording = {name: tap for name, tap in first.items() if name in asked.names and name not in exact}
        return Observed(recording, exact, {})

    def _recorded(self, folder: Path) -> list[Recording]:
        from lance_mlx.distributed.local import local_ranks
        from lance_mlx.distributed.watch import STATUS

        worker = [sys.executable, "-m", "parity.lance.ranks.worker", self.bundle.path.resolve(), self._split, folder]
        # The packages of this process, wherever it found them.
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), *sys.path]))}
        processes = [
            subprocess.Popen(worker, env=os.environ | paths | told, stderr=subprocess.PIPE, text=True, errors="replace")
            for told in local_ranks(self._count, folder)
        ]
        try:
            said = [process.communicate()[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        # The one that failed by itself says why.
        for rank in sorted(failed, key=lambda rank: processes[rank].returncode == STATUS):
            lines = said[rank].strip().splitlines() or [f"status {processes[rank].returncode}"]
            raise ParityError(f"rank {rank} failed: {lines[-1]}")
        return [read_tensors(folder / f"{rank}.safetensors") for rank in range(self._count)]


def ranks_port(count: int, split: str) -> Loader:
    """What loads lance_mlx as so many processes that share "rows" or "guidance"; raises ParityError for what cannot
    be."""
    import mlx.core as mx

    if not FEWEST <= count <= MOST:
        raise ParityError(f"--ranks {count} must be from {FEWEST} to {MOST} processes of this machine")
    if split == "guidance" and count != FEWEST:
        raise ParityError(f"guidance has two arms, for two ranks: give --ranks {FEWEST}, or --split rows")
    if not mx.distributed.is_available("ring"):
        raise ParityError("this MLX has no ring backend, by which --ranks are connected")
    return lambda bundle: RanksPort(bundle, count, split)
