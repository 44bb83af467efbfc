"""Bad checkpoints and configurations are named in one line."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.config import LanguageConfig
from reference.errors import ReferenceError
from reference.model import Pipeline
from reference.numerics import Numerics
from reference.prompt import Tokenizer

VARIANT = "Lance_3B"


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A writable copy of the image variant and the VAE."""
    shutil.copytree(checkpoint / VARIANT, tmp_path / VARIANT)
    shutil.copy(checkpoint / "Wan2.2_VAE.pth", tmp_path)
    return tmp_path


def complaint(folder, device="cpu"):
    with pytest.raises(ReferenceError) as raised:
        Pipeline.load(folder, VARIANT, Numerics(), device)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit_config(folder, **changes):
    path = folder / VARIANT / "llm_config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("llm2vae.bias"), "lacks tensor llm2vae.bias"),
        (lambda tensors: tensors.update(stray=torch.zeros(1)), "unexpected tensor stray"),
        (lambda tensors: tensors.update({"llm2vae.bias": torch.zeros(3)}), "llm2vae.bias has shape (3,)"),
    ],
)
def test_tensors_must_be_exactly_those_of_the_model(copy, change, words):
    path = copy / VARIANT / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert words in complaint(copy)


def test_position_table_and_vit_are_not_read(copy, pipeline):
    path = copy / VARIANT / "model.safetensors"
    tensors = load_file(path)
    tensors["latent_pos_embed.pos_embed"] = torch.zeros(3, 3)
    tensors["vit_model.blocks.0.norm1.weight"] = torch.zeros(3)
    save_file(tensors, path)
    loaded = Pipeline.load(copy, VARIANT, Numerics())
    assert torch.equal(loaded.model.vae2llm.weight, pipeline.model.vae2llm.weight)


def test_truncated_weights(copy):
    path = copy / VARIANT / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert "not readable as safetensors" in complaint(copy)


@pytest.mark.parametrize("content", [b"nothing", b"", pickle.dumps({"decoder.conv1.weight": 3}, protocol=2)])
def test_unreadable_vae(copy, content):
    (copy / "Wan2.2_VAE.pth").write_bytes(content)
    assert "Wan2.2_VAE.pth" in complaint(copy)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("decoder.head.2.bias", None, "lacks tensor decoder.head.2.bias"),
        ("decoder.conv1.weight", None, "decoder.conv1.weight"),
        ("decoder.conv9.weight", torch.zeros(2), "unexpected tensor decoder.conv9.weight"),
        ("conv2.bias", torch.zeros(2), "conv2.bias has shape (2,)"),
    ],
)
def test_vae_tensors_must_be_exactly_those_of_the_decoder(copy, name, value, words):
    path = copy / "Wan2.2_VAE.pth"
    tensors = torch.load(path, weights_only=True)
    tensors[name] = value
    torch.save({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
    assert words in complaint(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "llm_config.json", "vocab.json", "merges.txt"])
def test_missing_file(copy, name):
    (copy / VARIANT / name).unlink()
    assert name in complaint(copy) and "not found" in complaint(copy)


def test_missing_variant_vae_and_device(copy, tmp_path):
    assert "not found" in complaint(tmp_path / "nowhere")
    assert "device 'abacus'" in complaint(copy, "abacus")
    (copy / "Wan2.2_VAE.pth").unlink()
    assert "Wan2.2_VAE.pth: not found" in complaint(copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_sise": 64}, "unknown key 'hidden_sise'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": 65}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 17}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "mrope_section"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "factor": 2}}, "rope_scaling.factor"),
        ({"vision_config": {"depht": 3, "tokens_per_second": 2}}, "vision_config.depht"),
        ({"vision_config": {"depth": 3}}, "tokens_per_second"),
        ({"video_token_id": 453}, "video_token_id is 453"),
        ({"video_token_id": 100000}, "video_token_id 100000 lies outside"),
    ],
)
def test_configuration(copy, changes, words):
    edit_config(copy, **changes)
    assert words in complaint(copy)


def test_configuration_that_is_not_json(copy):
    path = copy / VARIANT / "llm_config.json"
    path.write_text("{")
    assert "not readable as JSON" in complaint(copy)
    path.write_text("[]")
    assert "not a JSON object" in complaint(copy)


def test_tied_embeddings_of_the_official_file_are_ignored(checkpoint):
    path = checkpoint / VARIANT / "llm_config.json"
    assert json.loads(path.read_text())["tie_word_embeddings"] is True
    assert LanguageConfig.from_file(path).head_dim == 16


@pytest.mark.parametrize(("key", "value"), [("model_max_length", "a"), ("added_tokens_decoder", 3)])
def test_settings_of_the_tokenizer_of_another_type(copy, key, value):
    path = copy / VARIANT / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ReferenceError, match="^[^\n]*the tokenizer cannot be read[^\n]*$"):
        Tokenizer(copy / VARIANT).encode("a bird")
