"""`lance-mlx benchmark`: the pictures and videos that public benchmarks evaluate."""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageOps

from lance_mlx.api import Generated, load
from lance_mlx.backend.numerics import BFLOAT16, policy
from lance_mlx.cli.commands import going_on
from lance_mlx.cli.console import Console
from lance_mlx.cli.drawing import Drawing, draw_all, prepare_drawings
from lance_mlx.cli.meaning import spelt
from lance_mlx.cli.options import (
    BatchSizeOption,
    GuidanceOption,
    LowRamOption,
    ModelOption,
    NumericsOption,
    SchedulerOption,
    VariantOption,
)
from lance_mlx.cli.several import DEFAULT_SEED
from lance_mlx.errors import LanceError, reason
from lance_mlx.files import check_place, taken_for_one, whole
from lance_mlx.media.write import read_metadata, save_image, save_text
from lance_mlx.requests.benchmarks import Benchmark, Entry, read_benchmark
from lance_mlx.requests.files import naming_entry
from lance_mlx.requests.request import Request, Scheduler, Task, Visual, VisualKind
from lance_mlx.requests.results import is_made_from

_SEEDS = "seeds"
"""Key of a grid's metadata that holds the seeds of its pictures."""
_OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
_COLUMNS = 2
"""Of a grid: what DPG-Bench's evaluator cuts it into."""


def register(app: typer.Typer, epilog: str) -> None:
    """Add the command to an app."""
    app.command(epilog=epilog)(benchmark)


def benchmark(
    name: Annotated[Benchmark, typer.Argument(help="Whose prompts are drawn.", metavar="BENCHMARK")],
    model: ModelOption,
    prompts: Annotated[
        Path,
        typer.Option(
            help="Its prompts, as its evaluator or bytedance/Lance has them. geneval: JSON Lines. dpg: folder of .txt, "
            "or JSON Lines. gedit: .parquet or a folder of these, or JSON. vbench: JSON, .txt, or JSON Lines."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for its evaluator; what is there and was made alike is not made again."
        ),
    ],
    samples: Annotated[
        int | None,
        typer.Option(
            help="How many of each prompt. [default: geneval 4, dpg 4, gedit 1, vbench 5, and 25 where the dimension "
            "is temporal_flickering]",
            metavar="N",
            min=1,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.", metavar="N", min=1)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make anew what is there and was made in another way.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of each prompt's first sample; the next ones count up.")] = (
        DEFAULT_SEED
    ),
    batch_size: BatchSizeOption = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps. [default: 50, vbench 30]", show_default=False)
    ] = None,
    guidance: GuidanceOption = 4.0,
    timestep_shift: Annotated[
        float | None,
        typer.Option(help="Shift of the timesteps towards noise. [default: 3.5, vbench 3.0]", show_default=False),
    ] = None,
    scheduler: SchedulerOption = Scheduler.EULER,
    width: Annotated[int | None, typer.Option(help="Pixels. [default: 768, vbench 848]", show_default=False)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: 768, vbench 480]", show_default=False)] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a video. [default: 50]", show_default=False)] = None,
    vae_resolution: Annotated[
        int | None, typer.Option(help="About this many pixels squared of gedit's sources for the VAE. [default: 768]")
    ] = None,
    vit_resolution: Annotated[
        int | None, typer.Option(help="About this many pixels squared of gedit's sources for the ViT. [default: 672]")
    ] = None,
    variant: VariantOption = None,
    numerics: NumericsOption = BFLOAT16.name,
    low_ram: LowRamOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-Q", help="Show errors only.")] = False,
) -> None:
    """Draw the prompts of a benchmark into the files that its evaluator reads, with the settings of bytedance/Lance's
    scripts for it."""
    options = {
        "num_steps": steps,
        "timestep_shift": timestep_shift,
        "width": width,
        "height": height,
        "num_frames": num_frames,
        "vae_resolution": vae_resolution,
        "vit_resolution": vit_resolution,
    }
    given = {option: value for option, value in options.items() if value is not None}
    _check(name, given)
    values = name.settings | given | {"guidance_scale": guidance, "scheduler": scheduler}
    entries = read_benchmark(name, prompts, samples)[:limit]
    if alike := taken_for_one(output, (file for entry in entries for file in entry.names)):
        taken = f"the disk of {output} takes {alike[0]!r} and {alike[1]!r} for one file"
        remedy = "choose an --output on a disk that tells capitals apart, or leave one of the two out of"
        raise LanceError(f"{taken}: {remedy} {prompts}")
    asked = []
    for entry in entries:
        with naming_entry(prompts, entry.key):
            visuals = () if entry.source is None else (Visual(str(output / entry.source), VisualKind.IMAGE),)
            seeds = range(seed, seed + len(entry.outputs))
            asked.append([Request(name.task, entry.prompt, seed=each, visuals=visuals, **values) for each in seeds])
    console = Console(quiet)
    track = partial(console.bar, desc="loading", unit="tensor")
    opened = load(model, policy(numerics), track=track, variant=variant, quiet=quiet, low_ram=low_ram)
    made_by = opened.made_by(asked[0][0])
    work = [_Work.of(*each, output, made_by, overwrite) for each in zip(entries, asked, strict=True)]
    total = sum(len(each.entry.outputs) for each in work)
    left = {path: each for each in work for path in each.pending}

    def drawings() -> Iterator[Drawing]:
        for each in work:
            with naming_entry(prompts, each.entry.key):
                for path, request in list(each.pending.items()):
                    each.copy_source()
                    (drawing,) = prepare_drawings([request], lambda frames, path=path: [path], overwrite=True)
                    yield replace(drawing, passing=each.entry.grid is not None)

    with going_on(console, output, str(name), total, total - len(left)) as advance:

        def written(drawing: Drawing, generated: Generated) -> None:
            left[drawing.path].done(drawing.path, console)
            advance()

        for each in work:
            each.finish(console)
        draw_all(opened, drawings(), batch_size, None, console, written)


@dataclass
class _Work:
    """What of an entry is to be made: the request of each file that is not there."""

    entry: Entry
    folder: Path
    pending: dict[Path, Request]
    finished: bool

    @classmethod
    def of(
        cls, entry: Entry, requests: Sequence[Request], folder: Path, made_by: Mapping[str, Any], overwrite: bool
    ) -> "_Work":
        """See what is there; raises LanceError for what was made in another way, and is not to be overwritten."""
        if entry.grid is not None:
            seeds = {_SEEDS: [request.seed for request in requests]}
            if _is_made(folder / entry.grid, requests[0], {**made_by, **seeds}, overwrite):
                return cls(entry, folder, {}, True)
        paths = zip((folder / name for name in entry.outputs), requests, strict=True)
        pending = {path: request for path, request in paths if not _is_made(path, request, made_by, overwrite)}
        for name in (*entry.outputs, *entry.texts, entry.grid or entry.outputs[0]):
            check_place(folder / name)
        return cls(entry, folder, pending, False)

    def copy_source(self) -> None:
        """Write the picture that is edited beside where the result goes, if it is not there."""
        if self.entry.source is None or (path := self.folder / self.entry.source).is_file():
            return
        try:
            source = io.BytesIO(self.entry.read_source())
            with warnings.catch_warnings(action="ignore"), Image.open(source) as image, whole(path) as part:
                upright = ImageOps.exif_transpose(image)
                (upright if image.mode in _OF_PNG else upright.convert("RGB")).save(part, format="PNG")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise LanceError(f"its picture cannot be copied to {path} ({reason(error)})") from None

    def done(self, path: Path, console: Console) -> None:
        """Note that a file has been made."""
        del self.pending[path]
        self.finish(console)

    def finish(self, console: Console) -> None:
        """Once all samples are there, put them into a grid where there is one, and write what goes with them."""
        if self.pending or self.finished:
            return
        self.finished = True
        paths = [self.folder / name for name in self.entry.outputs]
        if self.entry.grid is not None:
            made = [read_metadata(path) for path in paths]
            notes = made[0] | {_SEEDS: [each["request"]["seed"] for each in made]}
            save_image(self.folder / self.entry.grid, _grid([np.asarray(Image.open(path)) for path in paths]), notes)
            for path in paths:
                path.unlink()
            if not any(paths[0].parent.iterdir()):
                paths[0].parent.rmdir()
            console.say(f"{self.folder / self.entry.grid}: {len(paths)} sample{'s' if len(paths) > 1 else ''}")
        for name, text in self.entry.texts.items():
            save_text(self.folder / name, text)


def _is_made(path: Path, request: Request, made_by: Mapping[str, Any], overwrite: bool) -> bool:
    if not path.is_file():
        return False
    try:
        same = is_made_from(read_metadata(path), request, made_by)
    except LanceError:
        same = False
    if not same and not overwrite:
        raise LanceError(f"{path} was made in another way: choose another --output, remove it, or give --overwrite")
    return same


def _grid(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures, uint8 [H, W, 3], in rows of two; one that is missing in the last row is white."""
    if len(pictures) == 1:
        return pictures[0]
    whole_rows = [*pictures, *[np.full_like(pictures[0], 255)] * (len(pictures) % _COLUMNS)]
    rows = [np.concatenate(whole_rows[i : i + _COLUMNS], axis=1) for i in range(0, len(whole_rows), _COLUMNS)]
    return np.concatenate(rows)


def _check(name: Benchmark, given: dict[str, Any]) -> None:
    of_video, of_source = ("num_frames",), ("vae_resolution", "vit_resolution")
    refused = (() if name.task is Task.T2V else of_video) + (
        ("width", "height") if name.task is Task.IMAGE_EDIT else of_source
    )
    for option in refused:
        if option in given:
            raise LanceError(f"{spelt(option)} means nothing to {name}: leave it out")
    if name is Benchmark.DPG and given.get("width", 768) != given.get("height", 768):
        raise LanceError("dpg's evaluator cuts squares out of a grid: give the same --width and --height")
