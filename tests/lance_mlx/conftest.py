"""What the tests of lance_mlx share: the embedded checkpoint and its tokenizer."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from lance_mlx import FLOAT32, Variant
from lance_mlx.cli.main import main
from lance_mlx.pipeline import Pipeline, load
from lance_mlx.sequence.tokenizer import LanceTokenizer

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "oracles" / "checkpoint-a"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """An official checkpoint at a small width, read only."""
    return CHECKPOINT


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The embedded oracle bundles."""
    return ROOT / "oracles"


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    """The small video checkpoint in float32."""
    return load(CHECKPOINT, Variant.VIDEO, FLOAT32)


@pytest.fixture(scope="session")
def tokenizer() -> LanceTokenizer:
    """The small checkpoint's tokenizer."""
    return LanceTokenizer(CHECKPOINT / "Lance_3B")


@pytest.fixture(scope="session")
def real_tokenizer() -> LanceTokenizer:
    """Qwen2.5-VL's own tokenizer."""
    return LanceTokenizer(ROOT / "tests" / "data" / "tokenizer")


class CheckpointCopy:
    """A checkpoint folder that a test may damage."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.variant = folder / "Lance_3B"
        shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("Lance_3B_Video"))

    def edit_config(self, **values: object) -> None:
        """Set keys of llm_config.json; None removes one."""
        path = self.variant / "llm_config.json"
        config = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def edit_weights(self, **arrays: mx.array | None) -> None:
        """Set tensors of model.safetensors; None removes one."""
        path = self.variant / "model.safetensors"
        tensors = mx.load(str(path))
        mx.eval(tensors)
        tensors |= {name.replace("__", "."): array for name, array in arrays.items()}
        mx.save_safetensors(str(path), {name: array for name, array in tensors.items() if array is not None})


@pytest.fixture
def checkpoint_copy(tmp_path: Path) -> CheckpointCopy:
    """A checkpoint folder that the test may damage."""
    return CheckpointCopy(tmp_path / "checkpoint")


COMMAND = Path(sys.executable).parent / "lance-mlx"


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess]:
    """Run `lance-mlx` as a user does; keyword arguments are added to the environment."""

    def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [COMMAND, *map(str, arguments)],
            capture_output=True,
            encoding="utf-8",
            timeout=600,
            env=os.environ | environment,
        )

    return run_command


class Done(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def invoke() -> Callable[..., Done]:
    """Run `lance-mlx` in this process, which saves seconds of imports."""

    def call(*arguments: object) -> Done:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        status = 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as ended:
                status = ended.code or 0
        return Done(status, *(stream.buffer.getvalue().decode() for stream in (out, err)))

    return call


@pytest.fixture(scope="session")
def refused(run: Callable, invoke: Callable) -> Callable[..., str]:
    """Run `lance-mlx` on bad input; returns the one line with which it is refused."""

    def refusal(*arguments: object, **environment: str) -> str:
        done = run(*arguments, **environment) if environment else invoke(*arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        lines = [line for line in done.stderr.splitlines() if line.startswith("lance-mlx: ")]
        assert len(lines) == 1
        return lines[0]

    return refusal


def _write_video(path: Path, height: int, width: int, num_frames: int, rate: Fraction) -> None:
    """A bright square that crosses a gradient."""
    background = np.linspace(30, 200, width, dtype=np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(num_frames):
            pixels = background.copy()
            left = index * (width - 16) // num_frames
            pixels[8:24, left : left + 16] = 250, 220, 20
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the files that users have.

    phone.jpg is stored lying and shown upright, 64x96; logo.png is transparent; clip30.mp4 and clip23.mp4 have 30 and
    23.976 frames a second, portrait.mp4 is higher than wide, still.mp4 has one frame.
    """
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "phone.jpg", exif=exif)
    logo = np.concatenate([pixels, np.tile(np.arange(96, dtype=np.uint8)[None, :, None], (64, 1, 1))], axis=2)
    Image.fromarray(logo).save(folder / "logo.png")
    _write_video(folder / "clip30.mp4", 64, 96, 25, Fraction(30))
    _write_video(folder / "clip23.mp4", 64, 96, 20, Fraction(24000, 1001))
    _write_video(folder / "portrait.mp4", 96, 54, 15, Fraction(30))
    _write_video(folder / "still.mp4", 64, 64, 1, Fraction(30))
    (folder / "text.png").write_text("not an image")
    (folder / "text.mp4").write_text("not a video")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (20000, 10)).save(folder / "ribbon.png")
    whole = (folder / "clip30.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return folder
