"""`lance-mlx generate`: its options."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer

from lance_mlx.api import load
from lance_mlx.backend.numerics import BFLOAT16, policy
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.cli.commands import answer, work_through
from lance_mlx.cli.console import Interrupted
from lance_mlx.cli.drawing import draw_all, prepare_drawings
from lance_mlx.cli.meaning import EDITING, check_options, refuse
from lance_mlx.cli.options import (
    DEFAULT_FRAMES,
    DEFAULT_SIDE,
    AsUpstreamOption,
    BatchSizeOption,
    BitsOption,
    GuidanceIntervalOption,
    GuidanceOption,
    LoRAOption,
    LoRAScaleOption,
    LowRamOption,
    ModelOption,
    NumericsOption,
    PredicateOption,
    SchedulerOption,
    VariantOption,
    ViTSourceOption,
)
from lance_mlx.cli.replay import check_sources, options_of
from lance_mlx.cli.settings import Settings, chosen_recipe
from lance_mlx.cli.several import DEFAULT_SEED, TakesSeeds, choose_seeds, name_outputs, read_prompts
from lance_mlx.cli.sharing import Sharing
from lance_mlx.distributed.ranks import join
from lance_mlx.distributed.split import Split
from lance_mlx.errors import LanceError
from lance_mlx.estimate.tiling import AUTO
from lance_mlx.media.preprocess import RESOLUTIONS
from lance_mlx.requests.files import read_requests
from lance_mlx.requests.request import Entry, Renorm, Scheduler, Task, Visual, VisualKind
from lance_mlx.requests.rewriting import Rewriter

_IN_THE_FILE = "prompt prompts_file question instruction image video noise reencode config_from auto_seeds".split()
_IN_THE_FILE += ["num_images", "stepwise_output_dir"]
"""Options that do not go with a request file."""


def register(app: typer.Typer, epilog: str) -> None:
    """Add the command to an app."""
    app.command(epilog=epilog, cls=TakesSeeds)(generate)


def _replay(context: typer.Context, file: Path | None) -> Path | None:
    """Take what a file was made with as defaults, before any other option is looked at."""
    if file is not None:
        context.default_map = options_of(file)
    return file


def _task(name: str) -> Task:
    """A task by its name, upstream's name of the subject-driven one included."""
    try:
        return Task(name)
    except ValueError:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(Task)}.") from None


def generate(
    context: typer.Context,
    model: ModelOption,
    task: Annotated[
        Task | None,
        typer.Argument(
            help="t2i, t2v: draw a prompt. i2v: animate an image. image_edit, video_edit: change one. subject (or "
            "idip): draw what the images show. x2t_image, x2t_video: answer a question. With --requests the file may "
            "tell.",
            parser=_task,
            metavar="TASK",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to draw, or how to change the source; - reads stdin. When editing, every further --prompt edits "
            "the result of the one before; the last result is written.",
            metavar="TEXT",
            show_default=False,
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="File of prompts, one a line, for an output each; - reads stdin.", metavar="FILE"),
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help="What to steer away from, in place of upstream's sequence without text: a departure from upstream.",
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
            help="File to write: .png, .jpg, .webp, .mp4, .mov, .gif, or text for an answer, which is printed too. "
            "{seed} in its name is the seed, {index} the number of the prompt. With --requests, a folder. "
            "[default: TASK-SEED.png or .mp4; the name of the request file]",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Write over files that are there, and make anew what other --requests have made."
        ),
    ] = False,
    config_from: Annotated[
        Path | None,
        typer.Option(
            callback=_replay,
            is_eager=True,
            help="Take every option that is not given from the metadata of this picture or video, but --model.",
            metavar="FILE",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            help=f"Seed of the noise, or several for an output each: --seed 1 2 3. [default: {DEFAULT_SEED}]",
            show_default=False,
        ),
    ] = None,
    auto_seeds: Annotated[
        int | None, typer.Option(help="Make so many outputs, with random seeds.", metavar="N", show_default=False)
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(help="Make so many of a prompt, with seeds from --seed on.", metavar="N", show_default=False),
    ] = None,
    batch_size: BatchSizeOption = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance: GuidanceOption = 4.0,
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
            help=f"Size of what is looked at, and in i2v, image_edit and video_edit of what is made: "
            f"{', '.join(RESOLUTIONS)}. "
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
    as_upstream: AsUpstreamOption = False,
    reencode: Annotated[
        bool, typer.Option("--reencode", help="Between turns, encode the pixels anew instead of keeping the latents.")
    ] = False,
    fps: Annotated[int, typer.Option(help="Frames per second of a video.")] = 12,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temp: Annotated[
        float,
        typer.Option("--temp", "--temperature", help="Temperature of an answer; 0 takes the most probable token."),
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the most probable tokens that add up to this.")] = 1.0,
    rewrite: Annotated[
        bool,
        typer.Option(
            "--rewrite",
            help="Have a chat model make the prompt of a t2v or i2v detailed: LANCE_REWRITE_API_KEY, "
            "LANCE_REWRITE_MODEL_NAME and LANCE_REWRITE_BASE_URL name it.",
        ),
    ] = False,
    scheduler: SchedulerOption = Scheduler.EULER,
    strength: Annotated[
        float,
        typer.Option(
            help="Share of the steps that an edit does, from its source's latents under the noise of that time: the "
            "less, the more stays. Upstream's 1 starts from noise alone."
        ),
    ] = 1.0,
    timestep_shift: Annotated[float, typer.Option(help="Shift of the timesteps towards noise.")] = 3.5,
    guidance_interval: GuidanceIntervalOption = (0.4, 1.0),
    guidance_renorm: Annotated[Renorm, typer.Option(help="How a guided velocity is scaled back.")] = Renorm.GLOBAL,
    guidance_renorm_min: Annotated[float, typer.Option(help="Least factor of the renorm.")] = 0.0,
    text_template: Annotated[bool, typer.Option(help="Wrap the prompt in the trained template.")] = True,
    entry: Annotated[
        Entry, typer.Option(help="Which of upstream's two sampling functions to follow.")
    ] = Entry.KV_CACHE,
    variant: VariantOption = None,
    vit_source: ViTSourceOption = ViTSource.LANCE,
    numerics: NumericsOption = BFLOAT16.name,
    noise: Annotated[
        Path | None,
        typer.Option(help="Start from this noise, [n, 48] in a .npy or .safetensors file, not from the seed."),
    ] = None,
    stepwise_output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Write a small picture of where the latents are heading after every step, by a linear map to colours "
            "that comes with a converted VAE, and is fitted to others: a moment on a GPU, some 14 s on a CPU.",
            metavar="DIR",
        ),
    ] = None,
    cache_limit_gb: Annotated[
        float | None,
        typer.Option(help="Most gigabytes of freed memory that MLX keeps. [default: MLX's]", show_default=False),
    ] = None,
    vision_type: Annotated[str | None, typer.Option(hidden=True)] = None,
    low_ram: LowRamOption = False,
    vae_tiling: Annotated[
        str,
        typer.Option(
            help="Code frames in tiles of so many pixels a side, from 384, which come within 0.001 of the whole; auto "
            "does so where the whole does not fit into memory, none never.",
            metavar="auto|none|PIXELS",
        ),
    ] = AUTO,
    quantize: BitsOption = None,
    quant_predicate: PredicateOption = None,
    lora: LoRAOption = None,
    lora_scale: LoRAScaleOption = None,
    split: Annotated[
        Split | None,
        typer.Option(
            help="What the processes of mlx.launch share: outputs, each whole; guidance, its two arms; rows, those of "
            "the latents. [default: outputs of several, else guidance by two processes and rows by more]",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-Q", help="Show errors only, and an answer that no --output takes.")
    ] = False,
) -> None:
    """Make or edit an image or a video, or answer a question about one, with the defaults of upstream's launcher."""
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    if resolution is not None and resolution not in RESOLUTIONS:
        raise LanceError(f"unknown resolution '{resolution}': choose one of {', '.join(RESOLUTIONS)}")
    if cache_limit_gb is not None:
        if not 0 <= cache_limit_gb < 2**20:
            raise LanceError(f"--cache-limit-gb {cache_limit_gb} must be 0 or more gigabytes")
        mx.set_cache_limit(round(cache_limit_gb * 1e9))
    options = context.params
    if "resolution" in given:  # Which goes before what a file was made with, but not before what is given besides.
        options = options | {name: None for name in ("vae_resolution", "vit_resolution") if name not in given}
    if "seed" in given or "auto_seeds" in given:
        refuse(given, ("noise",), "starts from what is given and no seed: leave one of the two out")
        noise = None  # Which a seed that is given goes before, too.
    ranks = join()
    seeds = ranks.from_first(choose_seeds(seed, auto_seeds, num_images))
    settings = Settings.of(options, seeds[0])
    recipe = chosen_recipe(quantize, quant_predicate)
    # Nothing looks again after the one request.
    several = requests is not None or prompts_file is not None or len(seeds) > 1
    again = several or len(prompt or ()) > 1
    if requests is not None:
        refuse(given, _IN_THE_FILE, "goes with a single request, not with --requests")
        read = read_requests(requests, task)
        task = read.task
    sharing = Sharing.of(ranks, split, several, bool(task and task.answers), guidance > 1)
    if rewrite and sharing.split is not Split.OUTPUTS:
        raise LanceError("--rewrite gives every process another prompt: leave it out, or give --split outputs")
    console = sharing.console(quiet)
    track = partial(console.bar, desc="loading", unit="tensor")
    opened = partial(
        load, model, policy(numerics), vit_source, track, variant, quiet, low_ram, again, vae_tiling, recipe,
        tuple(zip(lora or (), lora_scale or (), strict=True)), sharing.split,
    )  # fmt: skip
    if requests is not None:
        if len(seeds) > 1:
            raise LanceError("--requests takes one --seed: outputs are named by the entries alone")
        check_options(given, context.params, task)
        rewriter = Rewriter.from_environment() if rewrite else None
        folder = output or Path(requests.stem)
        work_through(opened(), read, settings, folder, overwrite, batch_size, rewriter, console, sharing)
        return
    sources = {"image": image or (), "video": video or (), "noise": [noise] if noise else ()}
    if task is None:
        raise LanceError(f"name a task ({', '.join(Task)}), or give a file with --requests")
    check_options(given, context.params, task)
    if config_from is not None:
        check_sources(config_from, {name: paths for name, paths in sources.items() if name not in given})
    visuals = (
        *(Visual(str(path), VisualKind.IMAGE) for path in image or ()),
        *(Visual(str(path), VisualKind.VIDEO) for path in video or ()),
    )
    if task.answers:
        asked = settings.question(task, question or "", visuals, instruction)
        outputs = [None] * len(seeds) if output is None else name_outputs(output, "", 1, seeds)
        questions = [replace(asked, seed=each) for each in seeds]
        answer(opened(), *map(sharing.items, (questions, outputs)), overwrite, console)
        return
    prompts = read_prompts(prompt or (), prompts_file)
    if not prompts:
        raise LanceError(f"task {task} needs a --prompt")
    firsts, turns = (prompts, []) if prompts_file is not None else (prompts[:1], prompts[1:])
    if turns and task not in EDITING:
        raise LanceError(f"task {task} takes one --prompt: only editing goes on from turn to turn")
    if noise is not None and (turns or len(firsts) * len(seeds) > 1):
        raise LanceError("--noise is for one output of one turn: give one --prompt and one seed")
    firsts = [settings.request(task, text, visuals, vision_type) for text in firsts]
    drawings = prepare_drawings(
        [replace(first, seed=each) for first in firsts for each in seeds],
        lambda frames: name_outputs(output, f"{task}{'.mp4' if frames > 1 else '.png'}", len(firsts), seeds),
        overwrite,
        turns,
        reencode,
        noise,
        stepwise_output_dir,
    )
    # Nobody begins before all have seen that nothing is in the way.
    ranks.wanting_everywhere([True])
    drawings = [sharing.drawing(each) for each in sharing.items(drawings)]
    rewriter = Rewriter.from_environment() if rewrite else None
    done = 0

    def written(*_: object) -> None:
        nonlocal done
        done += 1

    try:
        draw_all(opened(), drawings, batch_size, rewriter, console, written)
    except KeyboardInterrupt:
        told = [f"{done} of {len(drawings)} are written"] if done else []
        if shown := sum(each.steps.written for each in drawings if each.steps):
            told.append(f"{shown} picture{'s' if shown > 1 else ''} of steps in {stepwise_output_dir}")
        if not told:
            raise
        raise Interrupted(f"interrupted; {', '.join(told)}") from None
