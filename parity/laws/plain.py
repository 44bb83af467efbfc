"""Numbers as people write them: the plainest one that fits as well as what was fitted."""

import math

# What is written otherwise than in decimals, and how.
_NAMED = {
    math.pi: "pi",
    2 * math.pi: "2 pi",
    math.sqrt(2): "sqrt(2)",
    1 / math.sqrt(2): "1/sqrt(2)",
    **{1 / n: f"1/{n}" for n in (3, 6, 7, 9, 12)},
    2 / 3: "2/3",
    1 / 255: "1/255",
    1 / 127.5: "1/127.5",
}


def told(value: float, within: float) -> tuple[float, str]:
    """The plainest number that is no further than `within` from a value, and how it is said.

    Where none of four digits is as near the value is kept and said with four.
    """
    if abs(value) <= within:
        return 0.0, "0"
    for digits in (1, 2):
        if abs((plain := float(f"{value:.{digits - 1}e}")) - value) <= within:
            return plain, said(plain)
    for plain, name in _NAMED.items():
        for sign in (1, -1):
            if abs(sign * plain - value) <= within:
                return sign * plain, name if sign > 0 else f"-{name}"
    if value and abs((power := math.copysign(2.0 ** round(math.log2(abs(value))), value)) - value) <= within:
        return power, said(power)
    for digits in (3, 4):
        if abs((plain := float(f"{value:.{digits - 1}e}")) - value) <= within:
            return plain, said(plain)
    return value, f"{value:.4g}"


def said(value: float) -> str:
    """A number without an exponent where it is read without one."""
    return f"{value:.12g}" if 1e-4 <= abs(value) < 1e9 or not value else f"{value:.4g}"
