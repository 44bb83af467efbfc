"""Loading: every tensor is accounted for, and damage is named."""

import os
import sys

import mlx.core as mx
import numpy as np
import pytest
import torch

from lance_mlx import FLOAT32, LanceError, Variant
from lance_mlx.checkpoint.convert import convert_vae
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.pth import read_pth
from lance_mlx.pipeline import load


def refusal(path) -> str:
    with pytest.raises(LanceError) as error:
        load(path, Variant.IMAGE, FLOAT32)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_tensor_is_named(checkpoint_copy):
    checkpoint_copy.edit_weights(llm2vae__bias=None)
    assert "tensor 'llm2vae.bias' is missing" in refusal(checkpoint_copy.path)


def test_an_extra_tensor_is_named(checkpoint_copy):
    checkpoint_copy.edit_weights(connector__weight=mx.zeros((2, 2)))
    assert "unexpected tensor 'connector.weight'" in refusal(checkpoint_copy.path)


def test_a_misshapen_tensor_is_named(checkpoint_copy):
    checkpoint_copy.edit_weights(llm2vae__bias=mx.zeros(47))
    assert "tensor 'llm2vae.bias' has shape [47], expected [48]" in refusal(checkpoint_copy.path)


def test_an_integer_tensor_is_named(checkpoint_copy):
    checkpoint_copy.edit_weights(llm2vae__bias=mx.zeros(48, mx.int32))
    assert "tensor 'llm2vae.bias' is int32" in refusal(checkpoint_copy.path)


def test_the_stored_position_table_is_never_read(checkpoint_copy, checkpoint):
    checkpoint_copy.edit_weights(latent_pos_embed__pos_embed=mx.zeros((1, 1)))
    tables = [
        load(path, Variant.IMAGE, FLOAT32).model.latent_pos_embed((1, 2, 2))
        for path in (checkpoint_copy.path, checkpoint)
    ]
    assert mx.array_equal(*tables)


def test_a_truncated_file_is_named(checkpoint_copy):
    path = checkpoint_copy.variant / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    assert "model.safetensors" in refusal(checkpoint_copy.path)


def test_missing_files_are_named(checkpoint_copy):
    vae = checkpoint_copy.path / "Wan2.2_VAE.pth"
    vae.rename(vae.with_suffix(".away"))
    assert "the VAE belongs there" in refusal(checkpoint_copy.path)
    vae.with_suffix(".away").rename(vae)
    assert "holds Lance_3B and this needs Lance_3B_Video" in str(
        pytest.raises(LanceError, find_checkpoint, checkpoint_copy.path, Variant.VIDEO).value
    )
    (checkpoint_copy.variant / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(checkpoint_copy.path)
    (checkpoint_copy.variant / "llm_config.json").unlink()
    assert "holds neither llm_config.json" in refusal(checkpoint_copy.path)
    assert "does not exist" in refusal(checkpoint_copy.path / "nowhere")


def test_a_tokenizer_that_contradicts_the_configuration_is_refused(checkpoint_copy):
    checkpoint_copy.edit_config(video_token_id=453)
    assert "<|video_pad|> is 454 in the tokenizer, but 453 in llm_config.json" in refusal(checkpoint_copy.path)


def test_damaged_tokenizer_files_are_named(checkpoint_copy):
    merges = checkpoint_copy.variant / "merges.txt"
    merges.write_text("".join(merges.read_text().splitlines(keepends=True)[:-1]))
    assert "merges.txt has 184 merges, and the tokens of vocab.json need 185" in refusal(checkpoint_copy.path)
    (checkpoint_copy.variant / "vocab.json").write_text("{")
    assert "tokenizer files in" in refusal(checkpoint_copy.path)
    merges.unlink()
    assert "merges.txt is missing" in refusal(checkpoint_copy.path)


def test_a_variant_folder_serves_as_well_as_the_one_above(checkpoint):
    above, itself = (find_checkpoint(path, Variant.IMAGE) for path in (checkpoint, checkpoint / "Lance_3B"))
    assert above.folder == itself.folder
    assert above.lance() == itself.lance() and above.vae() == itself.vae()


def test_the_converted_vae_decodes_to_the_same_bits(checkpoint_copy):
    latents = mx.random.normal((2, 2, 2, 48), key=mx.random.key(0))
    before = [np.array(chunk) for chunk in load(checkpoint_copy.path, Variant.IMAGE, FLOAT32).vae.decode(latents)]
    source = checkpoint_copy.path / "Wan2.2_VAE.pth"
    count = convert_vae(source, source.with_suffix(".safetensors"))
    assert count == len(read_pth(source))
    source.unlink()
    after = [np.array(chunk) for chunk in load(checkpoint_copy.path, Variant.IMAGE, FLOAT32).vae.decode(latents)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_pickled_vae_is_read_without_torch(checkpoint, monkeypatch):
    path = checkpoint / "Wan2.2_VAE.pth"
    expected = torch.load(path, weights_only=True)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = read_pth(path)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert np.array_equal(np.array(tensor.read(mx.float32)), expected[name].numpy()), name


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_hostile_pickle_is_refused_and_not_executed(checkpoint_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"decoder.conv1.weight": Hostile()}, checkpoint_copy.path / "Wan2.2_VAE.pth")
    assert "is not a readable PyTorch state dict" in refusal(checkpoint_copy.path)
    assert not (tmp_path / "executed").exists()


def test_a_vae_with_wrong_tensors_is_named(checkpoint_copy):
    path = checkpoint_copy.path / "Wan2.2_VAE.pth"
    state = torch.load(path, weights_only=True)
    torch.save({name: tensor for name, tensor in state.items() if name != "conv2.bias"}, path)
    assert "tensor 'conv2.bias' is missing" in refusal(checkpoint_copy.path)
    torch.save(state | {"decoder.extra": torch.zeros(1)}, path)
    assert "unexpected tensor 'decoder.extra'" in refusal(checkpoint_copy.path)
    torch.save(state | {"conv2.bias": torch.zeros(48, dtype=torch.float64)}, path)
    assert "tensor 'conv2.bias' is torch.DoubleStorage" in refusal(checkpoint_copy.path)
    path.write_bytes(b"not a pickle")
    assert "is not a readable PyTorch state dict" in refusal(checkpoint_copy.path)


def test_weights_that_are_not_numbers_are_named(checkpoint_copy):
    checkpoint_copy.edit_weights(llm2vae__bias=mx.full(48, float("nan")))
    assert "tensor 'llm2vae.bias' holds NaN or infinite values" in refusal(checkpoint_copy.path)
