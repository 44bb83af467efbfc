"""Attention of a pair's trusted model, and the rotations of what it is given."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from parity.pairs.known import NEAR, Known, View
from parity.pairs.names import owner_of, parse
from parity.pairs.sides import ROTARY, SDPA
from parity.pairs.torch_side import TorchSide
from parity.pairs.written_out import HIDDEN
from parity.tensors.arrays import tap_of
from parity.tensors.metrics import rel_l2


def known_attention(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    """Attention at what it makes, as it makes it or with the channels of its heads one behind the other."""
    path = parse(name).path.partition("#")[0]
    if path.endswith(SDPA):
        return _attention(side, name, batch)
    own = side.taps[name].array
    for other in reversed([each for each in side.given if parse(each).path.partition("#")[0].endswith(SDPA)]):
        made = side.taps[other].array
        if parse(other).call == parse(name).call and own.ndim == 3 and own.size == made.size:
            if np.array_equal(made.swapaxes(1, 2).reshape(own.shape), own):
                return replace(_attention(side, other, batch), view=lambda array: array[batch])
    return None


def _attention(side: TorchSide, name: str, batch: int) -> Known:
    values = side.given[name][1]
    q, k, v = (side.taps[f"{name}:{short}"].array for short in "qkv")
    mask, added = _masked(values, q.shape[-2], k.shape[-2], batch, q.shape[0])
    q, k, v = (x.reshape(-1, *x.shape[-3:])[batch].swapaxes(0, 1) for x in (q, k, v))
    k, v = _once(k), _once(v)
    facts = {"scale": values.get("scale") or q.shape[-1] ** -0.5}
    facts["places"] = np.arange(len(k) - len(q), len(k), dtype=np.int32) if len(k) >= len(q) else np.arange(len(q))

    def view(array: np.ndarray) -> np.ndarray:
        heads = array.reshape(-1, *array.shape[-3:])[batch].swapaxes(0, 1)
        return np.ascontiguousarray(heads.reshape(len(heads), -1))

    inputs = {"q": q, "k": k, "v": v, "mask": mask} | ({} if added is None else {"added": added})
    return Known("attention", inputs, facts, view)


def _masked(
    values: Mapping[str, Any], queries: int, keys: int, batch: int, batches: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Which keys [queries, keys] are seen, and what is added to their scores [heads or 1, queries, keys] or None."""
    given = values.get("attn_mask")
    if given is None:
        return np.tri(queries, keys, dtype=bool) if values.get("is_causal") else np.ones((queries, keys), bool), None
    given = given.expand(batches, -1, queries, keys)[batch]
    if not given.is_floating_point():
        return given[0].numpy().astype(bool), None
    added = given.float().numpy()
    seen = added[0] > HIDDEN
    added = np.where(added > HIDDEN, added, 0)
    return seen, added if added.any() else None


def _once(x: np.ndarray) -> np.ndarray:
    """Heads [n, h, d] of which groups are the same, each group once."""
    heads = x.shape[1]
    for group in range(heads, 1, -1):
        if heads % group == 0:
            parts = x.reshape(len(x), heads // group, group, -1)
            if np.array_equal(parts, np.broadcast_to(parts[:, :, :1], parts.shape)):
                return parts[:, :, 0]
    return x


def known_rotary(model: nn.Module, side: TorchSide, name: str, batch: int) -> Known | None:
    """A rotation at what attention reads, of as many channels and in such pairs as come out as what it read."""
    if not name.endswith((":q", ":k")):
        return None
    turned = side.given.get(_turned(name))
    if turned is None or len(turned[0]) < 4:
        return None
    tap = side.taps[name]
    x = tap_of(turned[0][name.endswith(":k")].float()).array
    if x.ndim != 4 or tap.array.ndim != 4 or tap.array.shape[1] % x.shape[1]:
        return None
    cos, sin = (tap_of(each.float()).array.reshape(-1, *each.shape[-2:]) for each in turned[0][2:4])
    cos, sin = (each[min(batch, len(each) - 1)] for each in (cos, sin))
    count, (tokens, turns) = x.shape[1], cos.shape
    if tokens != x.shape[-2] or turns > x.shape[-1] or turns % 2:
        return None
    x = np.ascontiguousarray(x[batch].swapaxes(0, 1))

    def whole(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[batch, :: max(array.shape[1] // count, 1)].swapaxes(0, 1))

    # Channels that are not turned may have been parted from the others before.
    x = np.concatenate([x, whole(tap.array)[..., x.shape[-1] :]], -1)
    for order in (halves(turns), neighbours(turns)):
        # Which of two channels that are turned together stand beside each other tells what was computed.
        for tables in ((cos[:, : turns // 2], sin[:, : turns // 2]), (cos[:, ::2], sin[:, ::2])):
            made = turn(x[..., order], *tables)
            error = rel_l2(whole(tap.array)[..., order], made.astype(np.float32))
            if error is not None and error <= NEAR[tap.dtype]:
                return _rotary(side, name, x, order, tables, lambda array, order=order: whole(array)[..., order])
    return None


def halves(count: int) -> np.ndarray:
    """Channels in an order in which each of the first half is turned with that of the second: of those themselves."""
    return np.arange(count)


def neighbours(count: int) -> np.ndarray:
    """The same, of channels 2i and 2i + 1."""
    return np.arange(count).reshape(-1, 2).T.ravel()


def turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [tokens, heads, channels] with channel i of the first half and of the second turned; float64."""
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _rotary(
    side: TorchSide, name: str, x: np.ndarray, order: np.ndarray, tables: tuple[np.ndarray, np.ndarray], view: View
) -> Known:
    """A rotation of channels that are looked at in an order in which those of the first half belong to the second's."""
    inputs = {"x": np.ascontiguousarray(x[..., order]), "cos": tables[0], "sin": tables[1], "whole": x}
    facts: dict[str, Any] = {"axes": np.zeros(len(order) // 2, int), "axis_names": ("",), "order": order}
    ids, theta = _positions(side, parse(name).call, len(x)), _theta(side, _turned(name))
    if ids is not None and theta is not None:
        facts["theta"], inputs["position_ids"] = theta, ids
    return Known("rotary", inputs, facts, view, ("token", "head", "channel"))


def _turned(name: str) -> str:
    """Where the function that turns it was called, of what attention reads."""
    return owner_of(name).partition("#")[0].removesuffix(SDPA) + ROTARY


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
