"""What is known of a part of a trusted PyTorch model: its kind, inputs and facts, for the laws of parity.laws.

Nothing goes by a model's name: what a part computes is tried on what it was given, and believed where it comes out.
"""

from collections.abc import Container, Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from parity.laws.rearrangement import layout_of
from parity.laws.sinusoidal import is_made_of_waves, waves_of
from parity.pairs.attending import known_attention, known_rotary
from parity.pairs.composed import composed
from parity.pairs.known import NEAR, Known, View, given_to, held, module_at, near, rows
from parity.pairs.names import parse, relative
from parity.pairs.norms import known_norm
from parity.pairs.sides import SDPA
from parity.pairs.torch_side import TorchSide

# Groups of a convolution that are looked at.
GROUPS = 4
# The nearest results that another may be laid out of.
LAYOUTS = 12


def known(model: nn.Module, side: TorchSide, name: str, told: Container[str], batch: int = 0) -> Known:
    """What is known of the part that makes or reads a tap; of what is laid out by batch, in one of them.

    `told` are the taps that the port tells as well: all others are computed on the way.
    """
    for read in (_of_module, known_attention, known_rotary, _waves, _read_as_made, _laid_out_anew):
        found = read(model, side, name, batch)
        if found is not None:
            return found
    return composed(model, side, name, told, batch) or _alone(side, name, batch)


def _of_module(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    for read in (_linear, known_norm, _convolution, _embedding):
        found = read(model, side, name, batch)
        if found is not None:
            return found
    return None


def _waves(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    """Sines and cosines of what the model, or a part of it, was given."""
    own = rows(side.taps[name].array)
    if own.shape[1] < 8 or own.shape[1] % 2 or not is_made_of_waves(own):
        return None
    given = [value for args, values in side.given.values() for value in (*args, *values.values())]
    for value in (*side.inputs.values(), *given):
        if isinstance(value, Tensor) and value.numel() == len(own) and value.any():
            numbers = value.detach().double().numpy().ravel()
            waves = next(waves_of(numbers, own, None, NEAR[side.taps[name].dtype]), None)
            if waves:
                inputs = {"numbers": numbers.astype(np.float32)}
                return Known("waves", inputs, {"waves": waves}, rows, ("token", "channel"))
    return None


def _read_as_made(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    """What is read and is a module's result, as it is or with its channels elsewhere: a port may compute that without
    the module."""
    own = side.taps[name].array
    names = list(side.taps)
    for other in reversed(names[: names.index(name)] if ":" in name and own.ndim > 2 else ()):
        made = side.taps[other].array
        if ":" in other or made.size != own.size or parse(other).call != parse(name).call:
            continue
        # The nearest whose values these are has made them.
        for back in _ways_back(own, made):
            if np.array_equal(back(own), made):
                found = _of_module(model, side, other, batch)
                view = None if found is None else found.view
                return None if found is None else replace(found, view=lambda array, v=view, b=back: v(b(array)))
    return None


def _laid_out_anew(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    """The values of one result or of what the model was given in other places, all of a batch."""
    own, names = side.taps[name].array, list(side.taps)
    before = [other for other in reversed(names[: names.index(name)]) if parse(other).call == parse(name).call]
    sources = [(relative(other, name), side.taps[other].array) for other in before]
    sources += [(f"input {said}", value.float().numpy()) for said, value in side.inputs.items()]
    sources = [(said, array) for said, array in sources if array.size == own.size > own.shape[-1] > 1]
    if any(array.shape == own.shape and np.array_equal(array, own) for _, array in sources):
        return None
    # What no layout makes is not tried again with each result before.
    for said, array in sources[:LAYOUTS]:
        if layout_of(array, own):
            return Known("rearranged", {"source": array}, {"name": said}, lambda array: array)
    return None


def _ways_back(own: np.ndarray, made: np.ndarray) -> Iterator[View]:
    """How an array laid out as one may have been laid out as another."""
    if own.shape == made.shape:
        yield lambda array: array
    for source, to in ((-1, 1), (1, -1)):
        if np.moveaxis(own, source, to).shape == made.shape:
            yield lambda array, source=source, to=to: np.ascontiguousarray(np.moveaxis(array, source, to))
    if own.ndim == 3 and made.ndim == 4:
        yield lambda array: np.ascontiguousarray(array.swapaxes(1, 2)).reshape(made.shape)


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
    if set(module.dilation) != {1} or isinstance(module.padding, str):
        return None
    weight, bias, read, made = _some_groups(held(module.weight), held(module.bias), module.groups)
    # As one frame, and of one row where there are none.
    lacking = (slice(None), *(None for _ in range(5 - x.ndim)))
    alone = (0,) * (4 - x.ndim)
    pads = tuple((side, side) for side in (*alone, *module.padding))
    facts = {
        "weight": weight[:, *lacking],
        "bias": bias,
        "stride": (1, *(1 for _ in alone), *module.stride),
        "pads": pads,
    }
    x = x[batch][read][None, *lacking]
    return Known("convolution", {"x": x}, facts, lambda array: array[batch][made][None, *lacking])


def _some_groups(
    weight: np.ndarray, bias: np.ndarray | None, groups: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """A convolution's weight and bias as one of one group, and the input and output channels that it is of: of more
    groups those of some."""
    out, inner = len(weight) // groups, weight.shape[1]
    chosen = np.unique(np.linspace(0, groups - 1, min(groups, GROUPS)).astype(int))
    made, read = ((chosen[:, None] * count + np.arange(count)).ravel() for count in (out, inner))
    whole = np.zeros((len(made), len(read), *weight.shape[2:]), weight.dtype)
    for i, group in enumerate(chosen):
        whole[i * out : (i + 1) * out, i * inner : (i + 1) * inner] = weight[group * out : (group + 1) * out]
    return whole, None if bias is None else bias[made], read, made


def _embedding(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    module, (args, values) = module_at(model, name), side.given.get(name, ((), {}))
    if not isinstance(module, nn.Embedding):
        return None
    ids = next((each for each in (*args, *values.values()) if isinstance(each, Tensor)), None)
    if ids is None or ids.is_floating_point() or not near(side, name, (table := held(module.weight))[ids.numpy()]):
        return None
    inputs = {"ids": ids.numpy().ravel().astype(np.int32)}
    return Known("embedding", inputs, {"table": table}, rows, ("token", "channel"))
