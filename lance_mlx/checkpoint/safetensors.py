"""Tensors in files, read and written in blocks, so that none has to be in memory whole."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np

from lance_mlx.errors import LanceError, reason
from lance_mlx.files import opened

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint32": "U32", "uint8": "U8"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_OTHERS = {"F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"}
INTEGERS = "uint32", "uint8"
"""Of packed weights, and of their scales."""
# NumPy has no bfloat16: its bits are carried.
_CARRIERS = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "uint32": np.dtype("<u4"),
    "uint8": np.dtype("<u1"),
}
_BLOCK = 1 << 21
"""Values of a block: few enough to stay in a processor's cache while they are worked on."""
_HEADER_ALIGNMENT = 8
_LARGEST_HEADER = 100_000_000


class TensorInfo(NamedTuple):
    """Dtype (float32, bfloat16, float16, or for quantized weights uint32 or uint8) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _CARRIERS[self.dtype].itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, of which nothing has been read yet: its bytes begin at `offset`.

    Attributes:
        name: what the file calls it.
        info: dtype and shape in the file.
        shape: that of the tensor that is read.
        axes: the order of the file's axes in it, None for the same.
    """

    path: Path
    name: str
    info: TensorInfo
    offset: int
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None

    def permuted(self, *axes: int) -> "StoredTensor":
        """The same tensor with its axes in another order."""
        return replace(self, shape=tuple(self.info.shape[axis] for axis in axes), axes=axes)

    def flat(self) -> "StoredTensor":
        """The same tensor as a vector."""
        return replace(self, shape=(math.prod(self.info.shape),))

    @property
    def fixed(self) -> bool:
        """Whether it belongs to a quantized weight, and is read in the file's own dtype whatever is asked for: rounded
        scales would make other weights."""
        return self.info.dtype in INTEGERS or self.name.endswith((".scales", ".biases"))

    def blocks(
        self, dtype: str, watch: Callable[[np.ndarray], None] = lambda block: None, size: int = _BLOCK
    ) -> Iterator[np.ndarray]:
        """Yield the values in float32 or bfloat16 (as uint16 bits), flat; of a permuted tensor all at once.

        Args:
            watch: called with each block of the file before it is converted.
            size: values of a block.

        Raises:
            LanceError: the file ends too soon, or a value is not finite, or is not any more after rounding.
        """
        converted = (self._converted(block, dtype) for block in self.stored_blocks(watch, size))
        if self.axes is None:
            yield from converted
        else:
            yield np.concatenate(list(converted)).reshape(self.info.shape).transpose(self.axes).reshape(-1)

    def values(self, dtype: str) -> np.ndarray:
        """The whole tensor in float32 or bfloat16 (as uint16 bits), flat; raises LanceError as `blocks` does.

        Nothing of MLX is used, so that any thread may call it.
        """
        values, start = np.empty(math.prod(self.shape), _CARRIERS[self.info.dtype if self.fixed else dtype]), 0
        for block in self.blocks(dtype):
            values[start : start + len(block)] = block
            start += len(block)
        return values

    def array(self, values: np.ndarray) -> mx.array:
        """The tensor with what `values` gave."""
        array = mx.array(values)
        return (array.view(mx.bfloat16) if values.dtype == np.uint16 else array).reshape(self.shape)

    def read(self, dtype: mx.Dtype) -> mx.array:
        """The whole tensor in float32 or bfloat16; raises LanceError as `blocks` does."""
        return self.array(self.values("float32" if dtype == mx.float32 else "bfloat16"))

    def lazy(self, dtype: mx.Dtype) -> mx.array:
        """The whole tensor of a safetensors file, which is read when it is first used."""
        array = mx.load(str(self.path), format="safetensors")[self.name]
        return array if self.fixed else array.astype(dtype)

    def stored_blocks(
        self, watch: Callable[[np.ndarray], None] = lambda block: None, size: int = _BLOCK
    ) -> Iterator[np.ndarray]:
        """Yield the values as they lie in the file, flat."""
        left, carrier = math.prod(self.info.shape), _CARRIERS[self.info.dtype]
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                while left:
                    block = np.empty(min(left, size), carrier)
                    if file.readinto(block.view(np.uint8)) != block.nbytes:
                        raise LanceError(f"{self.path} ends inside tensor '{self.name}': fetch it again")
                    left -= len(block)
                    watch(block)
                    yield block
        except OSError as error:
            raise LanceError(f"{self.path} cannot be read ({error.strerror})") from None

    def _converted(self, block: np.ndarray, dtype: str) -> np.ndarray:
        values = block if self.fixed or self.info.dtype == dtype else _rounded(_widened(block, self.info.dtype), dtype)
        if not _finite(values):
            raise LanceError(f"{self.path}: tensor '{self.name}' holds NaN or infinite values: fetch the file again")
        return values


Tensors = dict[str, StoredTensor]


def read_header(path: Path) -> Tensors:
    """The tensors of a safetensors file by name, none of them read.

    Raises:
        LanceError: the file is missing, cut off or malformed, or holds another dtype than TensorInfo has.
    """
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError("its header is cut off")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in entries.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset != end:
                raise ValueError(f"tensor '{tensor.name}' does not follow the one before it")
            end += tensor.info.nbytes
        if end != size:
            raise ValueError(f"it has {size} bytes, its header says {end}")
    except FileNotFoundError:
        raise LanceError(f"{path} is missing: fetch it again") from None
    except OSError as error:
        raise LanceError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LanceError(f"{path} is not a readable safetensors file ({reason(error)}): fetch it again") from None
    return tensors


def read_notes(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file that `read_header` can read, whatever they are: MLX reads texts alone."""
    with opened(path) as file:
        notes = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    return notes if isinstance(notes, dict) else {}


def _stored(path: Path, name: str, entry: dict, start: int) -> StoredTensor:
    code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if code not in _DTYPES:
        found = _OTHERS.get(code, code)
        raise LanceError(f"{path}: tensor '{name}' is {found}; float32, bfloat16 or float16 is expected")
    info = TensorInfo(_DTYPES[code], shape)
    if min(shape, default=1) < 0 or end - begin != info.nbytes:
        raise ValueError(f"tensor '{name}' has another size than its shape")
    return StoredTensor(path, name, info, start + begin, shape)


def write_safetensors(
    file: BinaryIO,
    tensors: Mapping[str, TensorInfo],
    blocks: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file; `blocks` gives the values of a tensor when its turn comes, bfloat16 as uint16 bits."""
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, info in tensors.items():
        start, end = end, end + info.nbytes
        header[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in tensors:
        for block in blocks(name):
            file.write(np.ascontiguousarray(block))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, uint16, rounded to the nearest, ties to even; NaN may become infinite."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def _widened(block: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (block.astype(np.uint32) << 16).view(np.float32)
    return block.astype(np.float32, copy=False)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return to_bfloat16(values) if dtype == "bfloat16" else values


def _finite(values: np.ndarray) -> bool:
    if values.dtype == np.uint16:
        return not ((values & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(values).all())
