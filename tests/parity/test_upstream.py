"""Recording from a clone of bytedance/Lance: what needs one is skipped where LANCE_UPSTREAM does not name it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from parity.bundle.reading import read_bundle
from parity.cli.main import main
from parity.comparison.check import check_bundle
from parity.comparison.compare import compare_runs
from parity.comparison.verdict import AGREE
from parity.errors import ParityError
from parity.lance.record import record
from parity.lance.record_options import Options, build_request
from parity.lance.sequence_layouts import read_layout
from parity.lance.upstream.clone import COMMIT, NEEDED, check_clone
from parity.lance.upstream.record import Clone, record_upstream, record_upstream_layout, request_of
from parity.oracle.verify import SOUND, verify_bundle
from parity.tensors.recording import read_tensors

ROOT = Path(__file__).parents[2]
ORACLES = ROOT / "oracles"
CHECKPOINT = ORACLES / "checkpoint-a"
SMALL = build_request("t2i", Options(prompt="a bird", width=48, height=32, steps=2))


@pytest.fixture(scope="module")
def clone():
    """The clone that LANCE_UPSTREAM names, run by the Python that LANCE_UPSTREAM_PYTHON names."""
    path = os.environ.get("LANCE_UPSTREAM")
    if not path:
        pytest.skip("LANCE_UPSTREAM names no clone of https://github.com/bytedance/Lance")
    return Clone.at(Path(path), Path(os.environ.get("LANCE_UPSTREAM_PYTHON", sys.executable)))


@pytest.fixture
def fake(tmp_path):
    """Makes a folder that passes for a clone, whose launcher is the given source."""

    def make(source="", name="Lance"):
        for file in NEEDED:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source if file == NEEDED[0] else "")
        return tmp_path / name

    return make


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs lance-parity record and returns its status and the lines that it says on stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lance-parity", "record", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err.strip().splitlines()

    return run


def nothing_in(folder):
    """Tell whether a folder is empty or missing."""
    return not folder.exists() or not list(folder.iterdir())


def git(folder, *words):
    settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *settings, "-C", str(folder), *words], check=True, capture_output=True)


# Clones.


def test_a_missing_folder_and_a_missing_file_are_named(tmp_path, fake):
    with pytest.raises(ParityError, match="is not a folder: name a clone of https"):
        check_clone(tmp_path / "nowhere")
    (fake() / NEEDED[3]).unlink()
    with pytest.raises(ParityError, match=f"it lacks {NEEDED[3]}"):
        check_clone(tmp_path / "Lance")


def test_a_copy_without_git_is_used_with_a_warning(fake):
    commit, warning = check_clone(fake())
    assert commit is None and "does not tell its commit" in warning


def test_another_commit_and_changed_files_are_used_with_a_warning(fake, monkeypatch):
    folder = fake()
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "all")
    commit, warning = check_clone(folder)
    assert len(commit) == 40 and f"at commit {commit[:7]}, not {COMMIT[:7]}" in warning
    monkeypatch.setattr("parity.lance.upstream.clone.COMMIT", commit)
    assert check_clone(folder) == (commit, None)
    (folder / NEEDED[0]).write_text("changed")
    assert f"at commit {commit[:7]}-dirty" in check_clone(folder)[1]


# The command line.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--inputs-of", "BUNDLE"), "--inputs-of needs --upstream"),
        (("--weights", "none"), "--weights none needs --upstream"),
        (("--upstream-python", "python"), "--upstream-python needs --upstream"),
        (("--upstream", "nowhere", "--prompt", "a bird"), "nowhere is not a folder: name a clone"),
        (("--upstream", "CLONE"), "t2i needs a --prompt"),
        (("--upstream", "CLONE", "--inputs-of", "BUNDLE", "--steps", "2"), "--steps means nothing beside --inputs-of"),
        (("--upstream", "CLONE", "--inputs-of", "BUNDLE", "--seed", "7"), "--seed means nothing beside --inputs-of"),
        (("--upstream", "CLONE", "--inputs-of", "OTHER"), "holds a request of image_edit, not t2i"),
        (("--upstream", "CLONE", "--prompt", "a", "--numerics", "half"), "numerics 'half' is not one of"),
        (("--upstream", "CLONE", "--prompt", "a", "--entry", "both"), "entry 'both' is not one of"),
        (("--upstream", "CLONE", "--prompt", "a", "--level", "half"), "level 'half' is not one of"),
        (("--upstream", "CLONE", "--prompt", "a", "--whole", "layers.0"), "every tap is whole at level whole"),
        (("--upstream", "CLONE", "--prompt", "a", "--weights", "none", "--level", "sketch"), "leave --level and"),
    ],
)
def test_bad_options_get_one_line(tmp_path, fake, command, words, said):
    names = {"CLONE": fake(), "BUNDLE": ORACLES / "t2i-fp32-kv", "OTHER": ORACLES / "image_edit-fp32-nokv"}
    out = tmp_path / "bundles" / "new"
    status, lines = command("t2i", "--checkpoint", CHECKPOINT, "-o", out, *(names.get(word, word) for word in words))
    assert status == 2 and said in lines[-1]
    assert all("does not tell its commit" in line for line in lines[:-1])
    assert nothing_in(out.parent)


def test_a_checkpoint_without_what_upstream_reads_is_refused(tmp_path, fake):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, checkpoint)
    (checkpoint / "Wan2.2_VAE.pth").unlink()
    with pytest.raises(ParityError, match=r"lacks Wan2\.2_VAE\.pth, which upstream reads"):
        record_upstream(tmp_path / "bundles" / "new", Clone.at(fake()), checkpoint, SMALL)
    assert nothing_in(tmp_path / "bundles")


def test_a_damaged_bundle_gives_no_inputs(tmp_path, fake, copy_bundle, command):
    bundle = copy_bundle("t2i-fp32-kv")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["checkpoint"] = "../elsewhere"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    out = tmp_path / "bundles" / "new"
    status, lines = command("t2i", "--upstream", fake(), "--inputs-of", bundle, "--checkpoint", CHECKPOINT, "-o", out)
    assert status == 2 and len(lines) == 1 and "leaves the folder" in lines[0]
    assert nothing_in(out.parent)


# The process that runs the clone.


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os; os._exit(3)", "the process that ran upstream ended with status 3"),
        ("import os; os.kill(os.getpid(), 9)", "the process that ran upstream was killed by signal 9"),
        ("import nothing_like_it", r"cannot import the clone \(No module named 'nothing_like_it'\): name the Python"),
        ("raise RuntimeError('a\\nb')", "upstream fails: RuntimeError: a b$"),
    ],
)
def test_a_process_that_dies_leaves_nothing(tmp_path, fake, source, said):
    out = tmp_path / "bundles" / "new"
    with pytest.raises(ParityError, match=said) as raised:
        record_upstream(out, Clone.at(fake(source)), CHECKPOINT, SMALL)
    assert "\n" not in str(raised.value)
    assert nothing_in(out.parent)


def test_a_python_that_is_none_is_named(tmp_path, fake):
    with pytest.raises(ParityError, match="python cannot be run: No such file or directory"):
        record_upstream(tmp_path / "new", Clone.at(fake(), tmp_path / "python"), CHECKPOINT, SMALL)


def test_an_interrupt_ends_the_process_and_leaves_nothing(tmp_path, fake):
    marker = tmp_path / "started"
    source = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(900)"
    out = tmp_path / "bundles" / "new"
    words = ["record", "t2i", "--upstream", fake(source), "--prompt", "a", "--checkpoint", CHECKPOINT, "-o", out]
    line = [sys.executable, "-c", "from parity.cli.main import main; main()", *map(str, words)]
    running = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (marker.exists() and marker.read_text()):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.wait(600) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)
    assert nothing_in(out.parent)


def test_the_process_needs_only_packages_that_upstream_has():
    # The last of them needs NumPy 2.
    ours = ("lance_mlx", "mlx", "transformers", "pandas", "parity.tensors.metrics")
    code = f"import sys\nsys.modules.update(dict.fromkeys({ours}))\nimport parity.lance.upstream.worker"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# A real clone.


@pytest.mark.parametrize("name", ["t2i-fp32-kv", "t2v-bf16-kv", "image_edit-fp32-nokv", "x2t_image-bf16-kv"])
def test_a_clone_computes_what_an_oracle_holds(tmp_path, clone, name):
    oracle = read_bundle(ORACLES / name)
    out = tmp_path / name
    record_upstream(out, clone, CHECKPOINT, request_of(oracle), oracle.entry, oracle.dtype, given=oracle)
    # Bit for bit on the machine and with the number of threads of the capture; elsewhere products round otherwise.
    within = 1e-5 if oracle.dtype == "float32" else 0.05
    compared = compare_runs(str(ORACLES / name), str(out), within)
    assert compared.verdict == AGREE
    old, new = (read_tensors(path / "inputs.safetensors") for path in (oracle.path, out))
    assert old.keys() == new.keys() and all(np.array_equal(old[key].array, new[key].array) for key in old)


@pytest.mark.parametrize("name", ["t2i-fp32-kv", "x2t_image-bf16-kv"])
def test_a_clone_is_sketched_as_the_reference_is(tmp_path, clone, name):
    oracle = read_bundle(ORACLES / name)
    out = tmp_path / name
    how = request_of(oracle), oracle.entry, oracle.dtype
    record_upstream(out, clone, CHECKPOINT, *how, given=oracle, level="sketch", whole=["layers.1.mlp*"])
    recorded = read_bundle(out)
    record(tmp_path / "ours", CHECKPOINT, *how, level="sketch", whole=["layers.1.mlp*"])
    ours = read_bundle(tmp_path / "ours")
    assert recorded.sketches.keys() == ours.sketches.keys() and recorded.sketches
    assert {n: s.runs for n, s in recorded.sketches.items()} == {n: s.runs for n, s in ours.sketches.items()}
    assert compare_runs(str(ORACLES / name), str(out), 1e-5 if oracle.dtype == "float32" else 0.05).verdict == AGREE


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["t2i-fp32-kv", "x2t_image-bf16-kv"])
def test_a_capture_by_the_kernels_of_a_gpu_is_no_disagreement(tmp_path, clone, name, numerics):
    python = tmp_path / "python"
    kernels = Path(__file__).parent / "gpu_kernels"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{kernels}:$PYTHONPATH" exec "{clone.python}" "$@"\n')
    python.chmod(0o755)
    oracle, made = read_bundle(ORACLES / name), tmp_path / "made"
    how = request_of(oracle), "kv_cache", numerics
    record_upstream(made, replace(clone, python=python), CHECKPOINT, *how, copy_checkpoint=True, given=oracle)
    taps = read_bundle(made).taps
    assert oracle.dtype != numerics or any(not np.array_equal(taps[n].array, t.array) for n, t in oracle.taps.items())
    assert verify_bundle(made).verdict == SOUND and check_bundle(made, "mlx").verdict == AGREE


def test_what_a_seed_draws_is_the_launchers(tmp_path, clone):
    before = {path: path.stat().st_mtime_ns for path in clone.path.rglob("*")}
    out = tmp_path / "new"
    record_upstream(out, clone, CHECKPOINT, SMALL | {"seed": 7}, dtype="float32")
    assert {path: path.stat().st_mtime_ns for path in clone.path.rglob("*")} == before
    noise = torch.randn(6, 48, generator=torch.Generator().manual_seed(7))
    assert np.array_equal(read_tensors(out / "taps.safetensors")["sampler.noise"].array, noise.numpy())
    assert verify_bundle(out).verdict == SOUND


def test_noise_of_another_size_is_refused(tmp_path, clone):
    oracle = read_bundle(ORACLES / "t2i-fp32-kv")
    with pytest.raises(ParityError, match=r"sampler.noise has shape \[24, 48\], upstream draws \[6, 48\]"):
        record_upstream(tmp_path / "new", clone, CHECKPOINT, SMALL, given=oracle)
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("name", ["t2i-768", "image_edit-768", "x2t_image-768"])
def test_a_clone_lays_out_what_a_layout_holds(tmp_path, clone, name):
    layout = read_layout(ORACLES / "layouts" / f"{name}.npz")
    request = layout.request
    if isinstance(request["spec"], dict):
        spec = request["spec"]
        pairs = zip(spec["interleave_array"], spec["element_dtype_array"], strict=True)
        elements = [element if kind == "text" else str(layout.media / element) for element, kind in pairs]
        request = request | {"spec": spec | {"interleave_array": elements}}
    out = tmp_path / "layouts" / name
    record_upstream_layout(out, clone, ROOT / "tests" / "data" / "tokenizer", request)
    again = read_layout(out.with_name(f"{name}.npz"))
    assert again.request == layout.request
    assert again.arrays.keys() == layout.arrays.keys()
    for key, array in layout.arrays.items():
        assert array.dtype == again.arrays[key].dtype and np.array_equal(array, again.arrays[key]), key
