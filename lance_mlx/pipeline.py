"""Load a checkpoint once, then turn requests into steps, latents and frames."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from lance_mlx.model.lance import Lance
from lance_mlx.model.vae import VAE
from lance_mlx.numerics import BFLOAT16, Numerics
from lance_mlx.prompt import build_sequence
from lance_mlx.request import Request, Task
from lance_mlx.sampling.flow import Step, denoise
from lance_mlx.sampling.noise import draw_noise
from lance_mlx.tokenizer import LanceTokenizer
from lance_mlx.weights import Tracker, find_checkpoint, load_lance, load_vae


class Pipeline:
    """A loaded Lance: tokenizer, transformer and VAE decoder under one numeric policy."""

    def __init__(self, model: Lance, vae: VAE, tokenizer: LanceTokenizer) -> None:
        self.model = model
        self.vae = vae
        self.tokenizer = tokenizer

    def denoise(self, request: Request, noise: mx.array | None = None) -> Iterator[Step]:
        """Yield the sampler's steps; the last one's `x_next` holds the latents.

        Args:
            noise: [n, 48] to start from; drawn from the request's seed when None.

        Raises:
            LanceError: the noise does not fit the request.
        """
        sequence = build_sequence(request, self.tokenizer)
        if noise is None:
            noise = draw_noise(request, self.model.numerics)
        return denoise(self.model, request, sequence, noise)

    def decode(self, request: Request, latents: mx.array) -> Iterator[mx.array]:
        """Yield pixels, float32 [1 or 4, height, width, 3] in [-1, 1], one latent frame of [n, 48] latents at a
        time."""
        return self.vae.decode(latents.reshape(*request.latent_grid, -1))


def load(path: str | Path, task: Task, numerics: Numerics = BFLOAT16, track: Tracker = iter) -> Pipeline:
    """Load an official checkpoint for a task.

    Args:
        path: the folder that holds Lance_3B, Lance_3B_Video and the VAE, or one of the first two.
        numerics: the launcher's bfloat16, or float32.
        track: wraps the list of tensors while they are read, as tqdm does, to show progress.

    Raises:
        LanceError: a file, key or tensor is missing or wrong.
    """
    checkpoint = find_checkpoint(Path(path), task)
    tokenizer = LanceTokenizer(checkpoint.folder)
    model = load_lance(checkpoint, numerics, track)
    tokenizer.check(model.config)
    return Pipeline(model, load_vae(checkpoint, numerics), tokenizer)
