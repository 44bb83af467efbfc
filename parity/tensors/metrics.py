"""How far one captured tensor is from another: as a whole, and along its axes.

Everything is summed in float64, block by block. A product of two float32 or int32 values fits float64 without overflow
or underflow, so values of any size and denormals count in full; beside the tensors no more than a few blocks are held.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from parity.errors import ParityError
from parity.tensors.blocks import BLOCK, blocks
from parity.tensors.recording import Tap, float_bits
from parity.tensors.sketch import ACCURACY, STATISTICS, Sketch, estimate, sketch_array, unpacked

# From 10,000 elements on, OpenBLAS gives a dot product to several threads, which then wait for each other for as long
# as another process uses their core.
_DOT = 8192


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
        accuracy: how near rel_l2 is to the exact error, relative to it, in 95 of 100 cases, where it was estimated from
            sketches; None where it is exact.
        groups: the groups of rows that a sketch keeps apart, and rel_l2 of each.
        odd: whether NaN or infinity stands where the other has none, of which rel_l2 says nothing.
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
    accuracy: float | None = None
    groups: tuple[tuple[str, float], ...] = ()
    odd: bool = False

    @property
    def error(self) -> float | None:
        """rel_l2 as it may be told; None where there is none, or values that are not finite were left out of it."""
        return None if self.odd else self.rel_l2

    @property
    def exact(self) -> bool:
        """Whether shape, dtype and every value agree."""
        return self.mismatch is None and self.rel_l2 == 0.0

    def to_json(self, expected: str, got: str) -> dict[str, Any]:
        """Return plain JSON values, the two values that differ most under these names; what is not finite is null."""
        return {
            "rel_l2": finite(self.error),
            "max_abs": finite(self.max_abs),
            "max_abs_at": None if self.at is None else list(self.at),
            expected: finite(self.expected),
            got: finite(self.got),
            "cosine": finite(self.cosine),
            "bits_equal": finite(self.bits_equal),
            "accuracy": finite(self.accuracy),
            "groups": {group: finite(error) for group, error in self.groups},
            "mismatch": self.mismatch,
        }

    def beyond(self, allowed: float) -> bool:
        """Whether the tap is farther than an error that is allowed, or cannot be close at all."""
        return self.mismatch is not None or self.rel_l2 is None or not self.rel_l2 <= allowed


class AxisErrors(NamedTuple):
    """Sums over slices of a tensor, float64, over the places where both sides are finite.

    Attributes:
        errors: the squared error |got - expected|^2 of each slice.
        norms: the squared norm |expected|^2 of each slice.
    """

    errors: np.ndarray
    norms: np.ndarray


def compare(oracle: Tap | Sketch, ours: Tap | Sketch, most: float | None = None) -> Difference:
    """Return how far `ours` is from `oracle`; shapes and dtypes are compared before any value.

    Where one of the two is a sketch the error is an estimate. Values of ours beyond `most`, where the oracle has none,
    are a mismatch, however few they are.
    """
    if oracle.shape != ours.shape:
        what = f"shape {list(ours.shape)} instead of {list(oracle.shape)}"
        return Difference(None, None, None, None, None, None, None, oracle.size, what)
    mismatch = f"dtype {ours.dtype} instead of {oracle.dtype}" if ours.dtype != oracle.dtype else None
    if most is not None and _largest(oracle) <= most < _largest(ours):
        mismatch = mismatch or f"values up to {_largest(ours):.9g} where none is beyond {most:g}"
    if isinstance(oracle, Sketch) or isinstance(ours, Sketch):
        return _estimated(oracle, ours, mismatch)
    a, b = oracle.array, ours.array
    if a.size == 0:
        return Difference(0.0, 0.0, None, None, None, None, 1.0, 0, mismatch)
    if a.dtype == b.dtype and all(np.array_equal(bits(x), bits(y)) for x, y in _pairs(a, b)):
        at = (0,) * a.ndim
        cosine = 1.0 if any(np.any(np.isfinite(x) & (x != 0)) for x, _ in _pairs(a, a)) else None
        return Difference(0.0, 0.0, at, float(a[at]), float(b[at]), cosine, 1.0, a.size, mismatch)

    squares, norms, others, products = 0.0, 0.0, 0.0, 0.0
    same_bits, start, largest, farthest, odd = 0, 0, -1.0, 0, None
    widened = _Widened()
    for x, y in _pairs(a, b):
        same_bits += int(np.count_nonzero(bits(x) == bits(y)))
        odd_here = widened.load(x, y)
        if odd is None and odd_here is not None:
            odd = start + odd_here
        apart = widened.apart()
        squares += _dot(apart, apart)
        norms += widened.norm
        others += widened.other
        products += _dot(widened.expected, widened.got)
        np.abs(apart, out=apart)
        here = int(np.argmax(apart))
        if apart[here] > largest:
            largest, farthest = float(apart[here]), start + here
        start += x.size
    if odd is not None:
        at = _index(odd, a.shape)
        mismatch = mismatch or f"{b[at]} at {list(at)} where the oracle has {a[at]}"
    at = _index(farthest, a.shape)
    norm, other, error = math.sqrt(norms), math.sqrt(others), math.sqrt(squares)
    return Difference(
        rel_l2=error / norm if norm else (math.inf if error else 0.0),
        max_abs=largest,
        at=at,
        expected=float(a[at]),
        got=float(b[at]),
        cosine=products / norm / other if norm and other else None,
        bits_equal=same_bits / a.size,
        size=a.size,
        mismatch=mismatch,
        odd=odd is not None,
    )


def rel_l2(expected: np.ndarray, got: np.ndarray) -> float | None:
    """Return the relative L2 error of `got` alone, None where the shapes differ; see Difference.

    What is not finite on either side counts as equal. Where `expected` is zero the error is infinite, or 0.
    """
    if expected.shape != got.shape:
        return None
    squares, norms, widened = 0.0, 0.0, _Widened()
    for x, y in _pairs(expected, got):
        widened.load(x, y)
        apart = widened.apart()
        squares += _dot(apart, apart)
        norms += widened.norm
    if not norms:
        return math.inf if squares else 0.0
    return math.sqrt(squares / norms)


def _largest(tap: Tap | Sketch) -> float:
    """The largest absolute value among the finite ones."""
    if isinstance(tap, Sketch):
        return float(tap.statistics[:, STATISTICS.index("largest")].max(initial=0.0))
    parts = (np.abs(tap.array[block]) for block in blocks(tap.array.shape))
    return max((float(part.max(initial=0.0, where=np.isfinite(part))) for part in parts), default=0.0)


def _estimated(oracle: Tap | Sketch, ours: Tap | Sketch, mismatch: str | None) -> Difference:
    runs = oracle.runs if isinstance(oracle, Sketch) else ours.runs
    a, b = (x if isinstance(x, Sketch) else sketch_array(x.array, x.dtype, runs) for x in (oracle, ours))
    if a.runs != b.runs:
        what = mismatch or "other groups of rows"
        return Difference(None, None, None, None, None, None, None, a.size, what)
    # What is kept has been rounded to twice float32's digits.
    found = estimate(*(unpacked(x.packed(), x.dtype, x.shape, x.runs) for x in (a, b)))
    accuracy = None if found.equal else ACCURACY
    bits_equal = 1.0 if found.equal else None
    return Difference(found.rel_l2, None, None, None, None, None, bits_equal, a.size, mismatch or found.mismatch,
                      accuracy, tuple(found.groups.items()), found.mismatch is not None)  # fmt: skip


def axis_errors(expected: np.ndarray, got: np.ndarray, axis: int | tuple[int, ...]) -> AxisErrors:
    """Return the squared errors and norms of every slice along an axis or several.

    `expected` and `got` are float32 or int32 of one shape. The sums have the sides of `axis`, in the order given: [n]
    for one axis, [n, m] for two. Raises ParityError when the shapes differ.
    """
    if expected.shape != got.shape:
        raise ParityError(f"slices of shape {list(got.shape)} cannot be compared with {list(expected.shape)}")
    axes = normalize_axis_tuple(axis, expected.ndim)
    kept = sorted(axes)
    summed = tuple(i for i in range(expected.ndim) if i not in axes)
    errors, norms = np.zeros((2, *(expected.shape[i] for i in kept)))
    widened = _Widened()
    for block in blocks(expected.shape):
        x = expected[block]
        widened.load(x, got[block])
        place = tuple(block[i] for i in kept)
        for total, values in ((errors, widened.apart()), (norms, widened.expected)):
            total[place] += np.square(values, out=values).reshape(x.shape).sum(axis=summed)
    order = [kept.index(i) for i in axes]
    return AxisErrors(errors.transpose(order), norms.transpose(order))


def finite(value: float | None) -> float | None:
    """Return the value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def bits(array: np.ndarray) -> np.ndarray:
    """Return an array that is equal where, and only where, two arrays of one dtype are equal bit for bit."""
    return float_bits(array) if array.dtype == np.float32 else array


class _Widened:
    """A block of two arrays as float64, flat in C order and 0 where either is not finite.

    Attributes:
        expected, got: views of buffers that the next block reuses.
        norm, other: their squared norms.
    """

    def __init__(self) -> None:
        self._buffers = np.empty((3, BLOCK))

    def load(self, x: np.ndarray, y: np.ndarray) -> int | None:
        """Take a block; returns the first place where the two are not finite in the same way, None without one."""
        self.expected, self.got, self._apart = self._buffers[:, : x.size]
        # Widening a signalling NaN is worth no warning.
        with np.errstate(invalid="ignore"):
            np.copyto(self.expected.reshape(x.shape), x)
            np.copyto(self.got.reshape(y.shape), y)
        self._measure()
        # Finite float32 values have finite squares here, so this is seen for free.
        if math.isfinite(self.norm + self.other):
            return None
        a, b = self.expected, self.got
        finite = np.isfinite(a) & np.isfinite(b)
        # Infinities must be the same infinities; NaN must stand where NaN stands.
        same = finite | (np.isnan(a) & np.isnan(b)) | (a == b)
        a[~finite] = b[~finite] = 0
        self._measure()
        return None if same.all() else int(np.argmin(same))

    def apart(self) -> np.ndarray:
        """got - expected, in a buffer that the next block reuses."""
        return np.subtract(self.got, self.expected, out=self._apart)

    def _measure(self) -> None:
        self.norm, self.other = _dot(self.expected, self.expected), _dot(self.got, self.got)


def _pairs(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The blocks of two arrays of one shape, flat where that needs no copy."""
    if a.flags.c_contiguous and b.flags.c_contiguous:
        a, b = a.reshape(-1), b.reshape(-1)
    return ((a[block], b[block]) for block in blocks(a.shape))


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    """x . y of flat float64 arrays."""
    whole = len(x) - len(x) % _DOT
    rows = np.vecdot(x[:whole].reshape(-1, _DOT), y[:whole].reshape(-1, _DOT))
    return float(rows.sum() + np.dot(x[whole:], y[whole:]))


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))
