"""What is known of a part of a trusted PyTorch model: its kind, inputs and facts, for the laws of parity.laws.

Nothing goes by a model's name: what a part computes is tried on what it was given, and believed where it comes out.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
from torch import Tensor, nn

from parity.laws.curves import FUNCTIONS
from parity.pairs.names import distance, owner_of, parse, relative
from parity.pairs.sides import ROTARY, SDPA
from parity.pairs.torch_side import TorchSide
from parity.tensors.arrays import tap_of
from parity.tensors.metrics import rel_l2

# Results before a tap that it may be made of, those that may be added by mistake, and the widest product of which an
# identity is written down.
RECENT, BESIDE, WIDEST = 10, 4, 4096
# How near what is tried has to come: a hundred roundings of float32, three of bfloat16.
NEAR = {"float32": 1e-5, "bfloat16": 1.2e-2}
# What is added to a score that is not to count, at least.
MASKED = -1e4

View = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Known:
    """A part at one tap: see parity.laws.Component; `view` lays the tap out as the laws of the kind have it."""

    kind: str
    inputs: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    view: View
    axes: tuple[str, ...] = ()


def known(model: nn.Module, side: TorchSide, name: str, told: Container[str], batch: int = 0) -> Known:
    """What is known of the part that makes or reads a tap; of what is laid out by batch, in one of them.

    `told` are the taps that the port tells as well: all others are computed on the way.
    """
    for read in (_linear, _norm, _convolution, _attention, _rotary):
        found = read(model, side, name, batch)
        if found is not None:
            return found
    return _composed(side, name, told) or _alone(side, name, batch)


def _alone(side: TorchSide, name: str, batch: int) -> Known:
    """A tap of which nothing is known but its axes."""
    if side.taps[name].array.ndim == 4 and f".{SDPA}:" in name:
        return Known("any", {}, {}, lambda array: array[batch].swapaxes(0, 1), ("token", "head", "channel"))
    return Known("any", {}, {}, rows, ("token", "channel"))


def rows(array: np.ndarray) -> np.ndarray:
    """[..., channels] as [rows, channels]."""
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    if ":" in name:
        return None
    try:
        return model.get_submodule(parse(name).path.partition("#")[0])
    except AttributeError:
        return None


def _given(side: TorchSide, name: str) -> np.ndarray | None:
    """What a part reads, as it was recorded."""
    stem, sharp, number = name.partition("#")
    tap = side.taps.get(f"{stem}{sharp}{number}:in")
    return None if tap is None else tap.array


def _held(value: Tensor | None) -> np.ndarray | None:
    return None if value is None else np.asarray(tap_of(value.detach().float()).array)


def _near(side: TorchSide, name: str, made: np.ndarray) -> bool:
    tap = side.taps[name]
    if made.shape != tap.shape or not np.isfinite(made).all():
        return False
    error = rel_l2(tap.array, made.astype(np.float32))
    return error is not None and error <= NEAR[tap.dtype]


def _linear(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    module, x = _module(model, name), _given(side, name)
    weight = getattr(module, "weight", None)
    if x is None or not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    weight, bias = _held(weight), _held(getattr(module, "bias", None))
    # Some libraries keep the matrix the other way round.
    for matrix in (weight, weight.T):
        if matrix.shape[1] == x.shape[-1] and _near(side, name, x @ matrix.T + (0 if bias is None else bias)):
            return Known("linear", {"x": rows(x)}, {"weight": matrix, "bias": bias}, rows, ("token", "channel"))
    return None


def _norm(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    module, x = _module(model, name), _given(side, name)
    weight = _held(getattr(module, "weight", None)) if module is not None else None
    if x is None or weight is None or weight.ndim != 1 or weight.size != x.shape[-1]:
        return None
    eps = next((float(getattr(module, key)) for key in ("eps", "variance_epsilon") if hasattr(module, key)), 0.0)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + eps)
    for each in (weight, 1 + weight):
        if _near(side, name, normed * each):
            return Known("norm", {"x": rows(x)}, {"weight": each, "eps": eps}, rows, ("token", "channel"))
    bias = _held(getattr(module, "bias", None))
    facts = {"weight": weight, "bias": np.zeros_like(weight) if bias is None else bias, "eps": eps}
    if _near(side, name, layer_norm(x, **facts)):
        return Known("layer_norm", {"x": rows(x)}, facts, rows, ("token", "channel"))
    return None


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, mean: bool = True) -> np.ndarray:
    """x [..., channels] over its deviation, less its mean unless that is left, times a weight plus a bias; float64."""
    wide = x.astype(np.float64)
    wide = wide - wide.mean(-1, keepdims=True) if mean else wide
    return wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + eps) * weight + bias


def _convolution(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    module, x = _module(model, name), _given(side, name)
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or x is None or x.ndim != module.weight.ndim:
        return None
    if module.groups > 1 or set(module.dilation) != {1} or isinstance(module.padding, str):
        return None
    # As one frame, and of one row where there are none.
    lacking = (slice(None), *(None for _ in range(5 - x.ndim)))
    alone = (0,) * (4 - x.ndim)
    pads = tuple((side, side) for side in (*alone, *module.padding))
    facts = {
        "weight": _held(module.weight)[:, *lacking],
        "bias": _held(module.bias),
        "stride": (1, *(1 for _ in alone), *module.stride),
        "pads": pads,
    }
    return Known("convolution", {"x": x[batch][None, *lacking]}, facts, lambda array: array[batch][None, *lacking])


def _attention(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    path = parse(name).path.partition("#")[0]
    if not path.endswith(SDPA):
        return None
    values = side.given[name][1]
    q, k, v = (side.taps[f"{name}:{short}"].array for short in "qkv")
    mask = _mask(values, q.shape[-2], k.shape[-2], batch, q.shape[0])
    q, k, v = (x.reshape(-1, *x.shape[-3:])[batch].swapaxes(0, 1) for x in (q, k, v))
    k, v = _once(k), _once(v)
    facts = {"scale": values.get("scale") or q.shape[-1] ** -0.5}
    facts["places"] = np.arange(len(k) - len(q), len(k), dtype=np.int32) if len(k) >= len(q) else np.arange(len(q))

    def view(array: np.ndarray) -> np.ndarray:
        heads = array.reshape(-1, *array.shape[-3:])[batch].swapaxes(0, 1)
        return np.ascontiguousarray(heads.reshape(len(heads), -1))

    return Known("attention", {"q": q, "k": k, "v": v, "mask": mask}, facts, view)


def _mask(values: Mapping[str, Any], queries: int, keys: int, batch: int, batches: int) -> np.ndarray:
    given = values.get("attn_mask")
    if given is None:
        return np.tri(queries, keys, dtype=bool) if values.get("is_causal") else np.ones((queries, keys), bool)
    seen = given > MASKED if given.is_floating_point() else given
    seen = seen.expand(batches, -1, queries, keys)[batch, 0]
    return seen.numpy().astype(bool)


def _once(x: np.ndarray) -> np.ndarray:
    """Heads [n, h, d] of which groups are the same, each group once."""
    heads = x.shape[1]
    for group in range(heads, 1, -1):
        if heads % group == 0:
            parts = x.reshape(len(x), heads // group, group, -1)
            if np.array_equal(parts, np.broadcast_to(parts[:, :, :1], parts.shape)):
                return parts[:, :, 0]
    return x


def _rotary(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    if not name.endswith((":q", ":k")):
        return None
    path = owner_of(name).partition("#")[0]
    turned = side.given.get(path.removesuffix(SDPA) + ROTARY)
    if turned is None or len(turned[0]) < 4:
        return None
    tap = side.taps[name]
    x = tap_of(turned[0][name.endswith(":k")].float()).array
    if x.ndim != 4 or tap.array.ndim != 4 or tap.array.shape[1] % x.shape[1]:
        return None
    cos, sin = (tap_of(each.float()).array.reshape(-1, *each.shape[-2:]) for each in turned[0][2:4])
    cos, sin = (each[min(batch, len(each) - 1)] for each in (cos, sin))
    if cos.shape != (x.shape[-2], x.shape[-1]):
        return None
    half = x.shape[-1] // 2
    count = x.shape[1]
    inputs = {"x": x[batch].swapaxes(0, 1), "cos": cos[:, :half], "sin": sin[:, :half]}
    facts: dict[str, Any] = {"axes": np.zeros(half, int), "axis_names": ("",)}
    ids, theta = _positions(side, parse(name).call, len(cos)), _theta(side, path.removesuffix(SDPA) + ROTARY)
    if ids is not None and theta is not None:
        facts["theta"], inputs["position_ids"] = theta, ids

    def view(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[batch, :: max(array.shape[1] // count, 1)].swapaxes(0, 1))

    return Known("rotary", inputs, facts, view, ("token", "head", "channel"))


def _positions(side: TorchSide, call: str, count: int) -> np.ndarray | None:
    """The positions [1, n] that some part of a call was given; None where none was."""
    for name, (args, values) in side.given.items():
        # What is given by its place tells itself where what it is given to turns by it.
        given = [values.get("position_ids"), *(args if "rotary" in name or "rope" in name else ())]
        for value in given if name.startswith(f"{call}/") else ():
            if isinstance(value, Tensor) and not value.is_floating_point() and value.shape == (1, count):
                ids = value.numpy().astype(np.int32)
                if (np.diff(ids) == 1).all():
                    return ids
    return np.arange(count, dtype=np.int32)[None] if call == parse(next(iter(side.taps))).call else None


def _theta(side: TorchSide, turned: str) -> float | None:
    """The base of a rotation's frequencies: of the step from one position to the next the first two tell it."""
    path = parse(turned).path
    for name, (args, _) in side.given.items():
        if parse(name).path.partition("#")[0] != path or len(args) < 4:
            continue
        cos, sin = (tap_of(each.float()).array.reshape(-1, each.shape[-1]).astype(np.float64) for each in args[2:4])
        half = cos.shape[1] // 2
        steps = np.diff(np.unwrap(np.arctan2(sin[:, :half], cos[:, :half]), axis=0), axis=0)
        if len(steps) and half > 1 and steps[0, 1] > 0:
            return float(f"{(steps[0, 0] / steps[0, 1]) ** half:.5g}")
    return None


def _composed(side: TorchSide, name: str, told: Container[str]) -> Known | None:
    """A function of a result before it, or of one times another; the sum of two; or a result as it is."""
    own = side.taps[name].array
    if own.ndim < 2 or own.shape[-1] > WIDEST:
        return None
    before = _recent(side, name, own.shape, told)
    if any(np.array_equal(side.taps[other].array, own) for other in before):
        return _sum(side, name, before, 1)
    identity = {"weight": np.eye(own.shape[-1], dtype=np.float32), "bias": None}
    for a, (function, f) in product(before, FUNCTIONS.items()):
        gate = side.taps[a].array
        made = f(gate.astype(np.float64))
        for b in (None, *(other for other in before if other != a)):
            up = 1 if b is None else side.taps[b].array
            if (b or function != "nothing") and _near(side, name, made * up):
                inputs = {"gate": rows(gate), "x": rows(own)} | ({} if b is None else {"up": rows(up)})
                return Known("gated", inputs, {**identity, "activation": function}, rows, ("token", "channel"))
    return _sum(side, name, before, 2)


def _sum(side: TorchSide, name: str, before: Sequence[str], count: int) -> Known | None:
    """A sum of so many results; what else might be added stands beside them."""
    for terms in combinations(before, count):
        if _near(side, name, sum(side.taps[term].array.astype(np.float64) for term in terms)):
            others = [other for other in before if other not in terms][:BESIDE]
            inputs = {relative(each, name): rows(side.taps[each].array) for each in (*terms, *others)}
            facts = {"terms": tuple(relative(term, name) for term in terms), "names": terms}
            return Known("sum", inputs, facts, rows, ("token", "channel"))
    return None


def _recent(side: TorchSide, name: str, shape: tuple[int, ...], told: Container[str]) -> list[str]:
    """The nearest results of a shape before a tap in its call, each value once, by the nearest of its names."""
    names: Sequence[str] = list(side.taps)
    found: list[str] = []
    for other in reversed(names[: names.index(name)]):
        array = side.taps[other].array
        if other not in told or array.shape != shape or parse(other).call != parse(name).call:
            continue
        same = [place for place, known in enumerate(found) if np.array_equal(side.taps[known].array, array)]
        if not same:
            if len(found) == RECENT:
                break
            found.append(other)
        elif distance(other, name) < distance(found[same[0]], name):
            found[same[0]] = other
    return found
