"""Numbers read from data, as people write them."""

import math
from collections.abc import Callable, Iterator, Sequence

# What formulas are made of, with the words for it.
CONSTANTS = {
    "1/3": 1 / 3, "2/3": 2 / 3, "1/sqrt(2)": 0.5**0.5, "sqrt(2)": 2**0.5, "sqrt(3)": 3**0.5, "1/sqrt(3)": 3**-0.5,
    "pi": math.pi, "2 pi": 2 * math.pi, "pi/2": math.pi / 2, "1/pi": 1 / math.pi, "e": math.e, "ln 2": math.log(2),
    "127/128": 127 / 128, "255/256": 255 / 256, "1.702": 1.702,
}  # fmt: skip
DIGITS = 4
GOLDEN = (math.sqrt(5) - 1) / 2


def snapped(value: float, fits: Callable[[float], bool]) -> float:
    """The simplest number near one for which `fits` holds; the number itself where none is."""
    return next((written for written in _written(value) if fits(written)), value)


def told(value: float) -> str:
    """A number in words: a constant's name, or at most four significant digits."""
    for sign, prefix in ((1, ""), (-1, "-")):
        for name, constant in CONSTANTS.items():
            if math.isclose(value, sign * constant, rel_tol=1e-12):
                return prefix + name
    for root in range(2, 65):
        if root**0.5 % 1 and math.isclose(value, root**0.5, rel_tol=1e-9):
            return f"sqrt({root})"
    text = f"{value:.{DIGITS}g}"
    if "e" in text:
        digits, _, power = text.partition("e")
        return f"{digits}e{int(power)}"
    return "0" if text == "-0" else text


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
    if abs(value - round(value)) < 0.2:
        yield float(round(value))
    if value:
        yield _rounded(value, 1)
        yield math.copysign(2.0 ** round(math.log2(abs(value))), value)
    for constant in CONSTANTS.values():
        if 0.9 < abs(value) / constant < 1.1:
            yield math.copysign(constant, value)
    if value:
        yield from (_rounded(value, digits) for digits in range(2, DIGITS + 1))


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")
