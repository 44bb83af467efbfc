"""Runs the worker in a process of its own, so that upstream's modules and global state meet nothing of this one's."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.errors import ParityError
from parity.memory import peak_of_children

ROOT = Path(__file__).parents[3]
PACKAGES = ("parity", "reference")
"""What of this project the process sees."""
# What the launcher takes for an order to work with others, and what would write beside the clone's files or ask a hub.
_UNSET = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SET = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Run:
    """What a worker says of its run; `peak` is in bytes, None where it is not known."""

    device: str
    versions: dict[str, str]
    stood_in: list[str]
    seconds: float
    peak: int | None


def run_worker(python: Path, job: Mapping[str, Any], folder: Path, progress: Callable[[str], None] | None) -> Run:
    """Run a job of parity.lance.upstream.worker with a Python; it reads and writes in `folder`.

    Raises ParityError, in a line, for whatever stops it; what was written stays in the folder.
    """
    # A Python with other packages than this one's sees these alone.
    (folder / "code").mkdir()
    for package in PACKAGES:
        (folder / "code" / package).symlink_to(ROOT / package, target_is_directory=True)
    environment = {name: value for name, value in os.environ.items() if name not in _UNSET}
    environment |= _SET | {"PYTHONPATH": str(folder / "code")}
    started = time.perf_counter()
    inward, outward = os.pipe()
    with os.fdopen(inward, encoding="utf-8") as lines:
        try:
            (folder / "job.json").write_text(json.dumps({**job, "report": outward}), encoding="utf-8")
            with (folder / "log.txt").open("wb") as log:
                command = [str(python), "-m", "parity.lance.upstream.worker", str(folder / "job.json")]
                process = subprocess.Popen(
                    command, cwd=folder, env=environment, pass_fds=[outward],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
        except OSError as error:
            # Not from the error, which would read as one of the folder that is written to.
            raise ParityError(f"{python} cannot be run: {error.strerror}") from None
        finally:
            os.close(outward)
        try:
            problem = _listen(lines, progress)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
    found = folder / "run.json"
    if status or not found.is_file():
        raise ParityError(problem or _ended(status, folder / "log.txt"))
    told = json.loads(found.read_text(encoding="utf-8"))
    return Run(told["device"], told["versions"], told["stood_in"], time.perf_counter() - started, peak_of_children())


def default_python() -> Path:
    """The Python that runs this."""
    return Path(sys.executable)


def _listen(lines: Any, progress: Callable[[str], None] | None) -> str | None:
    """Pass on what a worker is doing; return what it says went wrong."""
    problem = None
    for line in lines:
        told = json.loads(line)
        if "call" in told and progress:
            progress(told["call"])
        problem = told.get("error", problem)
    return problem and f"upstream fails: {problem}"


def _ended(status: int, log: Path) -> str:
    """Say how a worker ended that did not say why itself."""
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    last = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"the process that ran upstream {how}" + (f": {last[-1]}"[:300] if last and status > 0 else "")
