"""Hypotheses about the pixels and patches that the encoders are given: value ranges, colours, layout."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from parity.hypotheses.base import Hypothesis
from reference.layout import MERGE

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

PREPROCESS = ("preprocess",)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
BYTES = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
FRAMES, SIDE = 2, 14
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def of_kind(kind: str, name: str, change: Callable[["TapProbe", np.ndarray], np.ndarray | None]) -> Hypothesis:
    """A hypothesis about "vae_pixels" [3, frames, h, w] or "vit_patches" [n, 1176]."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        if not site.tap.name.startswith(f"inputs/{kind}"):
            return None
        new = change(site, array)
        return None if new is None else np.ascontiguousarray(new, np.float32)

    return Hypothesis(name, PREPROCESS, transform=transform)


def split(patches: np.ndarray) -> np.ndarray:
    """[n, 1176] as [n, colour, frame, row, column]."""
    return patches.reshape(len(patches), 3, FRAMES, SIDE, SIDE)


def normalised(x: np.ndarray, axis: int, now: Statistics, other: Statistics) -> np.ndarray:
    """Colours along an axis, normalised by other means and deviations."""
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    mean, deviation, other_mean, other_deviation = (np.reshape(v, shape) for v in (*now, *other))
    return (x * deviation + mean - other_mean) / other_deviation


def vae(name: str, other: Statistics) -> Hypothesis:
    return of_kind("vae_pixels", name, lambda site, x: normalised(x, 0, HALVES, other))


def vit(name: str, other: Statistics) -> Hypothesis:
    return of_kind("vit_patches", name, lambda site, x: normalised(split(x), 1, CLIP, other).reshape(x.shape))


def values(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Hypothesis:
    """A hypothesis about the order of the values of a patch [n, colour, frame, row, column]."""
    return of_kind("vit_patches", name, lambda site, x: change(split(x)).reshape(x.shape))


def line_by_line(site: "TapProbe", patches: np.ndarray) -> np.ndarray | None:
    """Patches in reading order instead of token by token."""
    number = site.tap.numbers.get("index", 0)
    splits = site.layout.vit_splits
    if number >= len(splits):
        return None
    grid = splits[number].grid
    if grid.size * MERGE**2 != len(patches):
        return None
    whole = patches.reshape(grid.frames, grid.rows, grid.columns, MERGE, MERGE, -1)
    return whole.swapaxes(2, 3).reshape(patches.shape)


HYPOTHESES = [
    vae("the VAE's pixels are in [0, 1]", NONE),
    vae("the VAE's pixels are in [0, 255]", BYTES),
    vae("the VAE's pixels have CLIP's mean and deviation", CLIP),
    of_kind("vae_pixels", "red and blue of the VAE's pixels are exchanged", lambda site, x: x[::-1]),
    of_kind("vae_pixels", "the VAE's frames are mirrored", lambda site, x: x[..., ::-1]),
    of_kind("vae_pixels", "the VAE's frames are upside down", lambda site, x: x[:, :, ::-1]),
    of_kind("vae_pixels", "the VAE's frames are in reverse", lambda site, x: x[:, ::-1]),
    vit("the ViT's pixels are normalised to [-1, 1]", HALVES),
    vit("the ViT's pixels are in [0, 1]", NONE),
    vit("the ViT's pixels are in [0, 255]", BYTES),
    vit("the ViT's pixels have ImageNet's mean and deviation", IMAGENET),
    values("red and blue of the ViT's pixels are exchanged", lambda x: x[:, ::-1]),
    values("the frames of a patch are exchanged", lambda x: x[:, :, ::-1]),
    values("the values of a patch are put channels last", lambda x: x.transpose(0, 2, 3, 4, 1)),
    values("the values of a patch are put frame, channel", lambda x: x.swapaxes(1, 2)),
    values("the values of a patch are put row, column, channel, frame", lambda x: x.transpose(0, 3, 4, 1, 2)),
    of_kind("vit_patches", "patches are in reading order instead of token by token", line_by_line),
]
