"""Sizes of what upstream's preprocessing makes of an image or video; no pixel is touched."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from reference.checks import require_file
from reference.errors import ReferenceError
from reference.layout import VisualSize
from reference.request import Element, Medium, Request

# Widths to heights of the buckets, their sides multiples of STRIDE for both towers.
ASPECT_RATIOS = ((21, 9), (16, 9), (4, 3), (1, 1), (3, 4), (9, 16))
STRIDE = 16
# Multiples that the sides are cut down to, and the ViT's patches.
VAE_UNIT, VIT_UNIT = 16, 28
PATCH, TEMPORAL_PATCH = 14, 2
# Sides of the squares that have the buckets' areas, for the VAE and the ViT (validation_dataset.py:__init__).
RESOLUTIONS = {
    "image_256res": (256, 224),
    "video_192p": (256, 224),
    "image_512res": (512, 448),
    "image_768res": (768, 672),
    "video_360p": (480, 476),
    "video_480p": (640, 616),
}
SAMPLE_FPS = 12
MAX_SECONDS = 6.0
FRAMES_PER_LATENT = 4


@dataclass(frozen=True)
class MediaSize:
    """Width and height in pixels, frames and their rate in whole frames a second of a file."""

    width: int
    height: int
    frames: int = 1
    fps: int = 1


def visual_sizes(request: Request, media: Path) -> list[VisualSize]:
    """Sizes of a request's visuals after preprocessing; paths start from `media`. Raises ReferenceError."""
    vae, vit = resolutions(request)
    return [visual_size(request, element, media, vae, vit) for element in request.visuals]


def resolutions(request: Request) -> tuple[int | None, int | None]:
    """Sides of the squares that have the buckets' areas for VAE and ViT; raises ReferenceError where one is missing."""
    vae, vit = RESOLUTIONS.get(request.resolution, (None, None))
    vae, vit = request.vae_resolution or vae, request.vit_resolution or vit
    missing = vit is None and request.task != "i2v" or vae is None and not request.understanding
    if request.visuals and missing:
        raise ReferenceError(f"request: resolution {request.resolution!r} is not one of {', '.join(RESOLUTIONS)}")
    return vae, vit


def visual_size(request: Request, element: Element, media: Path, vae: int | None, vit: int | None) -> VisualSize:
    """Size of one visual after preprocessing (validation_dataset.py:get_video_tensor_online)."""
    file = read_size(media / element.content, element.medium)
    frames = sampled_frames(file) if element.medium is Medium.VIDEO else 1
    pixels = None if request.understanding else (frames, *resized(file, vae, VAE_UNIT))
    if request.task == "i2v":
        return VisualSize(pixels)
    height, width = resized(file, vit, VIT_UNIT)
    # An image is shown twice, a video of an odd number of frames shows its last one twice.
    return VisualSize(pixels, (math.ceil(frames / TEMPORAL_PATCH), height // PATCH, width // PATCH))


def read_size(path: Path, medium: Medium) -> MediaSize:
    """Size of a file as stored; raises ReferenceError when it cannot be read."""
    with reading(path, medium):
        if medium is Medium.IMAGE:
            with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
                return MediaSize(*image.size)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate
            frames = sum(1 for _ in container.decode(stream))
            # Less than half a frame a second would be none.
            return MediaSize(stream.width, stream.height, frames, max(round(float(rate)), 1) if rate else 24)


@contextmanager
def reading(path: Path, medium: Medium) -> Iterator[None]:
    """Raise ReferenceError in one line for whatever is wrong with a file."""
    try:
        require_file(path)
        yield
    except ReferenceError:
        raise
    except FileNotFoundError:
        raise ReferenceError(f"{path}: not found") from None
    except Exception as error:  # Pillow passes on whatever its parsers stumble over
        reason = " ".join((str(error) or type(error).__name__).split())
        raise ReferenceError(f"{path}: not readable as {medium.value} ({reason})") from None


def sampled_frames(file: MediaSize) -> int:
    """Frames taken from a video: 12 a second of at most six seconds, 4k + 1 (data/video/sampler/frames.py).

    A number that is a multiple of four loses three and not none.
    """
    wanted = round(min(file.frames / file.fps, MAX_SECONDS) * SAMPLE_FPS)
    latents = wanted // FRAMES_PER_LATENT - (wanted % FRAMES_PER_LATENT == 0)
    if latents < 0:
        raise ReferenceError(f"a video of {file.frames} frames at {file.fps} a second is too short to sample")
    return latents * FRAMES_PER_LATENT + 1


def resized(file: MediaSize, side: int, unit: int) -> tuple[int, int]:
    """Height and width in the bucket of the nearest aspect ratio, cut down to multiples of `unit`.

    (data/video/transforms/bucket_resize.py, divisible_crop.py)
    """
    height, width = nearest_bucket(file, side)
    return height // unit * unit, width // unit * unit


def nearest_bucket(file: MediaSize, side: int) -> tuple[int, int]:
    """Height and width of the bucket whose aspect ratio is nearest, the first of equally near ones."""
    buckets = [bucket(width / height, side) for width, height in ASPECT_RATIOS]
    distances = [abs(file.width / file.height - width / height) for height, width in buckets]
    return buckets[int(np.argmin(distances))]


def bucket(ratio: float, side: int) -> tuple[int, int]:
    """Height and width in multiples of 16 of about `side`**2 pixels, as near to a ratio of width to height as can be.

    Either the width is rounded first and the height follows, or the other way round; the nearer ratio wins, then the
    nearer area, then the first.
    """

    def rounded(length: float) -> int:
        return round(length / STRIDE) * STRIDE

    width = rounded(math.sqrt(side**2 * ratio))
    height = rounded(math.sqrt(side**2 / ratio))
    choices = [(rounded(width / ratio), width), (height, rounded(height * ratio))]
    if any(0 in choice for choice in choices):
        raise ReferenceError(f"resolution {side} is too small for a bucket of ratio {ratio:.2f}")
    return min(choices, key=lambda choice: (abs(choice[1] / choice[0] - ratio), abs(math.prod(choice) - side**2)))
