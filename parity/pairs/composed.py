"""What a tap of a pair's trusted model is made of, of what was computed before it."""

from collections.abc import Container, Iterator, Sequence
from itertools import combinations, product

import numpy as np
from torch import nn

from parity.laws.curves import FUNCTIONS
from parity.pairs.known import Known, held, module_at, near, rows
from parity.pairs.modulated import modulated
from parity.pairs.names import distance, parse, relative
from parity.pairs.torch_side import TorchSide

# Results before a tap that it may be made of, those that may be added by mistake, and the widest product of which an
# identity is written down.
RECENT, BESIDE, WIDEST = 10, 4, 4096
# The most scores of a softmax that are looked at as what attends.
SCORES = 512
TERMS = 3
"""Most terms of a sum."""


def composed(model: nn.Module, side: TorchSide, name: str, told: Container[str], batch: int) -> Known | None:
    """A function of a result before it, or of one times another; a sum; a result as it is, or with a border.

    `told` are the taps that the port tells as well.
    """
    own = side.taps[name].array
    if own.ndim < 2 or own.shape[-1] > WIDEST:
        return None
    before = _recent(side, name, told)
    if any(np.array_equal(_like(side, other, own), own) for other in before):
        return _sum(side, name, before, 1, batch)
    identity = {"weight": np.eye(own.shape[-1], dtype=np.float32), "bias": None}
    for a in before if own.shape[-1] <= SCORES else ():
        if near(side, name, _softmax(x := _like(side, a, own))):
            return _weights(x)
    for a, (function, f) in product(before, FUNCTIONS.items()):
        gate = _like(side, a, own)
        made = f(gate.astype(np.float64))
        for b in (None, *(other for other in before if other != a)):
            up = 1 if b is None else _like(side, b, own)
            if (b or function != "nothing") and near(side, name, made * up):
                inputs = {"gate": rows(gate), "x": rows(own)} | ({} if b is None else {"up": rows(up)})
                return Known("gated", inputs, {**identity, "activation": function}, rows, ("token", "channel"))
    # What the port does not tell may be a term too.
    for telling in (told, side.taps):
        among = _recent(side, name, telling)
        sums = (_sum(side, name, among, count, batch) for count in range(2, TERMS + 1))
        if found := next(filter(None, sums), None) or modulated(model, side, name, list(_before(side, name, telling))):
            return found
    return _bordered(side, name, told, batch) or _with_parameter(model, side, name, batch)


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _weights(scores: np.ndarray) -> Known:
    """A softmax: what attends to a key for each of its scores, which has that one's value alone."""
    x, alone = rows(scores), np.eye(scores.shape[-1], dtype=np.float32)[:, None]
    inputs = {"q": x[:, None], "k": alone, "v": alone, "mask": np.ones(x.shape, bool)}
    return Known("attention", inputs, {"scale": 1.0, "places": np.arange(len(x))}, rows)


def _like(side: TorchSide, name: str, own: np.ndarray) -> np.ndarray | None:
    """A result in the shape of a tap: as it is, the same for all of a batch, or with tokens as the places of a picture;
    None where it has none of these."""
    array = side.taps[name].array
    if own.ndim == 4 and array.shape == (own.shape[0], own.shape[2] * own.shape[3], own.shape[1]):
        return array.swapaxes(1, 2).reshape(own.shape)
    fits = array.shape in (own.shape, (1, *own.shape[1:]))
    return np.broadcast_to(array, own.shape) if fits else None


def _sum(side: TorchSide, name: str, before: Sequence[str], count: int, batch: int) -> Known | None:
    """A sum of so many results; what else might be added stands beside them."""
    own = side.taps[name].array
    for terms in combinations(before, count):
        if near(side, name, sum(_like(side, term, own).astype(np.float64) for term in terms)):
            others = [other for other in before if other not in terms][:BESIDE]
            picture = own.ndim == 4
            view = (lambda array: array[batch]) if picture else rows
            inputs = {relative(each, name): view(_like(side, each, own)) for each in (*terms, *others)}
            axes = ("channel", "row", "column") if picture else ("token", "channel")
            facts = {"terms": tuple(relative(term, name) for term in terms), "names": terms, "axes": axes}
            return Known("sum", inputs, facts, view, axes)
    return None


def _recent(side: TorchSide, name: str, told: Container[str]) -> list[str]:
    """The nearest results that a tap may be a sum of, each value once, by the nearest of its names."""
    found: list[str] = []
    for other in _before(side, name, told):
        array = side.taps[other].array
        if _like(side, other, side.taps[name].array) is None:
            continue
        same = [place for place, known in enumerate(found) if np.array_equal(side.taps[known].array, array)]
        if not same:
            if len(found) == RECENT:
                break
            found.append(other)
        elif distance(other, name) < distance(found[same[0]], name):
            found[same[0]] = other
    return found


def _before(side: TorchSide, name: str, told: Container[str]) -> Iterator[str]:
    """What both models tell of a call before a tap, the nearest first."""
    names = list(side.taps)
    for other in reversed(names[: names.index(name)]):
        if other in told and parse(other).call == parse(name).call:
            yield other


def _bordered(side: TorchSide, name: str, told: Container[str], batch: int) -> Known | None:
    """A result [b, channels, rows, columns] with a border around it."""
    own = side.taps[name].array
    for other in _before(side, name, told) if own.ndim == 4 else ():
        x = side.taps[other].array
        more = [a - b for a, b in zip(own.shape, x.shape, strict=False)]
        if x.ndim != 4 or any(more[:2]) or min(more) < 0 or not any(more):
            continue
        for top, left in product(range(more[2] + 1), range(more[3] + 1)):
            if np.array_equal(own[..., top : top + x.shape[2], left : left + x.shape[3]], x):
                pads = (0, 0), (top, more[2] - top), (left, more[3] - left)
                axes = ("channel", "row", "column")
                return Known("bordered", {"x": x[batch]}, {"pads": pads}, lambda array: array[batch], axes)
    return None


def _with_parameter(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    """What a module makes that holds a table of the same tokens and channels: that, and the rest of the sum."""
    module, own = module_at(model, name), side.taps[name].array
    if module is None or own.ndim != 3:
        return None
    for said, parameter in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        array = held(parameter)
        if array.shape in (own.shape[1:], (1, *own.shape[1:])):
            added = array.reshape(own.shape[1:])
            inputs = {said: added, "the rest": own[batch] - added}
            facts = {"terms": tuple(inputs), "names": ()}
            return Known("sum", inputs, facts, lambda array: array[batch], ("token", "channel"))
    return None
