import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from parity.bundle.reading import read_bundle, read_json
from parity.bundle.store import DAMAGED, INTACT, NONE, list_bundles, seal, sizes
from parity.comparison.check import check_bundle
from parity.comparison.compare import compare_runs
from parity.errors import ParityError
from parity.lance.record import record
from parity.lance.record_options import Options, build_request
from parity.localize.investigation import localize
from parity.oracle.verify import FAILS, SOUND, UNUSABLE, exit_status, verify, verify_bundle
from parity.tensors.recording import Tap, read_tensors, write_tensors

ORACLES = Path(__file__).parents[2] / "oracles"
LAYER = "language_model.model.layers.1"


@pytest.fixture
def whole(copy_bundle):
    """Copies an embedded bundle with everything of its checkpoint."""
    return lambda name: copy_bundle(name, weights=True)


@pytest.fixture(scope="module")
def recorded_once(tmp_path_factory):
    request = build_request("t2i", Options(prompt="a bird", width=48, height=32, steps=2))
    root = tmp_path_factory.mktemp("recorded")
    return record(root / "small", ORACLES / "checkpoint-a", request, dtype="float32", copy_checkpoint=True)


@pytest.fixture
def recorded(recorded_once, tmp_path):
    """A recorded bundle that a test may damage."""
    return Path(shutil.copytree(recorded_once.parent, tmp_path / "oracles")) / "small"


def change(bundle, name, edit, file="taps"):
    """Edit one tensor of a bundle, or take it out with None."""
    path = bundle / f"{file}.safetensors"
    taps = read_tensors(path)
    tap = taps.pop(name)
    if edit is not None:
        array = tap.array.copy()
        edited = edit(array)
        taps[name] = Tap(array if edited is None else edited, tap.dtype)
    write_tensors(path, taps)
    relist(bundle, lambda listed: [e for e in listed if e["name"] in taps] if file == "taps" else listed)


def relist(bundle, edit):
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["taps"] = edit(manifest["taps"])
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("file", ["taps.safetensors", "inputs.safetensors"])
def test_a_damaged_file_is_proven_before_anything_is_computed(recorded, file, monkeypatch):
    path = recorded / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    for part in ("reading.read_tensors", "reading.definition"):
        monkeypatch.setattr(f"parity.bundle.{part}", None)
    monkeypatch.setattr("parity.bundle.reading._read_manifest", read_json)
    message = f"^small/{file} does not match its checksum in small/manifest.json: copy it again$"
    for run in (
        lambda: check_bundle(recorded, "mlx"),
        lambda: localize(recorded),
        lambda: compare_runs(recorded, {"pixels": np.zeros(3)}),
    ):
        with pytest.raises(ParityError, match=message):
            run()


def test_a_list_of_files_that_is_none_is_refused(recorded):
    for files, said in (
        (["a"], "must map names"),
        ({"../other/taps.safetensors": {}}, "leaves"),
        ({"a": {}}, "missing"),
    ):
        manifest = json.loads((recorded / "manifest.json").read_text(encoding="utf-8"))
        (recorded / "manifest.json").write_text(json.dumps(manifest | {"files": files}), encoding="utf-8")
        with pytest.raises(ParityError, match=said):
            read_bundle(recorded)


def add(amount, *at):
    """An edit that adds to one element, by default to the first."""

    def edit(array):
        array[at or (0,) * array.ndim] += amount

    return edit


def problems(bundle):
    found = verify_bundle(bundle)
    for problem in found.problems:
        assert "\n" not in problem.what
    return {problem.place: problem.what for problem in found.problems}, found.verdict


def test_names_that_no_disk_takes_are_what_is_missing(recorded):
    path = recorded / "manifest.json"
    # A second problem, so that what can be derived without that is looked for.
    change(recorded, "latent", None)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint": "a" * 5000}))
    listed = {"format": "lance-oracles/1", "files": {"a" * 5000: {}}}
    (recorded.parent / "MANIFEST.json").write_text(json.dumps(listed))
    found = {problem.place[:13]: problem.what for result in verify(recorded.parent) for problem in result.problems}
    assert found["a" * 13] == "is missing" and "does not match" in found["taps.safetens"]


DERIVED = [
    ("t2i-fp32-kv", "sampler.timestep2", add(1e-4), "timesteps"),
    ("t2i-fp32-kv", "sampler.x_init", add(1e-4), "first state"),
    ("t2i-fp32-kv", "sampler.x_t2", add(1e-4), "states"),
    ("t2i-fp32-kv", "latent", add(1e-4), "last state"),
    ("t2i-fp32-kv", "cond.step1/llm2vae", add(1e-3, 3, 5), "states"),
    ("t2i-fp32-kv", "cond.step0/position_ids", add(1), "position ids"),
    ("t2i-fp32-kv", "uncond.prefix1/position_ids", add(-1, 2, 0), "position ids"),
    ("t2i-fp32-kv", f"cond.step0/{LAYER}.self_attn.q_rope", add(1e-4), "RoPE"),
    ("t2i-fp32-kv", f"uncond.step3/{LAYER}.self_attn.k_rope", add(1e-4), "RoPE"),
    ("t2i-fp32-kv", f"cond.prefix0/{LAYER}", add(1e-4), "residual stream"),
    ("t2i-fp32-kv", f"cond.step3/{LAYER}.mlp_moe_gen", add(1e-4), "residual stream"),
    ("t2i-fp32-kv", "pixels", lambda array: array * 3, "range of pixels"),
    ("t2i-fp32-nokv", "velocity_call3", add(1e-3), "states"),
    ("t2v-bf16-kv", "sampler.x_t1", lambda array: -array, "states"),
    ("i2v-fp32-nokv", "vae.latent0", add(1e-4), "latents"),
    ("i2v-fp32-nokv", "vae.encode0.logvar", lambda array: array + 0.01, "latents"),
    ("x2t_image-fp32-nokv", "tokens", lambda array: array[:1], "answer"),
    ("x2t_image-bf16-kv", "cond.decode0/position_ids", add(1), "position ids"),
]


@pytest.mark.parametrize(("name", "tensor", "edit", "quantity"), DERIVED)
def test_a_tensor_that_does_not_follow_from_the_others_is_named(whole, name, tensor, edit, quantity):
    bundle = whole(name)
    change(bundle, tensor, edit)
    if quantity == "answer":
        relist(bundle, lambda listed: [e | {"shape": [1]} if e["name"] == tensor else e for e in listed])
    found, verdict = problems(bundle)
    assert verdict == FAILS
    assert any(what.endswith(f"({quantity})") for what in found.values()), found
    # What is computed from it may be named too, but nothing else.
    assert len(found) <= 3
    if "llm2vae" not in tensor and "velocity" not in tensor and "mlp" not in tensor and "logvar" not in tensor:
        assert tensor in found


@pytest.mark.parametrize(
    ("name", "tensor", "edit"),
    [
        ("t2i-fp32-kv", "text_ids", add(1, 70)),
        ("t2i-fp32-kv", "modality", add(1, 5)),
        ("t2i-fp32-kv", "mse_loss_indexes", add(-1)),
        ("t2i-fp32-kv", "split_lens", lambda array: array[::-1].copy()),
        ("image_edit-fp32-nokv", "vit_video_grid_thw", lambda array: array[:, [0, 2, 1]].copy()),
        ("i2v-fp32-nokv", "vae_pixels0", add(3, 0, 1, 0, 0)),
        ("image_edit-fp32-nokv", "vae_pixels0", add(3)),
        ("x2t_image-fp32-nokv", "ce_loss_indexes", None),
    ],
)
def test_an_input_that_does_not_follow_from_the_request_is_named(whole, name, tensor, edit):
    bundle = whole(name)
    shutil.copytree(ORACLES / "media", bundle.parent / "media")
    change(bundle, tensor, edit, "inputs")
    found, verdict = problems(bundle)
    assert verdict == FAILS and f"inputs/{tensor}" in found, found


def test_what_the_request_does_not_do_is_named(whole):
    bundle = whole("t2i-fp32-kv")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["request"] |= {"cfg_interval": [0.6, 0.95], "timestep_shift": 3.0}
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    found, _ = problems(bundle)
    assert "guided steps" in found["uncond.step0"] and "uncond.step1" not in found
    assert "timesteps" in found["sampler.timestep1"] and "sampler.timestep0" not in found


def test_a_missing_arm_is_named(whole):
    bundle = whole("t2i-fp32-nokv")
    for number in (6, 7):
        change(bundle, f"velocity_call{number}", None)
    found, _ = problems(bundle)
    assert set(found) == {"velocity_call6", "velocity_call7"} and "is missing" in found["velocity_call7"]


def test_draws_are_compared_with_the_seed(recorded, monkeypatch):
    # What the reference makes of them is asked elsewhere.
    monkeypatch.setattr("parity.oracle.verify._judge", lambda *given: None)
    for name in ("sampler.noise", "sampler.x_init", "sampler.x_t0"):
        change(recorded, name, add(1e-3))
    seal(recorded)
    found, _ = problems(recorded)
    assert "draws from the seed" in found["sampler.noise"]
    assert set(found) == {"sampler.noise", "sampler.x_t1"}


def test_values_and_listing_are_checked_together(whole):
    bundle = whole("t2i-fp32-kv")
    change(bundle, "time_embedder", lambda array: array * np.nan)
    change(bundle, "uncond.step3/hidden_in", add(np.inf, 1, 2))

    def edit(listed):
        by_name = {entry["name"]: entry for entry in listed}
        by_name["pixels"]["shape"] = [3, 1, 96, 64]
        by_name["latent"]["dtype"] = "bfloat16"
        del by_name["sampler.x_t1"]
        return [*by_name.values(), {"name": "sampler.x_t9", "shape": [1], "dtype": "float32"}, 3, by_name["pixels"]]

    relist(bundle, edit)
    found, verdict = problems(bundle)
    assert verdict == FAILS
    assert found["time_embedder"] == "holds nan at [0] (64 elements)"
    assert found["uncond.step3/hidden_in"] == "holds inf at [1, 2]"
    assert "manifest.json says float32" not in found["latent"] and "says bfloat16" in found["latent"]
    assert found["sampler.x_t1"] == "is not listed in manifest.json"
    assert "missing from taps.safetensors" in found["sampler.x_t9"]
    assert "without a name" in found["manifest.json"] and "listed twice" in found["pixels"]


def manifest_json(root):
    """Write MANIFEST.json over all files below a folder."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    entries = {name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for name, path in files.items()}
    (root / "MANIFEST.json").write_text(json.dumps({"format": "lance-oracles/1", "files": entries}))


def test_checksums_of_the_folder_are_checked(whole):
    bundle = whole("t2i-fp32-nokv")
    manifest_json(bundle.parent)
    others, verified = verify(bundle.parent)
    assert (others.verdict, verified.verdict) == (SOUND, SOUND) and others.files > 10
    assert verified.files == len(list(bundle.iterdir()))
    (bundle.parent / "checkpoint-a" / "Wan2.2_VAE.pth").unlink()
    (bundle.parent / "checkpoint-a" / "Lance_3B" / "vocab.json").write_text("{}")
    change(bundle, "time_embedder", add(1e-3))
    results = verify(bundle.parent)
    assert exit_status(results) == 1
    places = {problem.place: problem.what for result in results for problem in result.problems}
    assert places["checkpoint-a/Wan2.2_VAE.pth"] == "is missing"
    assert places["checkpoint-a/Lance_3B/vocab.json"] == "does not match its checksum"
    assert places["taps.safetensors"] == "does not match its checksum"


def test_one_bundle_is_verified_with_its_checkpoint():
    others, bundle = verify(ORACLES / "t2i-fp32-nokv")
    assert (others.name, others.verdict, bundle.verdict) == ("MANIFEST.json", SOUND, SOUND)


def test_a_recorded_bundle_brings_its_checksums(recorded, alone):
    with alone():
        assert verify_bundle(recorded).files == 2
    change(recorded, "time_embedder", add(1e-3))
    found, verdict = problems(recorded)
    assert verdict == FAILS and found == {"taps.safetensors": "does not match its checksum"}


def test_what_cannot_be_read_is_unusable(whole, tmp_path):
    bundle = whole("t2i-fp32-nokv")
    start = (bundle / "taps.safetensors").read_bytes()[:5000]
    (bundle / "taps.safetensors").write_bytes(start)
    found, verdict = problems(bundle)
    assert verdict == UNUSABLE and "not a complete safetensors file" in found["taps.safetensors"]
    assert exit_status(verify(bundle)) == 2
    (bundle / "inputs.safetensors").unlink()
    assert problems(bundle)[1] == UNUSABLE
    (bundle / "manifest.json").write_text("{}")
    assert problems(bundle)[1] == UNUSABLE
    # What can be looked at counts for more.
    other = shutil.copytree(ORACLES / "t2i-fp32-kv", bundle.parent / "other")
    change(other, "sampler.x_t1", add(1e-3))
    assert exit_status(verify(bundle.parent)) == 1
    shutil.rmtree(bundle.parent / "checkpoint-a")
    assert exit_status(verify(other)) == 2
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ParityError, match="does not exist|no oracle bundle"):
            verify(place)


def test_listing_describes_bundles_without_reading_tensors(recorded, whole):
    manifest_json(whole("t2v-bf16-kv").parent)
    (recorded.parent / "t2v-bf16-kv" / "floors.json").touch()
    broken = shutil.copytree(ORACLES / "t2i-fp32-nokv", recorded.parent / "broken")
    (broken / "taps.safetensors").write_bytes(b"")
    (recorded.parent / ".small.x1" / "small").mkdir(parents=True)
    shutil.copytree(recorded, recorded.parent / ".small.x2")
    listed = {bundle.path.name: bundle for bundle in list_bundles([recorded.parent])}
    assert set(listed) == {"broken", "small", "t2v-bf16-kv"}
    small, other = listed["small"], listed["t2v-bf16-kv"]
    assert (small.task, small.dtype, small.entry, small.checksums) == ("t2i", "float32", "kv_cache", INTACT)
    assert small.source.startswith("lance-mlx reference") and not small.floors and small.problem is None
    assert (other.taps, other.source, other.checkpoint) == (408, "bytedance/Lance 4baeee0", "checkpoint-a")
    assert other.checksums == INTACT and other.floors
    assert listed["broken"].checksums == NONE
    (recorded / "inputs.safetensors").write_bytes(b"x")
    (other.path / "manifest.json").write_text("[]")
    listed = {bundle.path.name: bundle for bundle in list_bundles([recorded.parent])}
    assert listed["small"].checksums == DAMAGED and "inputs.safetensors" in listed["small"].problem
    assert "JSON object" in listed["t2v-bf16-kv"].problem
    shutil.rmtree(recorded.parent / "checkpoint-a")
    assert "checkpoint" in list_bundles([recorded.parent / "broken"])[0].problem


def test_sizes_in_words():
    assert [sizes(n) for n in (0, 999, 1000, 1234567, 2.5e9)] == ["0 B", "999 B", "1 kB", "1.23 MB", "2.5 GB"]
