"""What must be equal: weights in any layout, integers in the order that matters, visuals up to a drawn shift."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from parity.comparison.exact import (
    ORDER,
    ExactMismatch,
    check_exact,
    check_preprocessed,
    check_weights,
    describe,
    rounding_of_times,
)
from parity.lance.faults import CATALOGUE, Target
from parity.lance.ports import oracle_weights
from parity.tensors.recording import ExactInputs, Observed, Tap

# Together they hold the ViT, the VAE's encoder, i2v's and the answering head.
LOADED = ("image_edit-fp32-nokv", "x2t_image-bf16-kv")


class Given:
    """A subject that has these parameters."""

    partial = False

    def __init__(self, weights):
        self._weights = weights

    def weights(self):
        yield from self._weights.items()


def names(mismatches):
    return [mismatch.tap for mismatch in mismatches]


# Weights.


@pytest.mark.parametrize("name", LOADED)
def test_all_weights_of_lance_mlx_are_those_of_the_checkpoint(oracle_of, subject_of, name):
    oracle = oracle_of(name)
    checked = check_weights(subject_of(name), oracle)
    assert checked.mismatches == []
    assert checked.compared == len(dict(oracle_weights(oracle))) > 200
    # The sum is over the oracle's: the reference's own is the same.
    assert check_weights(subject_of(name, "reference"), oracle).checksum == checked.checksum


@pytest.mark.parametrize("fault", ["weight-transposed", "bias-missing", "vae-kernel-reversed-in-time", "weight-zero"])
def test_a_wrong_weight_is_named_replaced_and_left_as_it_was(oracle_of, subject_of, fault):
    oracle, subject = oracle_of("image_edit-fp32-nokv"), subject_of("image_edit-fp32-nokv")
    chosen = CATALOGUE[fault]
    with chosen.patch(Target(subject.pipeline)):
        broken = check_weights(subject, oracle)
        assert len(broken.mismatches) == 1
        (mismatch,) = broken.mismatches
        assert mismatch.tap.startswith("weights/") and chosen.component in mismatch.tap
        assert mismatch.error is not None and mismatch.error > 1e-3 and mismatch.detail.count("\n") == 0
        name = mismatch.tap.removeprefix("weights/")
        with subject.with_weights({name: mismatch.expected}):
            assert check_weights(subject, oracle).mismatches == []
        # Whatever passes: an exception leaves the broken weight too.
        with pytest.raises(KeyError), subject.with_weights({name: mismatch.expected}):
            raise KeyError
        assert names(check_weights(subject, oracle).mismatches) == [mismatch.tap]
    assert check_weights(subject, oracle).mismatches == []


def test_replacing_weights_gives_back_the_very_arrays(subject_of):
    pipeline = subject_of("image_edit-fp32-nokv").pipeline
    given = {
        "vae2llm.weight": np.ones_like(np.array(pipeline.model["vae2llm"].weight)),
        "vae.encoder.conv1.weight": np.zeros(_torch_shape(pipeline.vae["encoder"]["conv1"].weight), np.float32),
    }

    def held():
        return {name: np.array(array) for name, array in tree_flatten(pipeline.model.parameters())} | {
            f"vae.{name}": np.array(array) for name, array in tree_flatten(pipeline.vae.parameters())
        }

    before = held()
    with subject_of("image_edit-fp32-nokv").with_weights(given):
        inside = held()
        changed = {name for name in before if not np.array_equal(before[name], inside[name])}
        assert changed == set(given)
    after = held()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def _torch_shape(weight: mx.array) -> tuple[int, ...]:
    out, *sides, channels = weight.shape
    return (out, channels, *sides)


def test_weights_that_are_missing_or_of_another_shape_are_breaches(oracle_of):
    oracle = oracle_of("t2i-fp32-kv")
    weights = dict(oracle_weights(oracle))
    name, other = "vae2llm.weight", "llm2vae.bias"
    given = {key: array for key, array in weights.items() if key != name}
    given |= {other: given[other][:-1], "only.ours": np.zeros(1, np.float32)}
    checked = check_weights(Given(given), oracle)
    assert sorted(names(checked.mismatches)) == [f"weights/{other}", f"weights/{name}"]
    shaped, missing = sorted(checked.mismatches, key=lambda mismatch: mismatch.tap)
    assert shaped.error is None and "has shape [47], the oracle's has [48]" in shaped.detail
    assert missing.got is None and missing.detail == f"{name} is not among the parameters"
    assert checked.compared == len(weights) - 1


def test_one_bit_of_one_weight_is_seen(oracle_of):
    oracle = oracle_of("t2i-fp32-kv")
    weights = {key: array.copy() for key, array in oracle_weights(oracle)}
    assert check_weights(Given(weights), oracle).mismatches == []
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    weights[name].view(np.uint32)[3, 5] ^= 1
    assert names(check_weights(Given(weights), oracle).mismatches) == [f"weights/{name}"]


def test_a_scale_with_axes_of_length_1_is_the_same_scale(oracle_of):
    oracle = oracle_of("t2i-fp32-kv")
    weights = dict(oracle_weights(oracle))
    name = next(key for key, array in weights.items() if key.startswith("vae.") and array.ndim > 1 and
                array.size == array.shape[0])  # fmt: skip
    weights[name] = weights[name].reshape(-1)
    assert check_weights(Given(weights), oracle).mismatches == []


# Integers and times.


def exact_of(**arrays):
    exact = {f"inputs/{name.replace('__', '.')}": np.asarray(array) for name, array in arrays.items()}
    return ExactInputs((), None, exact)


def observed(failures=None, **arrays):
    exact = {f"inputs/{name.replace('__', '.')}": Tap(array, str(array.dtype)) for name, array in arrays.items()}
    return Observed({}, exact, failures or {})


def ints(*values):
    return np.array(values, np.int32)


def test_what_is_equal_is_no_breach():
    arrays = {"text_ids": ints(1, 2), "position_ids__cond": ints(0, 1)}
    assert list(check_exact(exact_of(**arrays), observed(**arrays))) == []
    # What a run has no use for, such as an arm that never runs, is not computed; what has no oracle is not compared.
    assert list(check_exact(exact_of(**arrays), observed(text_ids=ints(1, 2), answer=ints(7)))) == []


def test_breaches_come_in_the_order_in_which_a_run_needs_them():
    right = {name.removeprefix("inputs/").replace(".", "__"): ints(1, 2) for name in ORDER if name != "inputs/request"}
    wrong = dict.fromkeys(reversed(right), ints(1, 3))
    mismatches = list(check_exact(exact_of(**right), observed(**wrong)))
    assert names(mismatches) == [name for name in ORDER if name != "inputs/request"]
    assert all(mismatch.error == pytest.approx(1 / 5**0.5) for mismatch in mismatches)
    assert mismatches[0].detail == "text_ids is 3 at [1] where the oracle has 2; 1 of 2 values differ"


def test_what_a_function_raised_is_the_breach_in_its_place():
    failures = {"inputs/position_ids.cond": "ValueError: no", "inputs/request": "task 'i2v' is not supported"}
    right = {"text_ids": ints(1), "position_ids__cond": ints(2), "timesteps": ints(3)}
    mismatches = list(check_exact(exact_of(**right), observed(failures, timesteps=ints(4))))
    assert [(mismatch.tap, mismatch.detail) for mismatch in mismatches[:2]] == [
        ("inputs/request", "task 'i2v' is not supported"),
        ("inputs/position_ids.cond", "ValueError: no"),
    ]
    assert mismatches[0].expected is None and mismatches[1].got is None and mismatches[1].error is None
    assert names(mismatches[2:]) == ["inputs/timesteps"]


def test_a_sequence_of_another_length_is_a_breach_without_a_number():
    mismatches = list(check_exact(exact_of(text_ids=ints(1, 2)), observed(text_ids=ints(1, 2, 3))))
    assert mismatches[0].error is None and "has shape [3], the oracle's has [2]" in mismatches[0].detail


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 8), st.integers(1, 5))
def test_the_first_value_that_differs_is_told(values, index, amount):
    index %= len(values)
    expected, got = ints(*values), ints(*values)
    got[index:] += amount
    words = describe("inputs/text_ids", expected, got)
    assert words.startswith(f"text_ids is {got[index]} at [{index}] where the oracle has {expected[index]};")
    assert f"{len(values) - index} of {len(values)} values differ" in words
    assert describe("inputs/text_ids", expected, expected) == "text_ids is equal"


def test_the_error_of_zeros_has_no_number():
    assert ExactMismatch("inputs/guided", ints(0, 0), ints(0, 1), "").error is None


# Visuals: of some upstream draws where they are cut.

DRAWN = ("vae_pixels0", "vit_patches0")


def picture(t=2, h=6, w=8, seed=0):
    return np.random.default_rng(seed).standard_normal((3, t, 16 * h, 16 * w)).astype(np.float32)


def shifted(frames, down, right):
    """The same scene one window further, with new pixels at the border."""
    moved = np.roll(frames, (down, right), (-2, -1))
    fresh = np.random.default_rng(9).standard_normal(frames.shape).astype(np.float32)
    edge = np.ones(frames.shape[-2:], bool)
    edge[max(down, 0) : frames.shape[-2] + min(down, 0), max(right, 0) : frames.shape[-1] + min(right, 0)] = False
    return np.where(edge, fresh, moved)


def patches_of(frames):
    """Frames [2t, 3, 14h, 14w] as the ViT takes them: [t h w, 1176], four neighbours after another."""
    double, _, height, width = frames.shape
    t, h, w = double // 2, height // 14, width // 14
    blocks = frames.reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    return blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)


def seen(t=1, h=4, w=6, seed=0):
    return np.random.default_rng(seed).standard_normal((2 * t, 3, 14 * h, 14 * w)).astype(np.float32)


def inputs_of(pixels, patches, grid=(1, 4, 6)):
    return {
        "vae_pixels0": Tap(pixels, "float32"),
        "vit_patches0": Tap(patches, "float32"),
        "vit_video_grid_thw": Tap(np.array([grid], np.int32), "int32"),
    }


@pytest.mark.parametrize("down", [-1, 0, 1])
@pytest.mark.parametrize("right", [-1, 0, 1])
def test_a_picture_shifted_by_a_pixel_is_as_good(down, right):
    pixels, looked = picture(), seen()
    computed = {
        "vae_pixels0": shifted(pixels, down, right),
        "vit_patches0": patches_of(shifted(looked, down, right)),
    }
    inputs = inputs_of(pixels, patches_of(looked))
    assert list(check_preprocessed(computed, inputs, DRAWN)) == []
    # What upstream does not draw is no shift's matter.
    assert bool(list(check_preprocessed(computed, inputs))) == bool(down or right)


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_what_lies_behind_a_shift_is_a_picture_too(value):
    pixels = picture()
    moved = shifted(pixels, 1, 0)
    moved[..., 0, :] = value
    inputs = inputs_of(pixels, patches_of(seen()))
    assert names(check_preprocessed({"vae_pixels0": moved}, inputs, DRAWN)) == ["inputs/vae_pixels0"]


def test_a_border_is_part_of_the_picture():
    pixels = picture()
    framed = pixels.copy()
    framed[..., 0, :] = framed[..., -1] = -1
    inputs = inputs_of(pixels, patches_of(seen()))
    for drawn in ((), DRAWN):
        assert names(check_preprocessed({"vae_pixels0": framed}, inputs, drawn)) == ["inputs/vae_pixels0"]


@pytest.mark.parametrize("change", [(2, 0), (0, -2), (1, 2)])
def test_a_picture_shifted_by_more_is_another(change):
    pixels, looked = picture(), seen()
    computed = {
        "vae_pixels0": shifted(pixels, *change),
        "vit_patches0": patches_of(shifted(looked, *change)),
    }
    mismatches = list(check_preprocessed(computed, inputs_of(pixels, patches_of(looked)), DRAWN))
    assert names(mismatches) == ["inputs/vae_pixels0", "inputs/vit_patches0"]
    assert mismatches[0].error > 0.1


def test_other_pixels_sizes_and_orders_are_breaches():
    pixels, looked = picture(), seen()
    inputs = inputs_of(pixels, patches_of(looked))

    def found(**computed):
        return names(check_preprocessed(computed, inputs))

    assert found(vae_pixels0=pixels * np.float32(1.001)) == ["inputs/vae_pixels0"]
    assert found(vae_pixels0=pixels[..., :-16]) == ["inputs/vae_pixels0"]
    assert found(vae_pixels0=pixels[:, ::-1].copy()) == ["inputs/vae_pixels0"]
    # Patches in reading order, not four neighbours after another.
    reading = looked.reshape(1, 2, 3, 4, 14, 6, 14).transpose(0, 3, 5, 2, 1, 4, 6).reshape(24, -1)
    assert found(vit_patches0=reading) == ["inputs/vit_patches0"]
    assert found(vit_patches0=patches_of(looked)[:-4]) == ["inputs/vit_patches0"]
    # Nothing is said of what upstream was not given, or where nothing is computed.
    assert found(vae_pixels7=pixels) == [] and list(check_preprocessed(None, inputs)) == []


def test_lance_mlx_prepares_the_embedded_bundles_visuals_as_upstream_did(oracle_of, subject_of):
    for name, count in (("image_edit-fp32-nokv", 2), ("x2t_image-bf16-kv", 1)):
        oracle, subject = oracle_of(name), subject_of(name)
        computed = subject.preprocessed(oracle.bundle.path.parent)
        assert len(computed) == count
        assert list(check_preprocessed(computed, oracle.bundle.inputs)) == []
        with CATALOGUE["visuals-resized-bilinearly"].patch(Target(subject.pipeline)):
            otherwise = subject.preprocessed(oracle.bundle.path.parent)
        assert len(list(check_preprocessed(otherwise, oracle.bundle.inputs))) == count
    assert subject_of("t2i-fp32-kv").preprocessed(oracle.bundle.path.parent) is None
    # Without the media there is nothing to prepare.
    assert subject_of("x2t_image-bf16-kv").preprocessed(oracle.bundle.path) is None


def test_times_may_be_off_by_rounding_alone():
    tau = np.linspace(1, 0, 31, dtype=np.float32)
    times = np.float32(3.5) * tau / (1 + np.float32(2.5) * tau)
    near = times.copy()
    near[7] = np.nextafter(near[7], np.float32(1))
    exact = exact_of(timesteps=times)
    assert list(check_exact(exact, observed(timesteps=near))) == []
    assert rounding_of_times(exact, observed(timesteps=near)) == (
        "1 of 31 timesteps are off by up to 6e-08, as rounding makes them"
    )
    assert not rounding_of_times(exact, observed(timesteps=times)) and not rounding_of_times(exact, observed())
    for wrong in (
        times + np.float32(1e-6),
        times[:-1],
        times.astype(np.float16).astype(np.float32),
        np.full_like(times, np.nan),
    ):
        assert names(check_exact(exact, observed(timesteps=wrong))) == ["inputs/timesteps"]
        assert not rounding_of_times(exact, observed(timesteps=wrong))
    # Integers are equal or are not.
    assert names(check_exact(exact_of(guided=ints(1, 0)), observed(guided=ints(1, 1)))) == ["inputs/guided"]
