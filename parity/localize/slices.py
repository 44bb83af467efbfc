"""The error of a tap by role, expert, head, frame, channel and token, so that a wrong minority cannot hide."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from parity.localize.findings import SliceError
from parity.model import definition
from parity.tensors.metrics import axis_errors
from parity.tensors.names import TapName

# Of an axis with many members only the worst are listed; heat maps show them all.
LISTED = 8
# A slice is named as the place of an error when it holds this part of it while being this part of the tap, at most.
CONCENTRATED, MINORITY = 0.9, 0.5
_AXES = {"head": "head", "channel": "channel", "hidden": "channel", "frame": "frame", "t": "frame", "patch": "token"}
_AXES |= {"token": "token", "latent": "token", "step": "step", "axis": "axis", "head_dim": "channel"}


def slice_errors(tap: TapName, expected: np.ndarray, got: np.ndarray, layout: Any) -> list[SliceError]:
    """The errors of a tap's slices, the worst of each axis first; empty where the shapes differ."""
    if expected.shape != got.shape or not expected.size:
        return []
    return [item for axis, labels, errors, norms in _cuts(tap, expected, got, layout)
            for item in _listed(axis, labels, errors, norms)]  # fmt: skip


def place_of(slices: Sequence[SliceError], sizes: dict[str, float]) -> str | None:
    """Say in words in which slice most of an error lies; None when it is spread evenly.

    `sizes` gives the part of the tap that a slice is, by "axis label".
    """
    for item in slices:
        size = sizes.get(f"{item.axis} {item.label}", 1.0)
        if item.share >= CONCENTRATED and size <= MINORITY:
            return f"{item.axis} {item.label}: {item.share:.0%} of the squared error in {size:.0%} of the values"
    return None


def slice_sizes(tap: TapName, array: np.ndarray, layout: Any) -> dict[str, float]:
    """The part of a tap that each slice is, by "axis label"."""
    if not array.size:
        return {}
    ones = np.ones_like(array, np.float32)
    return {
        f"{axis} {label}": float(norm / array.size)
        for axis, labels, _, norms in _cuts(tap, ones, ones, layout)
        for label, norm in zip(labels, norms, strict=True)
    }


def _cuts(
    tap: TapName, expected: np.ndarray, got: np.ndarray, layout: Any
) -> Iterator[tuple[str, list[str], np.ndarray, np.ndarray]]:
    names = [name.strip() for name in tap.axes.split(",")] if tap.axes else []
    if len(names) != expected.ndim:
        return
    for place, name in enumerate(names):
        axis = _AXES.get(name)
        if axis is None or expected.shape[place] < 2:
            continue
        errors, norms = (np.asarray(x) for x in axis_errors(expected, got, place))
        if axis == "token":
            yield from _by_row(tap, errors, norms, layout)
        yield axis, [str(i) for i in range(len(errors))], errors, norms


def _by_row(
    tap: TapName, errors: np.ndarray, norms: np.ndarray, layout: Any
) -> Iterator[tuple[str, list[str], np.ndarray, np.ndarray]]:
    for axis, row_labels in (
        ("role", definition().row_roles(tap, len(errors), layout)),
        ("expert", definition().row_experts(tap, len(errors), layout)),
        ("frame", definition().row_frames(tap, len(errors), layout)),
    ):
        if row_labels is None:
            continue
        labels = list(dict.fromkeys(row_labels))
        if len(labels) > 1:
            index = np.array([labels.index(label) for label in row_labels])
            yield (axis, labels, *(np.bincount(index, values, len(labels)) for values in (errors, norms)))


def _listed(axis: str, labels: Sequence[str], errors: np.ndarray, norms: np.ndarray) -> list[SliceError]:
    total = float(errors.sum())
    if not total:
        return []
    order = np.argsort(-errors, kind="stable")[:LISTED]
    relative = np.sqrt(np.divide(errors, norms, out=np.full(len(errors), np.inf), where=norms > 0))
    return [SliceError(axis, labels[i], float(errors[i] / total), float(relative[i])) for i in order if errors[i]]
