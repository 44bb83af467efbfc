"""Where a difference is, in words, and the numbers that people write."""

import numpy as np


def affected(difference: np.ndarray, axis: int, rounding: float) -> np.ndarray:
    """Which places along an axis hold a difference beyond rounding, bool; all where none stands out of it."""
    energy = np.square(np.abs(difference)).sum(tuple(i for i in range(difference.ndim) if i != axis))
    beyond = energy > np.maximum(9 * rounding**2 / len(energy), 1e-6 * energy.max(initial=0.0))
    return beyond if beyond.any() else np.ones_like(beyond)


def places(chosen: np.ndarray, one: str, ordered: bool = True) -> str:
    """Chosen places of an axis in words: "head 2 alone", "heads 1, 3", "rows from 12 on"; all is "".

    Args:
        chosen: bool [size].
        one: what one of them is called.
        ordered: whether the axis has a direction, so that "from" and "up to" say something.
    """
    indices = np.flatnonzero(chosen)
    if len(indices) in (0, len(chosen)):
        return ""
    first, last = int(indices[0]), int(indices[-1])
    if len(indices) == 1:
        return f"{one} {first} alone"
    if last - first + 1 == len(indices) and ordered:
        if last == len(chosen) - 1:
            return f"{one}s from {first} on"
        return f"{one}s up to {last}" if first == 0 else f"{one}s {first} to {last}"
    if len(indices) == 2:
        return f"{one}s {first} and {last}"
    others = np.flatnonzero(~chosen)
    if len(others) == 1:
        return f"every {one} but {others[0]}"
    steps = np.diff(indices)
    if len(indices) > 2 and np.all(steps == steps[0]) and steps[0] > 1 and first < steps[0]:
        return f"every {_nth(int(steps[0]))} {one} from {first} on"
    if len(indices) <= 4:
        return f"{one}s " + ", ".join(map(str, indices))
    return f"{len(indices)} of {len(chosen)} {one}s"


def chosen_like(chosen: np.ndarray, size: int) -> np.ndarray:
    """The same places of an axis of another size: what runs to the end still does."""
    if len(chosen) == size or chosen.all():
        return np.ones(size, bool) if chosen.all() else chosen
    like = np.zeros(size, bool)
    like[: min(size, len(chosen))] = chosen[:size]
    like[len(chosen) :] = chosen[-1]
    return like


def _nth(step: int) -> str:
    return {2: "second", 3: "third"}.get(step, f"{step}th")
