"""Hypotheses about how pictures become the pixels and patches that the encoders are given: size, crop and filter.

Each resizes the request's own files again; where they are not at hand, none applies.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from parity.hypotheses.base import Hypothesis
from reference.errors import ReferenceError
from reference.media import STRIDE, VAE_UNIT, VIT_UNIT, MediaSize, nearest_bucket, resolutions
from reference.preprocess import Box, aspect_box, cut, frames, vae_pixels, vit_patches
from reference.request import Medium

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

PREPROCESS = ("preprocess",)


@dataclass(frozen=True)
class Way:
    """A way to resize: `size` of (width, height, resolution) is (rows, columns), None for those that are asked for of
    what is made; `box` of (width, height, aspect) is what is kept of the picture before, sampled from `inset[0]` pixels
    within its left and upper edge to `inset[1]` within the others."""

    size: Callable[[int, int, int], tuple[int, int]] | None
    box: Callable[[int, int, float], Box] = aspect_box
    filter: Image.Resampling = Image.Resampling.BICUBIC
    inset: tuple[float, float] = (0.0, 0.0)


def bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Upstream's size."""
    return nearest_bucket(MediaSize(width, height), resolution)


def square(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The resolution itself, whatever the picture's aspect."""
    side = max(round(resolution / STRIDE), 1) * STRIDE
    return side, side


def all_of_it(width: int, height: int, aspect: float) -> Box:
    """All of the picture, which is stretched then."""
    return 0, 0, width, height


def at_the_corner(width: int, height: int, aspect: float) -> Box:
    """Upstream's part of the picture, from its top left corner."""
    left, top, right, bottom = aspect_box(width, height, aspect)
    return 0, 0, right - left, bottom - top


def resized(way: Way, swapped: bool = False) -> Callable[["TapProbe", np.ndarray], np.ndarray | None]:
    """Resize a visual of the request in a way, for the encoder that the site is about; `swapped` takes the resolution
    of the other encoder."""

    def again(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        request, index = site.oracle.run.request, site.tap.numbers.get("index", 0)
        if index >= len(request.visuals):
            return None
        visual, for_vit = request.visuals[index], site.tap.name.startswith("inputs/vit_patches")
        path = site.oracle.bundle.path.parent / visual.content
        resolution = resolutions(request)[for_vit if not swapped else not for_vit]
        if resolution is None or not os.path.isfile(path):
            return None
        try:
            return _made(path, visual.medium, way, resolution, (request.height, request.width), for_vit)
        except ReferenceError:
            # A resolution that leaves nothing.
            return None

    return again


@lru_cache(maxsize=8)
def _made(path: Path, medium: Medium, way: Way, resolution: int, asked: tuple[int, int], for_vit: bool) -> np.ndarray:
    """What an encoder is given of a file, in the form of a bundle's inputs; kept, since combinations are tried."""
    unit = VIT_UNIT if for_vit else VAE_UNIT
    shown = np.stack([cut(_resized(image, way, resolution, asked), unit) for image in frames(path, medium)])
    return vit_patches(shown)[0] if for_vit else vae_pixels(shown)


def _resized(image: Image.Image, way: Way, resolution: int, asked: tuple[int, int]) -> np.ndarray:
    rows, columns = way.size(*image.size, resolution) if way.size else asked
    part = image.crop(way.box(*image.size, columns / rows))
    (near, far), (width, height) = way.inset, part.size
    return np.asarray(part.resize((columns, rows), way.filter, box=(near, near, width - far, height - far)))


SIZES = {
    "": Way(bucket),
    "stretched to a square": Way(square, all_of_it),
    "cut to a square": Way(square),
    "stretched to their bucket": Way(bucket, all_of_it),
    "cut from their top left corner": Way(bucket, at_the_corner),
    "stretched to the size asked for": Way(None, all_of_it),
    "cut to the size asked for": Way(None),
}
FILTERS = {
    "": Image.Resampling.BICUBIC,
    "resized bilinearly": Image.Resampling.BILINEAR,
    "resized by the Lanczos filter": Image.Resampling.LANCZOS,
    "resized to their nearest pixels": Image.Resampling.NEAREST,
}
MORE_FILTERS = {
    "resized by the mean of the area": Image.Resampling.BOX,
    "resized by the Hamming filter": Image.Resampling.HAMMING,
}
"""Filters that are tried of the right size alone."""

INSETS = {
    "with their corners aligned": (0.5, 0.5),
    "half a pixel too far right and down": (0.5, 0.0),
    "half a pixel too far left and up": (0.0, 0.5),
}
HYPOTHESES = [
    Hypothesis(name, PREPROCESS, transform=transform, anew=True)
    for name, transform in (
        *(
            (f"pictures are {' and '.join(part for part in (size, how) if part)}", resized(replace(way, filter=mode)))
            for how, mode in FILTERS.items()
            for size, way in SIZES.items()
            if size or how
        ),
        *(
            (f"pictures are {how or 'resized'} {where}", resized(Way(bucket, filter=mode, inset=inset)))
            for how, mode in FILTERS.items()
            for where, inset in INSETS.items()
        ),
        *((f"pictures are {how}", resized(Way(bucket, filter=mode))) for how, mode in MORE_FILTERS.items()),
        ("the resolutions of VAE and ViT are exchanged", resized(Way(bucket), swapped=True)),
    )
]
