"""The `lance-mlx` command."""

import resource
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import numpy as np
import typer
from tqdm import tqdm

from lance_mlx.convert import convert_vae
from lance_mlx.errors import LanceError
from lance_mlx.media import VideoWriter, check_output, save_image, to_uint8
from lance_mlx.model.vae import num_decoded_frames
from lance_mlx.numerics import BFLOAT16, POLICIES, policy
from lance_mlx.pipeline import Pipeline, load
from lance_mlx.request import Entry, Renorm, Request, Task
from lance_mlx.sampling.noise import check_noise, read_noise

_EXIT = "Exit status: 0 done, 2 bad input (one line on stderr says what and how to mend it), 130 interrupted."
_INTERRUPTED = 130
_DEFAULT_FRAMES = 50

app = typer.Typer(
    help=f"Lance on MLX: text to image and text to video. {_EXIT}",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.callback()
def _commands() -> None:
    """Lance on MLX."""


@app.command(epilog=_EXIT)
def generate(
    task: Annotated[Task, typer.Argument(help="What to make: an image (t2i) or a video (t2v).")],
    model: Annotated[Path, typer.Option(help="Folder of an official checkpoint, or of one of its variants.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write: .png, or .mp4. [default: TASK-SEED.png or .mp4]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 42,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 turns guidance off.")] = 4.0,
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 16 up to 1024.")] = 768,
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 16 up to 1024.")] = 768,
    num_frames: Annotated[
        int | None, typer.Option(help=f"Frames of a video, up to 121. [default: {_DEFAULT_FRAMES}]", show_default=False)
    ] = None,
    fps: Annotated[int, typer.Option(help="Frames per second of a video.")] = 12,
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
    numerics: Annotated[
        str, typer.Option(help=f"Where to round: {' or '.join(POLICIES)}; bfloat16 is the launcher's.")
    ] = BFLOAT16.name,
    noise: Annotated[
        Path | None,
        typer.Option(help="Start from this noise, [n, 48] in a .npy or .safetensors file, not from the seed."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
) -> None:
    """Generate an image or a video, with the defaults of upstream's launcher."""
    if num_frames is None:
        num_frames = _DEFAULT_FRAMES if task.makes_video else 1
    request = Request(
        task=task,
        prompt=prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        num_steps=steps,
        timestep_shift=timestep_shift,
        guidance_scale=guidance,
        guidance_interval=guidance_interval,
        guidance_renorm=guidance_renorm,
        guidance_renorm_min=guidance_renorm_min,
        text_template=text_template,
        entry=entry,
        seed=seed,
        fps=fps,
    )
    frames = num_decoded_frames(request.latent_grid[0])
    path = check_output(output or Path(f"{task}-{seed}.{'mp4' if frames > 1 else 'png'}"), frames)
    given = read_noise(noise) if noise else None
    if given is not None:
        check_noise(request, given)
    progress = partial(tqdm, disable=quiet, leave=False)
    started = time.perf_counter()
    pipeline = load(model, task, policy(numerics), track=partial(progress, desc="loading", unit="tensor"))
    latents, seconds_a_step = _denoise(pipeline, request, given, quiet)
    metadata = {
        "generator": f"lance-mlx {version('lance-mlx')}",
        "request": request.to_dict(),
        "numerics": numerics,
        "noise": str(noise) if noise else None,
    }
    pixels = pipeline.decode(request, latents)
    with tqdm(total=frames, desc="decoding", unit="frame", disable=quiet, leave=False) as bar:
        if frames == 1:
            save_image(path, to_uint8(np.array(next(pixels)[0])), metadata)
        else:
            with VideoWriter(path, fps, metadata) as video:
                for chunk in pixels:
                    for frame in to_uint8(np.array(chunk)):
                        video.write(frame)
                    bar.update(len(chunk))
    if not quiet:
        elapsed = time.perf_counter() - started
        typer.echo(
            f"{path}: {request.width}x{request.height}, {frames} frame{'s' if frames > 1 else ''}, {numerics}, "
            f"{seconds_a_step:.2f} s a step, {elapsed:.1f} s in all, peak memory {_gigabytes()}"
        )


def _denoise(pipeline: Pipeline, request: Request, noise: mx.array | None, quiet: bool) -> tuple[mx.array, float]:
    """Run the sampler behind a progress bar; returns the latents [n, 48] and the mean seconds a step."""
    with tqdm(total=request.num_steps, desc="denoising", unit="step", disable=quiet, leave=False) as bar:
        started = time.perf_counter()
        for step in pipeline.denoise(request, noise):
            bar.set_postfix_str(f"t={step.state.t:.3f}, peak {_gigabytes()}")
            bar.update()
        return step.x_next, (time.perf_counter() - started) / request.num_steps


def _gigabytes() -> str:
    """Peak memory of the process, and of MLX where that is on a GPU and not part of it."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{max(resident, mx.get_peak_memory()) / 1e9:.2f} GB"


@app.command("convert-vae", epilog=_EXIT)
def convert_vae_command(
    source: Annotated[Path, typer.Argument(help="The official Wan2.2_VAE.pth.")],
    destination: Annotated[
        Path, typer.Argument(help="The .safetensors file to write; generate looks for Wan2.2_VAE.safetensors.")
    ],
) -> None:
    """Convert the VAE once, where torch is installed, so that generating needs no torch."""
    count = convert_vae(source, destination)
    typer.echo(f"{destination}: {count} tensors")


def main() -> None:
    """Run the command; bad input ends it with one line on stderr and status 2."""
    try:
        app()
    except LanceError as error:
        print(f"lance-mlx: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as status:
        if status.code == _INTERRUPTED:
            print("lance-mlx: interrupted, nothing written", file=sys.stderr)
        raise
