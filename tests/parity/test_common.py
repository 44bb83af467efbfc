"""What the errors of a tap's rows have in common: nothing where they are roundings, all of it where a weight is off."""

import numpy as np
import pytest

from parity.oracle.common import common_error
from parity.tensors.names import parse
from parity.tensors.rounding import rounded

TAP = parse("cond.step0/language_model.model.layers.1.self_attn.sdpa")


def values(rows, columns, draw):
    """Rows that have a good part in common, as those of attention do."""
    return draw.standard_normal(columns) + 0.3 * draw.standard_normal((rows, columns))


def narrow(array):
    return rounded(array, "bfloat16")


@pytest.mark.parametrize(("rows", "columns"), [(2, 64), (38, 64), (300, 24), (5, 3)])
@pytest.mark.parametrize("flips", [1.0, 0.02])
def test_roundings_of_rows_have_nothing_in_common(rows, columns, flips):
    draw = np.random.default_rng(0)
    for _ in range(200):
        exact = values(rows, columns, draw)
        noise = draw.standard_normal(exact.shape) * 2.0**-9 * (draw.random(exact.shape) < flips)
        assert common_error(TAP, narrow(exact), narrow(exact * (1 + noise))) == 0


def test_rows_that_are_each_scaled_have_nothing_in_common():
    draw = np.random.default_rng(1)
    for _ in range(200):
        exact = values(40, 64, draw)
        assert common_error(TAP, narrow(exact), narrow(exact * (1 + 2.0**-9 * draw.standard_normal((40, 1))))) == 0


@pytest.mark.parametrize("factor", [1.001, 0.998])
def test_a_factor_below_the_last_place_is_common_to_all_rows(factor):
    exact = values(38, 64, np.random.default_rng(2))
    off = narrow(exact * factor) - narrow(exact)
    found = common_error(TAP, narrow(exact), narrow(exact * factor))
    assert found > np.linalg.norm(off) / np.linalg.norm(exact)


def test_what_has_no_rows_has_nothing_in_common():
    exact = values(40, 64, np.random.default_rng(3))
    assert common_error(TAP, exact, exact) == 0 == common_error(TAP, exact[:1], 1.01 * exact[:1])
    assert common_error(TAP, exact, 1.01 * exact[:5]) == 0 == common_error(TAP, exact, np.full_like(exact, np.nan))
    assert common_error(parse("pixels"), exact, 1.01 * exact) == 0 < common_error(TAP, exact, 1.01 * exact)
