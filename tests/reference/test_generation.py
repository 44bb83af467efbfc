"""The two entries, guidance, the Euler steps, the VAE stream and the recording."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from parity.lance.replay_torch import TorchReplay
from parity.tensors.recording import Replay
from reference.errors import ReferenceError
from reference.numerics import Numerics, attend
from reference.request import Element, Medium, Renorm
from reference.sampler import denoise, guide, time_grid
from reference.weights import load_vae

ENTRIES = ("kv_cache", "full_sequence")


def test_cached_prefix_gives_the_conditional_velocity_of_the_whole_sequence(arms, request_):
    cached, whole = (next(denoise(*arms(request_, entry), request_)) for entry in ENTRIES)
    torch.testing.assert_close(cached.velocity_cond, whole.velocity_cond, rtol=1e-4, atol=1e-5)
    # The unconditional prefix keeps conditional ids in one entry alone: far more than rounding.
    assert (cached.velocity_uncond - whole.velocity_uncond).norm() > 1e-3 * whole.velocity_uncond.norm()


def test_entries_agree_on_both_arms_without_text_to_drop(arms, request_):
    request = replace(request_, elements=(Element(Medium.TEXT, ""),))
    pair = [next(denoise(*arms(request, entry), request)) for entry in ENTRIES]
    torch.testing.assert_close(pair[0].velocity_uncond, pair[1].velocity_uncond, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pair[0].velocity_uncond, pair[0].velocity_cond)


def test_guidance_runs_inside_its_interval_only(arms, request_):
    times = time_grid(request_.num_steps, request_.timestep_shift)
    request = replace(request_, cfg_interval=(float(times[2]), float(times[1])))
    guided = [step.velocity_uncond is not None for step in denoise(*arms(request, "kv_cache"), request)]
    assert guided == [False, True, False, False]


def test_scale_one_has_no_unconditional_arm(arms, request_):
    assert arms(replace(request_, cfg_text_scale=1.0), "kv_cache")[1] is None


def test_unknown_entry_is_named(arms, request_):
    with pytest.raises(ReferenceError, match="entry 'cached'"):
        arms(request_, "cached")


@pytest.mark.parametrize("renorm", list(Renorm))
def test_renorm_bounds_the_norm(request_, renorm):
    cond, uncond = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(0))
    request = replace(request_, cfg_renorm_type=renorm, cfg_renorm_min=0.0)
    v, plain = guide(cond, uncond, request), uncond + 4.0 * (cond - uncond)
    if renorm is Renorm.GLOBAL:
        torch.testing.assert_close(v.norm(), cond.norm())
    elif renorm is Renorm.CHANNEL:
        torch.testing.assert_close(v.norm(dim=-1), torch.minimum(cond.norm(dim=-1), plain.norm(dim=-1)))
    else:
        torch.testing.assert_close(v, plain)
    floor = guide(cond, uncond, replace(request, cfg_renorm_min=1.0))
    torch.testing.assert_close(floor, plain)


def test_bfloat16_scalars_are_not_rounded(request_):
    cond, uncond = (torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    request = replace(request_, cfg_text_scale=7.3, cfg_renorm_type=Renorm.NONE)
    product = ((cond - uncond).float() * 7.3).bfloat16()
    assert torch.equal(guide(cond, uncond, request), uncond + product)


def test_euler_ends_at_zero(arms, request_):
    steps = list(denoise(*arms(request_, "kv_cache"), request_))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert steps[0].t == 1.0
    last = steps[-1]
    torch.testing.assert_close(last.x_next, last.x_t - last.velocity * last.t)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_is_causal_and_streams(checkpoint, dtype):
    vae = load_vae(checkpoint / "Wan2.2_VAE.pth", Numerics(dtype), torch.device("cpu"))
    latent = torch.randn(4, 2, 3, 48, generator=torch.Generator().manual_seed(0))
    chunks = list(vae.decode_frames(latent))
    assert [tuple(chunk.shape) for chunk in chunks] == [(3, 1, 32, 48)] + [(3, 4, 32, 48)] * 3
    assert all(chunk.dtype == torch.float32 and chunk.abs().max() <= 1 for chunk in chunks)
    changed = latent.clone()
    changed[2] += 1
    others = list(vae.decode_frames(changed))
    assert [torch.equal(a, b) for a, b in zip(chunks, others, strict=True)] == [True, True, False, False]
    # A stream knows nothing of another one.
    assert all(torch.equal(a, b) for a, b in zip(chunks[:2], vae.decode_frames(latent[:2]), strict=True))


@pytest.mark.parametrize("order", ["math", "tiled", "disturbed"])
@pytest.mark.parametrize("masked", [True, False])
def test_orders_of_rounding_agree(order, masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, heads, 8, generator=generator) for heads in (4, 2, 2))
    mask = torch.ones(40, 40, dtype=torch.bool).tril() if masked else None
    exact, found = attend(q, k, v, mask, "float64"), attend(q, k, v, mask, order)
    torch.testing.assert_close(found, exact)
    assert not torch.equal(found, exact)


def test_an_order_of_rounding_is_one_of_those_there_are():
    with pytest.raises(ReferenceError, match="attention 'flash'"):
        Numerics(attention="flash")


def test_recording_keeps_what_is_named_and_leaves_no_hook(pipeline, request_, noise):
    wanted = {"cond.step0/llm2vae", "sampler.x_t3", "text_ids", "vae.decode.chunk0/decoder"}
    calls: list[str] = []
    recording = TorchReplay(pipeline, request_, "kv_cache", Replay(noise)).record(wanted, calls.append)
    assert set(recording) == wanted
    prefixes = ["cond.prefix0", "cond.prefix1", "cond.prefix2", "uncond.prefix0", "uncond.prefix1"]
    steps = [f"{arm}.step{index}" for index in range(4) for arm in ("cond", "uncond")]
    assert calls == [*prefixes, *steps, "vae.decode.chunk0"]
    modules = (*pipeline.model.modules(), *pipeline.vae.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_recording_is_deterministic(pipeline, request_, noise):
    first, second = (TorchReplay(pipeline, request_, "full_sequence", Replay(noise)).record() for _ in range(2))
    assert list(first) == list(second)
    assert all(np.array_equal(first[name].array, second[name].array) for name in first)


@pytest.mark.parametrize("noise", [None, np.zeros((3, 48), np.float32)])
def test_noise_of_another_size_is_refused(pipeline, request_, noise):
    with pytest.raises(ReferenceError, match="the noise has shape"):
        TorchReplay(pipeline, request_, "kv_cache", Replay(noise)).record()
