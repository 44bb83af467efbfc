"""A bundle tells its own weights and configuration from others."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from parity.bundle.reading import CONFIG, WEIGHTS, read_bundle
from parity.cli.main import app
from parity.comparison.check import check_bundle
from parity.errors import ParityError
from parity.lance import weight_sums as summing
from parity.lance.record import record
from parity.lance.record_options import Options, build_request
from parity.lance.weight_sums import weight_sums
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


def changed(folder, task="t2i", key=WEIGHTS):
    """The first that is not as in the capture."""
    found = summing.changed(read_bundle(folder / task), key)
    return found and found[0]


def rewritten(folder, change, task="t2i"):
    path = folder / task / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def scaled(name):
    return lambda tensors: tensors.update({name: tensors[name] * 1.001})


def test_the_manifest_lists_what_a_run_reads(recorded):
    sums = {task: read_bundle(recorded / task).manifest["weights"] for task in REQUESTS}
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in sums["t2i"].values())
    assert DOWN in sums["t2i"] and "vae.conv2.weight" in sums["t2i"]
    assert not any(name.startswith(("vit_model.", "latent_pos_embed.")) for name in sums["t2i"])
    both = {name: value for name, value in sums["x2t_image"].items() if not name.startswith("vit_model.")}
    assert both == sums["t2i"] and f"vit_model.{VIT}" in sums["x2t_image"]
    assert not any(changed(recorded, task, key) for task in REQUESTS for key in (WEIGHTS, CONFIG))


def test_a_scaled_tensor_is_named_everywhere(recorded):
    edit(recorded, scaled(DOWN))
    bundle = recorded / "t2i"
    assert changed(recorded) == DOWN
    message = (
        f"bundle t2i: it was captured with other weights: {DOWN} is not as in checkpoint-a: restore the checkpoint"
    )
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
    assert changed(recorded) == DOWN
    with pytest.raises(ParityError, match=f"{DOWN} and 2 more are not as in checkpoint-a"):
        check_bundle(recorded / "t2i", "reference")
    rewritten(recorded, lambda m: [m["weights"].pop(name) for name in (DOWN, gate, up)])
    with pytest.raises(ParityError, match=f"manifest.json lists {names[0]}, which checkpoint-a lacks: restore either"):
        check_bundle(recorded / "t2i", "reference")


def test_only_what_is_read_of_the_vision_tower_counts(recorded):
    edit(recorded, scaled(VIT), "Qwen2.5-VL-ViT/vit.safetensors")
    assert changed(recorded) is None and changed(recorded, "x2t_image") == f"vit_model.{VIT}"


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
    assert changed(recorded) == "vae.conv2.bias"


def test_bundles_without_checksums_are_taken_as_they_are(recorded):
    rewritten(recorded, lambda m: [m.pop(key) for key in (WEIGHTS, CONFIG)])
    edit(recorded, scaled(DOWN))
    configured(recorded, rms_norm_eps=1e-5)
    assert changed(recorded) is changed(recorded, key=CONFIG) is None


@pytest.mark.parametrize("key", [WEIGHTS, CONFIG])
def test_a_manifest_that_was_changed_is_not_told_as_another_checkpoint(recorded, key):
    name = {WEIGHTS: DOWN, CONFIG: "Lance_3B/llm_config.json:rope_theta"}[key]
    value = read_bundle(recorded / "t2i").manifest[key][name]
    for change, said in (
        (lambda m: m[key].pop(name), f"manifest.json lists no checksum for {name}, which checkpoint-a has"),
        (
            lambda m: m[key].update({name: value, "no.such": value}),
            "manifest.json lists no.such, which checkpoint-a lacks",
        ),
    ):
        rewritten(recorded, change)
        with pytest.raises(ParityError, match=f"bundle t2i: {said}: restore either, or record the bundle again"):
            check_bundle(recorded / "t2i", "reference")
        (problem,) = verify_bundle(recorded / "t2i").problems
        assert problem.what.startswith(said)


# The configuration.


def configured(folder, file="Lance_3B/llm_config.json", **values):
    path = folder / "checkpoint-a" / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values, indent=3), encoding="utf-8")


CONFIGURATIONS = [
    (lambda folder: configured(folder, rms_norm_eps=1e-5), "t2i", "Lance_3B/llm_config.json:rms_norm_eps is not as in"),
    (lambda folder: configured(folder, rope_theta=5e5), "t2i", "Lance_3B/llm_config.json:rope_theta is not as in"),
    (
        lambda folder: configured(folder, "Qwen2.5-VL-ViT/config.json", fullatt_block_indexes=[]),
        "x2t_image",
        "Qwen2.5-VL-ViT/config.json:fullatt_block_indexes is not as in",
    ),
    (
        lambda folder: (folder / "checkpoint-a" / "Lance_3B" / "merges.txt").open("a").write("a b\n"),
        "t2i",
        "Lance_3B/merges.txt is not as in",
    ),
]


@pytest.mark.parametrize(("change", "task", "said"), CONFIGURATIONS)
def test_another_configuration_is_named_before_anything_runs(recorded, change, task, said, monkeypatch):
    change(recorded)
    monkeypatch.setattr("parity.oracle.oracle.definition", None)
    message = f"bundle {task}: it was captured with another configuration: {said} checkpoint-a: restore the checkpoint"
    with pytest.raises(ParityError, match=message):
        check_bundle(recorded / task, "mlx")
    verified = verify_bundle(recorded / task)
    assert verified.verdict == FAILS and any(said in problem.what for problem in verified.problems)


def test_what_says_nothing_about_inference_and_how_it_is_written_are_no_configuration(recorded):
    configured(recorded, transformers_version="0")
    configured(recorded, "Qwen2.5-VL-ViT/config.json", fullatt_block_indexes=[], torch_dtype="bfloat16")
    assert changed(recorded, key=CONFIG) is None


@pytest.mark.parametrize(
    ("values", "held", "likely"),
    [
        ({"rms_norm_eps": 1e-2}, {}, "the weights or the configuration: layers.0.input_layernorm"),
        pytest.param(
            {"rms_norm_eps": 1e-2},
            {WEIGHTS},
            "the configuration, upstream's commit or the reference: layers.0.input_lay",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            {"rope_theta": 5e2},
            {},
            "the configuration, upstream's commit or the reference: layers.0.self_attn.q_rope",
            marks=pytest.mark.exhaustive,
        ),
        ({"rope_theta": 5e2}, {WEIGHTS, CONFIG}, "upstream's commit or the reference: layers.0.self_attn.q_rope"),
    ],
)
def test_only_what_no_checksum_rules_out_is_a_likely_cause(recorded, values, held, likely, alone):
    configured(recorded, **values)

    def change(manifest):
        for key, sums in summing.sums_for(recorded / "checkpoint-a", "Lance_3B", manifest["request"]).items():
            manifest.pop(key)
            manifest |= {key: sums} if key in held else {}

    rewritten(recorded, change)
    with alone():
        reason = check_bundle(recorded / "t2i", "reference").reason
    assert f"; likely {likely}" in reason and not (WEIGHTS in held and "the weights" in reason)


def test_weights_that_are_not_there(recorded):
    (recorded / "checkpoint-a" / "Lance_3B" / "model.safetensors").unlink()
    with pytest.raises(ParityError, match="model.safetensors: not found"):
        check_bundle(recorded / "t2i", "reference")
    # What a bundle holds can be verified without them.
    assert verify_bundle(recorded / "t2i").verdict == SOUND


@pytest.mark.parametrize("key", [WEIGHTS, CONFIG])
@pytest.mark.parametrize(
    "sums", [None, [], "x", {}, {"a": 3}, {"a": "0" * 31}, {"a": "G" * 32}, {"a": None}, {"a": "0" * 32 + "\n"}]
)
def test_checksums_that_are_none_are_refused_in_one_line(recorded, sums, key):
    rewritten(recorded, lambda m: m.update({key: sums}))
    with pytest.raises(ParityError, match=f"'{key}' in manifest.json of bundle t2i") as caught:
        read_bundle(recorded / "t2i")
    assert "\n" not in str(caught.value)
    assert verify_bundle(recorded / "t2i").verdict in (FAILS, UNUSABLE)
