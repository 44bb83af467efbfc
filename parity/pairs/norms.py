"""Norms of a pair's trusted model: of the root mean square, layer norms and group norms."""

import numpy as np
from torch import nn

from parity.pairs.known import Known, given_to, held, module_at, near, rows
from parity.pairs.torch_side import TorchSide


def known_norm(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    """A norm at a tap, of whichever sort comes out as what was made."""
    module, x = module_at(model, name), given_to(side, name)
    if module is None or x is None:
        return None
    if isinstance(module, nn.GroupNorm):
        return _grouped(module, x, batch)
    weight = held(getattr(module, "weight", None))
    if weight is None or weight.ndim != 1:
        return None
    if x.ndim == 4 and weight.size == x.shape[1] != x.shape[-1]:
        return _of_places(module, side, name, x, weight, batch)
    if weight.size != x.shape[-1]:
        return None
    eps = next((float(getattr(module, key)) for key in ("eps", "variance_epsilon") if hasattr(module, key)), 0.0)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + eps)
    for each in (weight, 1 + weight):
        if near(side, name, normed * each):
            return Known("norm", {"x": rows(x)}, {"weight": each, "eps": eps}, rows, ("token", "channel"))
    bias = held(getattr(module, "bias", None))
    facts = {"weight": weight, "bias": np.zeros_like(weight) if bias is None else bias, "eps": eps}
    if near(side, name, layer_norm(x, **facts)):
        return Known("layer_norm", {"x": rows(x)}, facts, rows, ("token", "channel"))
    return None


def _grouped(module: nn.GroupNorm, x: np.ndarray, batch: int) -> Known:
    facts = {
        "weight": np.ones(x.shape[1], np.float32) if module.weight is None else held(module.weight),
        "bias": np.zeros(x.shape[1], np.float32) if module.bias is None else held(module.bias),
        "eps": module.eps,
        "groups": module.num_groups,
    }

    def view(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[batch].reshape(array.shape[1], -1).T)

    return Known("layer_norm", {"x": view(x)}, facts, view, ("place", "channel"))


def _of_places(
    module: nn.Module, side: TorchSide, name: str, x: np.ndarray, weight: np.ndarray, batch: int
) -> Known | None:
    """A layer norm over the channels [batch, channels, rows, columns] of each place."""
    bias = held(getattr(module, "bias", None))
    facts = {
        "weight": weight,
        "bias": np.zeros_like(weight) if bias is None else bias,
        "eps": getattr(module, "eps", 0),
    }
    made = layer_norm(rows(np.moveaxis(x, 1, -1)), **facts).reshape(np.moveaxis(x, 1, -1).shape)
    if not near(side, name, np.moveaxis(made, -1, 1)):
        return None

    def view(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[batch].reshape(array.shape[1], -1).T)

    return Known("layer_norm", {"x": view(x)}, facts, view, ("place", "channel"))


def layer_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, groups: int = 0, mean: bool = True, less: int = 0
) -> np.ndarray:
    """x [rows, channels] over its deviation, less its mean unless that is left, times a weight plus a bias; float64.

    Mean and deviation are those of each row; with `groups` those of so many equal groups of channels, of all rows.
    A negative number of groups is of channels that lie as many apart. `less` is what the number of values is less by
    that squares are divided by.
    """
    wide = x.astype(np.float64)
    count = abs(groups)
    if not groups:
        parts, axes = wide, -1
    elif groups > 0:
        parts, axes = wide.reshape(len(wide), count, -1), (0, 2)
    else:
        parts, axes = wide.reshape(len(wide), -1, count), (0, 1)
    parts = parts - parts.mean(axes, keepdims=True) if mean else parts
    squares = np.square(parts)
    power = squares.sum(axes, keepdims=True) / (squares.size / squares.sum(axes).size - less)
    parts = parts / np.sqrt(power + eps)
    return parts.reshape(wide.shape) * weight + bias
