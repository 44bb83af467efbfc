"""What upstream's preprocessing makes of images and videos: pixels for the VAE, patches for the ViT."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from PIL import Image
from torch import Tensor

from reference.errors import ReferenceError
from reference.layout import VisualSize
from reference.media import (
    PATCH,
    TEMPORAL_PATCH,
    VAE_UNIT,
    VIT_UNIT,
    MediaSize,
    nearest_bucket,
    read_size,
    reading,
    resolutions,
    sampled_frames,
)
from reference.request import Element, Medium, Request

Box = tuple[int, int, int, int]
"""Left, top, right and bottom."""
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and deviation of red, green and blue, all pixels being in [0, 1]."""
VAE_STATISTICS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
VIT_STATISTICS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class Preprocessed:
    """One image or video as the encoders are given it; what the task has no use for is None.

    Attributes:
        vae_pixels: float32 [3, frames, height, width] in [-1, 1].
        vit_patches: float32 [t * h * w, 1176].
        vit_grid: (t, h, w) in patches.
    """

    vae_pixels: np.ndarray | None = None
    vit_patches: np.ndarray | None = None
    vit_grid: tuple[int, int, int] | None = None

    @property
    def size(self) -> VisualSize:
        """What a layout has to know of it."""
        return VisualSize(None if self.vae_pixels is None else self.vae_pixels.shape[1:], self.vit_grid)


def preprocess(request: Request, media: Path) -> list[Preprocessed]:
    """Read and resize the visuals of a request; their paths start from `media`. Raises ReferenceError.

    Source: `bytedance/Lance data/datasets_custom/validation_dataset.py:get_video_tensor_online`.
    """
    vae, vit = resolutions(request)
    return [_preprocessed(request, element, media / element.content, vae, vit) for element in request.visuals]


def _preprocessed(request: Request, element: Element, path: Path, vae: int | None, vit: int | None) -> Preprocessed:
    seen, encoded = [], []
    for image in frames(path, element.medium):
        if not request.understanding:
            encoded.append(fitted(image, vae, VAE_UNIT))
        if request.task != "i2v":
            seen.append(fitted(image, vit, VIT_UNIT))
    pixels = vae_pixels(np.stack(encoded)) if encoded else None
    return Preprocessed(pixels, *(vit_patches(np.stack(seen)) if seen else (None, None)))


def frames(path: Path, medium: Medium) -> Iterator[Image.Image]:
    """Yield an image, or the sampled frames of a video, in 8-bit RGB; raises ReferenceError.

    Images are taken as they are stored, and those with a palette or opacity put on white (bytedance/Lance
    data/datasets_custom/validation_dataset.py:get_video_tensor_online). Frames of a video are turned by its display
    matrix, as decord turns them for upstream.
    """
    with reading(path, medium):
        yield from (_image if medium is Medium.IMAGE else _video)(path)


def _image(path: Path) -> Iterator[Image.Image]:
    # Pillow warns of the sizes of ordinary photos, and of metadata that nothing is asked of.
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
        yield _rgb(image, path)


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "F":
        raise ReferenceError(f"{path}: holds floating-point values, whose white is not known")
    if image.mode not in ("P", "RGBA"):
        return image.convert("RGB")
    rgba = np.asarray(image.convert("RGBA")).astype(np.int64)
    colour, opacity = rgba[..., :3], rgba[..., 3:]
    # To the nearest integer, as Pillow pastes.
    blended = (colour * opacity + 255 * (255 - opacity) + 127) // 255
    return Image.fromarray(blended.astype(np.uint8))


def _video(path: Path) -> Iterator[Image.Image]:
    file = read_size(path, Medium.VIDEO)
    # Spread over the whole video by number; those of a slow one are shown more than once.
    shown = Counter(np.linspace(0, file.frames - 1, sampled_frames(file), dtype=int).tolist())
    size = None
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            # A stream may change its size on the way.
            size = size or (frame.width, frame.height)
            if number in shown:
                pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
                image = Image.fromarray(np.ascontiguousarray(_displayed(pixels, frame)))
                for _ in range(shown[number]):
                    yield image


def _displayed(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turn and mirror a frame [H, W, 3] by its display matrix."""
    try:
        stored = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError as unnamed:
        # PyAV reads no side data where one is of a type without a name there, as EXIF: FFmpeg drops it by its number.
        number = re.match(r"\d+", str(unnamed))
        if number is None:
            raise
        return _displayed(pixels, _without_side_data(frame, number[0]))
    if stored is None:
        return pixels
    # Column and row of where a pixel is shown are (column, row) @ matrix.
    matrix = np.frombuffer(bytes(stored), np.int32).reshape(3, 3)[:2, :2].astype(np.int64)
    if abs(matrix[0, 1]) > abs(matrix[0, 0]):
        pixels, matrix = pixels.transpose(1, 0, 2), matrix[::-1]
    across, down = np.diag(matrix)
    return np.flip(pixels, [axis for axis, direction in enumerate((down, across)) if direction < 0])


def _without_side_data(frame: av.VideoFrame, number: str) -> av.VideoFrame:
    chain = av.filter.Graph()
    ends = (
        chain.add_buffer(template=frame),
        chain.add("sidedata", f"mode=delete:type={number}"),
        chain.add("buffersink"),
    )
    chain.link_nodes(*ends)
    chain.configure()
    chain.push(frame)
    return chain.pull()


def aspect_box(width: int, height: int, aspect: float) -> Box:
    """The middle of a picture that has about this width / height.

    torchvision's RandomResizedCrop at scale 1: a box of the whole picture's area, if it fits by its roundings, else
    the largest. Of the former upstream draws the place, which is one pixel's matter.
    """
    box = whole_area(width, height, aspect)
    if box[0] > width or box[1] > height:
        box = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - box[0]) // 2, (height - box[1]) // 2
    return left, top, left + box[0], top + box[1]


def whole_area(width: int, height: int, aspect: float) -> tuple[int, int]:
    """Width and height of a box of a picture's area and another width / height."""
    area = width * height
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def is_drawn(file: MediaSize, side: int) -> bool:
    """Whether upstream draws the place of what it cuts out of a picture: where there is more than one."""
    height, width = nearest_bucket(file, side)
    box = whole_area(file.width, file.height, width / height)
    return box[0] <= file.width and box[1] <= file.height and box != (file.width, file.height)


def fitted(image: Image.Image, side: int, unit: int) -> np.ndarray:
    """Cut and resize a picture to the bucket of its aspect, and cut that to multiples of `unit`: uint8 [H, W, 3].

    (bytedance/Lance data/video/transforms/bucket_resize.py:BucketResize, divisible_crop.py:DivisibleCrop)
    """
    height, width = nearest_bucket(MediaSize(*image.size), side)
    # Cut first, so that the filter does not reach over the edge.
    image = image.crop(aspect_box(*image.size, width / height))
    return cut(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)), unit)


def cut(pixels: np.ndarray, unit: int) -> np.ndarray:
    """The middle of [H, W, 3] whose sides are multiples of `unit`; raises ReferenceError where there is none."""
    kept = [side // unit * unit for side in pixels.shape[:2]]
    if 0 in kept:
        raise ReferenceError(f"{pixels.shape[1]}x{pixels.shape[0]} pixels leave no multiple of {unit}: ask for more")
    top, left = ((side - part) // 2 for side, part in zip(pixels.shape, kept, strict=False))
    return pixels[top : top + kept[0], left : left + kept[1]]


def vae_pixels(shown: np.ndarray) -> np.ndarray:
    """What the VAE is given of frames uint8 [T, H, W, 3]: float32 [3, T, H, W] in [-1, 1]."""
    return normalised(shown, VAE_STATISTICS).transpose(0, 1).contiguous().numpy()


def vit_patches(shown: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """What the ViT is given of frames uint8 [T, H, W, 3]: float32 [n, 1176], and the grid (t, h, w) of the n patches.

    The last of an odd number of frames is repeated; see patches.
    """
    pixels = normalised(shown, VIT_STATISTICS)
    return patches(torch.cat([pixels, pixels[-1:]]) if len(pixels) % TEMPORAL_PATCH else pixels)


def normalised(shown: np.ndarray, statistics: Statistics) -> Tensor:
    """Frames uint8 [T, H, W, 3] as float32 [T, 3, H, W], less the mean, in units of the deviation."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return torch.from_numpy(shown).movedim(-1, 1).float().div(255).sub(mean).div(deviation)


def patches(pixels: Tensor) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut float32 [T, 3, H, W], T even, into patches [n, 1176] of two frames, and return their grid (t, h, w).

    The four patches of a token follow each other; the values of a patch are in the order colour, frame, row, column.
    Source: `bytedance/Lance data/data_utils.py:patchify_video_with_merge`.
    """
    tokens = (
        pixels.unfold(0, TEMPORAL_PATCH, TEMPORAL_PATCH).unfold(2, VIT_UNIT, VIT_UNIT).unfold(3, VIT_UNIT, VIT_UNIT)
    )
    # Time, colour, row and column of tokens, frame, row and column of patches in a token, each with that of pixels.
    split = tokens.unflatten(6, (-1, PATCH)).unflatten(5, (-1, PATCH))
    values = split.permute(0, 2, 3, 5, 7, 1, 4, 6, 8).flatten(5).flatten(0, 4)
    grid = len(pixels) // TEMPORAL_PATCH, pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    return values.contiguous().numpy(), grid
