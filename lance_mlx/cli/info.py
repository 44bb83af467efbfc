"""`lance-mlx info`: what is installed, what a checkpoint holds, and what a request would need."""

import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import typer

from lance_mlx.backend import blas, precision
from lance_mlx.backend.numerics import BFLOAT16, policy, runs_on_cpu
from lance_mlx.checkpoint.hub import is_repository
from lance_mlx.checkpoint.layouts import LAYOUTS, check_folder, find_checkpoint, variants_in
from lance_mlx.checkpoint.recipe import Recipe
from lance_mlx.checkpoint.tensors import Checkpoint, Part, ViTSource
from lance_mlx.checkpoint.weights import packed_modules
from lance_mlx.cli.meaning import refuse
from lance_mlx.cli.options import (
    DEFAULT_FRAMES,
    DEFAULT_SIDE,
    BitsOption,
    GuidanceIntervalOption,
    GuidanceOption,
    NumericsOption,
    PredicateOption,
    VariantOption,
)
from lance_mlx.cli.settings import chosen_recipe
from lance_mlx.config import SPATIAL_STRIDE
from lance_mlx.errors import LanceError
from lance_mlx.estimate.estimate import (
    OFFICIAL,
    coders_of,
    peak_memory,
    quantized_by,
    sizes_of,
    weights_of,
    work_of,
)
from lance_mlx.estimate.machine import budget, measure, memory, seconds_of
from lance_mlx.estimate.tiling import tile_chooser
from lance_mlx.requests.request import Question, Request, Task, Variant, Visual, VisualKind
from lance_mlx.sampling.batch import default_size

_PROCESS = 90_000_000
"""Bytes of Python and its libraries."""
_SIZES = {"width", "height", "num_frames", "steps", "guidance", "guidance_interval", "numerics", "variant"}
_SIZES |= {"quantize", "quant_predicate"}


_OF_ANSWERS = {"num_frames", "numerics", "variant", "quantize", "quant_predicate"}


def register(app: typer.Typer, epilog: str) -> None:
    """Add the command to an app."""
    app.command(epilog=epilog)(info)


def info(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option(help="Folder of a checkpoint in any layout.", metavar="DIR")] = None,
    task: Annotated[
        Task | None, typer.Option(help="Estimate what this task needs; at the official sizes without --model.")
    ] = None,
    width: Annotated[int, typer.Option(help="Pixels, of the source where the task takes its size from it.")] = (
        DEFAULT_SIDE
    ),
    height: Annotated[int, typer.Option(help="Pixels.")] = DEFAULT_SIDE,
    num_frames: Annotated[
        int | None,
        typer.Option(help=f"Frames of a video. [default: {DEFAULT_FRAMES}]", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance: GuidanceOption = 4.0,
    guidance_interval: GuidanceIntervalOption = (0.4, 1.0),
    variant: VariantOption = None,
    numerics: NumericsOption = BFLOAT16.name,
    quantize: BitsOption = None,
    quant_predicate: PredicateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes and seconds.")] = False,
) -> None:
    """Show versions, device, BLAS and precision in use; what a checkpoint holds; and what a task would need.

    Memory and time are estimates: memory from the model's sizes, time from how fast this machine computes one layer.
    """
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    if task is None:
        refuse(given, _SIZES, f"needs a --task to estimate: name one of {', '.join(Task)}")
    elif task.answers:
        refuse(given, _SIZES - _OF_ANSWERS, f"means nothing to task {task}: leave it out")
    if task is not None and not (task.is_for_video or task is Task.SUBJECT):
        refuse(given, {"num_frames"}, f"means nothing to task {task}: leave it out")
    if guidance <= 1:
        refuse(given, {"guidance_interval"}, "acts through guidance: give a --guidance above 1")
    policy(numerics)
    values: dict[str, Any] = {"installed": _installed()}
    if model is not None:
        if is_repository(str(model)):
            raise LanceError(
                f"{model} is a repository, and info reads a folder: leave --model out for the official sizes"
            )
        check_folder(model)
        values["checkpoints"] = [_held(find_checkpoint(model, found)) for found in variants_in(model)]
    if task is not None:
        asked, frames = _asked(task, width, height, num_frames, steps, guidance, guidance_interval)
        recipe = chosen_recipe(quantize, quant_predicate)
        values["estimate"] = _estimated(asked, frames, model, variant, numerics, recipe)
    typer.echo(json.dumps(values, indent=2) if as_json else "\n".join(_lines(values)))


def _installed() -> dict[str, Any]:
    device = mx.default_device()
    return {
        "lance_mlx": version("lance-mlx"),
        "mlx": version("mlx"),
        "device": "gpu" if device.type == mx.gpu else "cpu",
        "memory": memory(),
        "blas": blas.describe(),
        "float32": precision.describe(),
    }


def _held(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint's files hold; nothing but their headers is read."""
    parts: dict[str, Part | None] = {"language_model": checkpoint.lance(), "vae": checkpoint.vae()}
    try:
        parts["vit"] = checkpoint.vit(ViTSource.LANCE)
    except LanceError:
        # Only tasks that look at pictures need one.
        parts["vit"] = None
    tensors = {name: part.tensors.values() if part else () for name, part in parts.items()}
    return {
        "folder": str(checkpoint.folder),
        "variant": str(checkpoint.variant),
        "layout": LAYOUTS[type(checkpoint)],
        "dtypes": {name: sorted({tensor.info.dtype for tensor in held}) for name, held in tensors.items()},
        "bytes": {name: sum(tensor.info.nbytes for tensor in held) for name, held in tensors.items()},
        "quantized": {
            name: Counter(map(str, packed_modules(part, checkpoint.quantization).values()))
            for name, part in parts.items()
            if part
        },
    }


def _asked(
    task: Task,
    width: int,
    height: int,
    num_frames: int | None,
    steps: int,
    guidance: float,
    interval: tuple[float, float],
) -> tuple[Request | Question, int]:
    """A request of that size, and the frames of what it makes or looks at."""
    frames = (DEFAULT_FRAMES if task.is_for_video else 1) if num_frames is None else num_frames
    visuals = (Visual("its source", task.takes),) if task.takes else ()
    if task.answers:
        return Question(task, "", visuals), frames
    request = Request(
        task,
        "",
        height,
        width,
        frames,
        num_steps=steps,
        guidance_scale=guidance,
        guidance_interval=interval,
        visuals=visuals,
    )
    return request, frames


def _estimated(
    asked: Request | Question,
    frames: int,
    model: Path | None,
    kind: VisualKind | None,
    numerics: str,
    recipe: Recipe | None,
) -> dict[str, Any]:
    sizes, rounding, looks = OFFICIAL, policy(numerics), asked.task.takes is not None
    if model is not None:
        checkpoint = find_checkpoint(model, asked.variant if kind is None else Variant.of(kind))
        checkpoint.check(rounding)
        sizes = sizes_of(checkpoint, looks, recipe=recipe)
    elif recipe is not None:
        sizes = quantized_by(recipe, sizes)
    work = work_of(asked, frames, runs_on_cpu())
    stages, tiles = {}, {}
    for name, low_ram in {"kept": False, "low_ram": True}.items():
        tile_for = tile_chooser(*coders_of(sizes, rounding, low_ram, runs_on_cpu()), budget())
        stages[name] = peak_memory(sizes, rounding, work, low_ram, runs_on_cpu(), tile_for)
        tile = tile_for((work.decoded, work.rows, work.columns), False) if work.decoded else None
        tiles[name] = tile and tile * SPATIAL_STRIDE
    rates = measure(sizes, rounding)
    seconds = seconds_of(sizes, rates, work)
    drawn, weights = isinstance(asked, Request), weights_of(sizes, rounding)
    if not looks:
        weights = weights._replace(vit=0, encoder=0)
    return {
        "task": str(asked.task),
        "width": asked.width if drawn else None,
        "height": asked.height if drawn else None,
        "num_frames": frames,
        "steps": asked.num_steps if drawn else asked.max_new_tokens,
        "guided_steps": work.num_guided,
        "numerics": numerics,
        "sizes": "official" if model is None else str(model),
        "weights": weights._asdict(),
        "peak_bytes": {name: _PROCESS + max(found.values()) for name, found in stages.items()},
        "stages": stages,
        "vae_tiling": tiles,
        "batch_size": default_size(asked) if drawn else 1,
        "flops": round(rates.product),
        "seconds": seconds._asdict() | {"total": seconds.total},
    }


def _lines(values: dict[str, Any]) -> list[str]:
    installed = values["installed"]
    lines = [
        f"lance-mlx {installed['lance_mlx']}, mlx {installed['mlx']}",
        f"device: {installed['device']}, {installed['memory'] / 1e9:.1f} GB of memory",
        f"BLAS: {installed['blas']}",
        f"float32 is multiplied {installed['float32']}",
    ]
    for held in values.get("checkpoints", ()):
        lines.append(f"{held['folder']}: {held['variant']}, {held['layout']}")
        for name, size in held["bytes"].items():
            dtypes = " and ".join(held["dtypes"][name])
            packed = held["quantized"].get(name, {})
            dtypes += "".join(f", {count} weights {scheme}" for scheme, count in packed.items())
            lines.append(f"  {name.replace('_', ' ')}: " + (f"{size / 1e9:.2f} GB, {dtypes}" if size else "none"))
    if "estimate" in values:
        lines += _estimate_lines(values["estimate"])
    return lines


def _estimate_lines(found: dict[str, Any]) -> list[str]:
    tiles = [f"{side} pixels" if side else "one piece" for side in found["vae_tiling"].values()]
    tiled = [f"  the VAE in tiles: {tiles[0]}, with --low-ram {tiles[1]}"] if set(tiles) != {"one piece"} else []
    peak, seconds, steps = found["peak_bytes"], found["seconds"], found["steps"]
    if found["width"] is None:
        what = f"{found['task']}, an answer of {steps} tokens"
    else:
        frames = f", {found['num_frames']} frames" if found["num_frames"] > 1 else ""
        what = f"{found['task']}, {found['width']}x{found['height']}{frames}, {steps} step{'s' if steps > 1 else ''}"
        what += f" ({found['guided_steps']} guided)"
    each = f"{_duration(seconds['steps'] / steps)} a {'token' if found['width'] is None else 'step'}"
    speed = found["flops"] / 1e9
    batch = (
        [f"  of several seeds or prompts, {found['batch_size']} are drawn at a time"] if found["batch_size"] > 1 else []
    )
    weights = found["weights"]
    held = f"language model {(weights['layers'] + weights['others'] + weights['head']) / 1e9:.2f} GB, "
    held += f"vae {(weights['decoder'] + weights['encoder']) / 1e9:.2f} GB, vit {weights['vit'] / 1e9:.2f} GB"
    sizes = " of the official model" if found["sizes"] == "official" else ""
    return [
        f"{what}, {found['numerics']}: an estimate{sizes}, not a measurement",
        f"  weights in memory: {held}",
        f"  peak memory: {peak['kept'] / 1e9:.2f} GB, with --low-ram {peak['low_ram'] / 1e9:.2f} GB",
        *tiled,
        *batch,
        f"  time: {_duration(seconds['total'])} without reading the files, {each}, at {speed:.3g} GFLOP/s",
    ]


def _duration(seconds: float) -> str:
    """In words that say no more than an estimate knows: two units from minutes on."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 10:
        return f"{seconds:.3g} s" if seconds < 1 else f"{seconds:.1f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
