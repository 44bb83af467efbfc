"""Measure what the parts of lance_mlx cost, beside the rate at which the same process multiplies matrices.

    python scripts/bench.py [--quick | --whole-model | --video [--latents N]] [--only TEXT] [--json FILE]
                            [--plots FOLDER]

Every case runs in a process of its own, on one thread, with random weights at the sizes that its row names. Seconds are
CPU time, which a busy machine disturbs less than the clock, and where MLX has a GPU the clock's: the best of several
runs. Memory is the most that MLX allocates while it runs, the weights left out; of a conversion that by which the
process grows. GFLOP/s are those of the products and convolutions, and their share is of a product in the same process:
1024 x 2048 x 2048 in float32, on a GPU 8192 x 8192 x 8192 in the case's dtype.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

# Set before a child loads any library.
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
LATENTS = (256, 1024, 2304, 4096)
VIDEO_LATENTS = (2304, 9216, 29952, 49290, 71424)
# Latents of a small picture, and as many pictures as are sampled together by default.
BATCHES = ((16, 8), (64, 8), (256, 4))


@dataclass(frozen=True)
class Case:
    """One measurement: a name of bench_cases.CASES and its arguments."""

    name: str
    arguments: tuple[Any, ...]

    @property
    def label(self) -> str:
        """The arguments in words."""
        return ", ".join(str(argument) for argument in self.arguments)

    @property
    def latents(self) -> int:
        """Of a case of video_cases."""
        return next(each for each in self.arguments if isinstance(each, int))


@dataclass(frozen=True)
class Result:
    """What a case took: seconds, megabytes, GFLOP/s, the product rate of the same process, and of one that is quantized
    the seconds of the same with nothing quantized, in turn with it."""

    name: str
    arguments: tuple[Any, ...]
    seconds: float
    megabytes: float
    items: int
    gflops: float | None
    product_gflops: float
    plain: float | None = None


def whole_model_cases() -> list[Case]:
    """Steps and answers at the official width and depth."""
    sizes = [("t2i", n, 2048, 36, dtype) for dtype in ("bfloat16", "float32") for n in LATENTS]
    found = [Case(kind, arguments) for arguments in sizes for kind in ("step", "step, PyTorch")]
    return [*found, Case("text", (128, 2048, 36, "bfloat16"))]


def video_cases() -> list[Case]:
    """Steps of one layer at the official width and attention alone, with the latents of videos."""
    found = []
    for dtype in ("float32", "bfloat16"):
        for latents in VIDEO_LATENTS:
            found += [Case("step", ("t2v", latents, 2048, 1, dtype))]
            found += [Case(name, (latents, dtype)) for name in ("attention", "attention, PyTorch")]
    return found


def cases(quick: bool) -> list[Case]:
    """All cases, or those of small sizes that show whether each works."""
    if quick:
        sizes, wide, pictures = (64,), (64, 64, 1), (1, 32)
        texts, vit = (4, 64, 2), 112
    else:
        sizes, wide, pictures = LATENTS, (1024, 2048, 1), (2, 128)
        texts, vit = (128, 512, 4), 672
    hidden, layers = (64, 2) if quick else (512, 4)
    kinds = ("step", "step, both experts", "step, PyTorch")
    found = [Case(kind, ("t2i", *wide, dtype)) for dtype in ("float32", "bfloat16") for kind in kinds]
    found += [Case("step", ("t2i", n, hidden, layers, "float32")) for n in sizes]
    found += [Case("step, PyTorch", ("t2i", n, hidden, layers, "float32")) for n in sizes]
    for latents, many in BATCHES[:1] if quick else BATCHES:
        for shape in ((hidden, layers, "float32"), (*wide[1:], "bfloat16")):
            found += [Case("batch", (pictures, latents, *shape)) for pictures in (1, many)]
    edit = ("image_edit", sizes[min(1, len(sizes) - 1)], hidden, layers, "float32")
    found += [Case(name, edit) for name in ("step", "step, no prefix cache", "prefix")]
    found += [Case("text", (*texts, dtype)) for dtype in ("float32", "bfloat16")]
    alone = (8, 64, 2) if quick else (32, 2048, 4)
    for recipe, bits in (("8bit", 8), ("small", 4)):
        found.append(Case("step, quantized", ("t2i", 64 if quick else 2304, *wide[1:], "bfloat16", recipe)))
        found += [
            Case("text, quantized", (*alone, "bfloat16", recipe)),
            Case("text, quantized by mlx-lm", (*alone, "bfloat16", bits)),
        ]
    found.append(Case("ViT, 4 blocks", (vit, "float32")))
    if not quick:
        found.append(Case("VAE decode", (*pictures, "float32")))
    found += [Case("VAE decode", (frames, 64, "float32", True)) for frames in ((1, 2) if quick else (4, 31))]
    found.append(Case("VAE encode", (*pictures, "float32")))
    found.append(Case("conversion", (hidden, layers, "bfloat16")))
    return found


def measure(case: Case, repeats: int) -> Result:
    """Run a case; called in a process of its own."""
    # PyTorch and an OpenBLAS come before MLX.
    from parity import memory  # noqa: I001
    import mlx.core as mx
    import torch
    from bench_cases import CASES
    from bench_rate import clock, product_rate

    torch.set_num_threads(1)
    work = CASES[case.name](*case.arguments)
    dtype = next(each for each in case.arguments if each in ("float32", "bfloat16"))
    rate = product_rate(dtype)
    with torch.inference_mode():
        if repeats > 1:
            work.run()
        times, plain, most = [], [], 0
        if work.plain:
            work.plain()
        for _ in range(repeats):
            memory.give_back()
            mx.reset_peak_memory()
            memory.reset_peak()
            held = memory.peak() if work.whole else mx.get_active_memory()
            start = clock()
            work.run()
            times.append(clock() - start)
            most = max(most, (memory.peak() if work.whole else mx.get_peak_memory()) - held)
            if work.plain:
                start = clock()
                work.plain()
                plain.append(clock() - start)
    work.remove()
    seconds = min(times)
    gflops = work.operations / seconds / 1e9 if work.operations else None
    rate = max(rate, product_rate(dtype))
    return Result(
        case.name, case.arguments, seconds, most / 1e6, work.items, gflops, rate, min(plain) if plain else None
    )


def exponent(points: list[tuple[float, float]]) -> float:
    """The exponent of a power law through points, fitted in logarithms."""
    import numpy as np

    x, y = np.log(np.array(points, float)).T
    return float(np.polyfit(x, y, 1)[0])


def summary(results: list[Result]) -> list[str]:
    """The ratios that tell whether the port wastes anything, in words."""
    at = {(r.name, r.arguments): r for r in results}
    lines = []
    for (name, arguments), r in at.items():
        if name != "step":
            continue
        for other, what in (
            ("step, both experts", "that of both experts for all tokens"),
            ("step, no prefix cache", "that without a prefix cache"),
            ("step, PyTorch", "PyTorch's"),
        ):
            if (other, arguments) in at:
                ratio = r.seconds / at[other, arguments].seconds
                lines.append(f"step ({Case(name, arguments).label}): {ratio:.2f} of {what}")
    for (name, (pictures, *sizes)), r in ((key, r) for key, r in at.items() if key[0] == "batch" and key[1][0] > 1):
        ratio = r.seconds / pictures / at[name, (1, *sizes)].seconds
        lines.append(f"batch ({Case(name, r.arguments).label}): a picture takes {ratio:.2f} of one alone")
    for sizes, grown in _over_latents(results, "step").items():
        power = exponent([(r.arguments[1], r.seconds) for r in grown])
        memory = exponent([(r.arguments[1], r.megabytes) for r in grown])
        lines.append(f"step ({sizes}): cost grows with latents to the power {power:.2f}, memory to {memory:.2f}")
    narrow = [r for r in results if r.name == "VAE decode" and len(r.arguments) == 4]
    if len(narrow) == 2:
        few, many = narrow
        ratio = many.megabytes / few.megabytes
        lines.append(f"VAE decode: {many.items} latent frames take {ratio:.2f} of the memory of {few.items}")
    lines += [f"{r.name} ({Case(r.name, r.arguments).label}): {r.items / r.seconds:.3g} tokens/s"
              for r in results if r.name.startswith("text")]  # fmt: skip
    lines += [f"{r.name} ({Case(r.name, r.arguments).label}): {r.seconds / r.plain:.2f} of the time without quantizing"
              for r in results if r.plain]  # fmt: skip
    lines += [f"conversion ({Case(r.name, r.arguments).label}): {r.items / r.seconds:.0f} MB/s of the source"
              for r in results if r.name == "conversion"]  # fmt: skip
    return lines


def _over_latents(results: list[Result], name: str) -> dict[str, list[Result]]:
    """Steps that differ in their latents alone, by their other sizes in words."""
    found: dict[str, list[Result]] = {}
    for r in results:
        if r.name == name and r.arguments[0] == "t2i":
            found.setdefault(", ".join(map(str, r.arguments[2:])), []).append(r)
    return {sizes: rows for sizes, rows in found.items() if len(rows) > 1}


def print_table(results: list[Result]) -> None:
    """Print a row for each result."""
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "sizes", "ms", "MB", "GFLOP/s", "share of product")
    for r in results:
        rates = ("–", "–") if r.gflops is None else (f"{r.gflops:.0f}", f"{r.gflops / r.product_gflops:.0%}")
        memory = "–" if "PyTorch" in r.name else f"{r.megabytes:.0f}"
        table.add_row(r.name, Case(r.name, r.arguments).label, f"{1000 * r.seconds:.1f}", memory, *rates)
    Console(width=120).print(table)


def plot(results: list[Result], folder: Path) -> Path:
    """Draw the step's cost against its size, with the fitted exponents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    curves = [("MLX", *curve) for curve in _over_latents(results, "step").items()]
    curves += [("PyTorch", *curve) for curve in _over_latents(results, "step, PyTorch").items()]
    for label, sizes, rows in curves:
        latents = [r.arguments[1] for r in rows]
        for axes, values in ((left, [r.seconds for r in rows]), (right, [r.megabytes for r in rows])):
            if axes is left or label == "MLX":
                power = exponent(list(zip(latents, values, strict=True)))
                axes.loglog(latents, values, marker="o", label=f"{label}, {sizes}: exponent {power:.2f}")
    for axes, title, unit in ((left, "a guided step", "seconds"), (right, "its memory beyond the weights", "MB")):
        axes.set(title=title, xlabel="latents", ylabel=unit)
        axes.set_xticks(LATENTS, [f"{count:,}" for count in LATENTS])
        axes.set_xticks([], minor=True)
        axes.grid(True, alpha=0.3)
        if axes.lines:
            axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: shows that all cases run.")] = False,
    whole_model: Annotated[
        bool, typer.Option("--whole-model", help="Steps and answers at the official width and depth, for a GPU.")
    ] = False,
    video: Annotated[bool, typer.Option("--video", help="One layer and its attention at videos' lengths.")] = False,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only cases whose name holds this.")] = "",
    latents: Annotated[int | None, typer.Option(help="Of --video: up to so many latents.", min=1)] = None,
    repeats: Annotated[
        int, typer.Option(help="Runs of which the best counts; before several there is one that does not count.", min=1)
    ] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Draw cost against size.")] = None,
) -> None:
    """Run the cases, print the table and what follows from it."""
    if quick + whole_model + video > 1:
        print("--quick, --whole-model and --video: name one of them", file=sys.stderr)
        raise typer.Exit(2)
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    found = whole_model_cases() if whole_model else video_cases() if video else cases(quick)
    chosen = [case for case in found if only in case.name and (latents is None or not video or case.latents <= latents)]
    if not chosen:
        print(f"no case's name holds {only!r}", file=sys.stderr)
        raise typer.Exit(2)
    results = []
    for case in tqdm(chosen, unit="case", disable=None):
        # A process of its own: its peak memory is its own, and no case warms another's caches.
        with get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(measure, (case, repeats)))
    print_table(results)
    print("\n".join(summary(results)))
    if json_file:
        json_file.write_text(json.dumps([asdict(r) for r in results], indent=1), encoding="utf-8")
    if plots:
        print(plot(results, plots))


if __name__ == "__main__":
    typer.run(main)
