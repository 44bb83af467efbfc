"""`lance-mlx train`: learn an adapter from images, videos, edits and questions."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lance_mlx.backend.allocator import release
from lance_mlx.backend.numerics import Numerics, policy
from lance_mlx.checkpoint.hub import fetch, is_repository
from lance_mlx.checkpoint.layouts import check_folder, find_checkpoint
from lance_mlx.checkpoint.recipe import recipe_of
from lance_mlx.checkpoint.tensors import Checkpoint, ViTSource
from lance_mlx.checkpoint.weights import load_lance, stream_vae
from lance_mlx.cli.console import Console, Interrupted, gigabytes
from lance_mlx.cli.previews import Previews
from lance_mlx.errors import LanceError
from lance_mlx.files import check_place
from lance_mlx.pipeline import Pipeline
from lance_mlx.requests.request import Variant, VisualKind
from lance_mlx.sequence.tokenizer import LanceTokenizer
from lance_mlx.training.adapter_files import MLX
from lance_mlx.training.checkpointing import checkpoint_layers
from lance_mlx.training.data import Example, read_data
from lance_mlx.training.encoded import Cache, Encoded, digests_of, encode, files_of, look
from lance_mlx.training.run import CACHE, LOG, STATE, Training, Validated
from lance_mlx.training.settings import TrainSettings

_REPORTS = 20
"""Lines of progress that a run shows where there is no terminal."""


def register(app: typer.Typer, epilog: str) -> None:
    """Add the command to an app."""
    app.command(epilog=epilog)(train)


def train(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="JSON file of settings, by the names of these options with _ for -; also "
            "rank, alpha, tower, targets, caption_dropout and more.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder of a checkpoint, or OWNER/NAME on the hub.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images and videos, each with its caption in a .txt of the same name; or a .jsonl file with "
            "upstream's element lists, also of edits and questions."
        ),
    ] = None,
    adapter_path: Annotated[
        Path | None,
        typer.Option(help="Folder to write the adapter and the log to. [default: adapters]", show_default=False),
    ] = None,
    variant: Annotated[
        VisualKind | None, typer.Option(help="Which model is trained. [default: by the data]", show_default=False)
    ] = None,
    iters: Annotated[int | None, typer.Option(help="Steps. [default: 1000]", show_default=False)] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Examples of a step, run one after another in the memory of one. [default: 1]", show_default=False
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: 0.0001]", show_default=False)] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Root of an image's area in pixels. [default: 512]", show_default=False)
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters. [default: 16]", show_default=False)] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            "-q",
            help="Quantize the base while it is read: bits, or a recipe.",
            metavar="BITS|NAME|FILE",
            show_default=False,
        ),
    ] = None,
    numerics: Annotated[
        str | None, typer.Option(help="bfloat16 or float32. [default: bfloat16]", show_default=False)
    ] = None,
    grad_checkpoint: Annotated[
        bool | None,
        typer.Option("--grad-checkpoint", help="Less memory, for a third more time.", show_default=False),
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between what a run can go on from. [default: 100]", show_default=False)
    ] = None,
    val_data: Annotated[
        Path | None, typer.Option(help="As --data, to measure the loss of and not to learn.", show_default=False)
    ] = None,
    steps_per_eval: Annotated[
        int | None, typer.Option(help="Steps between losses of --val-data. [default: 200]", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn. [default: 0]", show_default=False)] = (
        None
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --adapter-path, to the same bits.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-Q", help="Show errors only.")] = False,
) -> None:
    """Learn a LoRA adapter from images, videos, edits or questions; generate --lora uses it, fuse adds it to the
    weights.

    The log is log.jsonl in --adapter-path, a line a step. A run that was stopped, or killed, goes on with --resume.
    """  # fmt: skip
    flags = {
        "model": model, "data": data and str(data), "adapter_path": adapter_path and str(adapter_path),
        "variant": variant and str(variant), "iters": iters, "batch_size": batch_size, "learning_rate": learning_rate,
        "resolution": resolution, "rank": rank, "numerics": numerics, "grad_checkpoint": grad_checkpoint,
        "quantize": int(quantize) if quantize and quantize.isdecimal() else quantize, "save_every": save_every,
        "seed": seed, "val_data": val_data and str(val_data), "steps_per_eval": steps_per_eval,
    }  # fmt: skip
    settings = TrainSettings.read(config, flags)
    console, folder = Console(quiet), Path(settings.adapter_path)
    check_place(folder / LOG)
    if (folder / STATE).exists() and not resume:
        raise LanceError(f"{folder} holds a run already: go on with --resume, or choose another --adapter-path")
    own = policy(settings.numerics)
    examples = read_data(Path(settings.data))
    validation = read_data(Path(settings.val_data)) if settings.val_data else []
    settings = settings.for_tasks({example.task for example in examples})
    previews = Previews(settings, resume)
    checkpoint = _located(settings, quiet)
    checkpoint.check(own)
    training = _prepared(settings, checkpoint, own, (examples, validation), console)
    if settings.sample_prompts:
        # The VAE is read for each drawing, and dropped after it.
        pipeline = Pipeline(training.model, stream_vae(checkpoint.vae(), own), training.tokenizer)
        training = replace(training, preview=partial(previews.draw, pipeline))
    done = 0
    bar = console.bar(total=settings.iters, desc="training", unit="step")
    try:
        with bar:
            for told in training.run(resume):
                done = told.step
                if isinstance(told, Validated):
                    console.say(f"step {done}: validation loss {told.val_loss:.4f}, {told.seconds:.2f} s")
                    continue
                bar.update(done - bar.n)
                bar.set_postfix_str(f"loss {told.loss:.4f}, peak {gigabytes()}")
                if done % max(1, settings.iters // _REPORTS) == 0:
                    console.say(f"step {done}: loss {told.loss:.4f}, {told.seconds:.2f} s, peak {gigabytes()}")
    except KeyboardInterrupt:
        kept = done - done % settings.save_every
        if not kept:
            raise
        raise Interrupted(f"interrupted; {kept} steps are kept in {folder}: --resume goes on from there") from None
    console.say(f"{folder / MLX}: {done} steps")


def _located(settings: TrainSettings, quiet: bool) -> Checkpoint:
    variant = Variant(settings.variant)
    if is_repository(settings.model):
        return find_checkpoint(fetch(settings.model, variant, quiet), variant)
    check_folder(Path(settings.model))
    return find_checkpoint(Path(settings.model), variant)


def _prepared(
    settings: TrainSettings,
    checkpoint: Checkpoint,
    numerics: Numerics,
    data: tuple[list[Example], list[Example]],
    console: Console,
) -> Training:
    """Encode what is to be learned, then read the model, with the ViT where something has not been looked at yet: the
    VAE and the model are never in memory together. `data` is what is learned, and what is not."""
    examples = [*data[0], *data[1]]
    digests, folder = digests_of(examples), Path(settings.adapter_path) / CACHE
    part = checkpoint.vae()
    latents = Cache(folder, [settings.resolution, numerics.name, files_of(part)], digests)
    track = partial(console.bar, desc="encoding", unit="file")
    encode(examples, latents, part, numerics, settings.resolution, track)
    release()
    tokenizer = LanceTokenizer(checkpoint.folder)
    recipe = None
    if settings.quantize is not None:
        bits = settings.quantize if isinstance(settings.quantize, int) else None
        recipe = recipe_of(bits, None if bits else settings.quantize)
    looked_at = [visual for example in examples for visual in example.looked_at]
    key = [settings.looks_at, numerics.name, settings.quantize]
    features = Cache(folder, key + files_of(checkpoint.vit(ViTSource.LANCE)) if looked_at else [], digests)
    learned, validation = (Encoded(tuple(part), digests, latents, features) for part in data)
    learned.check()
    validation.check()
    looks = bool(features.missing(looked_at))
    track = partial(console.bar, desc="loading", unit="tensor")
    model = load_lance(checkpoint, numerics, looks, track=track, recipe=recipe)
    tokenizer.check(model.config)
    if looks:
        look(examples, features, model, settings.looks_at, partial(console.bar, desc="looking", unit="file"))
        del model.vit_model
        release()
    if settings.grad_checkpoint:
        checkpoint_layers(model)
    return Training(settings, model, tokenizer, learned, validation if data[1] else None)
