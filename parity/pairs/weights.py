"""The parameters of a port, held against those of the trusted model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

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
        compared: names of all that were compared.
        mismatches: those that differ.
        unmatched: names on either side without a counterpart.
    """

    compared: Sequence[str]
    mismatches: Sequence[WeightMismatch]
    unmatched: Sequence[str]
    _port: Any
    _given: Mapping[str, Any]

    @contextmanager
    def right(self) -> Iterator[None]:
        """The port with the trusted values where its own differ."""
        import mlx.utils

        before = dict(mlx.utils.tree_flatten(self._port.parameters()))
        self._port.load_weights(list(self._given.items()), strict=False)
        try:
            yield
        finally:
            self._port.load_weights([(name, before[name]) for name in self._given], strict=False)


def check_weights(pair: Pair) -> Weights:
    """Compare every parameter of the port with the trusted model's; buffers count where the port has them."""
    import mlx.core as mx
    import mlx.utils

    theirs = dict(pair.trusted.named_parameters(remove_duplicate=False))
    buffers = dict(pair.trusted.named_buffers())
    compared, mismatches, unmatched = list[str](), list[WeightMismatch](), list[str]()
    given: dict[str, Any] = {}
    for path, array in mlx.utils.tree_flatten(pair.port.parameters()):
        if not mx.issubdtype(array.dtype, mx.floating):
            continue
        owner, _, kind = path.rpartition(".")
        names = [f"{name}.{kind}".lstrip(".") for name in pair.trusted_paths(owner)]
        found = [theirs.get(name, buffers.get(name)) for name in names]
        if any(tensor is None for tensor in found):
            unmatched.append(path)
            continue
        expected = [tap_of(tensor.detach().float()).array for tensor in found]
        ends = np.cumsum([len(each) for each in expected])[:-1]
        held = tap_of(array.astype(mx.float32)).array
        parts = np.split(held, ends) if len(names) > 1 else [held]
        right = list[np.ndarray | None]()
        for name, wanted, part in zip(names, expected, parts, strict=True):
            got = laid_out(part, wanted.shape)
            compared.append(name)
            right.append(put_back(wanted, part.shape))
            if got is None or not np.array_equal(got, wanted):
                mismatches.append(WeightMismatch(name, wanted, part if got is None else got))
        whole = len(right) and all(each is not None for each in right)
        if whole and any(mismatch.name in names for mismatch in mismatches):
            given[path] = mx.array(np.concatenate(right)).astype(array.dtype)
    tied = {id(theirs[name]) for name in compared if name in theirs}
    unmatched += [name for name, tensor in theirs.items() if name not in compared and id(tensor) not in tied]
    return Weights(compared, mismatches, unmatched, pair.port, given)
