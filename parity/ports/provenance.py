"""Where the numbers of a report come from."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.bundle.reading import Bundle
from parity.ports.port import Port


def provenance_of(bundle: Bundle, port: Port, checksum: str, weights: int) -> dict[str, str]:
    """Commits, weights, numerics, versions and the command, in words."""
    source = bundle.manifest["source"]
    found = {
        "oracle": origin(source),
        "oracle's PyTorch": str(source.get("torch", "unknown")),
        "checkpoint": f"{bundle.checkpoint.name}/{bundle.variant}",
        "weights": f"{weights} tensors, {checksum}",
        "numerics": bundle.dtype,
        "entry": bundle.entry,
        "this code": code_commit(12) or "unknown",
        "machine": f"{platform.system()} {platform.machine()}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    return found | port.versions()


def origin(source: Mapping[str, Any]) -> str:
    """What made a bundle and at which commit, as far as its manifest tells."""
    return " ".join(str(source[key]) for key in ("implementation", "commit") if key in source)


def code_commit(digits: int = 40) -> str | None:
    """The commit of this project's working copy; see commit_of."""
    return commit_of(Path(__file__).parents[2], digits)


def commit_of(root: Path, digits: int = 40) -> str | None:
    """The commit that a working copy is at, with -dirty behind it where files differ; None outside of one."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", f"--abbrev={digits}", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
