"""What one run computed: taps by name, in order of execution, and the safetensors files that hold them."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from parity.errors import ParityError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32}


@dataclass(frozen=True)
class Tap:
    """One captured tensor: `array` is float32 for the float dtypes (exact for bfloat16) and int32 for int32.

    `dtype` is the dtype the run computed it in, a key of DTYPES. Raises ParityError when array and dtype disagree.
    """

    array: np.ndarray
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ParityError(f"a tap of dtype {self.dtype!r} cannot be compared: the dtypes are {', '.join(DTYPES)}")
        held = "int32" if self.dtype == "int32" else "float32"
        if self.array.dtype != np.dtype(held):
            raise ParityError(f"a {self.dtype} tap must be held as {held}, not {self.array.dtype}")
        if self.dtype == "bfloat16" and np.any(float_bits(self.array) & 0xFFFF):
            raise ParityError("a bfloat16 tap holds values that bfloat16 cannot represent: it was not captured as such")


Recording = dict[str, Tap]
"""Tap name -> Tap; the order of insertion is the order of execution."""


@dataclass(frozen=True)
class Replay:
    """What a run is given so that it can be compared with another: randomness, and visuals already resized.

    Attributes:
        noise: float32 [latents, 48] over all VAE tokens of the sequence, None for questions.
        vae_pixels: float32 [3, T, H, W] in [-1, 1] of each encoded visual, the target's placeholder last.
        vit_patches: float32 [n, 1176] of each visual that the ViT sees.
        vit_grids: (t, h, w) in patches for each of them.
        eps: float32 [1, 48, t, h, w], the noise that samples the latents of each encoded visual.
    """

    noise: np.ndarray | None = None
    vae_pixels: tuple[np.ndarray, ...] = ()
    vit_patches: tuple[np.ndarray, ...] = ()
    vit_grids: tuple[tuple[int, int, int], ...] = ()
    eps: tuple[np.ndarray, ...] = ()


def float_bits(array: np.ndarray) -> np.ndarray:
    """Return the uint32 bit patterns of a float32 array."""
    return np.ascontiguousarray(array).view(np.uint32).reshape(array.shape)


def read_tensors(path: Path) -> Recording:
    """Return the tensors of a safetensors file as taps.

    Raises ParityError for a file that is missing, truncated or malformed, or holds another dtype than DTYPES.
    """
    try:
        tensors = load(path.read_bytes())
    except OSError as error:
        raise ParityError(f"{path} cannot be read: {error.strerror}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise ParityError(f"{path} is not a complete safetensors file ({error}): copy it again") from error
    names = {dtype: name for name, dtype in DTYPES.items()}
    taps: Recording = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise ParityError(f"{path} holds {name} as {tensor.dtype}: only {', '.join(DTYPES)} can be compared")
        # bfloat16 has no NumPy dtype; float32 holds it exactly.
        array = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        taps[name] = Tap(array, names[tensor.dtype])
    return taps


def write_tensors(path: Path, taps: Recording) -> None:
    """Write taps to a safetensors file under their own dtypes, whole or not at all.

    Raises ParityError when the file cannot be written.
    """
    tensors = {name: torch.tensor(tap.array).to(DTYPES[tap.dtype]).contiguous() for name, tap in taps.items()}
    write_atomically(path, save(tensors))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it there; raises ParityError when that fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError as error:
        raise ParityError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            beside.unlink()
