import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from parity.bundle.reading import find_bundles, read_bundle, write_bundle
from parity.errors import ParityError
from parity.tensors.recording import Tap


def manifest_of(bundle):
    return json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))


def edit(bundle, **changes):
    (bundle / "manifest.json").write_text(json.dumps(manifest_of(bundle) | changes), encoding="utf-8")


def edit_request(bundle, **changes):
    edit(bundle, request=manifest_of(bundle)["request"] | changes)


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(bundle, *words):
    with pytest.raises(ParityError) as caught:
        read_bundle(bundle)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_reads_every_bundle_there_is(oracle):
    bundle = read_bundle(oracle)
    assert bundle.name == oracle.name and bundle.taps and bundle.checkpoint.is_dir()
    assert len(bundle.guided) == len(bundle.timesteps)


def test_guided_steps_follow_the_interval_and_the_scale(bundle):
    assert read_bundle(bundle).guided == [True] * 4
    edit_request(bundle, cfg_interval=[0.6, 0.95])
    assert read_bundle(bundle).guided == [False, True, True, False]
    edit_request(bundle, cfg_text_scale=1.0)
    assert read_bundle(bundle).guided == [False] * 4


@pytest.mark.parametrize("name", ["manifest.json", "inputs.safetensors", "taps.safetensors"])
def test_refuses_a_missing_file(bundle, name):
    (bundle / name).unlink()
    refused(bundle, name)


def test_refuses_what_is_no_folder(bundle):
    refused(bundle / "manifest.json", "is no folder: name the folder of a bundle")


@pytest.mark.parametrize(
    ("text", "word"), [("{", "not JSON"), ("[]", "JSON object"), ("{}", "format"), ("\udcff", "not JSON")]
)
def test_refuses_a_malformed_manifest(bundle, text, word):
    (bundle / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(bundle, word)


@pytest.mark.parametrize("key", ["source", "checkpoint", "variant", "request", "taps"])
def test_refuses_a_manifest_without_a_key(bundle, key):
    edit(bundle, **{key: None})
    refused(bundle, key)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"source": {"entry": "other", "dtype": "float32"}}, "entry"),
        ({"source": {"entry": "kv_cache", "dtype": "float16"}}, "float16"),
        ({"taps": []}, "no taps"),
        ({"taps": [{"name": "pixels"}]}, "pixels"),
        ({"format": "lance-oracle/2"}, "lance-oracle/2"),
    ],
)
def test_refuses_values_it_does_not_know(bundle, changes, word):
    edit(bundle, **changes)
    refused(bundle, word)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"height": "64"}, "height"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_frames": True}, "num_frames"),
        ({"timestep_shift": None}, "timestep_shift"),
        ({"cfg_interval": [0.4]}, "cfg_interval"),
        ({"cfg_renorm_type": 3}, "cfg_renorm_type"),
        ({"text_template": 1}, "text_template"),
        ({"spec": ["a"]}, "spec"),
        ({"task": 2}, "task"),
        ({"cfg_txt_scale": 2.0}, "cfg_txt_scale"),
    ],
)
def test_refuses_a_request_it_cannot_mean(bundle, changes, word):
    edit_request(bundle, **changes)
    refused(bundle, word)


@pytest.mark.parametrize("key", ["checkpoint", "variant"])
@pytest.mark.parametrize("name", ["..", ".", "", "../checkpoint-a", "/tmp", "a/b", "a\\b", "a\0b"])
def test_refuses_a_path_that_leaves_the_folder(bundle, key, name):
    edit(bundle, **{key: name})
    refused(bundle, key, "leaves the folder")


def test_refuses_links_out_of_the_folder(bundle, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(bundle / "taps.safetensors", outside)
    (bundle / "taps.safetensors").symlink_to(outside)
    refused(bundle, "taps.safetensors", "leaves")


def test_a_checkpoint_may_be_a_link(bundle, tmp_path):
    shutil.move(bundle.parent / "checkpoint-a", tmp_path / "elsewhere")
    (bundle.parent / "checkpoint-a").symlink_to(tmp_path / "elsewhere")
    assert read_bundle(bundle).checkpoint == bundle.resolve().parent / "checkpoint-a"


def test_refuses_a_checkpoint_that_is_not_there(bundle):
    edit(bundle, checkpoint="checkpoint-z")
    refused(bundle, "checkpoint-z", "does not exist")


def test_refuses_a_missing_tap(bundle):
    edit_tensors(bundle / "taps.safetensors", lambda tensors: tensors.pop("latent"))
    refused(bundle, "latent", "missing")


def test_refuses_an_unlisted_tap(bundle):
    edit_tensors(bundle / "taps.safetensors", lambda tensors: tensors.update(latent2=torch.zeros(1)))
    refused(bundle, "latent2")


def test_refuses_a_tap_of_unknown_name(bundle):
    edit_tensors(bundle / "taps.safetensors", lambda tensors: tensors.update(extra=torch.zeros(1)))
    edit(bundle, taps=[*manifest_of(bundle)["taps"], {"name": "extra", "shape": [1], "dtype": "float32"}])
    refused(bundle, "extra")


def test_refuses_a_tap_that_is_listed_twice(bundle):
    taps = manifest_of(bundle)["taps"]
    edit(bundle, taps=[*taps, taps[0]])
    refused(bundle, taps[0]["name"], "twice")


def test_refuses_a_wrong_shape(bundle):
    edit_tensors(bundle / "taps.safetensors", lambda t: t.update({"sampler.noise": t["sampler.noise"][:-1].clone()}))
    refused(bundle, "sampler.noise", "shape")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
def test_refuses_a_wrong_dtype(bundle, dtype):
    edit_tensors(bundle / "taps.safetensors", lambda t: t.update(latent=t["latent"].to(dtype)))
    refused(bundle, "latent", str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_an_oracle_that_is_not_finite(bundle, value):
    edit_tensors(bundle / "taps.safetensors", lambda t: t["sampler.x_t2"].__setitem__((3, 5), value))
    refused(bundle, "sampler.x_t2", "[3, 5]", str(value))


@pytest.mark.parametrize("size", [0, 4, 100, -1])
@pytest.mark.parametrize("name", ["inputs.safetensors", "taps.safetensors"])
def test_refuses_a_truncated_file(bundle, name, size):
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:size])
    refused(bundle, name)


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("text_ids", 0, 10**6),
        ("text_ids", 0, -1),
        ("modality", 0, 5),
        ("attn_modes", 0, 4),
        ("packed_vae_token_indexes", 0, 107),
        ("mse_loss_indexes", -1, -1),
        ("video_sizes", 0, 0),
    ],
)
def test_refuses_inputs_out_of_bounds(bundle, name, index, value):
    edit_tensors(bundle / "inputs.safetensors", lambda t: t[name].__setitem__(index, value))
    refused(bundle, name)


@pytest.mark.parametrize("name", ["text_ids", "modality", "split_lens", "attn_modes"])
def test_refuses_inputs_without_a_sequence(bundle, name):
    edit_tensors(bundle / "inputs.safetensors", lambda t: t.pop(name))
    refused(bundle, name)


def test_refuses_splits_that_do_not_cover_the_sequence(bundle):
    edit_tensors(bundle / "inputs.safetensors", lambda t: t["split_lens"].__setitem__(0, 1))
    refused(bundle, "split_lens")


def write_checksums(bundle, **wrong):
    root = bundle.parent
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    entries = {name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for name, path in files.items()}
    document = {"format": "lance-oracles/1", "files": entries | wrong}
    (root / "MANIFEST.json").write_text(json.dumps(document), encoding="utf-8")


def test_checksums_of_the_bundle_and_its_checkpoint_are_verified(bundle):
    write_checksums(bundle)
    assert read_bundle(bundle)
    config = bundle.parent / "checkpoint-a" / "Lance_3B" / "llm_config.json"
    config.write_text(config.read_text() + "\n")
    refused(bundle, "checkpoint-a/Lance_3B/llm_config.json", "checksum")


def test_a_file_that_has_a_checksum_must_be_there(copy_bundle):
    bundle = copy_bundle("t2i-fp32-nokv", weights=False)
    write_checksums(bundle, **{"checkpoint-a/Wan2.2_VAE.pth": {"sha256": ""}})
    refused(bundle, "Wan2.2_VAE.pth", "missing")


def test_checksums_of_other_bundles_are_not_looked_at(bundle):
    write_checksums(bundle, **{"other/taps.safetensors": {"sha256": ""}})
    assert read_bundle(bundle)


def test_checksums_cannot_name_files_elsewhere(bundle):
    write_checksums(bundle, **{f"{bundle.name}/../../x": {"sha256": ""}})
    refused(bundle, "leaves")


@pytest.mark.parametrize("text", ["{}", '{"format": "lance-oracles/1"}', "x"])
def test_refuses_malformed_checksums(bundle, text):
    (bundle.parent / "MANIFEST.json").write_text(text)
    refused(bundle, "MANIFEST.json")


def test_written_bundles_are_read_back(bundle):
    read = read_bundle(bundle)
    taps = read.taps | {"sampler.noise": Tap(np.zeros_like(read.taps["sampler.noise"].array), "float32")}
    copy = bundle.parent / "copy"
    for _ in range(2):
        write_bundle(copy, read.manifest, read.inputs, taps)
    again = read_bundle(copy)
    assert again.manifest["name"] == "copy" and again.request == read.request
    assert set(again.taps) == set(taps) and not again.taps["sampler.noise"].array.any()
    assert sorted(path.name for path in bundle.parent.iterdir()) == sorted([bundle.name, "checkpoint-a", "copy"])


def test_finds_single_bundles_and_folders_of_them(bundle, copy_bundle):
    other = copy_bundle("t2v-fp32-nokv")
    assert find_bundles([bundle.parent]) == [bundle, other]
    assert find_bundles([other, bundle.parent]) == [other, bundle]
    (other / "manifest.json").unlink()
    assert find_bundles([bundle.parent]) == [bundle, other]


def test_finding_nothing_is_an_error(tmp_path):
    with pytest.raises(ParityError, match="no oracle bundle"):
        find_bundles([tmp_path])
    with pytest.raises(ParityError, match="does not exist"):
        find_bundles([tmp_path / "nothing"])
