"""What an array lacks or has too much of that has another length than it should."""

import numpy as np

from parity.laws.numbers import listed
from parity.laws.support import plural
from parity.tensors.metrics import rel_l2

# Along the axes of [batch, heads, tokens, channels] and of [batch, tokens, channels].
AXES = {4: ("batch", "head", "token", "channel"), 3: ("batch", "token", "channel")}


def other_length(expected: np.ndarray, got: np.ndarray, near: float) -> str | None:
    """In a few words, what is missing along the one axis of another length, and what there is instead.

    None where the shapes differ otherwise, or where nothing of the one is in the other.
    """
    axes = [axis for axis, sides in enumerate(zip(expected.shape, got.shape, strict=False)) if len(set(sides)) > 1]
    if expected.ndim != got.ndim or len(axes) != 1 or expected.ndim not in AXES:
        return None
    (axis,) = axes
    right, there = (np.moveaxis(array, axis, 0) for array in (expected, got))
    found = [_place(part, right, near) for part in there]
    missing = [place for place in range(len(right)) if place not in found]
    other = [place for place, part in enumerate(found) if part is None]
    if len(other) == len(found):
        return None
    name = AXES[expected.ndim][axis]
    words = [f"of its {len(right)} {plural(name)} it lacks {_listed(missing)}"] if missing else []
    words += [f"{plural(name)} {_listed(other)} are none of the right ones"] if other else []
    return ", and ".join(words) or f"{plural(name)} are there more than once"


def _place(part: np.ndarray, right: np.ndarray, near: float) -> int | None:
    for place, each in enumerate(right):
        error = rel_l2(each, part)
        if error is not None and error <= near:
            return place
    return None


def _listed(places: list[int]) -> str:
    whole = len(places) > 2 and places[-1] - places[0] == len(places) - 1
    return f"{places[0]} to {places[-1]}" if whole else listed([str(place) for place in places])
