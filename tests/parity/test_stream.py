"""Layer-streamed parity at a tiny width: what it finds, what it names, and what it keeps in memory."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from parity.cli.main import app
from parity.errors import ParityError
from parity.lance.faults.layered import load_layered
from parity.lance.record_options import Options
from parity.lance.replay_torch import TorchReplay
from parity.lance.stream import reference as stream_reference
from parity.lance.stream.comparison import EMBEDDED, HEAD, stream
from parity.lance.stream.plan import plan_against, plan_live, size_of_latents
from parity.lance.stream.reference import ReferenceStream
from parity.tensors.metrics import compare
from reference.model import Pipeline
from reference.numerics import Numerics
from reference.request import Request

ORACLES = Path(__file__).parents[2] / "oracles"
CHECKPOINT = ORACLES / "checkpoint-a"
LAYERS = 3
ALL_PARTS = [EMBEDDED, *(f"layers.{index}" for index in range(LAYERS)), HEAD]


def drawn(numerics="float32", checkpoint=CHECKPOINT, **values):
    options = Options(**({"prompt": "a red bird", "width": 64, "height": 48, "steps": 1} | values))
    return plan_live(checkpoint, "t2i", options, numerics)


def broken(*specs, numerics="float32"):
    return stream(drawn(numerics), [load_layered(spec) for spec in specs])


@pytest.fixture
def deep(tmp_path):
    """Makes a checkpoint of more layers, which repeat those of the embedded one."""

    def make(count):
        folder = tmp_path / f"deep-{count}"
        shutil.copytree(CHECKPOINT / "Lance_3B", folder / "Lance_3B")
        shutil.copy(CHECKPOINT / "Wan2.2_VAE.pth", folder)
        variant = folder / "Lance_3B"
        config = json.loads((variant / "llm_config.json").read_text())
        (variant / "llm_config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
        tensors = load_file(variant / "model.safetensors")
        stem = "language_model.model.layers."
        layers = {name: tensor for name, tensor in tensors.items() if name.startswith(stem)}
        for index in range(LAYERS, count):
            own = f"{stem}{index % LAYERS}."
            tensors |= {
                name.replace(own, f"{stem}{index}."): tensor.clone()
                for name, tensor in layers.items()
                if name.startswith(own)
            }
        save_file(tensors, variant / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_both_sides_agree_in_every_part(numerics):
    found = stream(drawn(numerics))
    assert found.verdict == "agree" and not found.findings
    assert [part.name for part in found.parts] == ALL_PARTS
    for part in found.parts:
        assert part.farthest.local <= part.farthest.allowed and not part.wrong
    names = {tap.tap.name for tap in found.taps}
    for path in ("self_attn.q_rope", "self_attn.k_rope", "self_attn.sdpa", "self_attn.o_proj_moe_gen", "mlp_moe_gen"):
        assert f"uncond.step0/language_model.model.layers.2.{path}" in names
    assert {"cond.step0/llm2vae", "cond.prefix2/hidden_out", "sampler.velocity0"} <= names
    # Its own way leads away from the reference's, layer by layer.
    totals = [part.total for part in found.parts]
    assert totals[-1] > totals[1] > 0


def test_a_streamed_reference_computes_what_a_whole_one_does():
    plan = drawn("bfloat16")
    streamed = ReferenceStream(CHECKPOINT, plan.variant, plan.request, "bfloat16", plan.replay, {})
    taps = dict(streamed.embed(None).taps)
    for index in range(LAYERS):
        for computed in streamed.run_layer(index).values():
            taps |= computed.taps
    taps |= streamed.finish().taps
    pipeline = Pipeline.load(CHECKPOINT, plan.variant, Numerics("bfloat16"))
    whole = TorchReplay(pipeline, Request.from_dict(plan.request), "kv_cache", plan.replay).record()
    assert {name for name in whole if name.startswith(("cond.", "uncond."))} <= taps.keys()
    for name in taps.keys() & whole.keys():
        assert compare(whole[name], taps[name]).exact, name


@pytest.mark.parametrize("name", [pytest.param("t2i-fp32-kv", marks=pytest.mark.exhaustive), "x2t_image-bf16-kv"])
def test_taps_of_a_bundle_are_expected_where_it_has_them(name):
    with plan_against(ORACLES / name) as plan:
        found = stream(plan)
        given = [tap for tap in found.taps if tap.tap.name in plan.given]
    assert found.verdict == "agree"
    assert len(given) > 60 and {tap.source for tap in given} == {"upstream"}


def test_a_wrong_tap_of_a_bundle_is_found():
    name = "cond.step0/language_model.model.layers.1.self_attn.sdpa"
    with plan_against(ORACLES / "t2i-fp32-kv") as plan:
        taps = dict(plan.given)
        taps[name] = replace(taps[name], array=taps[name].array * np.float32(1.01))
        found = stream(replace(plan, given=taps))
    # The reference computes something else, as lance_mlx does: that says nothing against lance_mlx.
    assert found.verdict == "inconclusive" and found.findings == []
    assert found.reason.startswith(f"oracle and reference disagree at {name} (error 0.0099, rounding allows ")
    tap = next(tap for tap in found.taps if tap.tap.name == name)
    assert tap.local < 1e-6 and not tap.wrong and tap.total == pytest.approx(0.0099, rel=0.01)


@pytest.mark.parametrize(
    ("spec", "component"),
    [
        ("key-norm-missing@2", "layers.2.self_attn.k_norm"),
        pytest.param("weight-of-the-next-layer@0", "layers.0.mlp.down_proj", marks=pytest.mark.exhaustive),
        pytest.param("residual-after-the-norm@2", "layers.2", marks=pytest.mark.exhaustive),
        pytest.param("final-norm-missing", "norm", marks=pytest.mark.exhaustive),
    ],
)
def test_a_fault_is_named_with_its_layer(spec, component):
    found = broken(spec)
    assert found.verdict == "diverge" and found.first.component == component
    # What comes after it is right by itself, and wrong by what comes before.
    stripped = component.partition(".self_attn")[0].partition(".mlp")[0]
    assert {part.name for part in found.parts if part.wrong} == {HEAD if stripped == "norm" else stripped}
    assert found.parts[-1].total > 1e-4


def test_a_fault_of_a_file_breaks_one_layer(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from parity.lance.faults.base import parameter\n"
        "def scaled(model):\n"
        "    norm = model.language_model.model.layers[1].input_layernorm\n"
        "    return parameter(norm, 'weight', norm['weight'] * 1.001)\n"
    )
    found = broken(f"{file}:scaled@1")
    assert found.first.component == "layers.1.input_layernorm" and found.first.local_error == pytest.approx(
        1e-3, rel=0.1
    )


def test_positions_are_compared_before_any_layer():
    found = broken("position-axes-t-w-h")
    assert (found.first.component, found.first.kind) == ("positions", "exact")
    assert not any(part.wrong for part in found.parts)


@pytest.mark.exhaustive
def test_memory_does_not_grow_with_the_number_of_layers(deep, monkeypatch):
    peaks, live = {}, []
    read = stream_reference.load_part

    def counted(model, part, *rest):
        read(model, part, *rest)
        layers = model.language_model.model.layers
        live.append(sum(any(not value.is_meta for value in layer.parameters()) for layer in layers))

    monkeypatch.setattr(stream_reference, "load_part", counted)
    # On a busy machine MLX's own thread may free things before it takes others: the largest of some runs tells, which
    # pass as many layers in all.
    few, many = deep(3), deep(6)
    for count, folder in [(3, few), (6, many), (3, few)] * 2:
        plan = drawn(checkpoint=folder, width=16, height=16)
        # What earlier tests left is not to be freed in between.
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        assert stream(plan).verdict == "agree"
        peaks[count] = max(peaks.get(count, 0), mx.get_peak_memory() - before)
    assert max(live) == 1 and live.count(1) == 2 * (3 + 6 + 3)
    tensors = load_file(CHECKPOINT / "Lance_3B" / "model.safetensors")
    layer = sum(t.nbytes for name, t in tensors.items() if name.startswith("language_model.model.layers.0."))
    assert abs(peaks[6] - peaks[3]) < layer / 2 < layer < peaks[3]


def test_what_cannot_be_streamed_is_an_error_of_one_line(deep, tmp_path):
    folder = deep(3)
    file = folder / "Lance_3B" / "model.safetensors"
    tensors = load_file(file)
    name = "language_model.model.layers.2.self_attn.q_proj.weight"
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, file)
    with pytest.raises(ParityError, match=r"q_proj.weight.* NaN"):
        stream(drawn(checkpoint=folder))
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ParityError, match=f"lacks tensor {name}"):
        stream(drawn(checkpoint=folder))
    with pytest.raises(ParityError, match="layers 0 to 2"):
        broken("key-norm-missing@3")
    with pytest.raises(ParityError, match="'x' is no layer"):
        load_layered("key-norm-missing@x")
    with pytest.raises(ParityError, match="full-sequence"), plan_against(ORACLES / "t2i-fp32-nokv"):
        pass


def test_latents_make_the_squarest_size():
    assert size_of_latents(1024, 1) == (512, 512)
    assert size_of_latents(24, 1) == (96, 64)
    assert size_of_latents(39, 50) == (48, 16)
    with pytest.raises(ParityError, match="a multiple of 13"):
        size_of_latents(40, 50)


def test_the_command_writes_json_and_tells_by_its_status(tmp_path):
    file = tmp_path / "found.json"
    arguments = ["stream", "--checkpoint", str(CHECKPOINT), "--task", "t2i", "--numerics", "float32", "--latents", "12"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(file)])
    assert done.exit_code == 0 and "layers.2" in done.stdout and "peak memory" in done.stdout
    document = json.loads(file.read_text())
    assert document["verdict"] == "agree" and [part["part"] for part in document["parts"]] == ALL_PARTS
    assert document["peak_bytes"] > 0 and document["request"]["width"] == 64

    done = CliRunner().invoke(app, [*arguments, "--fault", "query-norm-missing@1", "--format", "md"])
    assert done.exit_code == 1 and "layers.1.self_attn.q_norm" in done.stdout

    for wrong, told in (
        (["stream"], "name a --checkpoint and a --task"),
        ([*arguments, "--width", "64"], "leave --width"),
        (["stream", "--checkpoint", str(CHECKPOINT), "--task", "i2v"], "cannot be streamed"),
        (["stream", "--against", str(ORACLES / "t2i-fp32-kv"), "--task", "t2v"], "holds a request of t2i, not t2v"),
        (["stream", "--against", str(ORACLES / "t2i-fp32-kv"), "--width", "64"], "leave --width out"),
        ([*arguments, "--fault", "nonsense"], "there is no fault"),
    ):
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2 and told in done.stderr and done.stderr.count("\n") == 1


MADE_UP = Path(__file__).with_name("made_up_port.py")


def test_a_given_port_is_judged_on_what_it_tells(tmp_path):
    command = ["stream", "--against", str(ORACLES / "t2i-fp32-kv"), "--json", str(tmp_path / "found.json"), "--impl"]
    done = CliRunner().invoke(app, [*command, f"{MADE_UP}:Right"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert done.exit_code == 1 and found["impl"] == "made up"
    assert {finding["component"] for finding in found["findings"]} == {"sequence"}
    assert [part["part"] for part in found["parts"]] == ALL_PARTS
    assert "all weights of made up; judged on what made up shares with upstream: it does not tell" in found["remark"]
    done = CliRunner().invoke(app, [*command, f"{MADE_UP}:Wrong"])
    found = json.loads((tmp_path / "found.json").read_text())
    named = {finding["component"] for finding in found["findings"]}
    assert {"positions", "guidance"} <= named and any(name.startswith("layers.0.mlp") for name in named)


def test_a_given_port_needs_a_bundle():
    command = ["stream", "--checkpoint", str(CHECKPOINT), "--task", "t2i", "--impl", f"{MADE_UP}:Right"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "is loaded for a bundle: name one with --against" in done.stderr
