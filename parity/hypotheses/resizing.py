"""Hypotheses about how pictures become the pixels and patches that the encoders are given: size, crop and filter.

Each resizes the request's own files again; where they are not at hand, none applies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lance_mlx.config import SPATIAL_STRIDE
from lance_mlx.errors import LanceError
from lance_mlx.media_in import read_visual
from lance_mlx.preprocess import TEMPORAL_PATCH_SIZE, VIT_DIVISOR, bucket_size, crop_box, patchify
from lance_mlx.request import VisualKind
from parity.hypotheses.base import Hypothesis
from parity.hypotheses.preprocess import CLIP, HALVES, PREPROCESS

if TYPE_CHECKING:
    from parity.site import Site

Box = tuple[int, int, int, int]
"""Top, left, height and width."""


@dataclass(frozen=True)
class Way:
    """A way to resize: `size` of (height, width, resolution) is (rows, columns), `box` of (height, width, aspect) is
    what is kept of the picture before."""

    size: Callable[[int, int, int], tuple[int, int]]
    box: Callable[[int, int, float], Box] = crop_box
    filter: Image.Resampling = Image.Resampling.BICUBIC


def bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Upstream's size."""
    return bucket_size(height, width, resolution, SPATIAL_STRIDE)


def square(height: int, width: int, resolution: int) -> tuple[int, int]:
    """The resolution itself, whatever the picture's aspect."""
    side = max(round(resolution / SPATIAL_STRIDE), 1) * SPATIAL_STRIDE
    return side, side


def all_of_it(height: int, width: int, aspect: float) -> Box:
    """All of the picture, which is stretched then."""
    return 0, 0, height, width


def at_the_corner(height: int, width: int, aspect: float) -> Box:
    """Upstream's part of the picture, from its top left corner."""
    return 0, 0, *crop_box(height, width, aspect)[2:]


def resized(way: Way, swapped: bool = False) -> Callable[["Site", np.ndarray], np.ndarray | None]:
    """Resize a visual of the request in a way, for the encoder that the site is about; `swapped` takes the resolution
    of the other encoder."""

    def again(site: "Site", array: np.ndarray) -> np.ndarray | None:
        from parity.replay_mlx import request_from_bundle

        bundle, index = site.oracle.bundle, site.tap.numbers.get("index", 0)
        asked = request_from_bundle(bundle.request, bundle.entry, bundle.path.parent)
        if index >= len(asked.visuals) or not Path(asked.visuals[index].path).is_file():
            return None
        visual, for_vit = asked.visuals[index], site.tap.name.startswith("inputs/vit_patches")
        resolutions = asked.vit_resolution, getattr(asked, "vae_resolution", None)
        resolution = resolutions[for_vit if swapped else not for_vit]
        try:
            return None if resolution is None else _made(str(visual.path), visual.kind, way, resolution, for_vit)
        except LanceError:
            # A resolution that leaves nothing.
            return None

    return again


@lru_cache(maxsize=8)
def _made(path: str, kind: VisualKind, way: Way, resolution: int, for_vit: bool) -> np.ndarray | None:
    """What an encoder is given of a file, in the form of a bundle's inputs; kept, since combinations are tried."""
    frames = read_visual(Path(path), kind).pixels
    pixels = _resize(frames, way, resolution, VIT_DIVISOR if for_vit else SPATIAL_STRIDE)
    if not pixels.size:
        return None
    mean, deviation = (np.float32(values) for values in (CLIP if for_vit else HALVES))
    pixels = (pixels / np.float32(255) - mean) / deviation
    if not for_vit:
        return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2))
    if len(pixels) % TEMPORAL_PATCH_SIZE:
        pixels = np.concatenate([pixels, pixels[-1:]])
    return patchify(pixels)[0]


def _resize(frames: np.ndarray, way: Way, resolution: int, divisor: int) -> np.ndarray:
    """Cut, resize, and cut to multiples of a divisor; float32 [T, H, W, 3] in [0, 255]."""
    height, width = frames.shape[1:3]
    rows, columns = way.size(height, width, resolution)
    top, left, box_height, box_width = way.box(height, width, columns / rows)
    kept = rows - rows % divisor, columns - columns % divisor
    row, column = (round((whole - part) / 2) for whole, part in zip((rows, columns), kept, strict=True))
    images = (Image.fromarray(frame[top : top + box_height, left : left + box_width]) for frame in frames)
    done = [np.asarray(image.resize((columns, rows), way.filter), np.float32) for image in images]
    return np.stack(done)[:, row : row + kept[0], column : column + kept[1]]


HYPOTHESES = [
    Hypothesis(name, PREPROCESS, transform=transform, anew=True)
    for name, transform in (
        ("pictures are stretched to a square", resized(Way(square, all_of_it))),
        ("pictures are cut to a square", resized(Way(square))),
        ("pictures are stretched to their bucket", resized(Way(bucket, all_of_it))),
        ("pictures are cut from their top left corner", resized(Way(bucket, at_the_corner))),
        ("pictures are resized bilinearly", resized(Way(bucket, filter=Image.Resampling.BILINEAR))),
        ("pictures are resized by the Lanczos filter", resized(Way(bucket, filter=Image.Resampling.LANCZOS))),
        ("pictures are resized to their nearest pixels", resized(Way(bucket, filter=Image.Resampling.NEAREST))),
        ("the resolutions of VAE and ViT are exchanged", resized(Way(bucket), swapped=True)),
    )
]
