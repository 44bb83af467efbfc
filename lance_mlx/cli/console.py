"""What the commands show while they run: bars where stderr is a terminal, else a line for each kind of stage."""

import resource
import sys
from typing import Any, Self

import mlx.core as mx
from tqdm import tqdm

from lance_mlx.sampling.flow import Step


class Interrupted(Exception):
    """The user stopped the run: the message says what was kept."""


class Console:
    """Progress on stderr and one line a result on stdout, unless the user wants quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._told: set[str] = set()

    def bar(self, *items: Any, desc: str, unit: str, **options: Any) -> tqdm:
        """A bar of tqdm's; where that would fill a file with control codes, the first of its kind is a line."""
        hidden = self.quiet or not self._terminal
        bar = tqdm(*items, desc=desc, unit=unit, leave=False, disable=hidden, **options)
        if not self._terminal and desc not in self._told:
            self._told.add(desc)
            self.note(f"{desc}: {bar.total} {unit}{'s' if bar.total != 1 else ''}" if bar.total else desc)
        return bar

    def say(self, line: str) -> None:
        """Print a line, above any bar."""
        if not self.quiet:
            tqdm.write(line)

    def note(self, line: str) -> None:
        """Print a line to stderr."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)


class Stages:
    """A bar over whichever stage of a generation is at work."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: tqdm | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Move the bar; a new stage has a new one."""
        if self._bar is None:
            unit = "step" if stage == "denoising" else "part"
            self._bar = self._console.bar(total=total, desc=stage, unit=unit)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None

    def seen(self, step: Step) -> None:
        """Show where the latents are."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"t={step.state.t:.3f}, peak {gigabytes()}")


def gigabytes() -> str:
    """Peak memory of the process, and of MLX where that is on a GPU and not part of it."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{max(resident, mx.get_peak_memory()) / 1e9:.2f} GB"
