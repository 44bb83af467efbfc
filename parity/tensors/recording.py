"""What one run computed: taps by name, in order of execution, and the safetensors files that hold them."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from parity.errors import ParityError
from parity.files import replacing
from parity.tensors.blocks import blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32}
_HELD = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.float32), "int32": np.dtype(np.int32)}
# The names that safetensors has for them, in the order in which it lays out a file.
_CODES = {"float32": "F32", "int32": "I32", "bfloat16": "BF16"}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Tap:
    """One captured tensor: `array` is float32 for the float dtypes (exact for bfloat16) and int32 for int32.

    `dtype` is the dtype the run computed it in, a key of DTYPES. Raises ParityError when array and dtype disagree.
    """

    array: np.ndarray
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.array.shape

    @property
    def size(self) -> int:
        """How many elements it has."""
        return self.array.size

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ParityError(f"a tap of dtype {self.dtype!r} cannot be compared: the dtypes are {', '.join(DTYPES)}")
        if self.array.dtype != _HELD[self.dtype]:
            raise ParityError(f"a {self.dtype} tap must be held as {_HELD[self.dtype]}, not {self.array.dtype}")
        if self.dtype == "bfloat16" and np.bitwise_or.reduce(float_bits(self.array), axis=None) & 0xFFFF:
            raise ParityError("a bfloat16 tap holds values that bfloat16 cannot represent: it was not captured as such")

    @classmethod
    def widened(cls, array: np.ndarray) -> "Tap":
        """A bfloat16 tap of float32 values that were bfloat16 a moment ago: nothing is looked at again."""
        tap = cls.__new__(cls)
        tap.__dict__.update(array=array, dtype="bfloat16")
        return tap


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


@dataclass(frozen=True)
class Split:
    """A run of tokens as the oracle has it: role, mode, token ids int32 [n], grid (t, h, w) in cells or None."""

    role: int
    mode: int
    ids: np.ndarray
    grid: tuple[int, int, int] | None
    clean_frames: int = 0


@dataclass(frozen=True)
class ExactInputs:
    """What must be equal before any activation means anything, as the oracle has it.

    Attributes:
        splits: the sequence.
        answer: index of an answer's first token, None for what is drawn.
        arrays: int32 and float32 arrays by name: inputs/text_ids, inputs/position_ids.cond, inputs/timesteps ...
    """

    splits: tuple[Split, ...]
    answer: int | None
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class Observed:
    """What a run computed.

    Attributes:
        recording: the taps.
        exact: the exact arrays by their names in `inputs/`.
        failures: what functions raised, by the name of the exact array that they should have made.
        absent: of what the run has not whole, which of the oracle's values it lacks, as booleans: for a tap they
            broadcast to it, for an exact array, which then holds the others alone, they lie along its last axis.
    """

    recording: Recording
    exact: Recording
    failures: dict[str, str]
    absent: dict[str, np.ndarray] = field(default_factory=dict)

    def filled(self, expected: Mapping[str, Any]) -> "Observed":
        """The same with the expected rows where the run has none, so that it is judged on what is shared."""
        if not self.absent:
            return self
        recording = dict(self.recording)
        for name, lacking in self.absent.items():
            if name not in recording:
                continue
            tap = expected.get(name)
            if not isinstance(tap, Tap) or tap.shape != recording[name].shape:
                del recording[name]
            else:
                array = np.where(lacking, tap.array, recording[name].array)
                recording[name] = Tap(array, recording[name].dtype)
        return replace(self, recording=recording)


def float_bits(array: np.ndarray) -> np.ndarray:
    """Return the uint32 bit patterns of a float32 array, as a view."""
    return array.view(np.uint32)


def to_tap(tensor: torch.Tensor) -> Tap:
    """Hold a tensor as a tap: bfloat16 values as float32, integers as int32; the tap owns its memory."""
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return Tap.widened(tensor.float().contiguous().numpy())
    held = "float32" if tensor.is_floating_point() else "int32"
    return Tap(tensor.numpy().astype(held, order="C"), held)


class TensorFile(Mapping[str, Tap]):
    """An open safetensors file; a tap is read, into memory of its own, when it is asked for and not kept.

    Attributes:
        path: where the file lies.
        dtypes: name -> dtype of every tensor, a key of DTYPES, in the order of the file; so are `shapes`.
        shapes: name -> shape.
    """

    # Read, not mapped: a mapped file that somebody shortens kills the process, and its pages count as its memory.

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Read the header; raises ParityError for a file that is truncated or malformed or holds another dtype."""
        self.path, self._file = path, file
        try:
            with safe_open(path, "numpy"):
                pass
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (SafetensorError, ValueError) as error:
            raise self._incomplete(str(error)) from error
        header.pop("__metadata__", None)
        named = {code: dtype for dtype, code in _CODES.items()}
        entries = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
        for name, entry in entries.items():
            if not name.isprintable():
                raise ParityError(f"{path} calls a tensor {name!r}: letters that cannot be shown are in no tap's name")
            if entry["dtype"] not in named:
                raise ParityError(f"{path} holds {name} as {_spelled(entry['dtype'])}: only {', '.join(DTYPES)} "
                                  "can be compared")  # fmt: skip
        self._starts = {name: file.tell() + entry["data_offsets"][0] for name, entry in entries.items()}
        self.dtypes = {name: named[entry["dtype"]] for name, entry in entries.items()}
        self.shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def __contains__(self, name: object) -> bool:
        return name in self._starts

    def __getitem__(self, name: str) -> Tap:
        """Read a tap; raises KeyError for a name that is not there, ParityError when its values cannot be read."""
        start, dtype = self._starts[name], self.dtypes[name]
        count = math.prod(self.shapes[name])
        try:
            self._file.seek(start)
            array = self._read_bfloat16(count) if dtype == "bfloat16" else self._fill(np.empty(count, dtype))
        except OSError as error:
            raise ParityError(f"{self.path} cannot be read: {error.strerror}") from error
        return Tap(array.reshape(self.shapes[name]), dtype)

    def _fill(self, array: np.ndarray) -> np.ndarray:
        if self._file.readinto(array.view(np.uint8)) != array.nbytes:
            raise self._incomplete("it was shortened while it was open")
        return array

    def _read_bfloat16(self, count: int) -> np.ndarray:
        # NumPy has no bfloat16; it is the upper half of float32, which holds it exactly.
        array = np.empty(count, np.float32)
        for block in blocks((count,)):
            wide = float_bits(array[block])
            np.copyto(wide, self._fill(np.empty(len(wide), np.uint16)))
            np.left_shift(wide, 16, out=wide)
        return array

    def _incomplete(self, why: str) -> ParityError:
        return ParityError(f"{self.path} is not a complete safetensors file ({why}): copy it again")


def _spelled(code: str) -> str:
    """safetensors' F64 is float64 and so on."""
    words = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}
    return re.sub(r"^[A-Z]+(?=\d)", lambda letters: words.get(letters[0], letters[0]), code)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file whose taps are read one by one; errors are those of `read_tensors`."""
    try:
        if path.exists() and not path.is_file():
            raise ParityError(f"{path} is no file: copy it again")
        file = path.open("rb")
    except OSError as error:
        raise ParityError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield TensorFile(path, file)


def read_tensors(path: Path) -> Recording:
    """Return the tensors of a safetensors file as taps, in the order of the file.

    Raises ParityError for a file that is missing, truncated or malformed, or holds another dtype than DTYPES.
    """
    with open_tensors(path) as file:
        return dict(file.items())


def write_tensors(path: Path, taps: Recording) -> None:
    """Write taps to a safetensors file under their own dtypes, whole or not at all; the same taps make the same bytes.

    Raises ParityError when the file cannot be written.
    """
    ranks = list(_CODES)
    header, end = {}, 0
    for name in sorted(taps, key=lambda name: (ranks.index(taps[name].dtype), name)):
        tap = taps[name]
        start, end = end, end + tap.array.size * DTYPES[tap.dtype].itemsize
        header[name] = {"dtype": _CODES[tap.dtype], "shape": tap.array.shape, "data_offsets": (start, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            for block in blocks(taps[name].array.shape):
                values = taps[name].array[block]
                if taps[name].dtype == "bfloat16":
                    values = (float_bits(values) >> 16).astype(np.uint16)
                file.write(np.ascontiguousarray(values))
