"""What `lance-mlx generate` does once its options are read: draw, answer, or work through a request file."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from lance_mlx.api import Generated, LanceModel, next_turn
from lance_mlx.cli.console import Console, Interrupted, Stages, gigabytes
from lance_mlx.cli.settings import Settings
from lance_mlx.errors import LanceError
from lance_mlx.files import check_place
from lance_mlx.media.write import check_output, check_text_output, save_image, save_text
from lance_mlx.model.vae import num_decoded_frames
from lance_mlx.requests.files import Item, RequestsFile, naming_entry
from lance_mlx.requests.request import Question, Request, Task
from lance_mlx.requests.results import PROMPT_BEFORE_REWRITING, ResultsFolder
from lance_mlx.requests.rewriting import Rewriter
from lance_mlx.requests.visuals import PreparedVisual, prepare_visuals, sized_by_source
from lance_mlx.sampling.flow import Step
from lance_mlx.sampling.noise import check_noise, read_noise
from lance_mlx.sampling.preview import clean_estimate, preview


@dataclass(frozen=True)
class Drawing:
    """An image or a video to be made and what goes with it, all of it checked.

    Attributes:
        later_prompts: of the turns that edit what `request` makes.
        notes: what to write beside the metadata.
        steps: file of the picture of a step, from its number; None for no pictures.
    """

    request: Request
    visuals: Sequence[PreparedVisual]
    path: Path
    frames: int
    later_prompts: Sequence[str] = ()
    reencode: bool = False
    noise: mx.array | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    steps: Callable[[int], Path] | None = None


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
        steps = None if steps_folder is None else partial(_step_path, steps_folder, path.stem)
        if steps is not None:
            check_place(steps(1), overwrite)
        drawings.append(Drawing(request, visuals, path, frames, later_prompts, reencode, given, notes, steps))
    return drawings


def _step_path(folder: Path, stem: str, number: int) -> Path:
    return folder / f"{stem}-{number:04}.png"


class _StepPictures:
    """Pictures of the steps of one output, numbered on through its turns."""

    def __init__(self, weights: np.ndarray, path: Callable[[int], Path]) -> None:
        self._weights = weights
        self._path = path
        self._count = 0

    def write(self, step: Step, grid: tuple[int, int, int]) -> None:
        """Write what the step's latents are heading for."""
        self._count += 1
        notes = {"step": step.state.index + 1, "t": step.state.t}
        save_image(self._path(self._count), preview(self._weights, clean_estimate(step), grid), notes)


def draw_all(model: LanceModel, drawings: Sequence[Drawing], rewriter: Rewriter | None, console: Console) -> None:
    """Make one after the other; raises Interrupted where the user stops after some are written."""
    done = 0
    try:
        for drawing in drawings:
            draw(model, drawing, rewriter, console)
            done += 1
    except KeyboardInterrupt:
        if done == 0:
            raise
        raise Interrupted(f"interrupted; {done} of {len(drawings)} are written") from None


def draw(model: LanceModel, drawing: Drawing, rewriter: Rewriter | None, console: Console) -> Generated:
    """Make one image or video, edit it again for each later prompt, and write the last result."""
    started = time.perf_counter()
    request, notes = drawing.request, drawing.notes
    if rewriter is not None:
        request, notes = _rewritten(request, rewriter), notes | {PROMPT_BEFORE_REWRITING: request.prompt}
    # Loaded here, so that the bar over the steps begins with the first one.
    pipeline = model.pipeline(request.variant, looks=bool(drawing.visuals))
    pictures = None if drawing.steps is None else _StepPictures(pipeline.preview_weights, drawing.steps)
    grid = sized_by_source(request, drawing.visuals).latent_grid
    generated = None
    for prompt in (None, *drawing.later_prompts):
        with Stages(console) as stages:

            def seen(step: Step, show: Callable[[Step], None] = stages.seen) -> None:
                show(step)
                if pictures is not None:
                    pictures.write(step, grid)

            if generated is None:
                generated = model.generate(request, seen, drawing.noise, drawing.visuals, stages.progress)
            else:
                generated = model.edit_again(generated, prompt, drawing.reencode, seen, progress=stages.progress)
    frames = drawing.frames
    generated.save(drawing.path, notes, partial(console.bar, total=frames, desc="decoding", unit="frame"))
    size = f"{generated.request.width}x{generated.request.height}, {frames} frame{'s' if frames > 1 else ''}"
    elapsed = time.perf_counter() - started
    console.say(
        f"{drawing.path}: {size}, {model.numerics.name}, {generated.seconds_a_step:.2f} s a step, {elapsed:.1f} s in "
        f"all, peak memory {gigabytes()}"
    )
    return generated


def answer(
    model: LanceModel, questions: Sequence[Question], outputs: Sequence[Path | None], overwrite: bool, console: Console
) -> None:
    """Answer questions: each text goes to stdout as it comes, and to its output file if there is one."""
    paths = [check_text_output(output, overwrite) if output else None for output in outputs]
    with Stages(console) as stages:
        for question, path in zip(questions, paths, strict=True):
            started = time.perf_counter()
            shown = path is None or not console.quiet
            answered = model.answer(question, _print if shown else None, stages.progress)
            if shown:
                _print("\n")
            if path is not None:
                save_text(path, f"{answered.text}\n")
            count, elapsed = len(answered.tokens), time.perf_counter() - started
            console.note(
                f"{count} token{'s' if count > 1 else ''}, {model.numerics.name}, {answered.seconds_reading:.1f} s to "
                f"read, {answered.seconds_a_token:.3f} s a token, {elapsed:.1f} s in all, peak memory {gigabytes()}"
            )


def work_through(
    model: LanceModel,
    requests: RequestsFile,
    settings: Settings,
    folder: Path,
    overwrite: bool,
    rewriter: Rewriter | None,
    console: Console,
) -> None:
    """Make what the items of a request file ask for and is not in the folder yet.

    Args:
        overwrite: make anew what is there and was made from another request.

    Raises:
        LanceError: an item cannot be made, or was made from another request; those before it are kept.
        Interrupted: the user stopped the run.
    """
    asked: dict[str, Request | Question] = {}
    for item in requests.items:
        with naming_entry(requests.path, item.key):
            asked[item.key] = _ask(settings, requests.task, item)
    used = model.variant_for(next(iter(asked.values())))
    made_by = {"model": model.name, "variant": str(used), "numerics": model.numerics.name}
    results = ResultsFolder(folder, requests, asked, made_by, rewriter is not None, overwrite)
    total, done = len(requests.items), len(requests.items) - len(results.pending)
    if done:
        console.say(f"{folder}: {done} of {total} are there already")
    bar = console.bar(total=total, initial=done, desc=str(requests.task), unit="item")
    # Questions are answered by one generator, so that those on one visual share its reading.
    answers = model.answer_all(asked[item.key] for item in results.pending)
    try:
        with bar:
            for item in results.pending:
                with naming_entry(requests.path, item.key):
                    if requests.task.answers:
                        answered = next(answers)
                        results.answered(item, answered.raw_text)
                        console.say(f"{item.key}: {' '.join(answered.text.split())}")
                    else:
                        (drawing,) = prepare_drawings([asked[item.key]], partial(results.paths, item), overwrite=True)
                        made = draw(model, drawing, rewriter, console)
                        results.drawn(drawing.path, made.request.prompt)
                done += 1
                bar.update()
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {done} of {total} are in {folder}: the same command goes on from there"
        ) from None
    results.finish()


def _ask(settings: Settings, task: Task, item: Item) -> Request | Question:
    if task.answers:
        return settings.question(task, item.text, item.visuals, item.instruction, item.answer)
    return settings.request(task, item.text, item.visuals, item.vision_type)


def _rewritten(request: Request, rewriter: Rewriter) -> Request:
    """The request with its prompt rewritten, or as it is where that fails, which is said: upstream goes on as well."""
    try:
        image = request.visuals[0].path if request.visuals else None
        return changed(request, prompt=rewriter.rewrite(request.prompt, image))
    except LanceError as error:
        tqdm.write(f"lance-mlx: the prompt is not rewritten: {error}", file=sys.stderr)
        return request


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
