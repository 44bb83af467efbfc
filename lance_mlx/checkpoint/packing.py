"""What a conversion writes of each tensor: the tensor itself, what its weight is packed in, or what was packed; with
what is added to it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import numpy as np

from lance_mlx.checkpoint.safetensors import StoredTensor, TensorInfo, Tensors, to_bfloat16
from lance_mlx.model.quantized import Scheme

_WORDS = 1 << 18
"""About so many packed integers are dequantized at once."""

Watch = Callable[[np.ndarray], None]
Blocks = Callable[[Watch], Iterator[np.ndarray]]
Added = Mapping[str, Callable[[], mx.array]]
"""What is added to the weights of modules, float32 in the weight's shape, by path."""


@dataclass(frozen=True)
class Output:
    """A tensor to be written.

    Attributes:
        source: what it is made from.
        blocks: yields its values, bfloat16 as uint16 bits, and tells what it is called with of each block that is read.
        read: bytes of the source; 0 where they have been read for the weight before it.
        scheme: how it is packed, of a packed weight.
    """

    info: TensorInfo
    source: StoredTensor
    blocks: Blocks
    read: int
    scheme: Scheme | None = None


def outputs_of(
    tensors: Tensors, dtype: str, to_pack: Mapping[str, Scheme], packed: Mapping[str, Scheme], added: Added
) -> dict[str, Output]:
    """What is written of some tensors, by name.

    Args:
        dtype: of what is not packed.
        to_pack: the modules whose weights are to be packed, by path.
        packed: those whose weights are packed in `tensors`, and are dequantized.
        added: in float32, before what comes of it is rounded or packed.
    """
    outputs = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        more = added.get(path) if kind == "weight" else None
        if path in packed and kind in packed[path].names:
            if kind == "weight":
                outputs[name] = _dequantized(path, tensors, packed[path], dtype, more)
            continue
        values = partial(tensor.blocks, dtype) if more is None else _sum(partial(tensor.blocks, "float32"), more, dtype)
        if path in to_pack and kind == "weight":
            outputs |= _quantized(path, tensor, values, to_pack[path], dtype)
        else:
            outputs[name] = Output(TensorInfo(dtype, tensor.shape), tensor, values, tensor.info.nbytes)
    return outputs


def _sum(blocks: Blocks, more: Callable[[], mx.array], dtype: str) -> Blocks:
    """Float32 blocks and what is added to them, rounded once."""

    def summed(watch: Watch) -> Iterator[np.ndarray]:
        flat, start = np.array(more()).reshape(-1), 0
        for block in blocks(watch):
            values = block + flat[start : start + len(block)]
            start += len(block)
            yield to_bfloat16(values) if dtype == "bfloat16" else values

    return summed


def _quantized(path: str, tensor: StoredTensor, values: Blocks, scheme: Scheme, dtype: str) -> dict[str, Output]:
    shapes = scheme.shapes(*tensor.shape)
    pair = _Quantizing(values, scheme, dtype)
    outputs = {}
    for name in scheme.names:
        kind = "uint32" if name == "weight" else dtype if scheme.mode == "affine" else "uint8"
        info = TensorInfo(kind, shapes[name])
        if name == "weight":
            outputs[f"{path}.weight"] = Output(info, tensor, pair.weight, tensor.info.nbytes, scheme)
        else:
            outputs[f"{path}.{name}"] = Output(info, tensor, partial(pair.rest, name), 0)
    return outputs


@dataclass
class _Quantizing:
    """A weight that is packed block by block; its scales and biases, which are small, wait until it is written."""

    values: Blocks
    scheme: Scheme
    dtype: str
    _kept: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def weight(self, watch: Watch) -> Iterator[np.ndarray]:
        self._kept = {name: [] for name in self.scheme.names[1:]}
        # Every block is whole groups, of which none depends on another.
        for block in self.values(watch):
            array = mx.array(block)
            array = array.view(mx.bfloat16) if self.dtype == "bfloat16" else array
            made = self.scheme.quantize(array.reshape(-1, self.scheme.group_size))
            for name, kept in self._kept.items():
                kept.append(_values(made[name]))
            yield _values(made["weight"])

    def rest(self, name: str, watch: Watch) -> Iterator[np.ndarray]:
        yield from self._kept.pop(name)


def _dequantized(
    path: str, tensors: Tensors, scheme: Scheme, dtype: str, more: Callable[[], mx.array] | None
) -> Output:
    if more is not None:
        whole = _dequantized(path, tensors, scheme, "float32", None)
        info = TensorInfo(dtype, whole.info.shape)
        return Output(info, whole.source, _sum(whole.blocks, more, dtype), whole.read)
    weight = tensors[f"{path}.weight"]
    words = scheme.group_size * scheme.bits // 32

    def blocks(watch: Watch) -> Iterator[np.ndarray]:
        factors = {}
        for name in scheme.names[1:]:
            stored = tensors[f"{path}.{name}"]
            factors[name] = stored.array(stored.values(dtype)).reshape(-1, 1)
        start = 0
        for block in weight.blocks(dtype, watch, _WORDS // words * words):
            end = start + len(block) // words
            packed = {name: factor[start:end] for name, factor in factors.items()}
            packed["weight"] = mx.array(block).reshape(-1, words)
            yield _values(scheme.dequantize(packed, mx.float32 if dtype == "float32" else mx.bfloat16))
            start = end

    rows, width = weight.shape
    return Output(TensorInfo(dtype, (rows, width * 32 // scheme.bits)), weight, blocks, weight.info.nbytes)


def _values(array: mx.array) -> np.ndarray:
    """The values of an array, flat, bfloat16 as uint16 bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).reshape(-1)
