"""The `lance-mlx` command: its options, and which of them go together."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lance_mlx.api import load
from lance_mlx.backend.numerics import BFLOAT16, POLICIES, policy
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.cli import convert as cli_convert
from lance_mlx.cli import info as cli_info
from lance_mlx.cli import serve as cli_serve
from lance_mlx.cli.commands import (
    DEFAULT_FRAMES,
    DEFAULT_SIDE,
    Console,
    Interrupted,
    Settings,
    answer,
    draw,
    work_through,
)
from lance_mlx.errors import LanceError
from lance_mlx.media.preprocess import RESOLUTIONS
from lance_mlx.requests.files import read_requests
from lance_mlx.requests.request import Entry, Renorm, Task, Variant, Visual, VisualKind
from lance_mlx.requests.rewriting import REWRITABLE, Rewriter

_EXIT = "Exit status: 0 done, 2 bad input (one line on stderr says what and how to mend it), 130 interrupted."
_INTERRUPTED = 130
_DRAWING = """prompt reencode steps guidance width height num_frames fps timestep_shift guidance_interval
    guidance_renorm guidance_renorm_min text_template vae_resolution noise rewrite""".split()
"""Options that mean nothing to a question."""
_ANSWERING = "question instruction max_tokens temp top_p".split()
"""Options that mean nothing to an image or a video."""
_IN_THE_FILE = "prompt question instruction image video noise reencode".split()
"""Options that do not go with a request file."""

app = typer.Typer(
    help=f"Lance on MLX: make and edit images and videos, and ask about them. {_EXIT}",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.callback()
def _commands() -> None:
    """Lance on MLX."""


@app.command(epilog=_EXIT)
def generate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="Folder of an official checkpoint, or of one of its variants; of a converted one; of one by "
            "mlx-community; or any of these on the hub, as OWNER/NAME."
        ),
    ],
    task: Annotated[
        Task | None,
        typer.Argument(
            help="t2i, t2v: draw a prompt. i2v: animate an image. image_edit, video_edit: change one. subject: draw "
            "what the images show. x2t_image, x2t_video: answer a question. With --requests the file may tell.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to draw, or how to change the source. When editing, every further --prompt edits the result of "
            "the one before; the last result is written.",
            metavar="TEXT",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image to start from; all but i2v take several.", metavar="FILE"),
    ] = None,
    video: Annotated[list[Path] | None, typer.Option(help="Video to start from, or several.", metavar="FILE")] = None,
    question: Annotated[
        str | None, typer.Option(help="What to answer. [default: describe what is there]", show_default=False)
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="System prompt of a question. [default: upstream's]", show_default=False)
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(help="JSON file of many requests, as upstream's examples; those already in --output are left."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write: .png, .mp4, or text for an answer, which is printed too. With --requests, a folder. "
            "[default: TASK-SEED.png or .mp4; the name of the request file]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 42,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 turns guidance off.")] = 4.0,
    width: Annotated[
        int | None,
        typer.Option(help=f"Pixels, a multiple of 16 up to 1024. [default: {DEFAULT_SIDE}]", show_default=False),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help=f"Pixels, a multiple of 16 up to 1024. [default: {DEFAULT_SIDE}]", show_default=False),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(help=f"Frames of a video, up to 121. [default: {DEFAULT_FRAMES}]", show_default=False)
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(
            help=f"Size of what is looked at, and so of what is made from it: {', '.join(RESOLUTIONS)}. "
            "[default: image_768res or video_480p]",
            show_default=False,
        ),
    ] = None,
    vae_resolution: Annotated[
        int | None, typer.Option(help="About this many pixels squared for the VAE, in place of --resolution's.")
    ] = None,
    vit_resolution: Annotated[
        int | None, typer.Option(help="About this many pixels squared for the ViT, in place of --resolution's.")
    ] = None,
    reencode: Annotated[
        bool, typer.Option("--reencode", help="Between turns, encode the pixels anew instead of keeping the latents.")
    ] = False,
    fps: Annotated[int, typer.Option(help="Frames per second of a video.")] = 12,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temp: Annotated[float, typer.Option(help="Temperature of an answer; 0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the most probable tokens that add up to this.")] = 1.0,
    rewrite: Annotated[
        bool,
        typer.Option(
            "--rewrite",
            help="Have a chat model make the prompt of a t2v or i2v detailed: LANCE_REWRITE_API_KEY, "
            "LANCE_REWRITE_MODEL_NAME and LANCE_REWRITE_BASE_URL name it.",
        ),
    ] = False,
    timestep_shift: Annotated[float, typer.Option(help="Shift of the timesteps towards noise.")] = 3.5,
    guidance_interval: Annotated[tuple[float, float], typer.Option(help="Guidance acts while LOW < t <= HIGH.")] = (
        0.4,
        1.0,
    ),
    guidance_renorm: Annotated[Renorm, typer.Option(help="How a guided velocity is scaled back.")] = Renorm.GLOBAL,
    guidance_renorm_min: Annotated[float, typer.Option(help="Least factor of the renorm.")] = 0.0,
    text_template: Annotated[bool, typer.Option(help="Wrap the prompt in the trained template.")] = True,
    entry: Annotated[
        Entry, typer.Option(help="Which of upstream's two sampling functions to follow.")
    ] = Entry.KV_CACHE,
    variant: Annotated[
        VisualKind | None,
        typer.Option(
            help="Use the model for images, or the one for videos. [default: the one trained for the task]",
            show_default=False,
        ),
    ] = None,
    vit_source: Annotated[
        ViTSource, typer.Option(help="Whose ViT is used where the Lance file and the ViT file both hold one.")
    ] = ViTSource.LANCE,
    numerics: Annotated[
        str, typer.Option(help=f"Where to round: {' or '.join(POLICIES)}; bfloat16 is the launcher's.")
    ] = BFLOAT16.name,
    noise: Annotated[
        Path | None,
        typer.Option(help="Start from this noise, [n, 48] in a .npy or .safetensors file, not from the seed."),
    ] = None,
    low_ram: Annotated[
        bool,
        typer.Option(
            "--low-ram",
            help="Hold one layer in memory at a time and read the layers anew in every pass: slower, for machines "
            "that the model does not fit into. The result is the same.",
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show errors only, and an answer that no --output takes.")
    ] = False,
) -> None:
    """Make or edit an image or a video, or answer a question about one, with the defaults of upstream's launcher."""
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    if resolution is not None and resolution not in RESOLUTIONS:
        raise LanceError(f"unknown resolution '{resolution}': choose one of {', '.join(RESOLUTIONS)}")
    settings = Settings(
        height=height,
        width=width,
        num_frames=num_frames,
        resolution=resolution,
        vae_resolution=vae_resolution,
        vit_resolution=vit_resolution,
        num_steps=steps,
        timestep_shift=timestep_shift,
        guidance_scale=guidance,
        guidance_interval=guidance_interval,
        guidance_renorm=guidance_renorm,
        guidance_renorm_min=guidance_renorm_min,
        text_template=text_template,
        max_new_tokens=max_tokens,
        temperature=temp,
        top_p=top_p,
        entry=entry,
        seed=seed,
        fps=fps,
    )
    console = Console(quiet)
    track = partial(console.bar, desc="loading", unit="tensor")
    used = None if variant is None else Variant.of(variant)
    # Nothing looks again after the one request.
    again = requests is not None or len(prompt or ()) > 1
    opened = partial(load, model, policy(numerics), vit_source, track, used, quiet, low_ram, keep_encoders=again)
    if requests is not None:
        _refuse(given, _IN_THE_FILE, "goes with a single request, not with --requests")
        read = read_requests(requests, task)
        _check_options(given, read.task)
        rewriter = Rewriter.from_environment() if rewrite else None
        work_through(opened(), read, settings, output or Path(requests.stem), rewriter, console)
        return
    if task is None:
        raise LanceError(f"name a task ({', '.join(Task)}), or give a file with --requests")
    _check_options(given, task)
    visuals = (
        *(Visual(str(path), VisualKind.IMAGE) for path in image or ()),
        *(Visual(str(path), VisualKind.VIDEO) for path in video or ()),
    )
    if task.answers:
        asked = settings.question(task, question or "", visuals, instruction)
        answer(opened(), asked, output, console)
        return
    if not prompt:
        raise LanceError(f"task {task} needs a --prompt")
    if len(prompt) > 1 and task not in (Task.IMAGE_EDIT, Task.VIDEO_EDIT):
        raise LanceError(f"task {task} takes one --prompt: only editing goes on from turn to turn")
    if len(prompt) > 1 and noise is not None:
        raise LanceError("--noise is for one turn: give one --prompt")
    request = settings.request(task, prompt[0], visuals)
    rewriter = Rewriter.from_environment() if rewrite else None
    draw(opened(), request, prompt[1:], output, noise, reencode, rewriter, console)


def _check_options(given: list[str], task: Task) -> None:
    """Refuse options that would be ignored, rather than leave the user to find out."""
    _refuse(given, _DRAWING if task.answers else _ANSWERING, f"means nothing to task {task}: leave it out")
    if "rewrite" in given and task not in REWRITABLE:
        raise LanceError(f"--rewrite is for {' and '.join(REWRITABLE)}: leave it out")


def _refuse(given: list[str], options: list[str], why: str) -> None:
    refused = next((name for name in given if name in options), None)
    if refused is not None:
        raise LanceError(f"--{refused.replace('_', '-')} {why}")


cli_convert.register(app, _EXIT)
cli_info.register(app, _EXIT)
cli_serve.register(app, _EXIT)


def main() -> None:
    """Run the command; bad input ends it with one line on stderr and status 2."""
    # An answer may hold any character, whatever the locale.
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        app()
    except LanceError as error:
        print(f"lance-mlx: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"lance-mlx: {stopped}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except SystemExit as status:
        if status.code == _INTERRUPTED:
            print("lance-mlx: interrupted, nothing written", file=sys.stderr)
        raise
