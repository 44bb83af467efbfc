"""What the encoders are given of a picture or a video: pixels for the VAE, patches for the ViT."""

from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.hypotheses.base import DoesNotApply
from parity.lance.components.base import Known
from parity.laws import Component
from reference.layout import MERGE

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FRAMES, SIDE = 2, 14
STATISTICS = {"ImageNet's": IMAGENET, "CLIP's": CLIP, "0.5": HALVES}


def preprocess(site: "TapProbe") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Pixels [3, frames, h, w], or patches [n, 1176]."""
    name = site.tap.name.removeprefix("inputs/")
    if name.startswith("vae_pixels"):
        same: Callable[[np.ndarray], np.ndarray] = np.asarray
        facts = {"view": same, "back": same, "what": "the VAE's pixels"}
        return {}, facts | {"mean": HALVES[0], "deviation": HALVES[1], "known": STATISTICS}
    if not name.startswith("vit_patches"):
        raise DoesNotApply
    splits, number = site.layout.vit_splits, site.tap.numbers.get("index", 0)
    grid = splits[number].grid if number < len(splits) else None
    if grid is None or grid.size * MERGE**2 != len(site.expected):
        raise DoesNotApply
    cells = (grid.frames, grid.rows, grid.columns)
    facts = {"view": partial(pixels_of, cells), "back": partial(patches_of, cells), "what": "the ViT's pixels"}
    values = {"mean": CLIP[0], "deviation": CLIP[1], "known": STATISTICS, "patches": PATCHES}
    return {}, facts | values


def pixels_of(grid: tuple[int, int, int], patches: np.ndarray) -> np.ndarray:
    """Patches [n, 1176] as pixels [3, frames, h, w]."""
    t, h, w = grid
    blocks = patches.reshape(t, h, w, MERGE, MERGE, 3, FRAMES, SIDE, SIDE)
    return blocks.transpose(5, 0, 6, 1, 3, 7, 2, 4, 8).reshape(3, FRAMES * t, MERGE * SIDE * h, MERGE * SIDE * w)


def patches_of(grid: tuple[int, int, int], pixels: np.ndarray) -> np.ndarray:
    """Pixels [3, frames, h, w] as patches [n, 1176]."""
    t, h, w = grid
    blocks = pixels.reshape(3, t, FRAMES, h, MERGE, SIDE, w, MERGE, SIDE)
    return blocks.transpose(1, 3, 6, 4, 7, 0, 2, 5, 8).reshape(t * h * w * MERGE**2, -1)


def _values(order: tuple[int, ...], component: Component) -> np.ndarray:
    """The values of a patch (colour, frame, row, column) laid out in another order."""
    own = component.own.reshape(-1, 3, FRAMES, SIDE, SIDE)
    return own.transpose(0, *(axis + 1 for axis in order)).reshape(component.own.shape)


def _reading_order(component: Component) -> np.ndarray:
    pixels = component.facts["view"](component.own)
    _, frames, height, width = pixels.shape
    blocks = pixels.reshape(3, frames // FRAMES, FRAMES, height // SIDE, SIDE, width // SIDE, SIDE)
    return blocks.transpose(1, 3, 5, 0, 2, 4, 6).reshape(component.own.shape)


def _columns_first(component: Component) -> np.ndarray:
    own = component.own.reshape(-1, MERGE, MERGE, component.own.shape[-1])
    return own.swapaxes(1, 2).reshape(component.own.shape)


def _orders() -> dict[str, Callable[[Component], np.ndarray]]:
    names = ("colour", "frame", "row", "column")
    found: dict[str, Callable[[Component], np.ndarray]] = {
        "patches are in reading order instead of token by token": _reading_order,
        "the four patches of a token are in the order of columns": _columns_first,
        "patches are in reverse": lambda component: component.own[::-1],
        "the frames of a patch are exchanged": lambda component: component.own.reshape(-1, 3, FRAMES, SIDE, SIDE)[
            :, :, ::-1
        ].reshape(component.own.shape),
    }
    for order in permutations(range(4)):
        if order != (0, 1, 2, 3):
            words = f"the values of a patch are in the order {', '.join(names[axis] for axis in order)}"
            found[words] = partial(_values, order)
    return found


PATCHES = _orders()
KNOWN = (Known("preprocess", ("preprocess",), preprocess),)
