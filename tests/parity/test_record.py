import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from parity.bundle.reading import find_bundles, read_bundle
from parity.bundle.store import list_bundles
from parity.comparison.check import check_bundle
from parity.comparison.compare import compare_runs
from parity.comparison.verdict import AGREE
from parity.errors import ParityError
from parity.lance.record import record
from parity.lance.record_options import Options, build_request
from parity.lance.recorded_taps import RecordedTaps
from parity.lance.replay_torch import TorchReplay
from parity.oracle.verify import SOUND, verify_bundle
from parity.tensors.recording import Tap, read_tensors

ROOT = Path(__file__).parents[2]
ORACLES = ROOT / "oracles"
CHECKPOINT = ORACLES / "checkpoint-a"
SMALL = Options(prompt="a bird", width=48, height=32, steps=2)
GARDEN = ORACLES / "media" / "garden.png"


@pytest.fixture
def small(tmp_path):
    """Records a small t2i bundle."""

    def make(name="small", dtype="float32", options=SMALL, task="t2i", **values):
        return record(tmp_path / name, CHECKPOINT, build_request(task, options), dtype=dtype, **values)

    return make


@pytest.fixture
def unjudged(monkeypatch):
    """What the reference recorded it computes again; to measure floors for each bundle takes long."""
    monkeypatch.setattr("parity.oracle.verify._judge", lambda bundle, *rest: None)


def manifest_of(bundle):
    return json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))


def kinds(path):
    return {name: (tap.array.shape, tap.dtype) for name, tap in read_tensors(path).items()}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def asked_again(oracle):
    """The request of a bundle as a user gives it, with the paths of its files."""
    request = manifest_of(oracle)["request"] | {"seed": 3}
    if isinstance(request["spec"], dict):
        spec = request["spec"]
        both = zip(spec["interleave_array"], spec["element_dtype_array"], strict=True)
        files = [part if kind == "text" else str(oracle.parent / part) for part, kind in both]
        request["spec"] = spec | {"interleave_array": files}
    return request


def test_a_recorded_bundle_has_what_upstreams_has_and_both_sides_agree_with(supported_oracle, tmp_path, unjudged):
    source = manifest_of(supported_oracle)["source"]
    checkpoint = supported_oracle.parent / manifest_of(supported_oracle)["checkpoint"]
    request = asked_again(supported_oracle)
    bundle = record(tmp_path / "again", checkpoint, request, source["entry"], source["dtype"])
    for name in ("taps", "inputs"):
        assert kinds(bundle / f"{name}.safetensors") == kinds(supported_oracle / f"{name}.safetensors")
    ours, theirs = (read_bundle(path) for path in (bundle, supported_oracle))
    placeholder = f"vae_pixels{sum(name.startswith('vae_pixels') for name in theirs.inputs) - 1}"
    for name in set(theirs.inputs) - {placeholder}:
        assert np.array_equal(ours.inputs[name].array, theirs.inputs[name].array), name
    assert set(ours.manifest) == set(theirs.manifest) | {"files", "name", "config", "weights"}
    assert ours.request["spec"] == theirs.request["spec"] and ours.variant == theirs.variant
    assert verify_bundle(bundle).verdict == SOUND
    if supported_oracle.parent != ORACLES:
        return
    # The reference computes the same again, to the last bit; its float32 and MLX's round differently.
    assert compare_runs(bundle, "@reference", within=0.0).verdict == AGREE
    if source["dtype"] == "float32":
        assert compare_runs(bundle, "@mlx", within=1e-4).verdict == AGREE


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.exhaustive), "bfloat16"])
def test_check_takes_a_recorded_bundle(small, dtype, alone):
    options = Options(question="what", images=(GARDEN,), vit_resolution=56, max_new_tokens=3)
    bundle = small(dtype=dtype, options=options, task="x2t_image")
    for implementation in ("mlx", "reference"):
        with alone():
            result = check_bundle(bundle, implementation)
        assert result.verdict == AGREE and result.missing == [] and result.compared > 100


@pytest.mark.parametrize("task", ["idip", "image_idip"])
def test_subject_driven_requests_are_recorded_too(small, task, unjudged):
    options = Options(
        prompt="the bird",
        images=(GARDEN, ORACLES / "media" / "square.png"),
        width=48,
        height=32,
        num_frames=5 if task == "idip" else None,
        steps=2,
        vae_resolution=64,
        vit_resolution=56,
    )
    bundle = small(task, options=options, task=task)
    assert read_bundle(bundle).variant == ("Lance_3B_Video" if task == "idip" else "Lance_3B")
    assert verify_bundle(bundle).verdict == SOUND
    assert compare_runs(bundle, "@reference", within=0.0).verdict == AGREE
    assert compare_runs(bundle, "@mlx", within=1e-4).verdict == AGREE


def test_the_manifest_says_where_the_tensors_come_from(small):
    source = manifest_of(small())["source"]
    assert source["implementation"] == "lance-mlx reference"
    assert source["version"] and source["torch"] and source["device"] == "cpu"
    assert (source["entry"], source["dtype"]) == ("kv_cache", "float32")
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
        assert head.returncode or source["commit"].removesuffix("-dirty") == head.stdout.strip()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_seed_decides_every_byte(small, dtype):
    first, second = small("a/x", dtype), small("b/x", dtype)
    assert contents(first) == contents(second)
    other = small("c/x", dtype, replace(SMALL, seed=43))
    assert contents(other)["taps.safetensors"] != contents(first)["taps.safetensors"]
    noise = read_tensors(first / "taps.safetensors")["sampler.noise"]
    assert noise.dtype == dtype and abs(noise.array.std() - 1) < 0.1


def test_taps_that_share_memory_in_the_run_are_kept_apart(small, monkeypatch, unjudged):
    """The first state is the noise itself, and a recorder that kept references would see later changes."""
    seen, recorded = [], TorchReplay.record

    def spoiled(run, *given, **how):
        taps = recorded(run, *given, **how)
        seen.append([tap.array.__array_interface__["data"][0] for tap in taps.values() if tap.array.size])
        return taps

    monkeypatch.setattr(TorchReplay, "record", spoiled)
    bundle = small()
    assert len(set(seen[0])) == len(seen[0])
    assert verify_bundle(bundle).verdict == SOUND


def test_names_that_a_bundle_keeps():
    cached, whole = RecordedTaps("kv_cache", 4), RecordedTaps("full_sequence", 4)
    layer = "language_model.model.layers.1"
    for name in (f"cond.step0/{layer}.mlp_moe_gen", f"uncond.step3/{layer}", "cond.step2/llm2vae", "sampler.x_init"):
        assert name in cached and name not in whole
    for name in (f"cond.step2/{layer}", f"cond.step0/{layer}.mlp.up_proj", "vae.decode.chunk2/decoder", "frames"):
        assert name not in cached
    for name in (f"cond.step0/{layer}.self_attn.q_proj", "cond.decode1/hidden_in", "sampler.velocity0"):
        assert name not in cached
    for name in ("velocity_call3", "vit_model0", "latent", "pixels", "tokens", "vae.encode0.eps"):
        assert name in whole


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from parity.bundle import reading as bundle
from parity.lance import record
from parity.lance.record_options import Options, build_request

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def run(when, out, checkpoint):
    progress = die if when == "computing" else None
    if when == "writing":
        write, written = bundle.write_tensors, []
        bundle.write_tensors = lambda path, taps: die() if written else written.append(write(path, taps))
    if when == "written":
        os.rename = die
    request = build_request("t2i", Options(prompt="a bird", width=48, height=32, steps=2))
    record.record(out, checkpoint, request, dtype="float32", progress=progress)

torch.set_num_threads(1)
# Each in a process of its own, which is killed; importing takes longest and is done once.
for when in sys.argv[3:]:
    child = os.fork()
    if not child:
        run(when, Path(sys.argv[1]) / when / "killed", Path(sys.argv[2]))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_what_a_killed_recording_leaves_is_no_bundle(tmp_path):
    states = ["computing", "writing", "written"]
    command = [sys.executable, "-c", KILLED, tmp_path, CHECKPOINT, *states]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 3, done.stderr
    for out in (tmp_path / state / "killed" for state in states):
        assert not out.exists() and any(out.parent.glob(".lance-parity-*.part"))
        for look in (lambda out=out: find_bundles([out.parent]), lambda out=out: list_bundles([out.parent])):
            with pytest.raises(ParityError, match="no oracle bundle"):
                look()
    for left in out.parent.glob(".lance-parity-*.part"):
        os.utime(left, (0, 0))
    record(out, CHECKPOINT, build_request("t2i", SMALL), dtype="float32")
    assert [bundle.path for bundle in list_bundles([out.parent])] == [out]
    assert not any(out.parent.glob(".*"))


def test_a_failed_recording_leaves_nothing(small, tmp_path, monkeypatch):
    def full(path, taps):
        raise OSError(28, "No space left on device")

    def broken(*arguments, **how):
        return {"latent": Tap(np.full((1, 2, 3, 48), np.nan, np.float32), "float32")}

    for name, replacement, message in (
        ("parity.bundle.reading.write_tensors", full, "cannot be written: No space left"),
        ("parity.lance.replay_torch.TorchReplay.record", broken, "latent holds NaN or infinity"),
    ):
        with monkeypatch.context() as patched, pytest.raises(ParityError, match=message) as caught:
            patched.setattr(name, replacement)
            small("x/small")
        assert "\n" not in str(caught.value)
        assert not any((tmp_path / "x").iterdir())


def test_the_checkpoint_is_linked_or_copied_beside_the_bundle(small, tmp_path):
    linked = small("linked/a")
    link = linked.parent / "checkpoint-a"
    assert link.is_symlink() and not os.path.isabs(os.readlink(link)) and link.samefile(CHECKPOINT)
    assert small("linked/b").is_dir()
    copied = small("copied/a", copy_checkpoint=True)
    there = copied.parent / "checkpoint-a"
    assert not there.is_symlink()
    assert sorted(path.name for path in there.iterdir()) == ["Lance_3B", "Qwen2.5-VL-ViT", "Wan2.2_VAE.pth"]
    assert small("linked/c", copy_checkpoint=True).is_dir() and not link.is_symlink()
    inside = record(there.parent / "b", there, build_request("t2i", SMALL), dtype="float32")
    assert read_bundle(inside).checkpoint == there


def test_files_are_copied_beside_the_bundle_once_and_under_names_of_their_own(small, tmp_path):
    shutil.copy(ORACLES / "media" / "square.png", tmp_path / "garden.png")
    options = Options(question="what", images=(GARDEN,), vit_resolution=56, max_new_tokens=2)
    media = tmp_path / "out" / "media"

    def shown(bundle):
        return manifest_of(bundle)["request"]["spec"]["interleave_array"][0]

    assert shown(small("out/a", options=options, task="x2t_image")) == "media/garden.png"
    assert shown(small("out/b", options=options, task="x2t_image")) == "media/garden.png"
    other = replace(options, images=(tmp_path / "garden.png",))
    name = shown(small("out/c", options=other, task="x2t_image"))
    assert name.startswith("media/garden-") and sorted(path.name for path in media.iterdir()) == [
        name.removeprefix("media/"),
        "garden.png",
    ]
    assert (media.parent / name).read_bytes() == (tmp_path / "garden.png").read_bytes()
    within = replace(options, images=(media / "garden.png",))
    assert shown(small("out/d", options=within, task="x2t_image")) == "media/garden.png"


def test_a_photo_is_taken_as_it_is_stored_as_upstream_takes_it(small, tmp_path, unjudged):
    turned = Image.open(GARDEN)
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    options = Options(prompt="a hat", images=(tmp_path / "turned.png",), vae_resolution=64, vit_resolution=56, steps=1)
    bundle = small("turned", options=options, task="image_edit")
    height, width = read_bundle(bundle).inputs["vae_pixels0"].array.shape[2:]
    assert width > height and verify_bundle(bundle).verdict == SOUND


def test_requests_have_the_launchers_defaults():
    assert build_request("t2v", Options(prompt="a bird")) == {
        "task": "t2v",
        "spec": "a bird",
        "height": 768,
        "width": 768,
        "num_frames": 50,
        "text_template": True,
        "num_steps": 30,
        "timestep_shift": 3.5,
        "cfg_text_scale": 4.0,
        "cfg_interval": [0.4, 1.0],
        "cfg_renorm_type": "global",
        "cfg_renorm_min": 0.0,
        "seed": 42,
    }
    asked = build_request("x2t_image", Options(question="what", images=(Path("a.png"),)))
    assert asked["spec"]["interleave_array"][0] == "a.png" and asked["spec"]["istarget_in_interleave"] == [0, 1]
    assert (asked["vit_resolution"], asked["max_new_tokens"]) == (672, 256)
    edit = build_request("video_edit", Options(prompt="red", videos=(Path("a.mp4"),), vit_resolution=56))
    assert (edit["vae_resolution"], edit["vit_resolution"]) == (640, 56)


IMAGE = {"images": (GARDEN,)}


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("t3i", {"prompt": "a"}, "task 't3i' is not one of t2i"),
        ("t2i", {}, "needs a --prompt"),
        ("t2i", {"prompt": "a", **IMAGE}, "--image means nothing to t2i"),
        ("t2i", {"prompt": "a", "question": "b"}, "--question means nothing"),
        ("t2i", {"prompt": "a", "num_frames": 9}, "makes one frame"),
        ("t2i", {"prompt": "a", "width": 70}, "width 70 must be a multiple of 16"),
        ("t2i", {"prompt": "a", "steps": 0}, "num_steps must be a positive integer"),
        ("t2i", {"prompt": "a", "timestep_shift": -1.0}, "timestep_shift"),
        ("t2i", {"prompt": "a", "guidance": float("nan")}, "cfg_text_scale must be a finite number"),
        ("t2i", {"prompt": "a", "guidance_renorm": "local"}, "'local'"),
        ("t2i", {"prompt": "a", "seed": 2**64}, "seed"),
        ("t2i", {"prompt": "a <|video_pad|>"}, "control token"),
        ("image_edit", {"prompt": "a"}, "needs an --image"),
        ("video_edit", {"prompt": "a"}, "needs a --video"),
        ("video_edit", {"prompt": "a", **IMAGE}, "takes a video"),
        ("image_edit", {"prompt": "a", "width": 64, **IMAGE}, "takes its size"),
        ("image_edit", {"prompt": "a", "resolution": "8k", **IMAGE}, "resolution '8k' is not one of"),
        ("image_edit", {"prompt": "a", "images": (Path("no.png"),)}, "no.png: not found"),
        ("i2v", {"prompt": "a", "num_frames": 3, **IMAGE}, "num_frames 3"),
        ("i2v", {"prompt": "a", "vit_resolution": 56, **IMAGE}, "--vit-resolution means nothing"),
        ("x2t_image", IMAGE, "needs a --question"),
        ("x2t_image", {"question": "a", "steps": 3, **IMAGE}, "--steps means nothing"),
        ("x2t_image", {"question": "a", "max_new_tokens": 0, **IMAGE}, "max_new_tokens"),
    ],
)
def test_bad_requests_are_refused_in_one_line(tmp_path, task, options, message):
    with pytest.raises(ParityError) as caught:
        record(tmp_path / "out", CHECKPOINT, build_request(task, Options(**options)), dtype="float32")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_bad_places_are_refused_in_one_line(small, tmp_path):
    request = build_request("t2i", SMALL)
    (tmp_path / "file").touch()
    (tmp_path / "o" / "checkpoint-a").mkdir(parents=True)
    partial = tmp_path / "partial"
    shutil.copytree(CHECKPOINT / "Lance_3B", partial / "Lance_3B", ignore=lambda *_: ["model.safetensors"])
    for out, checkpoint, values, message in (
        (tmp_path / "file", CHECKPOINT, {}, "exists already"),
        (tmp_path / "file" / "x", CHECKPOINT, {}, "cannot be written"),
        (tmp_path / "o" / "x", CHECKPOINT, {}, "is another checkpoint than"),
        (tmp_path / "checkpoint-a", CHECKPOINT, {}, "cannot lie beside"),
        (tmp_path / "x", tmp_path / "nothing", {}, "is no checkpoint"),
        (tmp_path / "x", ORACLES / "media", {}, "is no checkpoint"),
        (tmp_path / "x", partial, {}, "model.safetensors"),
        (tmp_path / "x", CHECKPOINT, {"dtype": "float16"}, "'float16' is not one of"),
        (tmp_path / "x", CHECKPOINT, {"entry": "both"}, "'both'"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ParityError) as caught:
            record(out, checkpoint, request, **values)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before
