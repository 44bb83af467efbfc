"""Hypotheses about what surrounds the VAE's coders: packing, statistics of latents, sampling, pixels and frames."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import reference.vae
from parity.hypotheses.base import Hypothesis, Patch
from parity.lance.hypotheses.tools import around, function, on_input
from reference.vae import DEVIATION, MEAN, Posterior
from reference.vae_layers import PATCH, unpack

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

PACKED = ("vae.encoder.conv1", "vae.pixels")
ENCODER = ("vae.encoder.conv1",)
PIXELS = ("vae.pixels",)
CONV2 = ("vae.conv2",)
MEANS = ("vae.encoder.mean",)
LOGVAR = ("vae.encoder.logvar",)
SAMPLE = ("vae.encoder.sample",)
FRAMES = ("frames",)


def packed(order: tuple[int, int, int], flip: bool = False) -> Patch:
    """Packed channels in another order of their axes (0 colour, 1 column, 2 row), colours reversed or not."""

    def put(x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, PATCH, PATCH))
        x = x.flip(1) if flip else x
        return x.permute(0, *(1 + axis for axis in order), 4, 5, 6).flatten(1, 3)

    def read(x: Tensor) -> Tensor:
        sides = (3, PATCH, PATCH)
        x = x.unflatten(1, tuple(sides[axis] for axis in order))
        x = x.permute(0, *(1 + order.index(axis) for axis in range(3)), 4, 5, 6)
        return (x.flip(1) if flip else x).flatten(1, 3)

    def patched(site: "TapProbe"):
        if site.component == "vae.pixels":
            return around(reference.vae, "unpack", lambda original, x: original(read(x)))
        return on_input(lambda site, x: put(x))(site)

    return patched


def pixels(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Hypothesis:
    """A hypothesis about decoded pixels float32 [3, frames, h, w] before they are clipped."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        chunks = [site.value(f"vae.decode.chunk{index}/decoder") for index in range(site.layout.target.grid.frames)]
        if any(chunk is None for chunk in chunks):
            return None
        whole = torch.cat([unpack(torch.from_numpy(chunk))[0] for chunk in chunks], 1).numpy()
        return change(whole) if whole.shape == array.shape else None

    return Hypothesis(name, PIXELS, transform=transform)


Statistics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Another mean and reciprocal deviation [48], of upstream's."""


def scaled(change: Statistics) -> Patch:
    """The statistics of latents changed: latents are decoded as x / reciprocal + mean, encoded as the inverse."""

    def patched(site: "TapProbe"):
        return around(site.pipeline.vae, "scale", lambda original, device: change(*original(device)))

    return patched


@contextmanager
def exact(site: "TapProbe") -> Iterator[None]:
    """Statistics in float32; what conv2 is given is rounded once."""
    statistics = torch.tensor(MEAN), 1 / torch.tensor(DEVIATION)
    vae = site.pipeline.vae
    dtype = vae.numerics.torch_dtype

    def convolved(original: Callable, x: Tensor, *rest: object) -> Tensor:
        return original(x.to(dtype), *rest)

    with around(vae, "scale", lambda original, device: statistics), around(vae.conv2, "forward", convolved):
        yield


def statistics_of(site: "TapProbe") -> tuple[np.ndarray, np.ndarray]:
    """Mean and reciprocal deviation, float32 [48, 1, 1, 1]."""
    return tuple(x.float().view(-1, 1, 1, 1).numpy() for x in site.pipeline.vae.scale(torch.device("cpu")))


def moments(change: Callable[["TapProbe", np.ndarray, np.ndarray], np.ndarray]):
    """A change of a mean or log-variance [1, 48, t, h, w], given it without normalisation and the other one so too."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        call = site.tap.name.rpartition(".")[0]
        mean, logvar = site.value(f"{call}.mean"), site.value(f"{call}.logvar")
        if mean is None or logvar is None:
            return None
        shift, reciprocal = statistics_of(site)
        raw = mean / reciprocal + shift
        own, other = (raw, logvar) if site.tap.name.endswith(".mean") else (logvar, raw)
        return change(site, own, other).astype(np.float32)

    return transform


def normalised(site: "TapProbe", x: np.ndarray) -> np.ndarray:
    shift, reciprocal = statistics_of(site)
    return (x - shift) * reciprocal


def scaled_first(site: "TapProbe", own: np.ndarray, other: np.ndarray) -> np.ndarray:
    shift, reciprocal = statistics_of(site)
    return own * reciprocal - shift


def sampled(draw: Callable[["TapProbe", Posterior, Tensor], Tensor]) -> Patch:
    """A sample [1, 48, t, h, w] drawn in another way."""

    def sample(site: "TapProbe", original: Callable, posterior: Posterior, eps: Tensor) -> Tensor:
        return draw(site, posterior, eps)[0].movedim(0, -1)

    return function(Posterior, "sample", sample)


def normalised_afterwards(site: "TapProbe", p: Posterior, eps: Tensor) -> Tensor:
    """The deviation is normalised as well."""
    reciprocal = torch.from_numpy(statistics_of(site)[1])
    return p.mean + eps * torch.exp(0.5 * p.logvar) * reciprocal


def framed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Hypothesis:
    """A hypothesis about 8-bit frames, of the pixels [3, frames, h, w] in [-1, 1]."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        decoded = site.value("pixels")
        if decoded is None or decoded.shape != array.shape:
            return None
        return np.clip(change(decoded), 0, 255).astype(np.int32).astype(array.dtype)

    return Hypothesis(name, FRAMES, transform=transform)


HYPOTHESES = [
    Hypothesis("packed channels are (row, column, colour)", PACKED, packed((2, 1, 0))),
    Hypothesis("packed channels are (column, row, colour)", PACKED, packed((1, 2, 0))),
    Hypothesis("rows and columns of packed pixels are exchanged", PACKED, packed((0, 2, 1))),
    Hypothesis("red and blue of packed pixels are exchanged", PACKED, packed((0, 1, 2), flip=True)),
    Hypothesis("the encoder's pixels are in [0, 1]", ENCODER, on_input(lambda site, x: x / 2 + 0.5)),
    Hypothesis("the encoder's pixels are in [0, 255]", ENCODER, on_input(lambda site, x: (x + 1) * 127.5)),
    Hypothesis("the encoder's pixels are negated", ENCODER, on_input(lambda site, x: -x)),
    pixels("pixels are not clipped", lambda x: x),
    pixels("pixels are clipped to [0, 1]", lambda x: x.clip(0, 1)),
    pixels("pixels are in [0, 1]", lambda x: x.clip(-1, 1) / 2 + 0.5),
    Hypothesis("the latents are not un-normalised", CONV2, scaled(
        lambda mean, r: (torch.zeros_like(mean), torch.ones_like(r)))),
    Hypothesis("the mean is added before scaling", CONV2, scaled(lambda mean, r: (mean / r, r))),
    Hypothesis("the latents are divided by the deviation", CONV2, scaled(lambda mean, r: (mean, 1 / r))),
    Hypothesis("the latents are normalised instead of un-normalised", CONV2, scaled(
        lambda mean, r: (-mean * r, 1 / r))),
    Hypothesis("the mean is not added to the latents", CONV2, scaled(lambda mean, r: (torch.zeros_like(mean), r))),
    Hypothesis("the mean is subtracted from the latents", CONV2, scaled(lambda mean, r: (-mean, r))),
    Hypothesis("the latents are not scaled", CONV2, scaled(lambda mean, r: (mean, torch.ones_like(r)))),
    Hypothesis("the latents' statistics are reversed", CONV2, scaled(lambda mean, r: (mean.flip(0), r.flip(0)))),
    Hypothesis("the VAE's mean and deviation are not rounded", (*CONV2, *MEANS), exact),
    Hypothesis("the mean is not normalised", MEANS, transform=moments(lambda site, own, other: own)),
    Hypothesis("the mean is scaled before it is shifted", MEANS, transform=moments(scaled_first)),
    Hypothesis("the mean is multiplied by the deviation", MEANS, scaled(lambda mean, r: (mean, 1 / r))),
    Hypothesis("the mean is only shifted", MEANS, scaled(lambda mean, r: (mean, torch.ones_like(r)))),
    Hypothesis("the mean is only scaled", MEANS, scaled(lambda mean, r: (torch.zeros_like(mean), r))),
    Hypothesis("mean and log-variance are exchanged", (*MEANS, *LOGVAR), transform=moments(
        lambda site, own, other: normalised(site, other) if site.tap.name.endswith(".mean") else other)),
    Hypothesis("the log-variance is normalised too", LOGVAR, transform=moments(
        lambda site, own, other: normalised(site, own))),
    Hypothesis("the log-variance is clipped to [-20, 20]", LOGVAR, transform=lambda site, x: x.clip(-20, 20)),
    Hypothesis("the log-variance is a deviation", LOGVAR, transform=lambda site, x: np.exp(x / 2)),
    Hypothesis("the log-variance is a variance", LOGVAR, transform=lambda site, x: np.exp(x)),
    Hypothesis("the sample's deviation is normalised too", SAMPLE, sampled(normalised_afterwards)),
    Hypothesis("the sample is un-normalised", SAMPLE, transform=lambda site, x: (
        x / statistics_of(site)[1][:, 0, 0, 0] + statistics_of(site)[0][:, 0, 0, 0]).astype(np.float32)),
    framed("pixels are scaled by 256", lambda x: np.floor((x * 0.5 + 0.5) * 256)),
]  # fmt: skip
