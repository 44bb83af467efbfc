"""Measure the parity engine: how fast runs are compared, in how much memory, and what capturing costs a forward pass.

    OPENBLAS_NUM_THREADS=1 python scripts/bench_parity.py

Without an OpenBLAS, MLX's products on a Linux CPU are so slow that no capture could be seen beside them. Every number
is the median of several runs; plain and captured passes alternate in one process, so that a busy machine slows both.
"""

import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import parity  # noqa: F401

# isort: split
# Behind parity, which loads PyTorch and an OpenBLAS first.
import mlx.core as mx
import numpy as np
import torch
import typer
from bench_torch import drawing
from rich.console import Console
from rich.table import Table

import lance_mlx.backend.numerics
from lance_mlx.model.lance import Lance
from lance_mlx.model.mot import ExpertRows
from lance_mlx.pipeline import Pipeline, load
from lance_mlx.requests.request import Request, Variant
from lance_mlx.sampling.flow import State, make_arms, velocities
from parity.lance.capture_mlx import MlxCapture
from parity.lance.capture_torch import TorchCapture
from parity.tensors.metrics import axis_errors, compare
from parity.tensors.recording import DTYPES, Tap, open_tensors, write_tensors

CHECKPOINT = Path(__file__).parents[1] / "oracles" / "checkpoint-a"
VARIANT = Variant.IMAGE
# The official sizes, but for the depth and the vocabulary; checkpoint-a's are the small ones.
OFFICIAL = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "mrope_section": (16, 24, 24),
}
PROMPT = "a small red bird flies over the river"
MEGABYTE = 1 << 20
FILE_TENSORS = 2


@dataclass(frozen=True)
class Comparison:
    """One way of comparing two tensors of `size` bytes each as stored: seconds of the clock, and of all cores.

    `held` are the bytes of each in memory, where bfloat16 is held as float32; `memory` is the peak, the two tensors
    themselves included, over `held`.
    """

    what: str
    dtype: str
    size: int
    seconds: float
    cpu_seconds: float
    held: int
    memory: float

    def numbers(self) -> list[float]:
        """Milliseconds; GB/s of both sides, as held, as stored and as stored by the time of cores; memory."""
        held, stored = 2 * self.held / 1e9, 2 * self.size / 1e9
        rates = held / self.seconds, stored / self.seconds, stored / self.cpu_seconds
        return [1000 * self.seconds, *rates, self.memory]


@dataclass(frozen=True)
class Capture:
    """A denoising step of `milliseconds` and how much longer it takes with a capture, entered before.

    `ratio` is that of the clock, `cpu_ratio` that of the time that cores spent, which a busy machine disturbs less;
    both are medians over pairs of neighbouring steps.
    """

    implementation: str
    width: int
    latents: int
    dtype: str
    taps: int
    milliseconds: float
    ratio: float
    cpu_ratio: float


def tensors(size: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 arrays of rows [n, 512] that differ everywhere by rounding, holding `size` bytes as `dtype`."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(size // DTYPES[dtype].itemsize // 512, 512, generator=generator)
    second = first * (1 + 1e-2 * torch.randn(first.shape, generator=generator))
    return tuple(side.to(DTYPES[dtype]).float().numpy() for side in (first, second))


def compare_tensors(size: int, dtype: str, repeats: int) -> Iterator[Comparison]:
    """Measure what is done with two tensors in memory: they differ, are equal, or one holds a NaN."""
    a, b = tensors(size, dtype)

    def measured(what: str, way: Callable[[], object]) -> Comparison:
        # The two are there before.
        memory = 2 + growth(way) / a.nbytes
        return Comparison(what, dtype, size, *timed(way, repeats), a.nbytes, memory)

    def whole() -> None:
        compare(Tap(a, dtype), Tap(b, dtype))

    yield measured("different", whole)
    yield measured("by row", lambda: axis_errors(a, b, 0))
    yield measured("by column", lambda: axis_errors(a, b, 1))
    b[len(b) // 2, 7] = np.nan
    yield measured("one NaN", whole)
    b[...] = a
    yield measured("equal", whole)


def compare_files(size: int, dtype: str, repeats: int) -> Comparison:
    """Measure comparing two files of several tensors, which are read one pair at a time from the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        oracle, ours = (Path(folder) / f"{name}.safetensors" for name in ("oracle", "ours"))
        for path, side in zip((oracle, ours), tensors(size, dtype), strict=True):
            held = side.nbytes
            write_tensors(path, {str(index): Tap(side, dtype) for index in range(FILE_TENSORS)})
        del side

        def files() -> None:
            with open_tensors(oracle) as expected, open_tensors(ours) as got:
                for name in expected:
                    compare(expected[name], got[name])

        memory = growth(files) / held
        seconds = (total / FILE_TENSORS for total in timed(files, repeats))
        return Comparison("from files", dtype, size, *seconds, held, memory)


def growth(way: Callable[[], object]) -> int:
    """Most bytes that Python and NumPy allocate while something runs."""
    tracemalloc.start()
    way()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@contextmanager
def watched(times: list[tuple[float, float]]) -> Iterator[None]:
    """Add the seconds that the block takes, of the clock and of all cores, to a list."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    times.append((time.perf_counter() - wall, time.process_time() - cpu))


def timed(way: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of a run, of the clock and of all cores."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats):
        with watched(times):
            way()
    return np.median(times, axis=0).tolist()


def compared(plain: list[tuple[float, float]], captured: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Milliseconds of a step without a capture, and the median ratios of neighbours by the clock and by cores."""
    # The first pair warms up.
    ratios = np.array(captured[1:]) / np.array(plain[1:])
    return 1000 * float(np.median(np.array(plain[1:])[:, 0])), *np.median(ratios, axis=0).tolist()


def capture_mlx(sizes: dict, latents: int, dtype: str, repeats: int) -> Capture:
    """Measure what MlxCapture adds to a denoising step of a picture of `latents` latent cells."""
    pipeline = load(CHECKPOINT / VARIANT, VARIANT, lance_mlx.backend.numerics.policy(dtype))
    if sizes:
        mx.random.seed(0)
        config = replace(pipeline.model.config, **sizes, head_dim=sizes["hidden_size"] // sizes["num_attention_heads"])
        model = Lance(config, pipeline.model.numerics)
        model.set_dtype(pipeline.model.numerics.dtype)
        mx.eval(model.parameters())
        pipeline = Pipeline(model, pipeline.vae, pipeline.tokenizer)
    side = 16 * round(latents**0.5)
    request = Request.from_dict({"task": "t2i", "prompt": PROMPT, "height": side, "width": side, "num_frames": 1})
    prepared = pipeline.prepare(request)
    arm = make_arms(pipeline.model, request, prepared.sequence, prepared.conditions)["cond"]
    for index in range(len(arm.prefix)):
        arm.prefill(index)
    x_t = mx.random.normal((latents, 48)).astype(pipeline.model.numerics.dtype)
    timestep = np.full(latents, 0.5, np.float32)
    positions = pipeline.model.latent_pos_embed(request.latent_grid)
    brackets = pipeline.model.language_model.model.embed_tokens(mx.array(prepared.sequence.target.ids[[0, -1]]))
    mx.eval(x_t, positions, brackets)

    def velocity(step: int) -> None:
        embeds = ExpertRows(brackets, pipeline.model.embed_latents(x_t, timestep, positions))
        mx.eval(velocities(pipeline.model, [arm], State(step, 0.5, timestep, x_t, embeds)))

    plain, captured = [], []
    for step in range(repeats + 1):
        with watched(plain):
            velocity(step)
        with MlxCapture(pipeline) as capture, watched(captured):
            velocity(step)
            # A capture may put work off until it is asked.
            taps = len(capture.recording)
    return Capture("mlx", pipeline.model.config.hidden_size, latents, dtype, taps, *compared(plain, captured))


def capture_reference(sizes: dict, latents: int, dtype: str, repeats: int) -> Capture:
    """Measure what TorchCapture adds to a denoising step of a picture of `latents` latent cells."""
    drawn = drawing(sizes, PROMPT, latents, dtype, guidance=1.0)
    pipeline, bare, x_t, timestep = drawn.pipeline, drawn.arms[0], drawn.x_t, drawn.timestep
    plain, captured = [], []
    for step in range(repeats + 1):
        with watched(plain):
            bare.velocity(step, x_t, timestep)
        with TorchCapture(pipeline) as capture:
            # To follow an arm changes it.
            arm = capture.follow(copy(bare))
            with watched(captured):
                arm.velocity(step, x_t, timestep)
                taps = len(capture.recording)
    return Capture("reference", pipeline.model.config.hidden_size, latents, dtype, taps, *compared(plain, captured))


def speed_of_mlx() -> float:
    """GFLOP/s of a product as wide as the official model's."""
    a, b = mx.random.normal((1024, 2048)), mx.random.normal((2048, 2048))
    mx.eval(a, b)
    return 2 * 1024 * 2048 * 2048 / timed(lambda: mx.eval(a @ b), 3)[0] / 1e9


def main(
    sizes: Annotated[str, typer.Option(help="Megabytes of the tensors to compare; none with an empty text.")] = (
        "10,64,512"
    ),
    small: Annotated[str, typer.Option(help="Latents to capture at the small width.")] = "16,256",
    official: Annotated[str, typer.Option(help="Latents to capture at the official width, 2 layers.")] = "256,1024",
    dtypes: Annotated[str, typer.Option(help="The dtypes of both.")] = "float32,bfloat16",
    repeats: Annotated[int, typer.Option(help="Runs of which the median is taken.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="PyTorch's threads.", min=1)] = 1,
) -> None:
    """Print both tables."""
    torch.set_num_threads(threads)
    console = Console(width=100)
    table = Table("compared", "dtype", "MB", "ms", "GB/s held", "GB/s stored", "stored, CPU", "peak / tensor")
    for dtype in dtypes.split(","):
        for size in filter(None, sizes.split(",")):
            given = int(size) * MEGABYTE, dtype, repeats
            for c in (*compare_tensors(*given), compare_files(*given)):
                table.add_row(c.what, dtype, size, *(f"{number:.2f}" for number in c.numbers()))
    console.print(table)
    console.print(f"MLX multiplies at {speed_of_mlx():.0f} GFLOP/s")
    table = Table("captured", "dtype", "width", "latents", "taps", "plain ms", "ratio", "CPU ratio")
    for dtype in dtypes.split(","):
        for measure in (capture_mlx, capture_reference):
            for counts, model in ((small, {}), (official, OFFICIAL)):
                for latents in filter(None, counts.split(",")):
                    c = measure(model, int(latents), dtype, repeats)
                    times = f"{c.milliseconds:.1f}", f"{c.ratio:.2f}", f"{c.cpu_ratio:.2f}"
                    table.add_row(c.implementation, dtype, str(c.width), latents, str(c.taps), *times)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
