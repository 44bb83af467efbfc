"""Images and videos of the commands: checked before a model is read, drawn side by side, written, told."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from lance_mlx.api import Generated, LanceModel, next_turn
from lance_mlx.cli.console import Console, Stages, gigabytes
from lance_mlx.errors import LanceError
from lance_mlx.files import check_place
from lance_mlx.media.write import check_output, save_image
from lance_mlx.model.vae import num_decoded_frames
from lance_mlx.requests.request import Request
from lance_mlx.requests.results import PROMPT_BEFORE_REWRITING
from lance_mlx.requests.rewriting import Rewriter
from lance_mlx.requests.visuals import PreparedVisual, prepare_visuals, sized_by_source
from lance_mlx.sampling.batch import batches
from lance_mlx.sampling.flow import Step
from lance_mlx.sampling.noise import check_noise, read_noise
from lance_mlx.sampling.preview import clean_estimate, preview


@dataclass(frozen=True)
class Drawing:
    """An image or a video to be made and what goes with it, all of it checked.

    Attributes:
        path: where it goes; None where another process writes it.
        later_prompts: of the turns that edit what `request` makes.
        notes: what to write beside the metadata.
        steps: where pictures of the steps go; None for no pictures.
        passing: another file takes its place, so that no line is said of it.
    """

    request: Request
    visuals: Sequence[PreparedVisual]
    path: Path | None
    frames: int
    later_prompts: Sequence[str] = ()
    reencode: bool = False
    noise: mx.array | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    steps: "StepPictures | None" = None
    passing: bool = False


def prepare_drawings(
    requests: Sequence[Request],
    name: Callable[[int], Sequence[Path]],
    overwrite: bool,
    later_prompts: Sequence[str] = (),
    reencode: bool = False,
    noise: Path | None = None,
    steps_folder: Path | None = None,
) -> list[Drawing]:
    """Check everything that was given about requests with the same visuals, which costs no more than reading those.

    Args:
        name: gives the outputs from the number of frames that each will have.
        overwrite: let outputs take the place of files.
        noise: file of the noise to start from.
        steps_folder: where pictures of the steps go.

    Raises:
        LanceError: something given cannot be used.
    """
    visuals = prepare_visuals(requests[0])
    resolved = sized_by_source(requests[0], visuals)
    frames = num_decoded_frames(resolved.latent_grid[0])
    given = read_noise(noise) if noise else None
    if given is not None:
        check_noise(resolved, given)
    notes = {"noise": str(noise) if noise else None} | ({"reencode": True} if reencode else {})
    drawings, paths = [], name(frames)
    if steps_folder is not None and len({path.stem for path in paths}) < len(paths):
        raise LanceError("--stepwise-output-dir names pictures as --output names files: put {seed} into that name")
    for request, path in zip(requests, paths, strict=True):
        turns = [request]
        for prompt in later_prompts:
            turns.append(next_turn(turns[-1], prompt))
        check_output(path, frames, overwrite, notes | {"turns": [turn.to_dict() for turn in turns]})
        steps = None if steps_folder is None else StepPictures(steps_folder, path.stem)
        if steps is not None:
            check_place(steps.next, overwrite)
        drawings.append(Drawing(request, visuals, path, frames, later_prompts, reencode, given, notes, steps))
    return drawings


@dataclass
class StepPictures:
    """Pictures of the steps of one output, numbered on through its turns."""

    folder: Path
    stem: str
    written: int = 0

    @property
    def next(self) -> Path:
        """The file of the next one."""
        return self.folder / f"{self.stem}-{self.written + 1:04}.png"

    def write(self, weights: np.ndarray, step: Step, grid: tuple[int, int, int]) -> None:
        """Write what the step's latents are heading for, by the weights of a preview."""
        notes = {"step": step.state.index + 1, "t": step.state.t}
        save_image(self.next, preview(weights, clean_estimate(step), grid), notes)
        self.written += 1


def draw_all(
    model: LanceModel,
    drawings: Iterable[Drawing],
    size: int | None,
    rewriter: Rewriter | None,
    console: Console,
    tell: Callable[[Drawing, Generated], None] = lambda drawing, generated: None,
) -> None:
    """Make all of them, those that go together side by side.

    Args:
        size: most of a batch; None for as many as pay.
        tell: called with each that is written.
    """
    for batch in in_batches(drawings, size):
        for drawing, generated in zip(batch, draw(model, batch, rewriter, console), strict=True):
            tell(drawing, generated)


def in_batches(drawings: Iterable[Drawing], size: int | None) -> Iterator[list[Drawing]]:
    """Part drawings into those that are made side by side: what goes through turns or from given noise is alone."""
    for alone, several in groupby(drawings, lambda drawing: bool(drawing.later_prompts) or drawing.noise is not None):
        yield from batches(
            several, lambda drawing: sized_by_source(drawing.request, drawing.visuals), 1 if alone else size
        )


def draw(
    model: LanceModel, batch: Sequence[Drawing], rewriter: Rewriter | None, console: Console
) -> Iterator[Generated]:
    """Make images or videos side by side, or one, which is edited again for each later prompt; write the last results
    and yield each when it is written."""
    started = time.perf_counter()
    requests, notes = [], []
    for drawing in batch:
        request, note = drawing.request, drawing.notes
        if rewriter is not None:
            request, note = _rewritten(request, rewriter), note | {PROMPT_BEFORE_REWRITING: request.prompt}
        requests.append(request)
        notes.append(note)
    first = batch[0]
    # Loaded here, so that the bar over the steps begins with the first one.
    pipeline = model.pipeline(requests[0].variant, looks=bool(first.visuals))
    weights = pipeline.preview_weights if first.steps else None
    grid = sized_by_source(requests[0], first.visuals).latent_grid
    made: list[Generated] = []
    for prompt in (None, *first.later_prompts):
        with Stages(console) as stages:

            def seen(steps: list[Step], show: Callable[[Step], None] = stages.seen) -> None:
                show(steps[0])
                for step, drawing in zip(steps, batch, strict=True):
                    if drawing.steps is not None:
                        drawing.steps.write(weights, step, grid)

            def seen_alone(step: Step, seen: Callable[[list[Step]], None] = seen) -> None:
                seen([step])

            if made:
                made = [model.edit_again(made[0], prompt, first.reencode, seen_alone, progress=stages.progress)]
            elif len(batch) > 1:
                made = model.generate_batch(requests, seen, [each.visuals for each in batch], stages.progress)
            else:
                made = [model.generate(requests[0], seen_alone, first.noise, first.visuals, stages.progress)]
    shared = (time.perf_counter() - started) / len(batch)
    for drawing, generated, note in zip(batch, made, notes, strict=True):
        _write(drawing, generated, note, shared, console)
        yield generated


def _write(drawing: Drawing, generated: Generated, notes: dict[str, Any], seconds: float, console: Console) -> None:
    """Decode and write a result, and say how long it all took, with the seconds before."""
    started, frames = time.perf_counter(), drawing.frames
    if drawing.path is None:
        return
    generated.save(drawing.path, notes, partial(console.bar, total=frames, desc="decoding", unit="frame"))
    if drawing.passing:
        return
    size = f"{generated.request.width}x{generated.request.height}, {frames} frame{'s' if frames > 1 else ''}"
    elapsed = seconds + time.perf_counter() - started
    console.say(
        f"{drawing.path}: {size}, {generated.numerics}, {generated.seconds_a_step:.2f} s a step, {elapsed:.1f} s in "
        f"all, peak memory {gigabytes()}"
    )


def _rewritten(request: Request, rewriter: Rewriter) -> Request:
    """The request with its prompt rewritten, or as it is where that fails, which is said: upstream goes on as well."""
    try:
        image = request.visuals[0].path if request.visuals else None
        return changed(request, prompt=rewriter.rewrite(request.prompt, image, request.as_upstream))
    except LanceError as error:
        tqdm.write(f"lance-mlx: the prompt is not rewritten: {error}", file=sys.stderr)
        return request
