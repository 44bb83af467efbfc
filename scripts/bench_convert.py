"""A conversion to be timed: a float32 checkpoint of the official layout, at any width, in a temporary folder."""

import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import mkdtemp

import make_checkpoint

from lance_mlx.checkpoint.convert import prepare
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.requests.request import Variant

# What is not under test is small.
SMALL = {"vocabulary": 1024, "vit-layers": 2, "vit-hidden": 128, "vit-intermediate": 128, "vit-heads": 2}
SMALL |= {"vae-encoder": 16, "vae-decoder": 16}


class Converting:
    """A checkpoint that is converted anew each time, until both are removed.

    Args:
        sizes: options of make_checkpoint.py for the language model.

    Attributes:
        megabytes: what a conversion reads.
    """

    def __init__(self, sizes: dict[str, int], dtype: str) -> None:
        self._folder, self._dtype, self.megabytes = Path(mkdtemp(prefix="lance-bench-")), dtype, 0
        options = [word for name, value in (sizes | SMALL).items() for word in (f"--{name}", str(value))]
        source = self._folder / "official"
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            make_checkpoint.main([str(source), "--size", "official", "--variant", "image", *options])
        self._checkpoint = find_checkpoint(source, Variant.IMAGE)
        self.run()

    def run(self) -> None:
        """Convert, over what the last run made."""
        made = self._folder / "converted"
        shutil.rmtree(made, ignore_errors=True)
        prepare("official", self._checkpoint, made, self._dtype, 1 << 30, ViTSource.LANCE).run(self._started)

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _started(self, total: int, done: int) -> Callable[[int], None]:
        self.megabytes = total // 1_000_000
        return lambda count: None
