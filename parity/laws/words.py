"""Where a difference is, in words, and the numbers that people write."""

import math
from collections.abc import Callable, Iterator

import numpy as np

ROUND = (
    *(2.0**n for n in range(-20, 21)),
    2**0.5,
    0.5**0.5,
    math.pi,
    math.pi / 2,
    2 * math.pi,
    1 / 3,
    2 / 3,
    1 / math.pi,
)


def affected(difference: np.ndarray, axis: int, rounding: float) -> np.ndarray:
    """Which places along an axis hold a difference beyond rounding, bool; all where none stands out of it."""
    energy = np.square(np.abs(difference)).sum(tuple(i for i in range(difference.ndim) if i != axis))
    beyond = energy > np.maximum(9 * rounding**2 / len(energy), 1e-6 * energy.max(initial=0.0))
    return beyond if beyond.any() else np.ones_like(beyond)


def snapped(value: float, good: Callable[[float], bool]) -> float:
    """The plainest number near a value that is as good; the value itself with 4 digits where none is."""
    for number in _plainer(value):
        if good(number):
            return number
    return value


def _plainer(value: float) -> Iterator[float]:
    if not math.isfinite(value):
        return
    if abs(value) < 1e-2:
        yield 0.0
    for digits in (1, 2):
        yield float(f"{value:.{digits}g}")
    yield float(round(value))
    sign = math.copysign(1.0, value)
    near = min(ROUND, key=lambda number: abs(abs(value) - number))
    if abs(abs(value) - near) <= 0.02 * near:
        yield sign * near
    for digits in (3, 4):
        yield float(f"{value:.{digits}g}")


def told(number: float) -> str:
    """A number with at most 4 significant digits; a whole one in full."""
    return f"{number:.0f}" if abs(number) < 1e7 and number == round(number) else f"{number:.4g}"


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


def listed(words: list[str]) -> str:
    """Some words as people list them."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def rounded_to(dtype: str, x: np.ndarray) -> np.ndarray:
    """Values, real or complex, as float32, bfloat16 or float16 has them."""
    if np.iscomplexobj(x):
        return rounded_to(dtype, x.real) + 1j * rounded_to(dtype, x.imag)
    x = np.asarray(x, np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        bits = x.view(np.uint32) if x.flags.c_contiguous else np.ascontiguousarray(x).view(np.uint32)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return x.astype(np.float64)
