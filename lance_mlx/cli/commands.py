"""What `lance-mlx generate` does once its options are read: draw, answer, or work through a request file."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from lance_mlx.api import Generated, LanceModel, next_turn
from lance_mlx.errors import LanceError
from lance_mlx.media.preprocess import RESOLUTIONS
from lance_mlx.media.write import check_output, check_text_output, save_text
from lance_mlx.model.vae import num_decoded_frames
from lance_mlx.requests.files import Item, RequestsFile, caption_instruction, naming_entry
from lance_mlx.requests.request import Entry, Question, Renorm, Request, Task, Visual
from lance_mlx.requests.results import PROMPT_BEFORE_REWRITING, ResultsFolder
from lance_mlx.requests.rewriting import Rewriter
from lance_mlx.requests.visuals import prepare_visuals, sized_by_source
from lance_mlx.sampling.flow import Step
from lance_mlx.sampling.noise import check_noise, read_noise

DEFAULT_SIDE = 768
DEFAULT_FRAMES = 50


class Interrupted(Exception):
    """The user stopped the run: the message says what was kept."""


@dataclass(frozen=True)
class Settings:
    """The options that hold for everything that a run makes; None is the task's default."""

    height: int | None
    width: int | None
    num_frames: int | None
    resolution: str | None
    vae_resolution: int | None
    vit_resolution: int | None
    num_steps: int
    timestep_shift: float
    guidance_scale: float
    guidance_interval: tuple[float, float]
    guidance_renorm: Renorm
    guidance_renorm_min: float
    text_template: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    entry: Entry
    seed: int
    fps: int

    def request(self, task: Task, prompt: str, visuals: tuple[Visual, ...], vision_type: str | None = None) -> Request:
        """A request for an image or a video; raises LanceError for options that do not fit the task."""
        if task.size_from_source and (self.width or self.height):
            raise LanceError(f"task {task} takes its size from the source: use --resolution, not --width and --height")
        if task is Task.VIDEO_EDIT and self.num_frames is not None:
            raise LanceError(f"task {task} takes its frames from the source: leave out --num-frames")
        num_frames = self.num_frames
        if num_frames is None:
            num_frames = DEFAULT_FRAMES if task.is_for_video else 1
        vae_resolution, vit_resolution = self._resolutions()
        return Request(
            task=task,
            prompt=prompt,
            height=DEFAULT_SIDE if self.height is None else self.height,
            width=DEFAULT_SIDE if self.width is None else self.width,
            num_frames=num_frames,
            num_steps=self.num_steps,
            timestep_shift=self.timestep_shift,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            guidance_renorm=self.guidance_renorm,
            guidance_renorm_min=self.guidance_renorm_min,
            text_template=self.text_template,
            entry=self.entry,
            seed=self.seed,
            fps=self.fps,
            visuals=visuals,
            vae_resolution=vae_resolution,
            vit_resolution=vit_resolution,
            vision_type=vision_type,
        )

    def question(
        self, task: Task, question: str, visuals: tuple[Visual, ...], instruction: str | None, answer: str = ""
    ) -> Question:
        """A question; one without words asks for a description."""
        if instruction is None and not question:
            instruction = caption_instruction(task)
        return Question(
            task=task,
            question=question,
            visuals=visuals,
            instruction=instruction,
            answer=answer,
            vit_resolution=self._resolutions()[1],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            entry=self.entry,
        )

    def _resolutions(self) -> tuple[int | None, int | None]:
        """Of the VAE and of the ViT, None for the task's own."""
        named = RESOLUTIONS[self.resolution] if self.resolution else (None, None)
        given = (self.vae_resolution, self.vit_resolution)
        return tuple(named[i] if given[i] is None else given[i] for i in range(2))


class Console:
    """Progress on stderr and one line a result on stdout, unless the user wants quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar = partial(tqdm, disable=quiet, leave=False)

    def say(self, line: str) -> None:
        """Print a line, above any bar."""
        if not self.quiet:
            tqdm.write(line)

    def note(self, line: str) -> None:
        """Print a line to stderr."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)

    @contextmanager
    def steps(self, request: Request) -> Iterator[Callable[[Step], None]]:
        """A bar over the denoising steps, as the callback that moves it."""
        with self.bar(total=request.num_steps, desc="denoising", unit="step") as bar:

            def show(step: Step) -> None:
                bar.set_postfix_str(f"t={step.state.t:.3f}, peak {gigabytes()}")
                bar.update()

            yield show


def draw(
    model: LanceModel,
    request: Request,
    later_prompts: Sequence[str],
    output: Path | Callable[[int], Path] | None,
    noise: Path | None,
    reencode: bool,
    rewriter: Rewriter | None,
    console: Console,
) -> tuple[Path, Generated]:
    """Make one image or video, edit it again for each later prompt, and write the last result.

    Everything that the user gave is checked before the model is read.

    Args:
        output: the file, or what gives it from the number of frames; TASK-SEED with a suffix that fits when None.
        noise: file of the noise to start from.

    Raises:
        LanceError: something given cannot be used.
    """
    started = time.perf_counter()
    for prompt in later_prompts:
        next_turn(request, prompt)
    visuals = prepare_visuals(request)
    resolved = sized_by_source(request, visuals)
    frames = num_decoded_frames(resolved.latent_grid[0])
    if output is None:
        output = Path(f"{request.task}-{request.seed}{'.mp4' if frames > 1 else '.png'}")
    path = check_output(output(frames) if callable(output) else output, frames)
    given = read_noise(noise) if noise else None
    if given is not None:
        check_noise(resolved, given)
    notes: dict[str, str | None] = {"noise": str(noise) if noise else None}
    if rewriter is not None:
        original, request = request.prompt, _rewritten(request, rewriter)
        notes[PROMPT_BEFORE_REWRITING] = original
    # Loaded here, so that the bar over the steps begins with the first one.
    model.pipeline(request.variant, looks=bool(visuals))
    with console.steps(request) as show:
        generated = model.generate(request, show, given, visuals)
    for prompt in later_prompts:
        with console.steps(request) as show:
            generated = model.edit_again(generated, prompt, reencode, show)
    generated.save(path, notes, partial(console.bar, total=frames, desc="decoding", unit="frame"))
    size = f"{generated.request.width}x{generated.request.height}, {frames} frame{'s' if frames > 1 else ''}"
    elapsed = time.perf_counter() - started
    console.say(
        f"{path}: {size}, {model.numerics.name}, {generated.seconds_a_step:.2f} s a step, {elapsed:.1f} s in all, "
        f"peak memory {gigabytes()}"
    )
    return path, generated


def answer(model: LanceModel, question: Question, output: Path | None, console: Console) -> None:
    """Answer one question: the text goes to stdout as it comes, and to the output file if there is one."""
    path = check_text_output(output) if output else None
    started = time.perf_counter()
    shown = path is None or not console.quiet
    answered = model.answer(question, _print if shown else None)
    if shown:
        _print("\n")
    if path is not None:
        save_text(path, f"{answered.text}\n")
    count, elapsed = len(answered.tokens), time.perf_counter() - started
    console.note(
        f"{count} token{'s' if count > 1 else ''}, {model.numerics.name}, {answered.seconds_a_token:.3f} s a token, "
        f"{elapsed:.1f} s in all, peak memory {gigabytes()}"
    )


def work_through(
    model: LanceModel,
    requests: RequestsFile,
    settings: Settings,
    folder: Path,
    rewriter: Rewriter | None,
    console: Console,
) -> None:
    """Make what the items of a request file ask for and is not in the folder yet.

    Raises:
        LanceError: an item cannot be made; those before it are kept.
        Interrupted: the user stopped the run.
    """
    asked: dict[str, Request | Question] = {}
    for item in requests.items:
        with naming_entry(requests.path, item.key):
            asked[item.key] = _ask(settings, requests.task, item)
    results = ResultsFolder(folder, requests)
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
                        place = partial(results.path, item)
                        path, made = draw(model, asked[item.key], (), place, None, False, rewriter, console)
                        results.drawn(path, made.request.prompt)
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


def gigabytes() -> str:
    """Peak memory of the process, and of MLX where that is on a GPU and not part of it."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{max(resident, mx.get_peak_memory()) / 1e9:.2f} GB"
