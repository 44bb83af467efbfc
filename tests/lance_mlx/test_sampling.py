"""Schedule, guidance and the sampler."""

import io
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_mlx import BFLOAT16, FLOAT32, Entry, LanceError, Renorm, Request, Task, Visual, VisualKind
from lance_mlx.pipeline import load
from lance_mlx.sampling import flow, text
from lance_mlx.sampling.guidance import guided_velocity, is_guided
from lance_mlx.sampling.noise import draw_noise, read_noise
from lance_mlx.sampling.schedule import timesteps

REQUEST = Request(Task.T2I, "a bird", 32, 32)


@given(st.integers(1, 200), st.floats(0.1, 20))
def test_times_fall_from_one_to_zero(num_steps, shift):
    times = timesteps(num_steps, shift)
    assert times.dtype == np.float32
    assert len(times) == num_steps + 1
    assert abs(times[0] - 1) < 1e-6
    assert times[-1] == 0
    assert (np.diff(times) < 0).all()
    u = np.linspace(1, 0, num_steps + 1)
    assert np.allclose(times, shift * u / (1 + (shift - 1) * u), atol=1e-6)


def test_the_launchers_guidance_interval_leaves_out_the_last_four_of_thirty_steps():
    guided = [is_guided(t, REQUEST) for t in timesteps(30, 3.5)[:-1]]
    assert guided == [True] * 26 + [False] * 4


def test_the_interval_is_open_below_and_closed_above():
    request = replace(REQUEST, guidance_interval=(0.4, 0.8))
    assert [is_guided(t, request) for t in (np.float32(0.4), 0.41, np.float32(0.8), 0.81)] == [False, True, True, False]


def test_a_scale_of_one_guides_nothing():
    assert not is_guided(0.7, replace(REQUEST, guidance_scale=1.0))


@pytest.mark.parametrize("renorm", Renorm)
@pytest.mark.parametrize("least", [0.0, 0.9])
def test_guidance_is_upstreams_formula(renorm, least):
    cond, uncond = np.random.default_rng(0).normal(size=(2, 6, 48)).astype(np.float32)
    request = replace(REQUEST, guidance_renorm=renorm, guidance_renorm_min=least, guidance_scale=3.3)
    expected = uncond + 3.3 * (cond - uncond)
    axis = {Renorm.GLOBAL: None, Renorm.CHANNEL: -1}.get(renorm, "none")
    if axis != "none":
        length = np.linalg.norm(cond, axis=axis, keepdims=True) / np.linalg.norm(expected, axis=axis, keepdims=True)
        expected = expected * np.clip(length, least, 1)
    assert np.allclose(guided_velocity(mx.array(cond), mx.array(uncond), request), expected, atol=1e-5)


@pytest.mark.parametrize("renorm", [Renorm.GLOBAL, Renorm.CHANNEL])
def test_a_long_video_is_scaled_as_exactly_as_a_small_picture(renorm):
    cond, uncond = np.random.default_rng(0).normal(size=(2, 24576, 48)).astype(np.float32)
    request = replace(REQUEST, guidance_renorm=renorm, guidance_renorm_min=0.0)
    guided = cond.astype(np.float64) * request.guidance_scale + uncond * (1 - request.guidance_scale)
    axis = None if renorm is Renorm.GLOBAL else -1
    expected = guided * (
        # NumPy's norm of float32 adds up in float32, in an order that hangs on the processor.
        np.linalg.norm(cond.astype(np.float64), axis=axis, keepdims=True)
        / np.linalg.norm(guided, axis=axis, keepdims=True)
    )
    got = np.array(guided_velocity(mx.array(cond), mx.array(uncond), request))
    assert np.linalg.norm(got - expected) < 1e-6 * np.linalg.norm(expected)


def test_the_sampler_is_a_generator_that_takes_euler_steps(pipeline):
    request = Request(Task.T2V, "a bird", 32, 32, 5, num_steps=3, guidance_interval=(0.9, 1.0))
    times = timesteps(3, request.timestep_shift)
    previous = draw_noise(request, pipeline.model.numerics)
    for index, step in enumerate(pipeline.denoise(pipeline.prepare(request))):
        assert mx.array_equal(step.state.x_t, previous)
        assert (step.velocity_uncond is None) == (times[index] <= 0.9)
        expected = step.state.x_t - step.velocity * float(times[index] - times[index + 1])
        assert mx.allclose(step.x_next, expected, atol=1e-6)
        previous = step.x_next
    assert index == 2


@pytest.mark.parametrize("entry", Entry)
@pytest.mark.parametrize("numerics", [FLOAT32, BFLOAT16], ids=lambda numerics: numerics.name)
@pytest.mark.parametrize("task", [Task.T2I, Task.IMAGE_EDIT, Task.I2V, Task.SUBJECT])
def test_both_arms_in_one_pass_are_what_they_are_apart(checkpoint, media, monkeypatch, task, numerics, entry):
    source = (Visual(str(media / "logo.png"), VisualKind.IMAGE),) if task.takes else ()
    size = {"vae_resolution": 64, "vit_resolution": 56} if task.takes else {}
    if not task.size_from_source:
        size |= {"height": 48, "width": 80}
    size["num_frames"] = 5 if task.is_for_video else 1
    request = Request(
        task, "a red bird", visuals=source, entry=entry, num_steps=3, guidance_interval=(0.8, 1.0), **size
    )
    pipeline = load(checkpoint, request.variant, numerics, looks=bool(source))
    prepared, passes, original = pipeline.prepare(request), [], flow.velocities_of_pass

    def watched(model, arms, state):
        passes.append([arm.name for arm in arms])
        return original(model, arms, state)

    monkeypatch.setattr(flow, "velocities_of_pass", watched)
    together = list(pipeline.denoise(prepared))
    assert passes == [["cond", "uncond"]] * 2 + [["cond"]]
    for name in ("_JOINED_ON_CPU", "_JOINED_ON_GPU"):
        monkeypatch.setattr(flow, name, len(together[0].x_next) - 1)
    passes.clear()
    apart = list(pipeline.denoise(prepared))
    assert passes == [["cond"], ["uncond"]] * 2 + [["cond"]]
    # The arms are not alike, so that exchanging them would show.
    cond, uncond = apart[0].velocity_cond, apart[0].velocity_uncond
    # Products of more rows may add up in another order.
    bound = 1e-5 if numerics is FLOAT32 else 0.015
    for one, other in zip(together, apart, strict=True):
        assert (one.velocity_uncond is None) == (other.velocity_uncond is None)
        for name in ("velocity_cond", "velocity_uncond", "x_next"):
            a, b = getattr(one, name), getattr(other, name)
            assert a is None or mx.linalg.norm((a - b).astype(mx.float32)) <= bound * mx.linalg.norm(b)
    assert mx.linalg.norm((cond - uncond).astype(mx.float32)) > 2 * bound * mx.linalg.norm(cond)


def test_noise_of_another_size_is_refused(pipeline):
    with pytest.raises(LanceError, match=r"the noise has shape \[5, 48\], but 32x32 and 5 frames need \[8, 48\]"):
        next(pipeline.denoise(pipeline.prepare(Request(Task.T2V, "a bird", 32, 32, 5)), mx.zeros((5, 48))))


def test_the_seed_decides_the_noise(pipeline):
    first, again, other = (draw_noise(replace(REQUEST, seed=seed), pipeline.model.numerics) for seed in (1, 1, 2))
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, other)


def test_noise_files_are_read_by_name_or_when_they_hold_one_tensor(tmp_path, oracles):
    assert read_noise(oracles / "t2i-fp32-kv" / "taps.safetensors").shape == (24, 48)
    np.save(tmp_path / "noise.npy", np.ones((4, 48), np.float32))
    assert read_noise(tmp_path / "noise.npy").shape == (4, 48)


def _npy() -> bytes:
    np.save(file := io.BytesIO(), np.zeros((4, 48), np.float32))
    return file.getvalue()


SMALL = _npy()


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("absent.npy", None, "does not exist"),
        ("noise.txt", b"1 2 3", "must be .npy or .safetensors"),
        ("broken.npy", b"not an array", "is not readable"),
        ("broken.safetensors", b"\x10\x00", "is not readable"),
        ("short.npy", SMALL[:-100], "is not readable"),
        ("lying.npy", SMALL.replace(b"(4, 48), }         ", b"(400000000, 48), } "), "is not readable"),
    ],
)
def test_unreadable_noise_is_refused(tmp_path, name, content, line):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LanceError, match=line):
        read_noise(tmp_path / name)


def test_noise_that_is_ambiguous_not_float_or_not_finite_is_refused(tmp_path):
    np.save(tmp_path / "integers.npy", np.ones((4, 48), np.int32))
    np.save(tmp_path / "nan.npy", np.full((4, 48), np.nan, np.float32))
    mx.save_safetensors(str(tmp_path / "two.safetensors"), {"a": mx.zeros(1), "b": mx.zeros(1)})
    for name, line in (("integers.npy", "floating point"), ("nan.npy", "NaN"), ("two.safetensors", "2 tensors")):
        with pytest.raises(LanceError, match=line):
            read_noise(tmp_path / name)


def test_a_token_is_begun_before_the_one_before_is_read():
    begun = []

    def tokens():
        for token in range(3):
            begun.append(token)
            yield mx.array(token)

    assert [(token.item(), len(begun)) for token in text._started_early(tokens())] == [(0, 2), (1, 3), (2, 3)]
