"""What is known of a part of a pair's trusted model, and how what it was given and made is found among its taps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from parity.pairs.names import parse
from parity.pairs.torch_side import TorchSide
from parity.tensors.arrays import tap_of
from parity.tensors.metrics import rel_l2

# How near what is tried has to come: a hundred roundings of float32, three of bfloat16.
NEAR = {"float32": 1e-5, "bfloat16": 1.2e-2}
# Values that are looked at first.
SOME = 512

View = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Known:
    """A part at one tap: see parity.laws.Component; `view` lays the tap out as the laws of the kind have it."""

    kind: str
    inputs: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    view: View
    axes: tuple[str, ...] = ()


def rows(array: np.ndarray) -> np.ndarray:
    """[..., channels] as [rows, channels]."""
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """The module that makes a tap; None for what a module reads, and for what is none's."""
    if ":" in name:
        return None
    try:
        return model.get_submodule(parse(name).path.partition("#")[0])
    except AttributeError:
        return None


def given_to(side: TorchSide, name: str) -> np.ndarray | None:
    """What a part reads, as it was recorded."""
    stem, sharp, number = name.partition("#")
    tap = side.taps.get(f"{stem}{sharp}{number}:in")
    return None if tap is None else tap.array


def held(value: Tensor | None) -> np.ndarray | None:
    """A parameter in float32."""
    return None if value is None else np.asarray(tap_of(value.detach().float()).array)


def near(side: TorchSide, name: str, made: np.ndarray) -> bool:
    """Whether a tap is what was made, but for rounding."""
    tap = side.taps[name]
    if made.shape != tap.shape:
        return False
    # What is far from it in some of its values is so as a whole.
    step = max(made.size // SOME, 1)
    apart = np.linalg.norm(made.ravel()[::step].astype(np.float64) - tap.array.ravel()[::step])
    if not apart <= 2 * NEAR[tap.dtype] * np.linalg.norm(tap.array) or not np.isfinite(made).all():
        return False
    error = rel_l2(tap.array, made.astype(np.float32))
    return error is not None and error <= NEAR[tap.dtype]
