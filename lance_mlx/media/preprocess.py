"""Frames to model input: aspect buckets, bicubic resize, crops, normalisation, ViT patches."""

import math

import numpy as np
from PIL import Image

from lance_mlx.config import SPATIAL_STRIDE
from lance_mlx.errors import LanceError

RESOLUTIONS = {
    "image_256res": (256, 224),
    "image_512res": (512, 448),
    "image_768res": (768, 672),
    "video_192p": (256, 224),
    "video_360p": (480, 476),
    "video_480p": (640, 616),
}
"""Upstream's names for pairs of resolutions, of the VAE and of the ViT: roots of areas in pixels."""

PATCH_SIZE = 14
TEMPORAL_PATCH_SIZE = 2
MERGE_SIZE = 2
VIT_DIVISOR = PATCH_SIZE * MERGE_SIZE
"""Pixels per ViT token, along height and along width."""

_BUCKET_STRIDE = 16
_ASPECT_RATIOS = ((21, 9), (16, 9), (4, 3), (1, 1), (3, 4), (9, 16))
_VAE_MEAN, _VAE_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_VIT_MEAN = (0.48145466, 0.4578275, 0.40821073)
_VIT_STD = (0.26862954, 0.26130258, 0.27577711)


def bucket_size(height: int, width: int, resolution: int, divisor: int) -> tuple[int, int]:
    """Height and width in pixels that a `height` x `width` picture gets at `resolution`, multiples of `divisor`.

    The picture goes to the bucket of nearest aspect ratio, around `resolution`^2 pixels in multiples of 16, which is
    then cut down to multiples of `divisor` (VAE 16, ViT 28).

    Raises LanceError for a resolution so small that nothing is left. Source: `bytedance/Lance
    data/video/transforms/bucket_resize.py:BucketResize`, `divisible_crop.py:DivisibleCrop`.
    """
    rows, columns = _nearest_bucket(height, width, resolution)
    size = rows - rows % divisor, columns - columns % divisor
    if 0 in size:
        raise LanceError(f"resolution {resolution} leaves no multiple of {divisor} pixels: choose a larger one")
    return size


def vae_pixels(frames: np.ndarray, resolution: int) -> np.ndarray:
    """Input of the VAE's encoder, float32 [T, H, W, 3] in [-1, 1], of `frames`, uint8 [T, h, w, 3].

    Source: `bytedance/Lance data/transforms.py:VideoTransform`.
    """
    return _transform(frames, resolution, SPATIAL_STRIDE, _VAE_MEAN, _VAE_STD)


def vit_patches(frames: np.ndarray, resolution: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Input of the ViT, float32 [n, 1176], and its grid (t, h, w) in patches, of `frames`, uint8 [T, h, w, 3].

    An odd number of frames gets its last one repeated; an image is such a case.
    Source: `bytedance/Lance data/datasets_custom/validation_dataset.py:get_video_tensor_online`.
    """
    pixels = _transform(frames, resolution, VIT_DIVISOR, _VIT_MEAN, _VIT_STD)
    if len(pixels) % TEMPORAL_PATCH_SIZE:
        pixels = np.concatenate([pixels, pixels[-1:]])
    return patchify(pixels)


def patchify(pixels: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut [T, H, W, 3], T even, H and W multiples of 28, into patches [n, 1176] and their grid (t, h, w).

    The four patches that merge into one token follow each other; inside a patch the order is channel, frame, row,
    column. Source: `bytedance/Lance data/data_utils.py:patchify_video_with_merge`.
    """
    num_frames, height, width, channels = pixels.shape
    tp, p, m = TEMPORAL_PATCH_SIZE, PATCH_SIZE, MERGE_SIZE
    t, h, w = num_frames // tp, height // p, width // p
    blocks = pixels.reshape(t, tp, h // m, m, p, w // m, m, p, channels)
    return blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1), (t, h, w)


def _transform(
    frames: np.ndarray,
    resolution: int,
    divisor: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> np.ndarray:
    """Crop to the bucket's aspect, resize, crop to the divisor and normalise, one frame at a time."""
    num_frames, height, width, _ = frames.shape
    rows, columns = _nearest_bucket(height, width, resolution)
    top, left, box_height, box_width = crop_box(height, width, columns / rows)
    kept_rows, kept_columns = bucket_size(height, width, resolution, divisor)
    row, column = round((rows - kept_rows) / 2), round((columns - kept_columns) / 2)
    pixels = np.empty((num_frames, kept_rows, kept_columns, 3), np.float32)
    for frame, out in zip(frames, pixels, strict=True):
        # Cropped first: with resize's own box the filter would reach over the crop's edge.
        image = Image.fromarray(frame[top : top + box_height, left : left + box_width])
        image = image.resize((columns, rows), Image.Resampling.BICUBIC)
        out[:] = np.asarray(image)[row : row + kept_rows, column : column + kept_columns]
    # The order of PyTorch's operations, for the same float32 bit for bit.
    pixels /= np.float32(255)
    pixels -= np.array(mean, np.float32)
    pixels /= np.array(std, np.float32)
    return pixels


def crop_box(height: int, width: int, aspect: float) -> tuple[int, int, int, int]:
    """Top, left, height and width of the part of a picture that has width / height near `aspect`.

    Source: torchvision's RandomResizedCrop at scale 1 and one ratio. It draws the offset where the box of equal area
    fits by rounding, over one pixel at most; here the centre is taken.
    """
    box_height = round(math.sqrt(height * width / aspect))
    box_width = round(math.sqrt(height * width * aspect))
    if box_height > height or box_width > width:
        if width / height < aspect:
            box_height, box_width = round(width / aspect), width
        elif width / height > aspect:
            box_height, box_width = height, round(height * aspect)
        else:
            box_height, box_width = height, width
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _nearest_bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    if resolution < _BUCKET_STRIDE:
        raise LanceError(f"resolution {resolution} must be at least {_BUCKET_STRIDE}")
    buckets = [_bucket(*ratio, resolution) for ratio in _ASPECT_RATIOS]
    return min(buckets, key=lambda size: abs(width / height - size[1] / size[0]))


def _bucket(ratio_width: int, ratio_height: int, resolution: int) -> tuple[int, int]:
    """Height and width of one bucket: rounded from its width or from its height, whichever keeps the aspect better."""
    aspect, area = ratio_width / ratio_height, resolution**2
    width = _to_stride(math.sqrt(area * aspect))
    from_width = _to_stride(width / aspect), width
    height = _to_stride(math.sqrt(area / aspect))
    from_height = height, _to_stride(height * aspect)
    return min(
        (from_width, from_height),
        key=lambda size: (abs(size[1] / size[0] - aspect), abs(size[0] * size[1] - area)),
    )


def _to_stride(length: float) -> int:
    return max(round(length / _BUCKET_STRIDE), 1) * _BUCKET_STRIDE
