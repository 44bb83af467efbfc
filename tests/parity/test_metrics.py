import json
import math
import resource
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parity.errors import ParityError
from parity.tensors import blocks, metrics
from parity.tensors.metrics import axis_errors, bits, compare
from parity.tensors.recording import Tap, open_tensors, read_tensors, write_tensors
from parity.tensors.sketch import sketch_array

finite = st.floats(-1e6, 1e6, width=32)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=finite)


def tap(values, dtype="float32"):
    return Tap(np.asarray(values, np.int32 if dtype == "int32" else np.float32), dtype)


@settings(deadline=None)
@given(arrays)
def test_equal_arrays_differ_by_nothing(array):
    d = compare(tap(array), tap(array.copy()))
    assert d.exact and d.rel_l2 == d.max_abs == 0 and d.bits_equal == 1


@pytest.mark.parametrize("sketched", [False, True])
def test_values_beyond_what_there_can_be_are_a_mismatch(sketched):
    def held(values):
        return sketch_array(np.float32(values), "float32") if sketched else tap(values)

    inside, beyond = [1.0, -1.0, 0.5], [1.0, -1.0000001, 0.5]
    assert compare(held(inside), held(beyond), 1.0).mismatch == "values up to 1.00000012 where none is beyond 1"
    assert "values up to 3" in compare(held(inside), held([3.0, -1.0, 0.5]), 1.0).mismatch
    for expected, got, most in ((inside, inside, 1.0), (inside, beyond, None), (beyond, beyond, 1.0)):
        assert compare(held(expected), held(got), most).mismatch is None


@settings(deadline=None)
@given(arrays, st.data())
def test_a_permutation_is_seen(array, data):
    order = data.draw(st.permutations(range(array.size)))
    shuffled = array.ravel()[order].reshape(array.shape)
    assume(not np.array_equal(array, shuffled))
    d = compare(tap(array), tap(shuffled))
    assert not d.exact and d.rel_l2 > 0 and d.bits_equal < 1
    assert array[d.at] == pytest.approx(d.expected) and shuffled[d.at] == pytest.approx(d.got)


@settings(deadline=None)
@given(arrays, st.floats(1e-6, 1e-2))
def test_the_error_is_relative_to_the_oracle(array, share):
    oracle = array.astype(np.float64)
    assume(np.linalg.norm(oracle) > 1)
    d = compare(tap(array), tap((oracle * (1 + share)).astype(np.float32)))
    # Rounding to float32 moves every element by up to 2**-24 of itself.
    assert d.rel_l2 == pytest.approx(share, abs=2**-23)
    assert d.cosine == pytest.approx(1)


@settings(deadline=None)
@given(arrays, st.data())
def test_the_largest_difference_is_found_where_it_is(array, data):
    at = tuple(data.draw(st.integers(0, side - 1)) for side in array.shape)
    changed = array.copy()
    changed[at] += 3e6
    d = compare(tap(array), tap(changed))
    assert d.at == at and d.expected == array[at] and d.got == changed[at]


@settings(deadline=None)
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


# Every float32 there is, denormals, infinities and NaN of any kind among them.
patterns = hnp.arrays(np.uint32, hnp.array_shapes(max_dims=3, max_side=6)).map(lambda bits: bits.view(np.float32))


@pytest.fixture(params=[1, 3, 8, blocks.BLOCK])
def block(monkeypatch, request) -> int:
    """Sizes of a block, so that small arrays have many."""
    monkeypatch.setattr(blocks, "BLOCK", request.param)
    monkeypatch.setattr(metrics, "BLOCK", request.param)
    return request.param


def measured(a, b):
    """What compare says of two float32 arrays, by whole arrays and exact sums."""
    finite = np.isfinite(a) & np.isfinite(b)
    with np.errstate(invalid="ignore"):
        x, y = (np.where(finite, side, 0).astype(np.float64).ravel().tolist() for side in (a, b))
    apart = [abs(second - first) for first, second in zip(x, y, strict=True)]
    norm, other, error = (math.sqrt(math.fsum(value * value for value in side)) for side in (x, y, apart))
    at = np.unravel_index(int(np.argmax(apart)), a.shape)
    odd = ~(finite | (np.isnan(a) & np.isnan(b)) | (a == b))
    return {
        "rel_l2": error / norm if norm else (math.inf if error else 0.0),
        "max_abs": max(apart),
        "at": at,
        "expected": a[at],
        "got": b[at],
        "cosine": math.fsum(i * j for i, j in zip(x, y, strict=True)) / norm / other if norm and other else None,
        "bits_equal": np.mean(a.view(np.uint32) == b.view(np.uint32)),
        "odd": list(map(int, np.unravel_index(np.argmax(odd), a.shape))) if odd.any() else None,
    }


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(patterns, st.data())
def test_every_number_is_that_of_the_definition(block, a, data):
    places = data.draw(hnp.arrays(bool, a.shape))
    b = np.where(places, data.draw(hnp.arrays(np.uint32, a.shape)).view(np.float32), a)
    order = data.draw(st.permutations(range(a.ndim)))
    # Views in another order, and one that is whole in memory beside one that is not.
    for x, y in ((a, b), (a.transpose(order), b.transpose(order)), (a.transpose(order), b.transpose(order).copy())):
        found, wanted = compare(tap(x), tap(y)), measured(x, y)
        for key in ("rel_l2", "max_abs", "expected", "got", "bits_equal"):
            assert getattr(found, key) == pytest.approx(wanted[key], rel=1e-12, abs=0, nan_ok=True), key
        assert (found.cosine is None) == (wanted["cosine"] is None)
        assert found.cosine is None or found.cosine == pytest.approx(wanted["cosine"], abs=1e-12)
        assert found.at == wanted["at"] and found.size == a.size
        # NumPy's numbers would show as such in reports.
        assert {type(value) for value in (*vars(found).values(), *found.at)} <= {
            float,
            int,
            bool,
            tuple,
            str,
            type(None),
        }
        assert (found.mismatch is None) == (wanted["odd"] is None)
        assert found.mismatch is None or f"at {wanted['odd']} where" in found.mismatch


@pytest.mark.parametrize("scale", [1e-44, 1, 1e29])
def test_the_relative_error_is_exact_whatever_the_sizes(scale):
    rng = np.random.default_rng(0)
    # Larger than a block and than a row of its dot products, of no even length, over 16 orders of magnitude.
    oracle = (rng.normal(size=70_001) * 10.0 ** rng.uniform(-8, 8, 70_001) * scale).astype(np.float32)
    ours = (oracle * (1 + 1e-6 * rng.normal(size=oracle.size))).astype(np.float32)
    pairs = [(Fraction(a), Fraction(b)) for a, b in zip(oracle.tolist(), ours.tolist(), strict=True)]
    error, norm = sum((b - a) ** 2 for a, b in pairs), sum(a * a for a, _ in pairs)
    d = compare(tap(oracle), tap(ours))
    assert norm and d.rel_l2 == pytest.approx(math.sqrt(error / norm), rel=1e-12)
    assert d.max_abs == max(abs(b - a) for a, b in pairs)


def test_comparing_holds_no_copy_of_a_tensor():
    oracle = np.random.default_rng(0).normal(size=(64, 256, 512)).astype(np.float32)
    ours = oracle + np.float32(1e-3)
    broken = ours.copy()
    broken[3, 4, 5] = np.nan
    views = oracle.transpose(2, 0, 1), ours.transpose(2, 0, 1)
    for a, b in ((oracle, ours), (oracle, oracle.copy()), (oracle, broken), views):
        for measure in (lambda a, b: compare(tap(a), tap(b)), lambda a, b: axis_errors(a, b, (0, 1))):
            tracemalloc.start()
            measure(a, b)
            assert tracemalloc.get_traced_memory()[1] < oracle.nbytes / 8
            tracemalloc.stop()


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(patterns, st.data())
def test_slices_add_up_what_is_within_them(block, a, data):
    b = data.draw(hnp.arrays(np.uint32, a.shape)).view(np.float32)
    order = data.draw(st.permutations(range(a.ndim)))
    axes = tuple(data.draw(st.permutations(range(a.ndim)))[: data.draw(st.integers(1, a.ndim))])
    a, b = a.transpose(order), b.transpose(order)
    found = axis_errors(a, b, axes)
    finite = np.isfinite(a) & np.isfinite(b)
    with np.errstate(invalid="ignore"):
        x, y = (np.where(finite, side, 0).astype(np.float64) for side in (a, b))
    letters = "abc"[: a.ndim]
    kept = "".join(letters[i] for i in axes)
    for sums, values in ((found.errors, y - x), (found.norms, x)):
        assert sums.dtype == np.float64
        np.testing.assert_allclose(sums, np.einsum(f"{letters},{letters}->{kept}", values, values), rtol=1e-12)


def test_slices_of_one_axis_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 300, 7, 90)).astype(np.float32)
    whole = compare(tap(a), tap(b)).rel_l2
    for axis in (0, 1, -1, (2, 0)):
        errors, norms = axis_errors(a, b, axis)
        assert math.sqrt(errors.sum() / norms.sum()) == pytest.approx(whole, rel=1e-12)
    assert axis_errors(a, b, (2, 0)).errors.shape == (90, 300)
    assert axis_errors(a[:0], b[:0], 1).errors.tolist() == [0] * 7
    with pytest.raises(ParityError, match="cannot be compared"):
        axis_errors(a, b[1:], 0)


bfloat16 = hnp.arrays(np.uint16, hnp.array_shapes(max_dims=2, max_side=4)).map(
    lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)
)


@settings(deadline=None)
@given(bfloat16, arrays)
@example(np.zeros((2, 0), np.float32), np.zeros((), np.float32))
def test_tensors_are_stored_exactly_under_their_dtype(tmp_path_factory, low, wide):
    path = tmp_path_factory.mktemp("tensors") / "taps.safetensors"
    taps = {"b": tap(low, "bfloat16"), "a/x": tap(wide.T), "n": tap([-1, 2**31 - 1], "int32")}
    write_tensors(path, taps)
    found = read_tensors(path)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in taps.items()}
    for name in taps:
        assert np.array_equal(bits(taps[name].array), bits(found[name].array))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_tap_must_hold_what_its_dtype_says():
    with pytest.raises(ParityError, match="bfloat16 cannot represent"):
        tap([1 + 2**-10], "bfloat16")
    with pytest.raises(ParityError, match="held as int32"):
        Tap(np.zeros(2, np.float32), "int32")
    with pytest.raises(ParityError, match="float64"):
        Tap(np.zeros(2), "float64")


def some_taps():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(300, 700)).astype(np.float32)
    low = torch.from_numpy(wide).bfloat16().float().numpy()
    names = ("z/\u00e9", "a", 'q"', "m")
    return {name: tap(array, dtype) for name, array, dtype in zip(
        names, (low, wide, np.arange(5), low[:3, ::2]), ("bfloat16", "float32", "int32", "bfloat16"), strict=True
    )}  # fmt: skip


def test_the_same_taps_make_the_bytes_that_safetensors_makes(tmp_path):
    taps = some_taps()
    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int32": torch.int32}
    tensors = {name: torch.tensor(t.array).to(kinds[t.dtype]).contiguous() for name, t in taps.items()}
    write_tensors(tmp_path / "taps.safetensors", taps)
    write_tensors(tmp_path / "again.safetensors", dict(reversed(taps.items())))
    written = (tmp_path / "taps.safetensors").read_bytes()
    assert written == safetensors.torch.save(tensors) == (tmp_path / "again.safetensors").read_bytes()


def test_an_open_file_tells_what_it_holds_and_reads_one_tap_at_a_time(tmp_path):
    path, taps = tmp_path / "taps.safetensors", some_taps()
    taps["large"] = tap(np.ones((64, 256, 512)))
    write_tensors(path, taps)
    with open_tensors(path) as file:
        assert set(file) == set(taps) and len(file) == len(taps) and "a" in file and "b" not in file
        assert {name: (file.dtypes[name], file.shapes[name]) for name in file} == {
            name: (t.dtype, t.array.shape) for name, t in taps.items()
        }
        tracemalloc.start()
        values = [np.array_equal(file[name].array, taps[name].array) for name in ("a", "m")]
        assert all(values) and tracemalloc.get_traced_memory()[1] < taps["large"].array.nbytes / 8
        tracemalloc.stop()
        with pytest.raises(KeyError):
            file["b"]
    assert list(read_tensors(path)) == list(file)


def test_reading_and_writing_hold_each_tap_once(tmp_path):
    path = tmp_path / "taps.safetensors"
    taps = {name: tap(np.ones((64, 256, 512)), dtype) for name, dtype in (("a", "float32"), ("b", "bfloat16"))}
    size = sum(t.array.nbytes for t in taps.values())
    for use, most in ((lambda: write_tensors(path, taps), size / 8), (lambda: read_tensors(path), size * 9 / 8)):
        tracemalloc.start()
        use()
        assert tracemalloc.get_traced_memory()[1] < most
        tracemalloc.stop()


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a complete"),
        (b"\0" * 7, "not a complete"),
        (b"\xff" * 8 + b"{}", "not a complete"),
        (header(a=ONE)[:-3], "not a complete"),
        (header(a=ONE) + b"\0" * 7, "not a complete"),
        (header(a=ONE) + b"\0" * 9, "not a complete"),
        (header(a=ONE | {"shape": [3]}) + b"\0" * 8, "not a complete"),
        (header(a=ONE | {"shape": [2**62, 2**62]}) + b"\0" * 8, "not a complete"),
        (header(a=ONE | {"data_offsets": [8, 0]}) + b"\0" * 8, "not a complete"),
        (header(a=ONE, b=ONE) + b"\0" * 8, "not a complete"),
        (header(a=ONE | {"dtype": "X"}) + b"\0" * 8, "not a complete"),
        (header(a=ONE | {"dtype": "F64", "shape": [1]}) + b"\0" * 8, "holds a as float64"),
        (header(a=[]) + b"\0" * 8, "not a complete"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, data, why):
    path = tmp_path / "taps.safetensors"
    path.write_bytes(data)
    with pytest.raises(ParityError, match=why) as raised, open_tensors(path):
        pass
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    with pytest.raises(ParityError, match="is no file: copy it again"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["a", "m"])
def test_a_file_that_is_shortened_while_open_is_one_line(tmp_path, name):
    path = tmp_path / "taps.safetensors"
    write_tensors(path, some_taps())
    with open_tensors(path) as file, path.open("r+b") as other:
        other.truncate(4096)
        with pytest.raises(ParityError, match="shortened while it was open"):
            file[name]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    path = tmp_path / "taps.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ParityError, match="taps.safetensors cannot be written"):
            write_tensors(path, some_taps())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_writing_that_fails_keeps_what_was_there(tmp_path, monkeypatch):
    path, taps = tmp_path / "taps.safetensors", some_taps()
    write_tensors(path, taps)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("parity.tensors.recording.blocks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"a": taps["m"]})
    monkeypatch.undo()
    assert set(read_tensors(path)) == set(taps) and len(list(tmp_path.iterdir())) == 1
