"""Bounds on errors: how often a right run alarms, what is left out when they are fitted, and the least floor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity import floors as measuring
from parity.bounds import FALSE_ALARM, floor, free_bounds, local_bounds, threshold
from parity.floors_file import free_floors, local_floors
from parity.metrics import compare
from parity.recording import Tap
from parity.rounding import ULP, quantum

FAMILIES = 8


def bits(draw, taps, families=FAMILIES, spread=0.3, shared=0.0):
    """Errors [taps, families] of variants that round alike at every tap but for chance, which taps may share."""
    scales = np.exp(draw.normal(-14, 1, (taps, 1)))
    together = draw.normal(0, shared, (1, families)) if shared else 0.0
    return scales * np.exp(draw.normal(0, spread, (taps, families)) + together)


def ratios_of(table, families=None):
    """What `measure_*` keep of a table of errors of float32 taps."""
    families = families or [f"{index}:{index}" for index in range(table.shape[1])]
    found, count = measuring.ratios_of(table, np.full(len(table), 1e-30), np.full(len(table), "float32"), families)
    return found["float32"], count["float32"]


def alarms(draw, taps, compared, trials, **kind):
    """How many of so many fresh variants are called wrong anywhere, given the floors and the threshold of the others.

    The threshold is fitted to more taps than the bundle has, and that are compared.
    """
    wrong = 0
    for _ in range(trials):
        table = bits(draw, taps, FAMILIES + 1, **kind)
        known, fresh = table[:, :-1], table[:compared, -1]
        far = threshold(*ratios_of(known), compared)
        wrong += bool((fresh > known[:compared].max(1) * far).any())
    return wrong


# The threshold.


@pytest.mark.parametrize("kind", [{}, {"spread": 1.0}, {"spread": 0.05}, {"shared": 0.2}])
def test_a_fresh_variant_of_the_same_kind_alarms_rarely(kind):
    # As in check: a bundle has some of the taps that the reference computes. 1% of 200 runs are 2.
    assert alarms(np.random.default_rng(1), taps=1200, compared=150, trials=200, **kind) <= 5


def test_where_all_taps_are_compared_a_fresh_variant_alarms_as_rarely():
    # As in localize. Without the bootstrap's upper end 4 % of the runs alarm.
    assert alarms(np.random.default_rng(2), taps=1200, compared=1200, trials=200) <= 4


def test_a_variant_that_is_far_worse_alarms():
    draw = np.random.default_rng(3)
    table = bits(draw, 150)
    far = threshold(*ratios_of(table), 150)
    assert 1 <= far < 10
    worse = table.max(1) * np.where(np.arange(150) == 77, 20, 0.5)
    assert np.flatnonzero(worse > table.max(1) * far).tolist() == [77]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), taps=st.integers(2, 200), scale=st.floats(1e-9, 1e9))
def test_the_threshold_is_never_below_what_was_seen_and_has_no_unit(seed, taps, scale):
    table = bits(np.random.default_rng(seed), taps)
    found, count = ratios_of(table)
    assert count == table.size and np.all(np.diff(found) <= 0)
    far = threshold(found, count, taps)
    assert far >= max(1.0, float(found[0]) * (1 - 1e-6))
    assert threshold(*ratios_of(table * scale), taps) == pytest.approx(far, rel=1e-3)
    # More taps share the chance of a false alarm.
    assert threshold(found, count, 100 * taps) >= far


def test_without_a_measured_error_the_threshold_is_the_floor():
    assert threshold(np.zeros(0, np.float32), 0, 100) == 1.0
    assert ratios_of(np.zeros((5, 3)))[1] == 0


def test_few_or_equal_ratios_are_enough():
    assert threshold(np.array([0.5], np.float32), 1, 10) == 1.0
    assert threshold(np.array([3.0], np.float32), 1, 10) == pytest.approx(3)
    assert threshold(np.full(50, 2.0, np.float32), 50, 10) >= 2


def test_families_are_left_out_as_a_whole():
    # Two that round alike say nothing about each other: with one left out the other would vouch for it.
    table = np.tile(np.array([[1.0, 8.0, 8.0]]), (20, 1))
    apart, alike = (ratios_of(table, names)[0] for names in (["a:a", "b:b", "c:c"], ["a:a", "b:b", "c:b"]))
    assert apart[0] == 1 and alike[0] == 8
    assert threshold(apart, 60, 20) == pytest.approx(1) and threshold(alike, 60, 20) == pytest.approx(8)


def test_ratios_are_kept_by_dtype_and_not_below_the_least_floor():
    table = np.array([[1e-9, 4e-9], [1e-3, 4e-3], [0, 1e-3]])
    found, count = measuring.ratios_of(
        table, np.array([1e-8, 1e-4, 1e-4]), np.array(["float32", "bfloat16", "bfloat16"]), ["a:a", "b:b"]
    )
    assert count == {"float32": 2, "bfloat16": 3}
    assert found["float32"].tolist() == pytest.approx([0.4, 0.1])
    assert found["bfloat16"].tolist() == pytest.approx([10, 4, 0.25])


# The least floor, and bounds.


@pytest.mark.parametrize(("dtype", "size"), [("float32", 20000), ("bfloat16", 20000), ("float32", 9)])
def test_the_quantum_is_one_element_in_25_off_by_one_bit(dtype, size):
    draw = np.random.default_rng(4)
    values = draw.uniform(1, 2, size).astype(np.float32)
    if dtype == "bfloat16":
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    off = values.copy()
    # Of few elements the root of their number.
    flipped = draw.permutation(size)[: max(size // 25, round(size**0.5))]
    off.view(np.uint32)[flipped] += 1 if dtype == "float32" else 1 << 16
    tap = Tap(values, dtype)
    error = compare(tap, Tap(off, dtype)).rel_l2
    assert 0.9 * quantum(tap) < error < 2.1 * quantum(tap)


def test_the_quantum_of_a_tap_that_follows_from_bfloat16_states_is_that_of_bfloat16():
    tap = Tap(np.ones(100, np.float32), "float32")
    assert quantum(tap, "bfloat16") / quantum(tap) == ULP["bfloat16"] / ULP["float32"]
    assert quantum(Tap(np.ones(100, np.int32), "int32")) == 0
    assert quantum(Tap(np.ones(0, np.float32), "float32")) > 0
    assert floor(np.array([1e-9, 3e-9]), 2e-9) == pytest.approx(3e-9) and floor(np.zeros(0), 2e-9) == 2e-9


@pytest.mark.parametrize("name", ["t2i-fp32-kv", "t2v-bf16-kv", "x2t_image-bf16-kv", "i2v-fp32-nokv"])
def test_bounds_lie_between_what_was_seen_and_the_widest(oracle_of, name):
    oracle = oracle_of(name)
    local, free = local_floors(oracle), free_floors(oracle.bundle)
    for floors, bounds in ((local, local_bounds(oracle, local)), (free, free_bounds(oracle.bundle, free))):
        assert bounds.alarm.rate == FALSE_ALARM and bounds.alarm.taps == len(floors.errors)
        assert bounds.alarm.samples == sum(floors.count.values()) > 100
        widest = 1.0
        for tap, errors in floors.errors.items():
            # No variant that was measured is called wrong.
            assert bounds.allowed(tap) >= errors.max() and bounds.levels[tap] >= errors.max()
            widest = max(widest, bounds.allowed(tap) / bounds.levels[tap])
        assert bounds.alarm.threshold == pytest.approx(widest)


def test_a_small_bfloat16_tap_may_have_a_few_more_elements_off(oracle_of):
    oracle = oracle_of("t2v-bf16-kv")
    bounds = local_bounds(oracle, local_floors(oracle))
    over = {tap: bounds.allowed(tap) / level for tap, level in bounds.levels.items()}
    sizes = {tap: oracle.taps[tap].array.size for tap in over if oracle.taps[tap].dtype == "bfloat16"}
    # Of two taps on the least floor the smaller one's bound is the wider.
    least = [tap for tap in sizes if bounds.levels[tap] == quantum(oracle.taps[tap])]
    small, large = min(least, key=sizes.get), max(least, key=sizes.get)
    assert sizes[small] < sizes[large] and over[small] > over[large]
    wide = [tap for tap in over if oracle.taps[tap].dtype == "float32"]
    assert {round(over[tap], 9) for tap in wide} == {round(bounds.thresholds["float32"], 9)}
