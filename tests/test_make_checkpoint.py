"""scripts/make_checkpoint.py: the official layout, from a seed."""

from pathlib import Path

import make_checkpoint
import mlx.core as mx
import numpy as np
import pytest
import torch

from lance_mlx import BFLOAT16, Request, Task, Variant
from lance_mlx.checkpoint.safetensors import read_header
from lance_mlx.pipeline import load

ROOT = Path(__file__).parents[1]
ORACLE = ROOT / "oracles" / "checkpoint-a"
FILES = ("Lance_3B/model.safetensors", "Lance_3B_Video/model.safetensors", "Qwen2.5-VL-ViT/vit.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both variants at the tiny size."""
    folder = tmp_path_factory.mktemp("made") / "plain"
    assert make_checkpoint.main([str(folder), "--seed", "5"]) == 0
    return folder


def infos(path: Path) -> dict:
    return {name: tensor.info for name, tensor in read_header(path).items()}


def test_names_and_shapes_are_the_official_ones(made):
    # The embedded checkpoint goes without the position tables.
    rows = {FILES[0]: 4096, FILES[1]: 126976}
    for name in FILES:
        found = infos(made / name)
        if name in rows:
            assert found.pop("latent_pos_embed.pos_embed").shape == (rows[name], 64)
        assert found == infos(ORACLE / name)
    stored, expected = (torch.load(path / "Wan2.2_VAE.pth", weights_only=True) for path in (made, ORACLE))
    assert {name: value.shape for name, value in stored.items()} == {n: value.shape for n, value in expected.items()}
    assert all(value.std() > 0 for name, value in stored.items() if value.numel() > 1)


def test_the_official_size_has_the_official_number_of_tensors_and_bytes():
    size, numerics = make_checkpoint.SIZES["official"], make_checkpoint.Numerics("float32")
    decoder, encoder = make_checkpoint.vae_plans(size)
    with torch.device("meta"):
        vae = make_checkpoint.shapes(make_checkpoint.VAE(decoder, numerics, encoder))
    # The official file has 2,818,839,170 bytes.
    assert 4 * sum(int(np.prod(shape)) for shape in vae.values()) == 2_818_754_672
    config = make_checkpoint.llm_config(size, make_checkpoint.TOKENIZER)
    assert config["rope_scaling"]["mrope_section"] == [16, 24, 24]
    assert (config["vision_start_token_id"], config["video_token_id"]) == (151652, 151656)
    assert make_checkpoint.vit_config(size)["fullatt_block_indexes"] == [7, 15, 23, 31]
    assert 28 * size.layers + 13 == 1021 and 12 * size.vit_layers + 6 == 390


def test_the_same_seed_makes_the_same_bytes_whatever_else_is_made(made, tmp_path):
    for name, options in (("again", ["--seed", "5", "--variant", "image"]), ("other", ["--seed", "6"])):
        assert make_checkpoint.main([str(tmp_path / name), *options]) == 0
    again, other = tmp_path / "again", tmp_path / "other"
    assert not (again / "Lance_3B_Video").exists()
    for name in (FILES[0], FILES[2], "Wan2.2_VAE.pth"):
        assert (again / name).read_bytes() == (made / name).read_bytes()
        assert (other / name).read_bytes() != (made / name).read_bytes()


def test_a_tensor_depends_on_no_other(made, tmp_path):
    assert make_checkpoint.main([str(tmp_path / "one"), "--seed", "5", "--layers", "2", "--variant", "image"]) == 0
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    found = [read_header(path / FILES[0])[name].read(mx.float32) for path in (made, tmp_path / "one")]
    assert mx.array_equal(*found)


def test_bfloat16_files_hold_the_same_values_rounded(made, tmp_path):
    assert (
        make_checkpoint.main([str(tmp_path / "half"), "--seed", "5", "--variant", "image", "--dtype", "bfloat16"]) == 0
    )
    wide, half = (read_header(path / FILES[0]) for path in (made, tmp_path / "half"))
    for name, tensor in half.items():
        assert tensor.info == ("bfloat16", wide[name].shape)
        assert mx.array_equal(tensor.read(mx.bfloat16), wide[name].read(mx.float32).astype(mx.bfloat16)), name


@pytest.mark.parametrize("profile", ["plain", "outlier"])
def test_activations_stay_sane_through_all_layers_in_bfloat16(tmp_path, profile):
    folder = tmp_path / profile
    assert make_checkpoint.main([str(folder), "--profile", profile, "--layers", "36", "--variant", "image"]) == 0
    pipeline = load(folder, Variant.IMAGE, BFLOAT16)
    request = Request(Task.T2I, "a bird", height=64, width=64, num_steps=2)
    latents = None
    for step in pipeline.denoise(pipeline.prepare(request)):
        latents = np.array(step.x_next.astype(mx.float32))
    assert np.isfinite(latents).all() and 0.1 < latents.std() < 30
    pixels = np.concatenate([np.array(chunk) for chunk in pipeline.decode(request, mx.array(latents))])
    assert pixels.std() > 0.02 and (np.abs(pixels) == 1).mean() < 0.5
    scale = np.array(pipeline.model.language_model.model.layers[0].input_layernorm.weight.astype(mx.float32))
    assert (np.abs(scale).max() > 4) == (profile == "outlier")


def test_bad_input_writes_nothing(made, tmp_path, capsys):
    assert make_checkpoint.main([str(made)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert make_checkpoint.main([str(tmp_path / "a"), "--hidden", "100"]) == 2
    assert "must be a multiple of 16" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
