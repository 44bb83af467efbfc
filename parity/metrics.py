"""How far one captured tensor is from another."""

import math
from dataclasses import dataclass

import numpy as np

from parity.recording import Tap, float_bits


@dataclass(frozen=True)
class Difference:
    """The distance of a tap from the oracle's.

    Attributes:
        rel_l2: |ours - oracle| / |oracle| over the places where both are finite, in float64; 0 where both norms are 0,
            inf where only the oracle's is. None when the shapes differ.
        max_abs: the largest absolute difference, at index `at`, where the oracle holds `expected` and we hold `got`.
        cosine: of the angle between the two, None where a norm is 0.
        bits_equal: the share of elements that are equal bit for bit.
        mismatch: why the two cannot be close whatever their values: shape, dtype, or NaN and infinity in other places.
    """

    rel_l2: float | None
    max_abs: float | None
    at: tuple[int, ...] | None
    expected: float | None
    got: float | None
    cosine: float | None
    bits_equal: float | None
    size: int
    mismatch: str | None = None

    @property
    def exact(self) -> bool:
        """Whether shape, dtype and every value agree."""
        return self.mismatch is None and self.rel_l2 == 0.0


def compare(oracle: Tap, ours: Tap) -> Difference:
    """Return how far `ours` is from `oracle`; shapes and dtypes are compared before any value."""
    a, b = oracle.array, ours.array
    if a.shape != b.shape:
        return Difference(
            None, None, None, None, None, None, None, a.size, f"shape {list(b.shape)} instead of {list(a.shape)}"
        )
    mismatch = f"dtype {ours.dtype} instead of {oracle.dtype}" if ours.dtype != oracle.dtype else None
    if a.size == 0:
        return Difference(0.0, 0.0, None, None, None, None, 1.0, 0, mismatch)
    same_bits = float(np.mean(bits(a) == bits(b)))
    # Infinities must be the same infinities; NaN must stand where NaN stands.
    same_place = (np.isfinite(a) & np.isfinite(b)) | (np.isnan(a) & np.isnan(b)) | (a == b)
    if not same_place.all():
        at = _index(np.argmin(same_place), a.shape)
        mismatch = mismatch or f"{b[at]} at {list(at)} where the oracle has {a[at]}"
    finite = np.isfinite(a) & np.isfinite(b)
    a64, b64 = np.where(finite, a, 0).astype(np.float64), np.where(finite, b, 0).astype(np.float64)
    apart = np.abs(b64 - a64)
    at = _index(np.argmax(apart), a.shape)
    norm, other = float(np.linalg.norm(a64)), float(np.linalg.norm(b64))
    error = float(np.linalg.norm(apart))
    return Difference(
        rel_l2=error / norm if norm else (math.inf if error else 0.0),
        max_abs=float(apart[at]),
        at=at,
        expected=float(a[at]),
        got=float(b[at]),
        cosine=float(np.vdot(a64, b64)) / norm / other if norm and other else None,
        bits_equal=same_bits,
        size=a.size,
        mismatch=mismatch,
    )


def bits(array: np.ndarray) -> np.ndarray:
    """Return an array that is equal where, and only where, two arrays of one dtype are equal bit for bit."""
    return float_bits(array) if array.dtype == np.float32 else array


def _index(flat: np.intp, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))
