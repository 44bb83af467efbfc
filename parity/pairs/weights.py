"""The parameters of a port, held against those of the trusted model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from parity.errors import ParityError
from parity.pairs.layouts import in_groups, laid_out
from parity.pairs.pair import Pair
from parity.pairs.sides import tapped
from parity.tensors.metrics import rel_l2


@dataclass(frozen=True)
class WeightMismatch:
    """A parameter by its trusted name, what it should be and what the port holds, in the trusted layout.

    `of` is the name of another parameter that is just that.
    """

    name: str
    expected: np.ndarray
    got: np.ndarray
    of: str | None = None

    @property
    def error(self) -> float | None:
        """Relative L2; None where the shapes differ."""
        return rel_l2(self.expected, self.got)

    @property
    def detail(self) -> str:
        """In a sentence, how they differ."""
        if self.expected.shape != self.got.shape:
            return f"{self.name}: shape {list(self.got.shape)} instead of {list(self.expected.shape)}"
        return (
            f"{self.name} differs in {np.count_nonzero(self.expected != self.got):,} of {self.expected.size:,} elements"
        )


@dataclass(frozen=True)
class Weights:
    """What came of the comparison.

    Attributes:
        compared: trusted names of all that were compared.
        mismatches: those that differ.
        unmatched: names on either side without a counterpart.
    """

    compared: Sequence[str]
    mismatches: Sequence[WeightMismatch]
    unmatched: Sequence[str]
    _port: Any
    _right: Mapping[str, Any]

    @contextmanager
    def right(self) -> Iterator[None]:
        """The port with the trusted values where its own differ."""
        before = {path: array for path, array in _flat(self._port) if path in self._right}
        self._port.load_weights(list(self._right.items()), strict=False)
        try:
            yield
        finally:
            self._port.load_weights(list(before.items()), strict=False)


def check_weights(pair: Pair) -> Weights:
    """Compare every parameter of the port with the trusted model's; buffers count where the port has them."""
    theirs, taken = _tensors(pair), set[str]()
    compared, mismatches, unmatched, right = list[str](), list[WeightMismatch](), list[str](), dict[str, Any]()
    for path, array in _flat(pair.port):
        expected = _expected(pair, path, theirs)
        if expected is None:
            unmatched.append(path)
            continue
        held, count = _float32(array), len(mismatches)
        ends = np.cumsum([len(each) for each in expected.values()])[:-1]
        parts = np.split(held, ends) if len(expected) > 1 else [held]
        for (name, wanted), part in zip(expected.items(), parts, strict=True):
            got = laid_out(part, wanted)
            if got is None or not np.array_equal(got, wanted, equal_nan=True):
                got = part if got is None else got
                mismatches.append(WeightMismatch(name, wanted, got, _holder(theirs, got)))
        compared += expected
        taken |= {name.partition("[")[0] for name in expected}
        if len(mismatches) > count and (whole := _as_port([*expected.values()], array)) is not None:
            right[path] = whole
    named = list(pair.trusted.named_parameters(remove_duplicate=False))
    tied = {id(tensor) for name, tensor in named if name in taken}
    unmatched += [name for name, tensor in named if name not in taken and id(tensor) not in tied]
    return Weights(compared, mismatches, unmatched, pair.port, right)


def copy_weights(pair: Pair) -> None:
    """Give the port the trusted model's parameters, by their names, in the port's layout and the trusted dtype.

    For a port whose own conversion is not to be tried. Raises ParityError for a parameter that has no counterpart, or
    one of another shape.
    """
    import mlx.core as mx

    theirs, given = _tensors(pair), list[tuple[str, Any]]()
    dtype = getattr(mx, str(next(pair.trusted.parameters()).dtype).removeprefix("torch."))
    for path, array in _flat(pair.port):
        expected = _expected(pair, path, theirs)
        if expected is None:
            raise ParityError(f"{path} of the port has no counterpart in the trusted model: name it in Pair.names")
        whole = _as_port([*expected.values()], array)
        if whole is None:
            shapes = " and ".join(str(list(each.shape)) for each in expected.values())
            raise ParityError(f"{path} of the port has shape {list(array.shape)}, the trusted model's {shapes}")
        given.append((path, whole.astype(dtype)))
    pair.port.load_weights(given, strict=False)


def _expected(pair: Pair, path: str, theirs: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """The trusted values that a parameter of the port stands for, by their names; None where there are none."""
    part = pair.part(path)
    if part is not None:
        if part.of not in theirs:
            return None
        whole = _float32(theirs[part.of])
        return {f"{part.of}[{part.number}]": np.split(whole, part.count, part.axis)[part.number]}
    owner, _, kind = path.rpartition(".")
    names = [f"{name}.{kind}".lstrip(".") for name in pair.trusted_paths(owner)]
    return {name: _float32(theirs[name]) for name in names} if all(name in theirs for name in names) else None


def _holder(theirs: Mapping[str, Any], got: np.ndarray) -> str | None:
    """The trusted parameter that a port's is equal to, unless it is one of a single value, as many are."""
    alike = (name for name, tensor in theirs.items() if tuple(tensor.shape) == got.shape)
    return next((name for name in alike if np.ptp(got) and np.array_equal(_float32(theirs[name]), got)), None)


def _tensors(pair: Pair) -> dict[str, Any]:
    """The trusted model's tensors by name, as MLX's modules of their kinds have them: the inputs of kernels last, and
    the matrices of transformers' Conv1D the other way."""
    tensors = dict(pair.trusted.named_buffers()) | dict(pair.trusted.named_parameters(remove_duplicate=False))
    for path, module in pair.trusted.named_modules():
        name = f"{path}.weight".lstrip(".")
        if isinstance(module, nn.modules.conv._ConvNd):
            tensors[name] = tensors[name].movedim(0 if module.transposed else 1, -1)
        elif type(module).__name__ == "Conv1D" and isinstance(module.weight, torch.Tensor):
            tensors[name] = tensors[name].T
    return tensors


def _as_port(expected: Sequence[np.ndarray], array: Any) -> Any | None:
    """Trusted values as a port's array has them; None where the shapes do not fit."""
    import mlx.core as mx

    whole = np.concatenate(expected) if len(expected) > 1 else expected[0]
    placed = in_groups(whole, array.shape)
    return None if placed is None else mx.array(placed).astype(array.dtype)


def _flat(port: Any) -> list[tuple[str, Any]]:
    """The port's parameters of floats by their paths."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    return [(path, array) for path, array in tree_flatten(port.parameters()) if mx.issubdtype(array.dtype, mx.floating)]


def _float32(array: Any) -> np.ndarray:
    return np.ascontiguousarray(tapped(array).array)
