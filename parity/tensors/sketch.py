"""Small stand-ins for large tensors: a random projection by place, and exact statistics, from which errors are told.

Element number i (in C order, over the whole tensor) goes with a random sign into one of BUCKETS sums; both are bits of
a hash of i that is computed in 32-bit integers, so that every framework gets the same. The projection is linear, and
the squared norm of the projected difference of two tensors is that of the difference itself, in the mean; its relative
standard deviation is sqrt(2 / BUCKETS) (Charikar, Chen and Farach-Colton's count sketch; Alon, Matias and Szegedy's
second moment). As the hash is one of the place, exchanged axes, permuted rows and shifts are differences like others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

WITHIN, CONFIDENCE = 0.10, 0.95
"""What is asked of an estimated error: to be so near the exact one, relative to it, in this part of all cases."""
NORMAL = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
LEAST_BUCKETS = (NORMAL / WITHIN) ** 2 / 2
"""How many buckets that takes: an error is a root, so its relative deviation is sqrt(1 / (2 BUCKETS))."""
BUCKETS = 1 << (math.ceil(math.log2(LEAST_BUCKETS)) + 1)
"""The power of two above twice as many, for differences that sit in few elements and small parts of a tensor."""
ACCURACY = NORMAL / math.sqrt(2 * BUCKETS)
"""So near is an estimated error to the exact one, relative to it, in CONFIDENCE of all cases."""
LARGEST = 16384
"""Bytes that a sketch may take."""
STATISTICS = ("count", "sum", "sum of squares", "largest", "first", "last", "not finite")
RESOLUTION = 2.0**-44
"""Relative errors below this are none: sums are kept with 48 bits."""
_SEED = 0x9E3779B9
_FACTORS = (0x85EBCA6B, 0xC2B2AE35)
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 18
_COLUMNS = BUCKETS + len(STATISTICS)
MOST_GROUPS = LARGEST // (_COLUMNS * 8)
"""Groups of rows that a sketch can keep apart."""

Runs = tuple[tuple[str, int], ...]
"""How the rows of a tensor follow each other: the group of each run of rows, and how many they are."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is kept of a tensor.

    Attributes:
        dtype: the dtype that it was computed in.
        shape: its shape.
        runs: the groups of its rows.
        sums: float64 [groups, BUCKETS], the groups in the order in which they come first.
        statistics: float64 [groups, 7], see STATISTICS; the first three and the largest are of finite elements.
    """

    dtype: str
    shape: tuple[int, ...]
    runs: Runs
    sums: np.ndarray
    statistics: np.ndarray

    @property
    def size(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)

    @property
    def groups(self) -> list[str]:
        """The names of the groups."""
        return list(dict.fromkeys(label for label, _ in self.runs))

    def packed(self) -> np.ndarray:
        """As float32 [groups, 2, BUCKETS + 7]: numbers and what is left of them after rounding."""
        numbers = np.concatenate([self.sums, self.statistics], 1)
        high = numbers.astype(np.float32)
        return np.stack([high, (numbers - high).astype(np.float32)], 1)


def unpacked(packed: np.ndarray, dtype: str, shape: tuple[int, ...], runs: Runs) -> Sketch:
    """The sketch of what `packed` made; raises ValueError where that is no sketch of such a tensor."""
    groups = len({label for label, _ in runs})
    rows = shape[0] if shape else 1
    if packed.shape != (groups, 2, _COLUMNS) or sum(count for _, count in runs) != rows:
        raise ValueError(f"{list(packed.shape)} is no sketch of a tensor of shape {list(shape)} with {groups} groups")
    numbers = packed.astype(np.float64).sum(1)
    return Sketch(dtype, shape, runs, numbers[:, :BUCKETS], numbers[:, BUCKETS:])


def mixed(index: Any) -> Any:
    """The hash of places: MurmurHash3's last steps, over uint32 of NumPy or MLX, or int64 of PyTorch that hold such.

    PyTorch multiplies no uint32; a wrapped int64 product has the same lower half.
    """
    h = index ^ _SEED
    for shift, factor in zip((16, 13), _FACTORS, strict=True):
        h = ((h ^ (h >> shift)) * factor) & _MASK
    return h ^ (h >> 16)


def sketch_array(array: np.ndarray, dtype: str, runs: Runs | None = None) -> Sketch:
    """Sketch a float array of NumPy, its sums in float64; without `runs` all rows are one group, "all"."""

    def project(values: np.ndarray, start: int) -> np.ndarray:
        with np.errstate(over="ignore"):
            h = mixed(np.arange(start, start + len(values), dtype=np.uint32))
        signed = np.where(h >> 31, -values, values)
        return np.bincount(h & (BUCKETS - 1), signed, BUCKETS)

    def widen(flat: np.ndarray, start: int, stop: int) -> np.ndarray:
        return flat[start:stop].astype(np.float64)

    return _sketch(np.ascontiguousarray(array).reshape(-1), array.shape, dtype, runs, widen, project, _numpy_moments)


def sketch_tensor(tensor: Any, runs: Runs | None = None) -> Sketch:
    """Sketch a float tensor of PyTorch where it lies, its sums in float64; the same as that of its array."""
    import torch

    def project(values: Any, start: int) -> np.ndarray:
        h = mixed(torch.arange(start, start + len(values), dtype=torch.int64, device=values.device))
        sums = torch.zeros(BUCKETS, dtype=values.dtype, device=values.device)
        return sums.index_add(0, h & (BUCKETS - 1), torch.where(h >> 31 > 0, -values, values)).cpu().numpy()

    def widen(flat: Any, start: int, stop: int) -> Any:
        return flat[start:stop].double()

    def moments(values: Any) -> tuple[Any, list[float]]:
        finite = torch.isfinite(values)
        kept = torch.where(finite, values, 0.0)
        numbers = (finite.sum(), kept.sum(), (kept * kept).sum(), kept.abs().max())
        return kept, [float(number) for number in numbers]

    dtype = str(tensor.dtype).removeprefix("torch.")
    flat = tensor.detach().contiguous().reshape(-1)
    return _sketch(flat, tuple(tensor.shape), dtype, runs, widen, project, moments)


def _numpy_moments(values: np.ndarray) -> tuple[np.ndarray, list[float]]:
    finite = np.isfinite(values)
    kept = np.where(finite, values, 0.0)
    return kept, [float(finite.sum()), float(kept.sum()), float(kept @ kept), float(np.abs(kept).max())]


def _sketch(
    flat: Any, shape: tuple[int, ...], dtype: str, runs: Runs | None, widen: Any, project: Any, moments: Any
) -> Sketch:
    """Sketch a flat array chunk by chunk with one framework's functions."""
    rows = shape[0] if shape else 1
    runs = runs or (("all", rows),)
    if sum(count for _, count in runs) != rows:
        raise ValueError(f"runs of {sum(count for _, count in runs)} rows do not part a tensor of {rows}")
    groups = list(dict.fromkeys(label for label, _ in runs))
    sums, statistics = np.zeros((len(groups), BUCKETS)), np.zeros((len(groups), len(STATISTICS)))
    width, start = math.prod(shape) // max(rows, 1), 0
    for label, count in runs:
        group, stop = groups.index(label), start + count * width
        own = statistics[group]
        for begin in range(start, stop, _CHUNK):
            end = min(begin + _CHUNK, stop)
            values = widen(flat, begin, end)
            kept, (finite, total, squares, largest) = moments(values)
            sums[group] += project(kept, begin)
            first, last = float(kept[0].item()), float(kept[-1].item())
            own[4] = own[4] if own[0] + own[6] else first
            own[[0, 1, 2, 5, 6]] = (
                own[0] + finite,
                own[1] + total,
                own[2] + squares,
                last,
                own[6] + end - begin - finite,
            )
            own[3] = max(own[3], largest)
        start = stop
    return Sketch(dtype, tuple(shape), runs, sums, statistics)


@dataclass(frozen=True)
class Estimate:
    """How far one tensor is from another, by their sketches.

    Attributes:
        rel_l2: the relative error as a whole, good to ACCURACY in CONFIDENCE of all cases; inf over a norm of 0.
        groups: the same by group.
        equal: whether the two are equal up to how the sums are rounded; `groups` is then empty.
        mismatch: why the two cannot be close whatever their values: NaN or infinity that only one has, or None.
    """

    rel_l2: float
    groups: dict[str, float]
    equal: bool
    mismatch: str | None = None


def estimate(expected: Sketch, got: Sketch) -> Estimate:
    """Estimate an error from two sketches of one shape and the same runs."""
    errors = np.square(got.sums - expected.sums).sum(1)
    norms = expected.statistics[:, 2]
    odd = expected.statistics[:, 6].sum(), got.statistics[:, 6].sum()
    mismatch = f"{odd[1]:.0f} values that are not finite instead of {odd[0]:.0f}" if odd[0] != odd[1] else None
    parts = {name: _ratio(e, n) for name, e, n in zip(expected.groups, errors, norms, strict=True)}
    error = _ratio(errors.sum(), norms.sum())
    # One flipped bit of a float32 value is more than that in a tensor of 2**32 elements; how sums are rounded is less.
    equal = error < RESOLUTION and mismatch is None
    return Estimate(0.0 if equal else error, {} if equal else parts, equal, mismatch)


def _ratio(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else (math.inf if error else 0.0)


def runs_of(labels: Sequence[str] | None, rows: int) -> Runs:
    """The runs of rows that have a label each; one group where they have none, or more than a sketch keeps apart."""
    if labels is None or len(labels) != rows or len(set(labels)) > MOST_GROUPS or not rows:
        return (("all", rows),)
    runs: list[tuple[str, int]] = []
    for label in labels:
        if runs and runs[-1][0] == label:
            runs[-1] = (label, runs[-1][1] + 1)
        else:
            runs.append((label, 1))
    return tuple(runs)
