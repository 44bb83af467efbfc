"""Sketches: the same from every framework, as accurate as stated, and sensitive to places."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from parity.tensors import sketch
from parity.tensors.sketch import BUCKETS, estimate, mixed, runs_of, sketch_array, sketch_tensor, unpacked

RUNS = (("brackets", 1), ("noise", 60), ("brackets", 3))


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_every_framework_hashes_places_alike():
    places = np.concatenate([np.arange(5000), 2**32 - 1 - np.arange(5000), [2**31, 2**31 - 1]]).astype(np.uint32)
    ours = mixed(places)
    assert np.array_equal(ours, mixed(torch.from_numpy(places.astype(np.int64))).numpy().astype(np.uint32))
    assert np.array_equal(ours, np.array(mixed(mx.array(places))))
    # Known values: a change here makes all kept sketches worthless.
    assert ours[:4].tolist() == [2462723854, 920564995, 3024231355, 2527132011]
    # Buckets and signs are spread evenly and independently of each other.
    h = mixed(np.arange(1 << 18, dtype=np.uint32))
    counts = np.bincount((h & (BUCKETS - 1)) * 2 + (h >> 31), minlength=2 * BUCKETS)
    expected = len(h) / (2 * BUCKETS)
    assert np.square(counts - expected).sum() / expected == pytest.approx(2 * BUCKETS, rel=0.15)


def test_numpy_and_pytorch_make_the_same_sketch(monkeypatch):
    monkeypatch.setattr(sketch, "_CHUNK", 1000)
    array = drawn(1, 64, 130)
    array[3, 5], array[60, 7] = np.nan, np.inf
    ours = sketch_array(array, "float32", RUNS)
    theirs = sketch_tensor(torch.from_numpy(array), RUNS)
    assert (theirs.dtype, theirs.shape, theirs.groups) == ("float32", (64, 130), ["brackets", "noise"])
    np.testing.assert_allclose(theirs.sums, ours.sums, rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(theirs.statistics, ours.statistics, rtol=1e-13, atol=1e-11)
    brackets, noise = ours.statistics
    inner = array[1:61][np.isfinite(array[1:61])].astype(np.float64)
    assert noise.tolist() == pytest.approx(
        [inner.size, inner.sum(), (inner**2).sum(), np.abs(inner).max(), array[1, 0], array[60, -1], 2]
    )
    assert (brackets[0], brackets[4], brackets[5]) == (4 * 130, array[0, 0], array[-1, -1])
    narrow = torch.from_numpy(drawn(2, 7, 300)).bfloat16()
    assert estimate(sketch_tensor(narrow), sketch_array(narrow.float().numpy(), "bfloat16")).rel_l2 < 1e-14


def structured(kind, expected, rng):
    """Differences as wrong code makes them, and as rounding does."""
    rows, columns = expected.shape
    shape = {
        "noise": (rows, columns), "a channel": (rows, 1), "a row": (1, columns), "constant": (1, 1), "head": (rows, 8),
    }[kind]  # fmt: skip
    apart = np.zeros_like(expected)
    at = int(rng.integers(0, columns - 8))
    part = rng.standard_normal(shape).astype(np.float32) * np.float32(10.0 ** rng.uniform(-7, 0))
    if kind == "a row":
        apart[int(rng.integers(rows))] = part
    else:
        apart[:, slice(None) if shape[1] in (1, columns) and kind != "a channel" else slice(at, at + shape[1])] = part
    return apart


@pytest.mark.parametrize("kind", ["noise", "a channel", "a row", "constant", "head"])
def test_estimated_errors_are_within_a_tenth_in_95_of_100(kind):
    rng = np.random.default_rng(5)
    near = []
    for trial in range(200):
        expected = drawn(trial, 66, int(rng.integers(64, 256)))
        got = (expected + structured(kind, expected, rng)).astype(np.float32)
        exact = np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64))
        # Kept and read again, as sketches of a bundle are.
        kept = sketch_array(expected, "float32")
        kept = unpacked(kept.packed(), "float32", kept.shape, kept.runs)
        found = estimate(kept, sketch_array(got, "float32")).rel_l2
        near.append(abs(found / exact - 1) <= sketch.WITHIN)
    assert np.mean(near) >= sketch.CONFIDENCE
    assert BUCKETS >= sketch.LEAST_BUCKETS and sketch.ACCURACY <= sketch.WITHIN


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.swapaxes(0, 1),
        lambda x: x[::-1],
        lambda x: np.roll(x, 1, 0),
        lambda x: np.roll(x, 1, 1),
        lambda x: x[:, np.random.default_rng(0).permutation(x.shape[1])],
        lambda x: np.concatenate([x[:, 1::2], x[:, ::2]], 1),
        lambda x: -x,
    ],
)
def test_exchanged_permuted_and_shifted_values_are_seen(change):
    array = drawn(3, 96, 96)
    found = estimate(sketch_array(array, "float32"), sketch_array(change(array).copy(), "float32"))
    exact = np.linalg.norm(change(array) - array) / np.linalg.norm(array)
    assert found.rel_l2 == pytest.approx(exact, rel=0.15) and not found.equal


def test_groups_are_told_apart():
    array = drawn(4, 64, 130)
    got = array.copy()
    got[0] *= 1.01
    found = estimate(sketch_array(array, "float32", RUNS), sketch_array(got, "float32", RUNS))
    assert found.groups["noise"] == 0 and found.groups["brackets"] == pytest.approx(0.005, rel=0.2)
    assert runs_of(["a", "a", "b"], 3) == (("a", 2), ("b", 1))
    assert runs_of(list("abcdef"), 6) == runs_of(None, 6) == (("all", 6),)


def test_what_is_not_finite_and_what_is_equal_is_said():
    array = drawn(6, 30, 40)
    odd = array.copy()
    odd[1, 1] = np.inf
    whole = sketch_array(array, "float32")
    assert estimate(whole, sketch_array(odd, "float32")).mismatch == "1 values that are not finite instead of 0"
    same = estimate(whole, sketch_array(array, "float32"))
    assert same.equal and same.rel_l2 == 0 and same.mismatch is None
    assert estimate(sketch_array(0 * array, "float32"), whole).rel_l2 == np.inf
    assert sketch_array(array[:0], "float32").size == 0


def test_a_sketch_is_small_and_read_as_it_was_kept():
    array = drawn(7, 64, 3000)
    kept = sketch_array(array, "float32", (("a", 10), ("b", 20), ("c", 34)))
    assert kept.packed().nbytes <= sketch.LARGEST and len(kept.groups) == sketch.MOST_GROUPS
    read = unpacked(kept.packed(), "float32", kept.shape, kept.runs)
    np.testing.assert_allclose(read.sums, kept.sums, rtol=1e-13)
    with pytest.raises(ValueError, match="is no sketch"):
        unpacked(kept.packed(), "float32", kept.shape, (("a", 64),))
