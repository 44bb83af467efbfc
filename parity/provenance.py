"""Where the numbers of a report come from."""

import platform
import subprocess
import sys
from pathlib import Path

from parity.bundle import Bundle
from parity.subject import Subject


def provenance_of(bundle: Bundle, subject: Subject, checksum: str, weights: int) -> dict[str, str]:
    """Commits, weights, numerics, versions and the command, in words."""
    source = bundle.manifest["source"]
    found = {
        "oracle": " ".join(str(source[key]) for key in ("implementation", "commit") if key in source),
        "oracle's PyTorch": str(source.get("torch", "unknown")),
        "checkpoint": f"{bundle.checkpoint.name}/{bundle.variant}",
        "weights": f"{weights} tensors, {checksum}",
        "numerics": bundle.dtype,
        "entry": bundle.entry,
        "this code": _commit(),
        "machine": f"{platform.system()} {platform.machine()}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    return found | subject.versions()


def _commit() -> str:
    """The commit of this repository, or "unknown" outside of one."""
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"
