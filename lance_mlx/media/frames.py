"""Frames of a file, and the sizes that no picture or video may have."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lance_mlx.errors import LanceError

# Upstream would blow smaller pictures up and keep a sliver of narrower ones, which nobody means.
MIN_SIDE = 16
MAX_ASPECT = 16


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of one file and where in the file they were.

    Attributes:
        pixels: uint8 [t, H, W, 3], RGB; t is 1 for an image and 4k + 1 for a video.
        path: the file.
        kind: how it was read.
        indices: the t frame numbers in display order; numbers repeat in a video of fewer than 12 frames a second.
        num_source_frames: frames in the file.
        source_fps: average frames per second of the file, rounded to an integer; 0 for an image.
    """

    pixels: np.ndarray
    path: Path
    kind: Literal["image", "video"]
    indices: tuple[int, ...]
    num_source_frames: int
    source_fps: int


def check_size(kind: str, path: Path, height: int, width: int) -> None:
    """Raise LanceError for a picture or a video of that many pixels, naming it."""
    short, long = sorted((height, width))
    if short < MIN_SIDE:
        raise LanceError(f"{kind} {path} is {width}x{height} pixels: each side must have at least {MIN_SIDE}")
    if long > MAX_ASPECT * short:
        raise LanceError(
            f"{kind} {path} is {width}x{height} pixels, one side more than {MAX_ASPECT} times the other: crop it"
        )
