"""lance-mlx info: what it shows, what it estimates beside what is measured, and what it refuses."""

import gc
import json
import runpy
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from lance_mlx import BFLOAT16, FLOAT32, LanceError, Question, Request, Task, Variant, Visual, VisualKind, load
from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.checkpoint.convert import prepare
from lance_mlx.checkpoint.layouts import find_checkpoint
from lance_mlx.checkpoint.safetensors import read_header
from lance_mlx.checkpoint.tensors import ViTSource
from lance_mlx.cli.app import app
from lance_mlx.cli.info import _duration as duration
from lance_mlx.estimate.cost import decoder_convolutions, encoder_convolutions, step_operations
from lance_mlx.estimate.estimate import OFFICIAL, peak_memory, sizes_of, weights_of, work_of
from lance_mlx.estimate.machine import _seconds as machine_seconds
from lance_mlx.estimate.machine import memory
from lance_mlx.model import vae_encoder, vae_layers
from lance_mlx.pipeline import load as load_pipeline

make_community = runpy.run_path(str(Path(__file__).with_name("layout_cases.py")))["make_community"]
ON_CPU = pytest.mark.skipif(not runs_on_cpu(), reason="memory is estimated from what was measured on the CPU")


def shown(*arguments: object) -> str:
    """What the command prints, without a process of its own."""
    return CliRunner().invoke(app, ["info", *map(str, arguments)], catch_exceptions=False).stdout


def told(*arguments: object) -> dict:
    return json.loads(shown(*arguments, "--json"))


def test_without_a_model_it_names_versions_device_blas_and_precision(run):
    done = run("info")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("lance-mlx ") and ", mlx " in lines[0]
    assert lines[1].startswith("device: ") and lines[1].endswith(" GB of memory")
    assert lines[2].startswith("BLAS: ") and lines[3:] == ["float32 is multiplied in float32"]
    assert set(told()) == {"installed"}


@pytest.mark.parametrize("name", ["memory_size", "total_memory"])
def test_the_memory_of_a_gpu_is_found_under_metals_name_and_cudas(monkeypatch, name):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {name: 2**34, "architecture": "any"})
    assert memory() == 2**34


def test_every_layout_is_named_with_the_bytes_of_its_parts(checkpoint, tmp_path):
    official = told("--model", checkpoint)["checkpoints"]
    assert [held["variant"] for held in official] == list(Variant)
    tensors = read_header(checkpoint / "Lance_3B_Video" / "model.safetensors")
    vit = sum(tensor.info.nbytes for name, tensor in tensors.items() if name.startswith("vit_model."))
    assert official[1]["bytes"]["vit"] == vit > 0
    assert official[1]["dtypes"] == dict.fromkeys(("language_model", "vae", "vit"), ["float32"])
    found = find_checkpoint(checkpoint, Variant.VIDEO)
    prepare("it", found, tmp_path / "converted", "bfloat16", 10**9, ViTSource.LANCE).run(lambda *_: lambda _: None)
    (converted,) = told("--model", tmp_path / "converted")["checkpoints"]
    assert converted["layout"] == "written by lance-mlx convert"
    assert converted["bytes"] == {name: size // 2 for name, size in official[1]["bytes"].items()}
    make_community(checkpoint, Variant.IMAGE, tmp_path / "community")
    (tmp_path / "community" / "vit.safetensors").unlink()
    text = shown("--model", tmp_path / "community")
    assert "Lance_3B, as mlx-community publishes it" in text
    assert "language model: 0.00 GB, bfloat16 and float32" in text
    assert "vit: none" in text


def test_an_estimate_says_that_it_is_one(checkpoint):
    given = ["--task", "t2i", "--width", 64, "--height", 48, "--steps", 4, "--model", checkpoint]
    text = shown(*given)
    assert "t2i, 64x48, 4 steps (4 guided), bfloat16: an estimate, not a measurement" in text
    assert "with --low-ram" in text
    found = told(*given, "--guidance", 1, "--numerics", "float32")["estimate"]
    assert (found["guided_steps"], found["numerics"]) == (0, "float32")
    # Nothing looks: neither is loaded.
    assert (found["weights"]["vit"], found["weights"]["encoder"]) == (0, 0)
    assert found["peak_bytes"]["low_ram"] <= found["peak_bytes"]["kept"]
    assert "of several seeds or prompts, 8 are drawn at a time" in text and found["batch_size"] == 8
    alone = (["t2i"], ["i2v", "--num-frames", 5, "--width", 32, "--height", 32], ["x2t_image"])
    assert [told("--task", *each, "--model", checkpoint)["estimate"]["batch_size"] for each in alone] == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", 3], "--steps needs a --task"),
        (["--task", "t2i", "--width", 17], "width 17 must be a multiple of 16"),
        (["--task", "t2v", "--num-frames", 500], "num_frames 500 must be between"),
        (["--numerics", "int4", "--task", "t2i"], "unknown numerics 'int4'"),
        (["--model", "nowhere"], "model folder nowhere does not exist"),
        (["--model", "someone/something"], "info reads a folder"),
    ],
)
def test_bad_input_is_refused(arguments, line):
    with pytest.raises(LanceError, match=line):
        shown(*arguments)


def test_a_refusal_is_one_line(refused, tmp_path):
    assert "holds neither" in refused("info", "--model", tmp_path)


def test_the_official_sizes_are_those_of_the_official_checkpoint():
    # Bytes in bfloat16 of a checkpoint at the official size, as its headers have them.
    weights = weights_of(OFFICIAL, BFLOAT16)
    assert weights.layers == 36 * weights.layer
    assert (weights.layers + weights.others + weights.head) / 1e9 == pytest.approx(12.35, abs=0.005)
    assert weights.vit / 1e9 == pytest.approx(1.34, abs=0.005)
    assert (weights.decoder + weights.encoder) / 1e9 == pytest.approx(1.41, abs=0.005)


def test_weights_are_those_that_are_loaded(checkpoint):
    pipeline = load_pipeline(checkpoint, Variant.VIDEO, FLOAT32, looks=True)
    weights = weights_of(sizes_of(find_checkpoint(checkpoint, Variant.VIDEO), looks=True), FLOAT32)
    for module, expected in (
        (pipeline.model, weights.layers + weights.others + weights.head + weights.vit),
        (pipeline.vae, weights.decoder + weights.encoder),
    ):
        assert sum(array.nbytes for _, array in tree_flatten(module.parameters())) == expected


@pytest.mark.parametrize("frames", [1, 5])
def test_the_convolutions_that_are_counted_are_those_that_run(checkpoint, monkeypatch, frames):
    ran, original = [], vae_layers.convolve

    def watch(x, weight, *rest, **named):
        y = original(x, weight, *rest, **named)
        ran.append((y.size // y.shape[-1], weight.shape[-1], weight.shape[0]))
        return y

    for module in (vae_layers, vae_encoder):
        monkeypatch.setattr(module, "convolve", watch)
    sizes = sizes_of(find_checkpoint(checkpoint, Variant.VIDEO), looks=True)
    vae = load_pipeline(checkpoint, Variant.VIDEO, FLOAT32, looks=True).vae

    def counted(build, shape):
        convolutions = [*build(shape, 6, True), *(build(shape, 6, False) if frames > 1 else ())]
        return sorted((conv.cells, conv.in_channels, conv.out_channels) for conv in convolutions)

    list(vae.decode(mx.zeros(((frames + 3) // 4, 2, 3, 48))))
    assert counted(decoder_convolutions, sizes.decoder) == sorted(ran)
    ran.clear()
    vae.encode(np.zeros((frames, 32, 48, 3), np.float32))
    assert counted(encoder_convolutions, sizes.encoder) == sorted(ran)


def test_passes_are_those_of_the_sequence(pipeline):
    request = Request(Task.T2V, "a red bird", 32, 48, 5, num_steps=8)
    work, sequence = work_of(request, 5, on_cpu=True), pipeline.prepare(request).sequence
    alone, guided = work.steps
    assert alone.rows == guided.rows == len(sequence.target)
    assert (work.num_guided, alone.times, guided.times, guided.readings) == (7, 1, 7, 2)
    # Beyond some size each arm has a pass of its own.
    (step,) = work_of(Request(Task.T2V, "a red bird", 256, 256, 17, num_steps=8), 17, on_cpu=True).steps
    assert (step.rows, step.times, step.readings) == (5 * 256 + 2, 15, 1)
    assert step_operations(pipeline.model.config, [sequence]) > 0
    asked = Question(Task.X2T_IMAGE, "what?", (Visual("x", VisualKind.IMAGE),), vit_resolution=56)
    assert work_of(asked, 1, on_cpu=True).patches == 16


@ON_CPU
@pytest.mark.parametrize("low_ram", [False, True], ids=["kept", "low_ram"])
@pytest.mark.parametrize("numerics", [BFLOAT16, FLOAT32], ids=lambda numerics: numerics.name)
def test_memory_is_near_what_is_measured(checkpoint, numerics, low_ram):
    request = Request(Task.T2I, "a red bird", 256, 256, num_steps=4)
    sizes, work = sizes_of(find_checkpoint(checkpoint, Variant.IMAGE), looks=False), work_of(request, 1, on_cpu=True)
    expected = peak_memory(sizes, numerics, work, low_ram, on_cpu=True)
    passes, whole = [], []
    # On a busy machine MLX's own thread may free things before it takes others: the largest of some runs tells.
    for _ in range(3):
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model = load(checkpoint, numerics, low_ram=low_ram)
        model.pipeline(Variant.IMAGE, looks=False)
        generated = model.generate(request)
        passes.append(mx.get_peak_memory() - before)
        generated.frames  # noqa: B018
        whole.append(mx.get_peak_memory() - before)
        del model, generated
    assert expected["passes"] / 2 < max(passes) < 1.35 * expected["passes"]
    assert max(expected.values()) / 2 < max(whole) < 1.25 * max(expected.values())


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(9.94, "9.9 s"), (599, "10 min"), (95.5, "95.5 s"), (7260, "2 h 1 min"), (886_437, "10 d 6 h")],
)
def test_a_long_time_is_told_in_words(seconds, words):
    assert duration(seconds) == words


@ON_CPU
def test_a_machine_that_is_slow_is_not_watched_for_long(monkeypatch):
    runs = []

    def slow() -> list:
        runs.append(1)
        time.sleep(0.3)
        return []

    assert machine_seconds(slow) >= 0.3
    assert len(runs) == 1
