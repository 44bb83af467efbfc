"""Questions about values read from JSON."""

import math


def is_integer(value: object) -> bool:
    """Whether a value is an integer and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a finite number and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
