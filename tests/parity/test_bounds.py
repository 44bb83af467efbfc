"""Bounds on errors: how far a right run may be off, what is found, and how often a right run alarms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.oracle.bounds import FALSE_ALARM, bounds_of, poisson_quantile, scale_of
from parity.oracle.floors import Floors
from parity.tensors.metrics import compare
from parity.tensors.recording import Tap
from parity.tensors.rounding import step_squares


def normal(size, seed=0, dtype="bfloat16"):
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(size).astype(np.float32))
    return Tap((values.bfloat16().float() if dtype == "bfloat16" else values).numpy(), dtype)


def bound(tap, level=0.0, flips=0.0, spread=0.0, run=None, taps=400):
    """The bound of one of so many taps that are alike."""
    names = [f"inputs/vit_patches{i}" for i in range(taps)]
    floors = Floors(dict.fromkeys(names, level), dict.fromkeys(names, flips), dict.fromkeys(names, spread), ("a",))
    return bounds_of(floors, dict.fromkeys(names, tap), run or tap.dtype).taps[names[0]]


@given(mean=st.floats(1e-6, 300), chance=st.floats(1e-7, 0.1))
@settings(max_examples=200, deadline=None)
def test_the_quantile_of_poissons_distribution_is_its_quantile(mean, chance):
    count = poisson_quantile(mean, chance)
    log = [k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(count + 2)]
    within = math.fsum(map(math.exp, log[: count + 1]))
    assert 1 - within <= chance * (1 + 1e-6) + 1e-12
    assert count == 0 or 1 - (within - math.exp(log[count])) > chance * (1 - 1e-6) - 1e-12


def test_a_large_mean_is_taken_for_normal():
    assert poisson_quantile(499.0, 1e-5) == pytest.approx(poisson_quantile(501.0, 1e-5), rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_unit_in_the_last_place_is_the_distance_to_the_next_number(dtype):
    tap = normal(500, dtype=dtype)
    following = np.nextafter(np.abs(tap.array), np.float32(9))
    if dtype == "bfloat16":
        following = (np.abs(tap.array).view(np.uint32) + 0x10000).view(np.float32)
    steps = (following.astype(np.float64) - np.abs(tap.array)) ** 2
    found = step_squares(tap.array, dtype)
    assert found == pytest.approx((steps.sum(), (steps**2).sum(), steps.max()))
    assert step_squares(np.zeros(4, np.float32), dtype) == (0, 0, 0)


# Under bfloat16.


@pytest.mark.parametrize("size", [48, 500, 20000])
def test_one_element_that_is_rounded_the_other_way_agrees_and_many_do_not(size):
    tap = normal(size)
    allowed = bound(tap, flips=1e-5).allowed

    def flipped(count):
        array = tap.array.copy()
        largest = np.argsort(-np.abs(array))[:count]
        array[largest] = (array[largest].view(np.uint32) + 0x10000).view(np.float32)
        return compare(tap, Tap(array, "bfloat16")).rel_l2

    assert flipped(1) <= allowed < flipped(30)


@given(size=st.integers(48, 30000), flips=st.floats(-20, -1), level=st.floats(-20, -6), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_three_floors_are_found_whatever_the_size(size, flips, level, seed):
    found = bound(normal(size, seed), level=2.0**level, flips=2.0**flips, spread=0.5)
    assert found.floor <= found.allowed < 3 * found.floor


def test_a_right_run_whose_elements_flip_as_often_as_was_seen_alarms_rarely():
    draw, tap, rate = np.random.default_rng(3), normal(300, 1), 2e-3
    units = np.sqrt(np.exp2(2 * np.frexp(tap.array)[1].astype(np.float64) - 16))
    allowed = bound(tap, flips=rate, taps=100).allowed * np.linalg.norm(tap.array.astype(np.float64))
    errors = [np.linalg.norm(units[draw.random(300) < rate]) for _ in range(20000)]
    # Of a run of 100 taps one in a hundred: 1e-4 of them.
    assert np.mean(np.array(errors) > allowed) <= 3 * FALSE_ALARM / 100


# In float32.


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3, 3.0])
def test_a_float32_tap_may_be_two_floors_off_and_ten_are_found(spread):
    found = bound(normal(5000, dtype="float32"), level=1e-6, spread=spread)
    assert found.floor == 1e-6 and 2e-6 <= found.allowed * (1 + 1e-9) and found.allowed < 1e-5
    assert (found.allowed < 2.2e-6) == (spread <= 0.01)


def test_flips_mean_nothing_in_a_float32_run_and_bfloat16s_units_behind_it():
    tap = normal(500, dtype="float32")
    assert bound(tap, level=1e-6, flips=8.0) == bound(tap, level=1e-6)
    carried = bound(tap, level=1e-6, flips=1e-4, run="bfloat16")
    assert carried.counted and 1e-3 < carried.floor < carried.allowed < 1e-2


def test_a_right_run_whose_error_varies_as_was_seen_alarms_rarely():
    draw, size = np.random.default_rng(4), 20
    norms = np.linalg.norm(draw.standard_normal((20000, size)), axis=1) / size**0.5
    spread = float(np.log(norms).std())
    # The floor is the largest of a few draws; what agrees is on either side of what is exact.
    for start in range(0, 20000, 2000):
        floor = norms[start : start + 6].max() * 1e-6
        allowed = bound(normal(5000, dtype="float32"), level=floor, spread=spread, taps=100).allowed
        apart = np.linalg.norm(draw.standard_normal((5000, size)) - draw.standard_normal((5000, size)), axis=1)
        assert np.mean(apart / size**0.5 * 1e-6 > allowed) <= 1e-3


def test_without_a_measured_error_one_rounding_is_allowed_for():
    tap = normal(500, dtype="float32")
    found = bound(tap)
    assert found.floor == pytest.approx(scale_of(tap).peak ** 0.5) and found.allowed <= 2.01 * found.floor


def test_a_float32_tap_of_a_bfloat16_run_is_found_at_three_floors():
    tap = normal(500, dtype="float32")
    assert bound(tap, level=1e-3, spread=2.0, run="bfloat16").allowed < 3e-3
    assert bound(tap, level=1e-3, spread=2.0).allowed > 3e-3


def test_the_alarm_tells_the_widest_bound_and_what_it_was_measured_with():
    names = ["inputs/vit_patches0", "inputs/vit_patches1"]
    floors = Floors(dict.fromkeys(names, 1e-6), dict.fromkeys(names, 0.0), {names[0]: 0.0, names[1]: 0.7}, ("a", "b"))
    bounds = bounds_of(floors, dict.fromkeys(names, normal(900, dtype="float32")), "float32")
    assert bounds.alarm.rate == FALSE_ALARM and bounds.alarm.taps == 2 and bounds.alarm.samples == 2
    assert bounds.alarm.threshold == pytest.approx(bounds.allowed(names[1]) / bounds.floor(names[1]))
    # A tap that all variants have alike, and that is nothing, may be nothing else.
    assert bounds_of(floors, {names[0]: Tap(np.zeros(4, np.float32), "float32")}, "float32").floor(names[0]) == 1e-6
