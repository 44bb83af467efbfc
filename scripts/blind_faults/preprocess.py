"""Pictures and videos made ready otherwise for the ViT and for the VAE."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
from PIL import Image

from blind_faults.common import pair, plain, precision, small
from lance_mlx.media import preprocess
from parity.lance.faults.base import ENCODES, LOOKS, Patch, Target, function, replaced, together, wrapped

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SEEN = LOOKS | ENCODES


def _constants(**values: tuple) -> Patch:
    return together(
        *(lambda target, name=name, value=value: replaced(preprocess, name, value) for name, value in values.items())
    )


def _pixels(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """A patch of what leaves the resizing and normalisation, float32 [T, H, W, 3]."""

    def call(original: Callable, *args: object) -> np.ndarray:
        return change(original(*args)).astype(np.float32)

    return function(preprocess, "_transform", call)


def _resized(resize: Callable[..., Image.Image]) -> Patch:
    def patch(target: Target) -> AbstractContextManager[None]:
        return wrapped(Image.Image, "resize", resize)

    return patch


def _aligned(original: Callable, image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    width, height = image.size
    return original(image, size, resample, box=(0.5, 0.5, width - 0.5, height - 0.5))


def _hamming(original: Callable, image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    return original(image, size, Image.Resampling.HAMMING)


_corners_aligned = _resized(_aligned)


def _patches(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    """A patch of the patches [n, 3, frames, rows, columns] of the ViT."""

    def call(original: Callable, pixels: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        patches, grid = original(pixels)
        size = preprocess.PATCH_SIZE
        shaped = patches.reshape(len(patches), 3, preprocess.TEMPORAL_PATCH_SIZE, size, size)
        return np.ascontiguousarray(change(shaped)).reshape(patches.shape), grid

    return function(preprocess, "patchify", call)


def _second_frame_empty(patches: np.ndarray) -> np.ndarray:
    changed = patches.copy()
    changed[:, :, 1] = 0
    return changed


def _frames_before_channels(patches: np.ndarray) -> np.ndarray:
    return patches.swapaxes(1, 2)


FAULTS = [
    plain(
        "blind-preprocess-imagenet-statistics",
        "preprocess",
        _constants(_VIT_MEAN=_IMAGENET[0], _VIT_STD=_IMAGENET[1]),
        "Pictures for the ViT are normalised by ImageNet's mean and deviation, (0.485, 0.456, 0.406) and (0.229, "
        "0.224, 0.225), instead of by CLIP's.",
        tasks=LOOKS,
    ),
    plain(
        "blind-preprocess-hamming",
        "preprocess",
        _resized(_hamming),
        "Pictures are resized with Pillow's Hamming filter instead of with bicubic interpolation.",
        tasks=_SEEN,
    ),
    plain(
        "blind-preprocess-corners-aligned",
        "preprocess",
        _corners_aligned,
        "Resizing aligns corners: the centres of the first and of the last pixel stay where they are, so that half a "
        "pixel is lost at every edge.",
        tasks=_SEEN,
    ),
    plain(
        "blind-preprocess-divided-by-256",
        "preprocess",
        _pixels(lambda pixels: (pixels + 1) * 255 / 256 - 1),
        "Normalised pixels are 255 / 256 of the way from -1 that they should be: the bytes were divided by 256.",
        tasks=ENCODES,
    ),
    plain(
        "blind-preprocess-frames-before-channels",
        "preprocess",
        _patches(_frames_before_channels),
        "Inside a ViT patch the values are ordered frame, channel, row, column instead of channel, frame, row, column.",
        tasks=LOOKS,
    ),
    plain(
        "blind-preprocess-second-frame-empty",
        "preprocess",
        _patches(_second_frame_empty),
        "The second frame of every ViT patch is zeros, as if a picture were padded in time instead of repeated.",
        tasks=LOOKS,
    ),
    small(
        "blind-preprocess-blue-has-greens-deviation",
        "preprocess",
        _constants(_VIT_STD=(0.26862954, 0.26130258, 0.26130258)),
        "The ViT's deviation of blue is that of green, 0.26130258 instead of 0.27577711.",
        tasks=LOOKS,
    ),
    precision(
        "blind-preprocess-vit-deviation-rounded",
        "preprocess",
        _constants(_VIT_STD=(0.269, 0.261, 0.276)),
        "The ViT's deviations are written with three digits, 0.269, 0.261 and 0.276.",
        tasks=LOOKS,
    ),
    pair(
        "blind-pair-preprocess-corners-and-imagenet",
        "preprocess",
        together(
            _corners_aligned,
            _constants(_VIT_MEAN=_IMAGENET[0], _VIT_STD=_IMAGENET[1]),
        ),
        "Two faults of preprocessing at once: resizing aligns the corners, and the ViT's pictures are "
        "normalised by ImageNet's statistics.",
        tasks=LOOKS,
    ),
]
