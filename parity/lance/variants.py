"""Equally right ways to compute what the reference computes, each in another order of rounding.

Attention by an explicit softmax, in float64, or a few keys at a time; products in float64, padded, by the
processor's own kernels, or disturbed by what another order of summing would do; another number of threads; every
float32 tap off by a unit in its last place; single rows times packed weights that bfloat16 does not round.
`exact_variant` is the one that rounds least.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import reference.sampler
from parity.bundle.reading import Bundle
from parity.lance.packed import packed_beside, unrounded
from parity.tensors.names import parse
from parity.tensors.recording import Recording, Tap
from reference.numerics import Numerics
from reference.sampler import norm

# Components whose last sum is that of a norm, whichever way the products before it are summed.
_NORMED = re.compile(r"norm|ln_q|guidance|residual\.[03]$|head\.0$")


@dataclass(frozen=True)
class Variant:
    """One equally right way to compute.

    Attributes:
        family: variants of one family round alike.
        numerics: the reference's.
        threads: PyTorch's.
        draw: which errors are drawn at the taps: of their last place, or where `sums` is set of the sums in norms.
        unrounded: whether a single row is multiplied with packed weights as they are, and not as bfloat16 rounds them.
    """

    name: str
    family: str
    numerics: Numerics
    threads: int = 1
    draw: int = 0
    sums: bool = False
    unrounded: bool = False


UNROUNDED = Variant("packed weights not rounded", "packed", Numerics("bfloat16"), unrounded=True)


def variants_for(bundle: Bundle) -> list[Variant]:
    """The equally right variants of a bundle's run, which goes on from its own values."""
    packed = packed_beside(bundle.checkpoint, bundle.variant)
    return variants_of(bundle.dtype, carried=True) + ([UNROUNDED] if packed and bundle.dtype == "bfloat16" else [])


def variants_of(dtype: str, carried: bool = False) -> list[Variant]:
    """The equally right variants of a policy; `carried` of a run that goes on from its own values."""
    found = [
        Variant("explicit softmax", "attention", Numerics(dtype, "math")),
        Variant("attention in float64", "attention", Numerics(dtype, "float64")),
        Variant("attention in tiles of keys", "attention", Numerics(dtype, "tiled")),
        Variant("products in float64", "products", Numerics(dtype, linear="float64")),
        Variant("padded batches", "products", Numerics(dtype, linear="padded")),
        Variant("two threads", "threads", Numerics(dtype), threads=2),
    ]
    for draw in (1, 2):
        found.append(_disturbed_sums(dtype, draw))
        found.append(Variant(f"a unit in every last place {draw}", "last place", Numerics(dtype), draw=draw))
    if dtype == "float32":
        return found
    if carried:
        # A run of its own carries every rounding on, so that variants which round almost alike end up alike and a few
        # others far from them: it takes more draws to see how far.
        found += [_disturbed_sums(dtype, draw) for draw in range(3, 7)]
    return [*found, Variant("the processor's own products", "native", Numerics(dtype, "math", "native"))]


def exact_variant(dtype: str) -> Variant:
    """The variant that rounds least: everything in float64, or under bfloat16 every product and attention."""
    if dtype == "float32":
        return Variant("float64", "float64", Numerics("float64"))
    return Variant("products and attention in float64", "float64", Numerics(dtype, "float64", "float64"))


def _disturbed_sums(dtype: str, draw: int) -> Variant:
    numerics = Numerics(dtype, "disturbed", "disturbed", draw)
    return Variant(f"disturbed sums {draw}", "sums", numerics, draw=draw, sums=True)


def run_variant(variant: Variant, run: Callable[[], Recording]) -> Recording:
    """What `run` computes with a variant's threads, with the errors that the variant draws."""
    threads = torch.get_num_threads()
    torch.set_num_threads(variant.threads)
    # Of a float32 run the errors are drawn afterwards.
    rounded = variant.sums and variant.numerics.dtype == "bfloat16"
    try:
        with ExitStack() as stack:
            if rounded:
                stack.enter_context(patch.object(reference.sampler, "norm", _DisturbedNorm(variant.draw)))
            if variant.unrounded:
                stack.enter_context(unrounded())
            taps = run()
    finally:
        torch.set_num_threads(threads)
    if not variant.draw:
        return taps
    return {name: _disturbed(name, tap, [variant.draw, i], variant.sums) for i, (name, tap) in enumerate(taps.items())}


class _DisturbedNorm:
    """Takes the place of reference.sampler.norm: sums of squares as far off as those of many roundings may be.

    One bfloat16 number scales a whole velocity, so where it lies near the middle between two, it matters which way a
    sum is off: the norms of one guidance are off by two standard deviations in opposite ways, the other draw's in the
    other ways.
    """

    def __init__(self, draw: int) -> None:
        self._sign = 1 if draw % 2 else -1

    def __call__(self, v: Tensor, dim: int | None = None) -> Tensor:
        count = v.numel() if dim is None else v.shape[dim]
        self._sign = -self._sign
        return (norm(v.double(), dim) * (1 + 2 * self._sign * _sum_error(count))).to(v.dtype)


def _sum_error(count: int) -> float:
    """Standard deviation, relative, of the root of a sum of so many squares: each of so many roundings, as it grows, is
    off by a part of a unit in the last place."""
    return count**0.5 * 2.0**-26


def _disturbed(name: str, tap: Tap, seed: list[int], sums: bool) -> Tap:
    """A float32 tap with the errors of one unit in its last place, or of the sums that norm each of its rows."""
    if tap.dtype != "float32":
        return tap
    component = parse(name).component
    if sums and not _NORMED.search(component):
        return tap
    draw = np.random.default_rng(seed)
    if not sums:
        noise = draw.uniform(-1, 1, tap.array.shape) * 2.0**-23
    elif component == "guidance":
        noise = draw.standard_normal() * _sum_error(tap.array.size)
    else:
        axis = 1 if "vae." in component else -1
        shape = [1 if i == axis % tap.array.ndim else n for i, n in enumerate(tap.array.shape)]
        noise = draw.standard_normal(shape) * _sum_error(tap.array.shape[axis])
    return Tap((tap.array * (1 + noise)).astype(np.float32), tap.dtype)
