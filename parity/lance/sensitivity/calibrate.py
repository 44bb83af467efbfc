"""Scales of input channels behind which a tower's weights lose less by quantizing, found without training: AWQ's search
(arXiv 2306.00978) on what goes through each tower in whole runs, for scales that are powers of two."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.checkpoint.folding import followers
from lance_mlx.model.layers import Linear
from lance_mlx.model.quantized import quantizable
from parity.lance.sensitivity.groups import requantized, scheme_for
from parity.ports.attach import Attached

ROWS = 128
"""That are kept of what a layer is given in all runs, evenly spread: of prompts, and of latents at all times."""
BITS = 4
"""The width that scales are searched for."""
POWERS = tuple(step / 10 for step in range(1, 11))
"""Of a channel's mean size that its scale may be."""
_MOST = 12
"""The largest exponent of a scale."""

Scales = dict[str, np.ndarray]
"""float32 powers of two by the module whose output channels are divided by them."""


class _Rows:
    """Every so many of all rows that come, of which there are at most twice ROWS."""

    def __init__(self) -> None:
        self._held: list[mx.array] = []
        self._stride, self._seen = 1, 0

    def add(self, rows: mx.array) -> None:
        wanted = np.arange(-self._seen % self._stride, len(rows), self._stride)
        self._seen += len(rows)
        if len(wanted):
            taken = rows[mx.array(wanted)]
            mx.eval(taken)
            self._held.append(taken)
        if sum(map(len, self._held)) > 2 * ROWS:
            self._held = [mx.concatenate(self._held)[::2]]
            self._stride *= 2
            self.add(rows[:0])

    @property
    def array(self) -> mx.array:
        return mx.concatenate(self._held).astype(mx.float32)


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, _Rows]]:
    """Keep some of the rows that the modules behind a source of scales are given while the context lasts, by source."""
    named, modules = dict(model.named_modules()), quantizable(model)
    behind = {path: followers(path) for path in named}
    sources = [path for path, names in behind.items() if names and all(name in modules for name in names)]
    kept: dict[str, _Rows] = {}
    # What follows a norm is given its output, also where it is one product; up_proj's output is not all that it is.
    outputs = {id(named[path]): path for path in sources if path not in modules}
    inputs = {id(modules[behind[path][0]]): path for path in sources if path in modules}

    def normed(original: Callable, module: nn.Module, x: mx.array) -> mx.array:
        y = original(module, x)
        if id(module) in outputs:
            kept.setdefault(outputs[id(module)], _Rows()).add(y)
        return y

    def multiplied(original: Callable, module: nn.Module, x: mx.array) -> mx.array:
        if id(module) in inputs:
            kept.setdefault(inputs[id(module)], _Rows()).add(x)
        return original(module, x)

    with Attached() as attached:
        attached.wrap(nn.RMSNorm, "__call__", normed)
        attached.wrap(Linear, "__call__", multiplied)
        yield kept


def calibrated(model: nn.Module, kept: Mapping[str, _Rows], group_size: int, tell: Callable[[], None]) -> Scales:
    """The scales that win on the rows that were kept; a source for which none do is left out.

    Args:
        tell: called after each source.
    """
    modules, found = quantizable(model), {}
    for source, rows in sorted(kept.items()):
        weights = [modules[path].weight for path in followers(source)]
        best = best_scales(rows.array, weights, group_size)
        if best is not None:
            found[source] = best
        tell()
    return found


def best_scales(x: mx.array, weights: Sequence[mx.array], group_size: int) -> np.ndarray | None:
    """Of the powers of each channel's mean size those scales behind which quantizing does the least to the products.

    Args:
        x: float32 [n, in].
        weights: [out, in] each.

    Returns:
        float32 [in] powers of two, None where quantizing does least without any.
    """
    products = [(weight, mx.square(_product(x, weight)).sum()) for weight in weights]
    size = np.array(mx.abs(x).mean(0))
    size = np.log2(np.maximum(size, size.max() * 2.0**-_MOST or 1.0))
    best, least = None, _error(x, products, group_size, None)
    for power in POWERS:
        exponents = np.clip(np.round(power * (size - np.median(size))), -_MOST, _MOST)
        scales = np.exp2(exponents).astype(np.float32)
        error = _error(x, products, group_size, mx.array(scales))
        if error < least:
            best, least = scales, error
    return best


def _error(
    x: mx.array, products: Sequence[tuple[mx.array, mx.array]], group_size: int, scales: mx.array | None
) -> float:
    """What quantizing makes of products, relative squares added up."""
    total, scheme = 0.0, scheme_for(x.shape[1], BITS, group_size)
    for weight, square in products:
        off = requantized(weight, scheme, scales).astype(mx.float32) - weight.astype(mx.float32)
        total += (mx.square(_product(x, off)).sum() / mx.maximum(square, 1e-30)).item()
    return total


def _product(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.astype(mx.float32).T
