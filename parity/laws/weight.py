"""Laws of parameters: an array `own` in PyTorch's layout, [out, in, ...] or [channels]."""

from collections.abc import Iterator

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.change import Change, changes
from parity.laws.fit import Fit, checked
from parity.laws.mixture import grain, is_bfloat16, rounded_as
from parity.laws.rounding import by_rows, grids, to_format

AXES = ("channel",), ("output", "input"), ("output", "input", "place"), ("output", "input", "row", "column")
# Elements up to which all ways of quantizing are tried; of a larger matrix the first rows.
TRIED = 1 << 16
# Elements up to which ways are tried that need all of them, and rows and columns up to which a rank is read of all.
WHOLE, RANKED = 1 << 20, 256
# A matrix is of low rank where its rank is less than this part of what it could be.
LOW = 1 / 3
# A singular value is one of the rank from so many times the largest that is expected of noise.
EDGE = 1.2
# What a way to quantize may leave of the residual where something else was done to the parameter too.
BESIDE = 0.7


def changed(component: Component, got: np.ndarray) -> Iterator[Law]:
    """A parameter is another than it should be."""
    yield from checked(component, got, proposed, BESIDE)


def proposed(component: Component, fit: Fit) -> Iterator[Law]:
    """Changes of a parameter that may be."""
    subject = f"the {component.facts.get('name', 'weight')}"
    for found in (
        changes(fit.own, fit.got, 0.0, axes_of(fit.own), (), True),
        _flips(fit.own),
        quantized(fit),
        low_rank(fit),
    ):
        yield from (law_of(subject, change, fit.own, fit.got) for change in found)


def law_of(subject: str, change: Change, own: np.ndarray, got: np.ndarray) -> Law:
    """A change of a parameter as a law; what is held in bfloat16 is rounded to it again."""
    narrow = is_bfloat16(own) and is_bfloat16(got)

    def apply(other: Component) -> np.ndarray | None:
        # Float32 times a float32: what was multiplied so comes out to the bit.
        result = change.apply(other.own.astype(np.float32))
        return to_format(result, "bfloat16") if narrow and result is not None else result

    return change.law(subject, apply)


def axes_of(array: np.ndarray) -> tuple[str, ...]:
    """What the axes of a parameter are called."""
    if array.ndim == 5:
        return ("output", "input", "frame", "row", "column")
    return next((axes for axes in AXES if len(axes) == array.ndim), tuple(f"axis {i}" for i in range(array.ndim)))


def low_rank(fit: Fit) -> Iterator[Change]:
    """A matrix of low rank is added."""
    if fit.own.ndim < 2 or min(fit.own.shape) < 4:
        return
    off = (fit.got - fit.own).reshape(len(fit.own), -1)
    # Each value of a sum is rounded as the parameter is.
    found = factors(off, max(fit.slack, grain(fit.got) * float(np.linalg.norm(fit.got))))
    if found is None:
        return
    left, right = found
    added = (left @ right).reshape(fit.own.shape)
    words = f" differs by a matrix of rank {len(right)}"
    yield Change(words, float(left.size + right.size), lambda x: x + added if x.shape == added.shape else None)


def factors(off: np.ndarray, slack: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Two factors [m, k] and [k, n] of a matrix whose rank k is low; None where it is not."""
    if not np.isfinite(off).all():
        return None
    if min(off.shape) > RANKED:
        # The range of a matrix is that of a few mixtures of its columns.
        mixed = off @ np.random.default_rng(0).standard_normal((off.shape[1], RANKED // 2))
        basis = np.linalg.qr(mixed)[0]
        inner = basis.T @ off
        if np.linalg.norm(off) ** 2 - np.linalg.norm(inner) ** 2 > max(slack, 1e-3 * np.linalg.norm(off)) ** 2:
            return None
        found = factors(inner, slack)
        return None if found is None else (basis @ found[0], found[1])
    # A few rows or columns are of low rank whatever is in them.
    square, allowed = np.square(off), max(slack, 1e-3 * float(np.linalg.norm(off))) ** 2
    touched = [int(np.sum(square.sum(axis) * off.shape[1 - axis] > allowed)) for axis in (0, 1)]
    most = int(min(touched) * LOW)
    u, s, v = np.linalg.svd(off, full_matrices=False)
    beyond = np.sqrt(np.cumsum((s**2)[::-1])[::-1])
    allowed = max(slack, 1e-3 * float(beyond[0]))
    rank = int(np.sum(beyond > allowed))
    rows, columns = off.shape
    while 0 < rank < len(s):
        # What is no larger than noise as large as the rest is the largest of that, and no rank.
        edge = beyond[rank] / ((rows - rank) * (columns - rank)) ** 0.5 * (rows**0.5 + columns**0.5)
        if s[rank - 1] > EDGE * edge:
            break
        rank -= 1
    return (u[:, :rank] * s[:rank], v[:rank]) if 0 < rank <= most else None


def quantized(fit: Fit) -> Iterator[Change]:
    """Ways to quantize a matrix (a kernel as one, a vector as a row) under which it comes out as it did, as far as its
    first rows tell."""
    own, got = (_as_rows(array) for array in (fit.own, fit.got))
    touched = np.flatnonzero((own != got).any(1))
    rows = touched[: max(TRIED // own.shape[1], 1)]
    for words, size, rounded in grids(own.shape[1]):
        if not by_rows(words) and own.size > WHOLE:
            continue
        tried = rounded(own[rows]) if by_rows(words) else rounded(own)[rows]
        part = Fit(own[rows], got[rows])
        if part.left(rounded_as(got, tried)) <= BESIDE * part.residual:
            yield Change(f" {words}", size, lambda x, of=rounded: of(_as_rows(x)).reshape(x.shape))


def _as_rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array) if array.ndim > 1 else 1, -1)


def _flips(own: np.ndarray) -> Iterator[Change]:
    """A kernel [out, in, ...] read in another order."""
    if own.ndim < 3:
        return
    for axes, words in (((-1, -2), "rows and columns"), ((-3,), "frames"), ((-1, -2, -3), "frames, rows and columns")):
        if own.ndim >= 2 - min(axes):
            yield Change(f"'s {words} are reversed", 1, lambda x, axes=axes: np.flip(x, axes))
    for (a, b), words in (((-1, -2), "rows and columns"), ((0, 1), "inputs and outputs")):
        if own.shape[a] == own.shape[b]:
            yield Change(f"'s {words} are exchanged", 1, lambda x, a=a, b=b: np.swapaxes(x, a, b))
    yield Change(
        " is read channels last", 1, lambda x: np.moveaxis(x.reshape(x.shape[0], *x.shape[2:], x.shape[1]), -1, 1)
    )
    yield Change(" is read channels first", 1, lambda x: np.moveaxis(x, 1, -1).reshape(x.shape))
