"""What is known of a part of a trusted PyTorch model: its kind, inputs and facts, for the laws of parity.laws.

Nothing goes by a model's name: what a part computes is tried on what it was given, and believed where it comes out.
"""

from collections.abc import Container

import numpy as np
from torch import Tensor, nn

from parity.pairs.attending import known_attention, known_rotary
from parity.pairs.composed import composed
from parity.pairs.known import Known, given_to, held, module_at, near, rows
from parity.pairs.norms import known_norm
from parity.pairs.sides import SDPA
from parity.pairs.torch_side import TorchSide


def known(model: nn.Module, side: TorchSide, name: str, told: Container[str], batch: int = 0) -> Known:
    """What is known of the part that makes or reads a tap; of what is laid out by batch, in one of them.

    `told` are the taps that the port tells as well: all others are computed on the way.
    """
    for read in (_linear, known_norm, _convolution, _embedding, known_attention, known_rotary):
        found = read(model, side, name, batch)
        if found is not None:
            return found
    return composed(model, side, name, told, batch) or _alone(side, name, batch)


def _alone(side: TorchSide, name: str, batch: int) -> Known:
    """A tap of which nothing is known but its axes."""
    if side.taps[name].array.ndim != 4:
        return Known("any", {}, {}, rows, ("token", "channel"))
    if f"{SDPA}:" in name:
        return Known("any", {}, {}, lambda array: array[batch].swapaxes(0, 1), ("token", "head", "channel"))
    return Known("any", {}, {}, lambda array: np.ascontiguousarray(array[batch]), ("channel", "row", "column"))


def _linear(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    module, x = module_at(model, name), given_to(side, name)
    weight = getattr(module, "weight", None)
    if x is None or not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    weight, bias = held(weight), held(getattr(module, "bias", None))
    # Some libraries keep the matrix the other way round.
    for matrix in (weight, weight.T):
        if matrix.shape[1] == x.shape[-1] and near(side, name, x @ matrix.T + (0 if bias is None else bias)):
            return Known("linear", {"x": rows(x)}, {"weight": matrix, "bias": bias}, rows, ("token", "channel"))
    return None


def _convolution(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    module, x = module_at(model, name), given_to(side, name)
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or x is None or x.ndim != module.weight.ndim:
        return None
    if module.groups > 1 or set(module.dilation) != {1} or isinstance(module.padding, str):
        return None
    # As one frame, and of one row where there are none.
    lacking = (slice(None), *(None for _ in range(5 - x.ndim)))
    alone = (0,) * (4 - x.ndim)
    pads = tuple((side, side) for side in (*alone, *module.padding))
    facts = {
        "weight": held(module.weight)[:, *lacking],
        "bias": held(module.bias),
        "stride": (1, *(1 for _ in alone), *module.stride),
        "pads": pads,
    }
    return Known("convolution", {"x": x[batch][None, *lacking]}, facts, lambda array: array[batch][None, *lacking])


def _embedding(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    module, (args, values) = module_at(model, name), side.given.get(name, ((), {}))
    if not isinstance(module, nn.Embedding):
        return None
    ids = next((each for each in (*args, *values.values()) if isinstance(each, Tensor)), None)
    if ids is None or ids.is_floating_point() or not near(side, name, (table := held(module.weight))[ids.numpy()]):
        return None
    inputs = {"ids": ids.numpy().ravel().astype(np.int32)}
    return Known("embedding", inputs, {"table": table}, rows, ("token", "channel"))
