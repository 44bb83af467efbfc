"""The VAE encoder, the vision tower, and generating from visuals."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from parity.lance.replay_torch import TorchReplay
from reference.errors import ReferenceError
from reference.model import Pipeline
from reference.numerics import Numerics
from reference.vae import Posterior
from reference.vae_layers import pack, unpack
from reference.weights import load_vae

TASKS = ("i2v", "image_edit", "video_edit", "idip")


def pixels(frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoding_is_causal_and_streams(checkpoint, dtype):
    vae = load_vae(checkpoint / "Wan2.2_VAE.pth", Numerics(dtype), torch.device("cpu"))
    given = pixels(13)
    parts = list(vae.encode_frames(given))
    assert [tuple(part.mean.shape) for part in parts] == [(1, 48, 1, 2, 3)] * 4
    assert all(part.mean.dtype == part.logvar.dtype == torch.float32 for part in parts)
    changed = given.clone()
    changed[:, 5:] *= -1
    others = list(vae.encode_frames(changed))
    assert [torch.equal(a.mean, b.mean) for a, b in zip(parts, others, strict=True)] == [True, True, False, False]
    # What makes no latent frame of its own is left out, and a stream knows nothing of another one.
    shorter = list(vae.encode_frames(given[:, :8]))
    assert [torch.equal(a.logvar, b.logvar) for a, b in zip(parts, shorter, strict=False)] == [True, True]
    assert len(shorter) == 2


def test_a_sample_is_the_mean_and_scaled_noise():
    mean, logvar, eps = torch.randn(3, 1, 48, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    latent = Posterior(mean, logvar).sample(eps)
    assert latent.shape == (2, 3, 4, 48)
    torch.testing.assert_close(
        latent[1, 2, 3], mean[0, :, 1, 2, 3] + (logvar / 2).exp()[0, :, 1, 2, 3] * eps[0, :, 1, 2, 3]
    )
    with pytest.raises(ReferenceError, match="the noise has shape"):
        Posterior(mean, logvar).sample(eps[:, :, :1])


def test_packing_is_undone():
    given = pixels(2)[None]
    packed = pack(given)
    assert packed.shape == (1, 12, 2, 16, 24)
    # Channels count colours, then columns, then rows.
    assert packed[0, 4 + 2 * 1 + 0, 0, 5, 7] == given[0, 1, 0, 10, 15]
    assert torch.equal(unpack(packed), given)


def test_a_vae_without_encoder_only_decodes(checkpoint, tmp_path):
    stored = torch.load(checkpoint / "Wan2.2_VAE.pth", weights_only=True)
    path = tmp_path / "vae.pth"
    torch.save({name: x for name, x in stored.items() if not name.startswith(("encoder.", "conv1."))}, path)
    vae = load_vae(path, Numerics(), torch.device("cpu"))
    with pytest.raises(ReferenceError, match="no encoder"):
        next(vae.encode_frames(pixels(1)))
    stored.pop("encoder.middle.1.proj.bias")
    torch.save(stored, path)
    with pytest.raises(ReferenceError, match="lacks tensor encoder.middle.1.proj.bias"):
        load_vae(path, Numerics(), torch.device("cpu"))


@pytest.mark.parametrize("shape", [(3, 1, 30, 32), (1, 1, 32, 32), (3, 0, 32, 32)])
def test_pixels_of_no_latent_are_refused(pipeline, shape):
    with pytest.raises(ReferenceError, match="pixels of shape"):
        next(pipeline.vae.encode_frames(torch.zeros(shape)))


def test_windows_are_squares_of_a_frame(pipeline):
    # 112 pixels are four tokens; 5 x 6 tokens make four windows, two of them cut off.
    tokens, window, frame = pipeline.vit_model.windows([(2, 10, 12), (1, 4, 4)], torch.device("cpu"))
    assert sorted(tokens.tolist()) == list(range(64))
    expected = [
        [r * 6 + c for r in rows for c in columns] for rows in ((0, 1, 2, 3), (4,)) for columns in (range(4), (4, 5))
    ]
    lengths = [len(part) for part in expected]
    assert [part.tolist() for part in tokens[:30].split(lengths)] == expected
    assert [len(set(part.tolist())) for part in window[:30].split(lengths)] == [1] * 4
    assert frame.tolist() == [0] * 30 + [1] * 30 + [2] * 4
    assert window.unique().numel() == 9


def test_patches_see_their_window_until_a_full_block(pipeline):
    tower = pipeline.vit_model
    patches = torch.randn(1 * 10 * 12, 1176, generator=torch.Generator().manual_seed(0))
    changed = patches.clone()
    changed[0] += 1
    seen = {}
    for given in (patches, changed):
        hooks = [
            block.register_forward_hook(lambda module, args, out, i=i: seen.setdefault(i, []).append(out))
            for i, block in enumerate(tower.blocks)
        ]
        tower(given, [(1, 10, 12)])
        for hook in hooks:
            hook.remove()
    moved = [(pair[0] != pair[1]).any(1).int().tolist() for _, pair in sorted(seen.items())]
    full = min(tower.config.fullatt_block_indexes)
    assert full > 0 and moved[full - 1] == [1] * 64 + [0] * 56
    assert all(moved[full])


def test_visuals_do_not_see_each_other(pipeline):
    grids = [(1, 10, 12), (3, 4, 6)]
    patches = [torch.randn(t * h * w, 1176, generator=torch.Generator().manual_seed(t)) for t, h, w in grids]
    together = pipeline.vit_model(torch.cat(patches), grids)
    apart = [pipeline.vit_model(x, [grid]) for x, grid in zip(patches, grids, strict=True)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)
    # Nor do the frames of a video.
    frame = pipeline.vit_model(patches[1][24:48], [(1, 4, 6)])
    torch.testing.assert_close(apart[1][6:12], frame, rtol=1e-5, atol=1e-5)
    with pytest.raises(ReferenceError, match="do not fill"):
        pipeline.vit_model(patches[0], grids)


def test_the_lance_file_wins_over_the_vit_file(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "Lance_3B" / "model.safetensors"
    tensors = load_file(path)
    own = torch.full_like(load_file(tmp_path / "Qwen2.5-VL-ViT" / "vit.safetensors")["merger.mlp.2.bias"], 3.0)
    save_file(tensors | {"vit_model.merger.mlp.2.bias": own}, path)
    tower = Pipeline.load(tmp_path, "Lance_3B", Numerics()).vit_model
    first = Pipeline.load(checkpoint, "Lance_3B", Numerics()).vit_model
    assert torch.equal(tower.merger.mlp[2].bias, own)
    assert torch.equal(tower.merger.mlp[2].weight, first.merger.mlp[2].weight)
    for stray, words in (
        ("merger.mlp.2.bia", "unexpected tensor merger.mlp.2.bia"),
        ("merger.mlp.0.bias", "has shape"),
    ):
        save_file(tensors | {f"vit_model.{stray}": own}, path)
        with pytest.raises(ReferenceError, match=words):
            _ = Pipeline.load(tmp_path, "Lance_3B", Numerics()).vit_model
    shutil.rmtree(tmp_path / "Qwen2.5-VL-ViT")
    with pytest.raises(ReferenceError, match="Qwen2.5-VL-ViT"):
        _ = Pipeline.load(tmp_path, "Lance_3B", Numerics()).vit_model


@pytest.mark.parametrize(
    ("task", "count"), [(task, count) for task in TASKS for count in (1, 2) if (task, count) != ("i2v", 2)]
)
def test_entries_agree_on_the_conditional_velocity(pipeline, asked, task, count):
    request, replay = asked(task, count, cfg_renorm_type="none")
    cached, whole = (TorchReplay(pipeline, request, entry, replay).record() for entry in ("kv_cache", "full_sequence"))
    made = len(cached["mse_loss_indexes"].array)
    ours, theirs = cached["cond.step0/llm2vae"].array[1:-1][-made:], whole["velocity_call0"].array
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert cached["pixels"].array.shape[2:] == tuple(cached["video_sizes"].array[-1, 1:])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("entry", ["kv_cache", "full_sequence"])
def test_given_latents_stay_as_they_were_encoded(pipeline, asked, task, entry):
    request, replay = asked(task)
    recording = TorchReplay(pipeline, request, entry, replay).record()
    still = recording["sampler.timestep1"].array == 0
    encoded = np.concatenate([recording[f"vae.latent{i}"].array.reshape(-1, 48) for i in range(len(replay.eps))])
    assert still.sum() == len(still) - len(recording["mse_loss_indexes"].array) > 0
    for name in ("sampler.x_init", "sampler.x_t1"):
        np.testing.assert_array_equal(recording[name].array[still], encoded[still])
    np.testing.assert_array_equal(recording["sampler.x_init"].array[~still], replay.noise[~still])


def test_the_unconditional_arm_keeps_the_visuals(pipeline, asked):
    request, replay = asked("image_edit")
    calls: list[str] = []
    TorchReplay(pipeline, request, "kv_cache", replay).record(set(), calls.append)
    assert calls[:3] == ["vit_model0", "vae.encode0.chunk0", "vae.encode1.chunk0"]
    assert [name for name in calls if "prefix" in name] == [
        *(f"cond.prefix{i}" for i in range(5)),
        *(f"uncond.prefix{i}" for i in range(4)),
    ]


@pytest.mark.parametrize("field", ["vae_pixels", "eps", "vit_patches", "vit_grids"])
def test_a_replay_must_hold_what_the_task_needs(pipeline, asked, field):
    request, replay = asked("image_edit")
    with pytest.raises(ReferenceError, match="needs 2 vae_pixels and eps and 1"):
        TorchReplay(pipeline, request, "kv_cache", replace(replay, **{field: ()})).record()


def test_a_placeholder_of_another_size_is_refused(pipeline, asked):
    request, replay = asked("image_edit")
    pixels, eps = replay.vae_pixels[1][:, :, :16], replay.eps[1][..., :1, :]
    with pytest.raises(ReferenceError, match="the pixels make latents"):
        TorchReplay(
            pipeline,
            request,
            "kv_cache",
            replace(replay, vae_pixels=(replay.vae_pixels[0], pixels), eps=(replay.eps[0], eps)),
        ).record()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_head": 2}, "unknown key 'num_head'"),
        ({"depth": None}, "'depth' is missing"),
        ({"num_heads": 3}, "not a multiple of four times num_heads"),
        ({"window_size": 100}, "window_size"),
        ({"fullatt_block_indexes": [9]}, "fullatt_block_indexes"),
        ({"out_hidden_size": 32}, "out_hidden_size is 32"),
    ],
)
def test_configuration_of_the_tower(checkpoint, tmp_path, changes, words):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "Qwen2.5-VL-ViT" / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(ReferenceError, match=words):
        _ = Pipeline.load(tmp_path, "Lance_3B", Numerics()).vit_model
