"""A bundle tells its own weights from others."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from parity.bundle.reading import read_bundle
from parity.cli.main import app
from parity.comparison.check import check_bundle
from parity.errors import ParityError
from parity.lance.record import record
from parity.lance.record_options import Options, build_request
from parity.lance.weight_sums import changed_weights, weight_sums
from parity.localize.investigation import localize
from parity.oracle.verify import FAILS, SOUND, UNUSABLE, verify_bundle

ORACLES = Path(__file__).parents[2] / "oracles"
DOWN = "language_model.model.layers.1.mlp_moe_gen.down_proj.weight"
VIT = "blocks.0.attn.proj.weight"
REQUESTS = {
    "t2i": Options(prompt="a bird", width=48, height=32, steps=2),
    "x2t_image": Options(question="a", images=(ORACLES / "media" / "square.png",), vit_resolution=56, max_new_tokens=2),
}


@pytest.fixture(scope="module")
def recorded_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    checkpoint = shutil.copytree(ORACLES / "checkpoint-a", folder / "checkpoint-a")
    for task, options in REQUESTS.items():
        record(folder / task, checkpoint, build_request(task, options), dtype="float32")
    return folder


@pytest.fixture
def recorded(recorded_once, tmp_path):
    """A folder of recorded bundles whose checkpoint a test may change."""
    return Path(shutil.copytree(recorded_once, tmp_path / "recorded"))


def edit(folder, change, file="Lance_3B/model.safetensors"):
    path = folder / "checkpoint-a" / file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def changed(folder, task="t2i"):
    return changed_weights(read_bundle(folder / task))


def scaled(name):
    return lambda tensors: tensors.update({name: tensors[name] * 1.001})


def test_the_manifest_lists_what_a_run_reads(recorded):
    sums = {task: read_bundle(recorded / task).manifest["weights"] for task in REQUESTS}
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in sums["t2i"].values())
    assert DOWN in sums["t2i"] and "vae.conv2.weight" in sums["t2i"]
    assert not any(name.startswith(("vit_model.", "latent_pos_embed.")) for name in sums["t2i"])
    both = {name: value for name, value in sums["x2t_image"].items() if not name.startswith("vit_model.")}
    assert both == sums["t2i"] and f"vit_model.{VIT}" in sums["x2t_image"]
    assert changed(recorded) == changed(recorded, "x2t_image") == []


def test_a_scaled_tensor_is_named_everywhere(recorded):
    edit(recorded, scaled(DOWN))
    bundle = recorded / "t2i"
    assert changed(recorded) == [DOWN]
    message = f"bundle t2i was captured with other weights: {DOWN} is not the one in .*checkpoint-a: restore"
    for run in (
        lambda: check_bundle(bundle, "mlx"),
        lambda: check_bundle(bundle, "reference"),
        lambda: localize(bundle),
    ):
        with pytest.raises(ParityError, match=message):
            run()
    verified = verify_bundle(bundle)
    assert verified.verdict == FAILS and [problem.place for problem in verified.problems] == [DOWN]
    for command, status in (("check --impl mlx", 2), ("localize", 2), ("verify", 1)):
        result = CliRunner().invoke(app, [*command.split(), str(bundle)])
        shown = "".join((result.stdout + result.stderr).split())
        assert result.exit_code == status and "mlp_moe_gen.down_proj.weight" in shown


def test_a_cast_and_swapped_missing_and_further_tensors_are_others(recorded):
    up, gate = (DOWN.replace("down", part) for part in ("up", "gate"))
    names = ("language_model.model.norm.weight", "language_model.model.norm_moe_gen.weight")

    def change(tensors):
        tensors[DOWN] = tensors[DOWN].half()
        tensors[up], tensors[gate] = tensors[gate], tensors[up]
        del tensors[names[0]]
        tensors["further"] = torch.zeros(2)
        tensors["latent_pos_embed.pos_embed"] = torch.zeros(3, 4)

    edit(recorded, change)
    assert changed(recorded) == sorted(["further", DOWN, gate, up, names[0]])
    with pytest.raises(ParityError, match="further and 4 more are not those in"):
        check_bundle(recorded / "t2i", "reference")


def test_only_what_is_read_of_the_vision_tower_counts(recorded):
    edit(recorded, scaled(VIT), "Qwen2.5-VL-ViT/vit.safetensors")
    assert changed(recorded) == [] and changed(recorded, "x2t_image") == [f"vit_model.{VIT}"]


def test_the_language_models_file_comes_over_the_vision_towers(recorded):
    checkpoint = recorded / "checkpoint-a"
    before = weight_sums(checkpoint, "Lance_3B", with_vit=True)
    edit(recorded, lambda tensors: tensors.update({f"vit_model.{VIT}": torch.ones(2)}))
    after = weight_sums(checkpoint, "Lance_3B", with_vit=True)
    assert {name for name in after if after[name] != before.get(name)} == {f"vit_model.{VIT}"}
    edit(recorded, scaled(VIT), "Qwen2.5-VL-ViT/vit.safetensors")
    assert weight_sums(checkpoint, "Lance_3B", with_vit=True) == after


def test_the_vae_counts(recorded):
    path = recorded / "checkpoint-a" / "Wan2.2_VAE.pth"
    tensors = torch.load(path, weights_only=True)
    tensors["conv2.bias"] = tensors["conv2.bias"].bfloat16()
    torch.save(tensors, path)
    assert changed(recorded) == ["vae.conv2.bias"]


def test_bundles_without_checksums_are_taken_as_they_are(recorded):
    path = recorded / "t2i" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["weights"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    edit(recorded, scaled(DOWN))
    assert changed(recorded) == []


def test_weights_that_are_not_there(recorded):
    (recorded / "checkpoint-a" / "Lance_3B" / "model.safetensors").unlink()
    with pytest.raises(ParityError, match="model.safetensors: not found"):
        check_bundle(recorded / "t2i", "reference")
    # What a bundle holds can be verified without them.
    assert verify_bundle(recorded / "t2i").verdict == SOUND


@pytest.mark.parametrize(
    "weights", [None, [], "x", {}, {"a": 3}, {"a": "0" * 31}, {"a": "G" * 32}, {"a": None}, {"a": "0" * 32 + "\n"}]
)
def test_checksums_that_are_none_are_refused_in_one_line(recorded, weights):
    path = recorded / "t2i" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"weights": weights}), encoding="utf-8")
    with pytest.raises(ParityError, match="'weights' in manifest.json of bundle t2i") as caught:
        read_bundle(path.parent)
    assert "\n" not in str(caught.value)
    assert verify_bundle(path.parent).verdict in (FAILS, UNUSABLE)
