"""The parameters of a port, held against those of the trusted model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.errors import ParityError
from parity.pairs.pair import Pair
from parity.pairs.sides import laid_out, put_back
from parity.tensors.arrays import tap_of
from parity.tensors.metrics import rel_l2


@dataclass(frozen=True)
class WeightMismatch:
    """A parameter by its trusted name, what it should be and what the port holds, in the trusted layout."""

    name: str
    expected: np.ndarray
    got: np.ndarray

    @property
    def error(self) -> float | None:
        """Relative L2; None where the shapes differ."""
        return rel_l2(self.expected, self.got)

    @property
    def detail(self) -> str:
        """In a sentence, how they differ."""
        if self.expected.shape != self.got.shape:
            return f"{self.name}: shape {list(self.got.shape)} instead of {list(self.expected.shape)}"
        return f"{self.name} differs in {np.mean(self.expected != self.got):.3g} of its elements"


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
    theirs = dict(_named(pair)) | dict(pair.trusted.named_buffers())
    compared, mismatches, unmatched, right = list[str](), list[WeightMismatch](), list[str](), dict[str, Any]()
    for path, array in _flat(pair.port):
        names = _trusted_names(pair, path)
        if not all(name in theirs for name in names):
            unmatched.append(path)
            continue
        expected, held = [_float32(theirs[name]) for name in names], _float32(array)
        parts = np.split(held, np.cumsum([len(each) for each in expected])[:-1]) if len(names) > 1 else [held]
        count = len(mismatches)
        for name, wanted, part in zip(names, expected, parts, strict=True):
            got = laid_out(part, wanted.shape)
            if got is None or not np.array_equal(got, wanted):
                mismatches.append(WeightMismatch(name, wanted, part if got is None else got))
        compared += names
        if len(mismatches) > count and (whole := _as_port(expected, array)) is not None:
            right[path] = whole
    tied = {id(tensor) for name, tensor in _named(pair) if name in compared}
    unmatched += [name for name, tensor in _named(pair) if name not in compared and id(tensor) not in tied]
    return Weights(compared, mismatches, unmatched, pair.port, right)


def copy_weights(pair: Pair) -> None:
    """Give the port the trusted model's parameters, by their names and in its own layout and dtype of theirs.

    For a port whose own conversion is not to be tried. Raises ParityError for a parameter that has no counterpart, or
    one of another shape.
    """
    import mlx.core as mx

    theirs, given = dict(_named(pair)) | dict(pair.trusted.named_buffers()), list[tuple[str, Any]]()
    for path, array in _flat(pair.port):
        names = _trusted_names(pair, path)
        if missing := [name for name in names if name not in theirs]:
            raise ParityError(f"{path} of the port has no counterpart: the trusted model has no {missing[0]}")
        whole = _as_port([_float32(theirs[name]) for name in names], array)
        if whole is None:
            shapes = ", ".join(str(list(theirs[name].shape)) for name in names)
            raise ParityError(f"{path} of the port has shape {list(array.shape)}, the trusted model's {shapes}")
        dtype = str(theirs[names[0]].dtype).removeprefix("torch.")
        given.append((path, whole.astype(getattr(mx, dtype))))
    pair.port.load_weights(given, strict=False)


def _as_port(expected: Sequence[np.ndarray], array: Any) -> Any | None:
    """Trusted values as a port's array has them; None where the shapes do not fit."""
    import mlx.core as mx

    whole = np.concatenate(expected) if len(expected) > 1 else expected[0]
    placed = put_back(whole, array.shape)
    return None if placed is None else mx.array(placed).astype(array.dtype)


def _flat(port: Any) -> list[tuple[str, Any]]:
    """The port's parameters of floats by their paths."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    return [(path, array) for path, array in tree_flatten(port.parameters()) if mx.issubdtype(array.dtype, mx.floating)]


def _named(pair: Pair) -> list[tuple[str, Any]]:
    return list(pair.trusted.named_parameters(remove_duplicate=False))


def _trusted_names(pair: Pair, path: str) -> list[str]:
    owner, _, kind = path.rpartition(".")
    return [f"{name}.{kind}".lstrip(".") for name in pair.trusted_paths(owner)]


def _float32(array: Any) -> np.ndarray:
    return tap_of(array.detach() if hasattr(array, "detach") else array).array
