"""Numbers read from data, as people write them."""

import math
from collections.abc import Callable, Iterator

# What formulas are made of, with the words for it.
CONSTANTS = {
    "1/3": 1 / 3, "2/3": 2 / 3, "1/sqrt(2)": 0.5**0.5, "sqrt(2)": 2**0.5, "sqrt(3)": 3**0.5, "1/sqrt(3)": 3**-0.5,
    "pi": math.pi, "2 pi": 2 * math.pi, "pi/2": math.pi / 2, "1/pi": 1 / math.pi, "e": math.e, "ln 2": math.log(2),
    "127/128": 127 / 128, "255/256": 255 / 256, "1.702": 1.702,
}  # fmt: skip
DIGITS = 4


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


def _written(value: float) -> Iterator[float]:
    """Numbers near one, the simplest first."""
    if not math.isfinite(value):
        return
    if abs(value - round(value)) < 0.2:
        yield float(round(value))
    if value:
        power = round(math.log2(abs(value)))
        yield math.copysign(2.0**power, value)
        yield _rounded(value, 1)
    for constant in CONSTANTS.values():
        if 0.9 < abs(value) / constant < 1.1:
            yield math.copysign(constant, value)
    if value:
        yield from (_rounded(value, digits) for digits in range(2, DIGITS + 1))


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")
