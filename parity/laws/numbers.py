"""Numbers read from data, as people write them."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# What formulas are made of, with the words for it.
CONSTANTS = {
    "1/3": 1 / 3, "2/3": 2 / 3, "1/sqrt(2)": 0.5**0.5, "sqrt(2)": 2**0.5, "sqrt(3)": 3**0.5, "1/sqrt(3)": 3**-0.5,
    "pi": math.pi, "2 pi": 2 * math.pi, "pi/2": math.pi / 2, "1/pi": 1 / math.pi, "e": math.e, "ln 2": math.log(2),
    "127/128": 127 / 128, "255/256": 255 / 256, "1.702": 1.702,
}  # fmt: skip
FRACTIONS = {f"1/{n:g}": 1 / n for n in (6, 7, 9, 12, 127.5, 255)}
DIGITS = 4
GOLDEN = (math.sqrt(5) - 1) / 2


def snapped(value: float, fits: Callable[[float], bool]) -> float:
    """The simplest number near one for which `fits` holds; the number itself where none is."""
    return next((written for written in _written(value) if fits(written)), value)


def plainest(value: float, within: float) -> tuple[float, str]:
    """The simplest number that is no further than `within` from a value, and how it is said; else the value itself."""
    if abs(value) <= within:
        return 0.0, "0"
    number = snapped(value, lambda written: abs(written - value) <= within)
    return number, told(number)


def told(value: float) -> str:
    """A number in words: a constant's name, a whole one in full, or at most four significant digits."""
    if abs(value) < 1e7 and value == round(value):
        return str(round(value))
    for sign, prefix in ((1, ""), (-1, "-")):
        for name, constant in (CONSTANTS | FRACTIONS).items():
            if math.isclose(value, sign * constant, rel_tol=1e-12):
                return prefix + name
    for root in range(2, 65):
        if root**0.5 % 1 and math.isclose(value, root**0.5, rel_tol=1e-9):
            return f"sqrt({root})"
    text = f"{value:.{DIGITS}g}"
    if "e" in text:
        digits, _, power = text.partition("e")
        return f"{digits}e{int(power)}"
    return text


def norm_of(array: np.ndarray) -> float:
    """The norm of an array, in float64."""
    return float(np.linalg.norm(np.asarray(array, np.float64)))


def listed(words: Sequence[str]) -> str:
    """Some words as people list them."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def ordinal(number: int) -> str:
    """3rd, 4th."""
    return f"{number}{'rd' if number % 10 == 3 and number % 100 != 13 else 'th'}"


def least(left: Callable[[float], float], grid: Sequence[float], steps: int = 30) -> float:
    """The number for which `left` is least: the best of a grid in order, closed in on by golden sections."""
    best = min(range(len(grid)), key=lambda i: left(grid[i]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_a, at_b = left(a), left(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - GOLDEN * (high - low)
            at_a = left(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + GOLDEN * (high - low)
            at_b = left(b)
    return (low + high) / 2


def _written(value: float) -> Iterator[float]:
    """Numbers near one, the simplest first."""
    if not math.isfinite(value):
        return
    if abs(value - round(value)) < 0.2 and abs(value) < 1000:
        yield float(round(value))
    if value:
        yield _rounded(value, 1)
        yield math.copysign(2.0 ** round(math.log2(abs(value))), value)
    for constant in CONSTANTS.values():
        if 0.9 < abs(value) / constant < 1.1:
            yield math.copysign(constant, value)
    if value:
        yield _rounded(value, 2)
    for fraction in FRACTIONS.values():
        if 0.99 < abs(value) / fraction < 1.01:
            yield math.copysign(fraction, value)
    if value:
        yield from (_rounded(value, digits) for digits in range(3, DIGITS + 1))
        yield from [float(round(value))] if abs(value) >= 1000 else []


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")
