import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parity.errors import ParityError
from parity.metrics import compare
from parity.recording import Tap, read_tensors, write_tensors

finite = st.floats(-1e6, 1e6, width=32)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=finite)


def tap(values, dtype="float32"):
    return Tap(np.asarray(values, np.int32 if dtype == "int32" else np.float32), dtype)


@given(arrays)
def test_equal_arrays_differ_by_nothing(array):
    d = compare(tap(array), tap(array.copy()))
    assert d.exact and d.rel_l2 == d.max_abs == 0 and d.bits_equal == 1


@given(arrays, st.data())
def test_a_permutation_is_seen(array, data):
    order = data.draw(st.permutations(range(array.size)))
    shuffled = array.ravel()[order].reshape(array.shape)
    assume(not np.array_equal(array, shuffled))
    d = compare(tap(array), tap(shuffled))
    assert not d.exact and d.rel_l2 > 0 and d.bits_equal < 1
    assert array[d.at] == pytest.approx(d.expected) and shuffled[d.at] == pytest.approx(d.got)


@given(arrays, st.floats(1e-6, 1e-2))
def test_the_error_is_relative_to_the_oracle(array, share):
    oracle = array.astype(np.float64)
    assume(np.linalg.norm(oracle) > 1)
    d = compare(tap(array), tap((oracle * (1 + share)).astype(np.float32)))
    # Rounding to float32 moves every element by up to 2**-24 of itself.
    assert d.rel_l2 == pytest.approx(share, abs=2**-23)
    assert d.cosine == pytest.approx(1)


@given(arrays, st.data())
def test_the_largest_difference_is_found_where_it_is(array, data):
    at = tuple(data.draw(st.integers(0, side - 1)) for side in array.shape)
    changed = array.copy()
    changed[at] += 3e6
    d = compare(tap(array), tap(changed))
    assert d.at == at and d.expected == array[at] and d.got == changed[at]


@given(arrays, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_what_is_not_finite_must_stand_in_the_same_place(array, value, data):
    at = tuple(data.draw(st.integers(0, side - 1)) for side in array.shape)
    broken = array.copy()
    broken[at] = value
    for oracle, ours in ((array, broken), (broken, array)):
        d = compare(tap(oracle), tap(ours))
        assert d.mismatch and str(list(at)) in d.mismatch and not d.exact
        assert math.isfinite(d.rel_l2) or not np.any(oracle[np.isfinite(oracle)])
    assert compare(tap(broken), tap(broken.copy())).mismatch is None


def test_infinities_of_other_sign_differ():
    assert compare(tap([np.inf, 1]), tap([-np.inf, 1])).mismatch


def test_shapes_come_first_and_dtypes_before_values():
    assert compare(tap([[1, 2]]), tap([1, 2])).mismatch == "shape [2] instead of [1, 2]"
    assert compare(tap([[1, 2]]), tap([1, 2])).rel_l2 is None
    d = compare(tap([1, np.nan], "bfloat16"), tap([1, 2]))
    assert d.mismatch == "dtype float32 instead of bfloat16" and d.rel_l2 == 0


def test_an_oracle_of_zeros_has_no_relative_error():
    assert compare(tap([0, 0]), tap([0, 0])).rel_l2 == 0
    assert compare(tap([0, 0]), tap([0, 1e-30])).rel_l2 == math.inf
    assert compare(tap([0, 0]), tap([0, 1])).cosine is None
    assert compare(tap(np.zeros((0, 3))), tap(np.zeros((0, 3)))).size == 0


def test_norms_do_not_overflow_float32():
    d = compare(tap([3e38, 3e38]), tap([3e38, 0]))
    assert d.rel_l2 == pytest.approx(math.sqrt(0.5))


def test_bits_of_bfloat16_and_zeros_are_told_apart():
    d = compare(tap([1, 2, 4, -0.0], "bfloat16"), tap([1, 2.015625, 4, 0.0], "bfloat16"))
    assert d.bits_equal == 0.5 and d.max_abs == 0.015625


def test_integers_are_compared_without_rounding():
    large = 2**31 - 1
    d = compare(tap([large], "int32"), tap([large - 1], "int32"))
    assert d.max_abs == 1 and not d.exact


bfloat16 = hnp.arrays(np.uint16, hnp.array_shapes(max_dims=2, max_side=4)).map(
    lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)
)


@given(bfloat16.filter(lambda a: not np.isnan(a).any()), arrays)
def test_tensors_are_stored_exactly_under_their_dtype(tmp_path_factory, low, wide):
    path = tmp_path_factory.mktemp("tensors") / "taps.safetensors"
    taps = {"b": tap(low, "bfloat16"), "a/x": tap(wide.T), "n": tap([-1, 2**31 - 1], "int32")}
    write_tensors(path, taps)
    found = read_tensors(path)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in taps.items()}
    assert all(compare(taps[name], found[name]).bits_equal == 1 for name in taps)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_tap_must_hold_what_its_dtype_says():
    with pytest.raises(ParityError, match="bfloat16 cannot represent"):
        tap([1 + 2**-10], "bfloat16")
    with pytest.raises(ParityError, match="held as int32"):
        Tap(np.zeros(2, np.float32), "int32")
    with pytest.raises(ParityError, match="float64"):
        Tap(np.zeros(2), "float64")
