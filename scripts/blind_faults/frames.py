"""Pixels to 8-bit frames in another range, order or number of colours."""

from collections.abc import Callable

import numpy as np

from blind_faults.common import plain, small
from lance_mlx.media import write
from parity.lance.faults.base import DRAWS, Patch, function

# What a recording converts is [3, frames, height, width].
_COLOUR, _TIME, _ROW, _COLUMN = range(4)


def _frames(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """A patch from pixels float32 [3, frames, height, width] to values that are rounded and clipped to 0..255."""

    def call(original: Callable, pixels: np.ndarray) -> np.ndarray:
        values = change(np.asarray(pixels, np.float32))
        return np.clip(np.round(values), 0, 255).astype(np.uint8)

    return function(write, "to_uint8", call)


def _full(pixels: np.ndarray) -> np.ndarray:
    return np.clip((pixels * 0.5 + 0.5) * 255, 0, 255)


def _halved_chroma(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = _full(pixels)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    blueness, redness = (_blocks(x) for x in ((blue - luma) * 0.564, (red - luma) * 0.713))
    return np.stack([luma + redness / 0.713, luma - 0.344 * blueness - 0.714 * redness, luma + blueness / 0.564])


def _blocks(x: np.ndarray) -> np.ndarray:
    frames, height, width = x.shape
    means = x.reshape(frames, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
    return means.repeat(2, axis=1).repeat(2, axis=2)


def _last_row_lost(pixels: np.ndarray) -> np.ndarray:
    values = _full(pixels)
    values[:, :, -1] = 0
    return values


FAULTS = [
    plain(
        "blind-frames-times-127",
        "frames",
        _frames(lambda pixels: (pixels + 1) * 127),
        "Colours are round((x + 1) * 127) instead of round((x + 1) * 127.5): white is 254.",
        tasks=DRAWS,
    ),
    plain(
        "blind-frames-chroma-halved",
        "frames",
        _frames(_halved_chroma),
        "Frames went through 4:2:0: each two by two pixels share the mean of their chroma; luma is kept.",
        tasks=DRAWS,
    ),
    small(
        "blind-frames-last-row-black",
        "frames",
        _frames(_last_row_lost),
        "The last row of every frame is black.",
        tasks=DRAWS,
    ),
]
