"""The noise that a request starts from: drawn from its seed, or replayed from a file."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from lance_mlx.backend.numerics import Numerics, scaled
from lance_mlx.config import LATENT_CHANNELS
from lance_mlx.errors import LanceError, reason
from lance_mlx.requests.request import Request

_NAMES = ("noise", "sampler.noise")


def draw_noise(request: Request, numerics: Numerics) -> mx.array:
    """Standard normal noise from the request's seed, [n, 48], drawn in the policy's dtype as upstream does."""
    tokens = int(np.prod(request.latent_grid))
    return mx.random.normal((tokens, LATENT_CHANNELS), numerics.dtype, key=mx.random.key(request.seed))


def over_source(source: mx.array, noise: mx.array, t: float) -> mx.array:
    """Where an edit starts at time t: its source's latents under so much noise, [n, 48] in the dtype of both."""
    return scaled(source, 1 - t) + scaled(noise, t)


def draw_eps(request: Request, index: int, shape: tuple[int, ...]) -> mx.array:
    """Standard normal noise for sampling the latents of visual number `index`, float32, apart from the sampler's."""
    return mx.random.normal(shape, key=mx.random.split(mx.random.key(request.seed), index + 2)[-1])


def check_noise(request: Request, noise: mx.array) -> None:
    """Raise LanceError unless the noise has the shape of the request's latents, [n, 48]."""
    frames, rows, columns = request.latent_grid
    expected = (frames * rows * columns, LATENT_CHANNELS)
    if noise.shape != expected:
        size = f"{request.width}x{request.height} and {request.num_frames} frames"
        raise LanceError(f"the noise has shape {list(noise.shape)}, but {size} need {list(expected)}")


def read_noise(path: Path) -> mx.array:
    """Noise from a .npy or .safetensors file: its tensor `noise` or `sampler.noise`, or the only one; [n, 48].

    Raises:
        LanceError: the file is missing, unreadable, ambiguous, not floating point, or holds NaN or infinity.
    """
    if not path.is_file():
        raise LanceError(f"noise file {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.suffix not in (".npy", ".safetensors"):
        raise LanceError(f"noise file {path} must be .npy or .safetensors")
    try:
        # MLX believes what the header of a .npy says of its size.
        npy = path.suffix == ".npy"
        loaded = mx.array(np.load(path, mmap_mode="r")) if npy else mx.load(str(path), format="safetensors")
    except Exception as error:  # both raise many kinds
        raise LanceError(f"noise file {path} is not readable ({reason(error)})") from None
    if isinstance(loaded, dict):
        name = next((name for name in _NAMES if name in loaded), None)
        if name is None and len(loaded) != 1:
            raise LanceError(f"noise file {path} holds {len(loaded)} tensors and none is called {' or '.join(_NAMES)}")
        loaded = loaded[name] if name else next(iter(loaded.values()))
    if not mx.issubdtype(loaded.dtype, mx.floating):
        raise LanceError(f"noise file {path} holds {loaded.dtype}; a floating point tensor is needed")
    if not mx.isfinite(loaded).all().item():
        raise LanceError(f"noise file {path} holds NaN or infinite values")
    return loaded
