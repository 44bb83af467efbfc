"""Results of a pair's trusted model as a port may read them by mistake, by what that is called."""

from collections.abc import Iterator

import numpy as np

from parity.pairs.names import parse
from parity.pairs.sides import QKV, SDPA
from parity.tensors.recording import Recording

# How a fused projection may be split: its axes, by which of them q, k and v are told apart.
SPLITS = {"q, k and v of all heads": ("qhd", 0), "those of each head": ("hqd", 1), "those of each channel": ("hdq", 2)}


def readings(taps: Recording, name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Parts and summaries of results of a tap's call that have its shape."""
    call = parse(name).call
    taps = {other: tap for other, tap in taps.items() if parse(other).call == call}
    if len(shape) == 2:
        return dict(_pooled(taps, shape))
    return dict(_split(taps, shape)) if f"{SDPA}:" in name and len(shape) == 4 else {}


def _pooled(taps: Recording, shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    for name, tap in taps.items():
        array, one = tap.array, "token"
        if array.ndim == 4:
            # The channels of a picture stand first or last.
            array = array if array.shape[::3] == shape else np.moveaxis(array, 1, -1)
            array, one = array.reshape(len(array), -1, array.shape[-1]), "place"
        if array.ndim == 3 and array.shape[::2] == shape and array.shape[1]:
            yield f"{name}, the last {one}", array[:, -1]
            yield f"{name}, the first {one}", array[:, 0]
            yield f"{name}, the mean of {one}s", array.mean(1)
            yield f"{name}, the sum of {one}s", array.sum(1)
            yield f"{name}, the largest of {one}s", array.max(1)


def _split(taps: Recording, shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """q, k and v [batch, heads, tokens, channels] of what one product makes."""
    b, h, n, d = shape
    for name, tap in taps.items():
        if tap.shape != (b, n, 3 * h * d):
            continue
        for said, (order, axis) in SPLITS.items():
            sides = [{"q": 3, "h": h, "d": d}[side] for side in order]
            parts = np.moveaxis(tap.array.reshape(b, n, *sides), 2 + axis, 0)
            for short, part in zip(QKV, parts, strict=True):
                yield f"{name}, its {short} as {said} one behind the other", part.swapaxes(1, 2)
