"""Captures change nothing but what they are told to, and leave everything as it was, whatever happens inside."""

import json
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lance_mlx.sampling.flow as flow
import lance_mlx.sampling.text as text
import reference.sampler
from lance_mlx.backend import pieces
from lance_mlx.model.mot import MoTModel
from lance_mlx.model.rope import rotary_table
from lance_mlx.model.vae_decoder import Decoder
from lance_mlx.model.vit import VisionTransformer
from parity.bundle.reading import read_bundle
from parity.errors import ParityError
from parity.lance.boundaries_mlx import MlxBoundaries
from parity.lance.capture_mlx import MlxCapture
from parity.lance.capture_torch import TorchCapture
from parity.lance.given import replay_of
from parity.lance.ports import MlxPort
from parity.lance.replay_mlx import load_for, replay_pipeline, request_from_bundle
from parity.localize.steering import steered
from parity.ports.attach import Attached
from parity.tensors.metrics import compare
from parity.tensors.recording import Tap

NAME = "image_edit-fp32-nokv"
LAYER = "language_model.model.layers.1"


def held() -> dict[tuple[str, ...], object]:
    """Everything that a capture could replace: what modules and their classes, and MLX's, hold."""
    found: dict[tuple[str, ...], object] = {}
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] not in ("lance_mlx", "reference") and not path.startswith("mlx.nn"):
            continue
        for name, value in vars(module).items():
            found[path, name] = value
            if isinstance(value, type):
                found |= {(path, name, inner): attribute for inner, attribute in vars(value).items()}
    return found


def changed(before: dict[tuple[str, ...], object]) -> list[tuple[str, ...]]:
    after = held()
    return [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)]


def hooks(pipeline) -> int:
    modules = [*pipeline.model.modules(), *pipeline.vae.modules()]
    modules += pipeline.vit_model.modules() if pipeline.vit_model is not None else []
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


class Stop(Exception):
    """What passes through a capture in these tests."""


@pytest.mark.parametrize("error", [None, Stop, KeyboardInterrupt])
def test_lance_mlx_is_left_as_it_was(subject_of, error):
    subject = subject_of(NAME)
    subject.run({"pixels"})
    before = held()

    def enter():
        with MlxCapture(subject.pipeline) as capture, MlxBoundaries(capture):
            inside = changed(before)
            if error:
                raise error
        return inside

    if error:
        with pytest.raises(error):
            enter()
    else:
        # Every class of a module that is loaded, and the functions between them.
        inside = {key[-2:] for key in enter()}
        expected = {(kind.__name__, "__call__") for kind in (MoTModel, Decoder, VisionTransformer, nn.Linear)}
        expected |= {("lance_mlx.sampling.flow", name) for name in ("advance", "guided_velocity", "timesteps")}
        assert expected <= inside
    assert changed(before) == []


@pytest.mark.parametrize(
    ("owner", "name"),
    [(MoTModel, "__call__"), (Decoder, "__call__"), (VisionTransformer, "__call__"), (flow, "guided_velocity")],
)
def test_a_run_that_fails_inside_leaves_everything_as_it_was(subject_of, oracle_of, monkeypatch, owner, name):
    subject, oracle = subject_of(NAME), oracle_of(NAME)
    before = held()
    with monkeypatch.context() as context:

        def broken(*arguments, **values):
            raise Stop("inside")

        context.setattr(owner, name, broken)
        with pytest.raises(ParityError, match="^mlx cannot run bundle .*: Stop: inside$"):
            subject.run(set())
        with pytest.raises(ParityError):
            steered(subject, oracle)
    assert changed(before) == []
    again = subject.run(set(oracle.taps))
    assert compare(oracle.taps["pixels"], again.recording["pixels"]).rel_l2 < 1e-4


def test_what_is_inherited_is_inherited_again():
    class Inheriting(Decoder):
        pass

    with Attached() as attached:
        attached.wrap(Inheriting, "__call__", lambda original, *arguments: None)
        assert "__call__" in vars(Inheriting)
    assert "__call__" not in vars(Inheriting)


@pytest.mark.parametrize("stop", [None, "inside", "until"])
def test_the_reference_is_left_as_it_was(oracle_of, monkeypatch, stop):
    oracle = oracle_of(NAME)
    pipeline, before = oracle.run.pipeline, held()
    assert hooks(pipeline) == 0
    if stop == "until":
        assert oracle.run.recompute("cond.step2/hidden_out", oracle.passes) is not None
    elif stop == "inside":
        with monkeypatch.context() as context:

            def broken(*arguments):
                raise Stop

            context.setattr(reference.sampler, "guide", broken)
            with pytest.raises(Stop):
                oracle.run.record()
    else:
        with TorchCapture(pipeline):
            assert hooks(pipeline) > 100
            assert {key[-1] for key in changed(before)} == {"guide", "advance"}
    assert hooks(pipeline) == 0 and changed(before) == []


def test_watching_changes_nothing(subject_of, oracle_of):
    name = "t2i-fp32-kv"
    subject, bundle = subject_of(name), oracle_of(name).bundle
    request = request_from_bundle(bundle.request, bundle.entry)
    prepared = subject.pipeline.prepare_encoded(request, [], [])
    noise = mx.array(replay_of(bundle).noise)
    *_, last = subject.pipeline.denoise(prepared, noise)
    alone = np.array(last.x_next).reshape(bundle.taps["latent"].array.shape)
    watched = subject.run({"latent"})
    assert set(watched.recording) == {"latent"}
    assert watched.recording["latent"].array.tobytes() == alone.tobytes()
    assert watched.failures == {} and "inputs/text_ids" in watched.exact


@pytest.mark.parametrize("name", ["t2i-fp32-kv", "t2v-bf16-kv", "image_edit-fp32-nokv"])
def test_both_arms_in_one_pass_are_recorded_as_they_are_apart(oracle_of, subject_of, monkeypatch, name):
    subject, wanted = subject_of(name), set(oracle_of(name).taps)
    together = subject.run(wanted).recording
    monkeypatch.setattr(flow, "goes_in_one_pass", lambda *given: False)
    apart = subject.run(wanted).recording
    assert together.keys() == apart.keys()
    # Products of more rows may add up in another order, which may take a pixel to the next level.
    limit = 1e-5 if "fp32" in name else 0.05
    for tap, other in apart.items():
        difference = compare(other, together[tap])
        near = difference.rel_l2 < limit or (tap == "frames" and difference.max_abs <= 1)
        assert together[tap].dtype == other.dtype and near, tap


def test_rows_that_are_computed_in_pieces_are_recorded_whole(oracle_of, subject_of, monkeypatch):
    subject, wanted = subject_of("t2i-fp32-kv"), set(oracle_of("t2i-fp32-kv").taps)
    whole = subject.run(wanted).recording
    monkeypatch.setattr(pieces, "PIECE_VALUES", 1 << 8)
    monkeypatch.setattr(pieces, "GPU_PIECE_VALUES", 1 << 8)
    recording = subject.run(wanted).recording
    assert {name: tap.array.shape for name, tap in recording.items()} == {
        name: tap.array.shape for name, tap in whole.items()
    }


def test_a_token_that_is_begun_in_vain_is_not_recorded(oracle_of, monkeypatch):
    bundle = oracle_of("x2t_image-bf16-kv").bundle
    monkeypatch.setattr(text, "looks_ahead", lambda reader: True)
    asked = request_from_bundle(bundle.request, bundle.entry)
    pipeline = load_for(asked, bundle.checkpoint / bundle.variant, bundle.dtype)
    recording = replay_pipeline(pipeline, asked, replay_of(bundle)).recording
    decoded = {name.partition("/")[0] for name in recording if ".decode" in name}
    assert len(decoded) == len(recording["tokens"].array) > 1


def test_a_module_that_does_not_run_once_for_each_arm_is_told(subject_of):
    pipeline = subject_of("t2i-fp32-kv").pipeline
    config = pipeline.model.config
    table = rotary_table(np.zeros((3, 2), np.int32), config, pipeline.model.numerics)
    rope = pipeline.model.language_model.model.layers[0].self_attn.q_rope
    with MlxCapture(pipeline) as capture:
        capture.enter("cond.step0", "uncond.step0")
        rope(mx.zeros((2, 4, config.head_dim)), table)
        with pytest.raises(ParityError, match="another number of times than cond.step0 and uncond.step0 need"):
            capture.enter("cond.step1")


# Steering: what is computed is recorded, and what is given is used in its place.


def doubled(tap: Tap) -> Tap:
    return Tap(tap.array * 2, tap.dtype)


@pytest.mark.parametrize(
    ("bundle", "name", "after", "untouched"),
    [
        ("t2i-fp32-kv", f"cond.step0/{LAYER}.self_attn.q_norm_moe_gen", f"cond.step0/{LAYER}.self_attn.q_rope",
         f"cond.step0/{LAYER}.self_attn.k_rope"),
        ("t2i-fp32-kv", f"cond.prefix1/{LAYER}.self_attn.v_proj", f"cond.prefix1/{LAYER}.self_attn.sdpa",
         "cond.prefix0/hidden_out"),
        ("t2i-fp32-kv", "cond.step2/hidden_in", "cond.step2/hidden_out", "uncond.step2/hidden_out"),
        ("t2i-fp32-kv", "sampler.velocity1", "sampler.x_t2", "uncond.step1/llm2vae"),
        ("t2i-fp32-kv", "sampler.x_t1", "cond.step1/vae2llm", "sampler.velocity0"),
        ("t2i-fp32-kv", "latent", "vae.decode.chunk0/conv2", "sampler.velocity3"),
        ("t2i-fp32-kv", "vae.decode.chunk0/decoder.middle.0", "vae.decode.chunk0/decoder.middle.1",
         "vae.decode.chunk0/decoder.conv1"),
        ("image_edit-fp32-nokv", "vit_model0.blocks.0.attn.qkv", "vit_model0.blocks.0.attn.proj",
         "vit_model0.patch_embed"),
        ("image_edit-fp32-nokv", "vae.encode0.mean", "vae.latent0", "vae.encode0.logvar"),
        ("x2t_image-bf16-kv", f"cond.prefill0/{LAYER}", "cond.prefill0/hidden_out", "vit_model0"),
    ],
)  # fmt: skip
def test_both_sides_use_what_they_are_given(oracle_of, subject_of, bundle, name, after, untouched):
    oracle = oracle_of(bundle)
    given = {name: doubled(oracle.taps[name])}
    whole = set(oracle.taps)
    ours, plain = (subject_of(bundle).run(whole, force).recording for force in (given, None))
    # What was computed there is recorded, and what is given used behind it, and only there.
    assert np.array_equal(ours[name].array, plain[name].array)
    assert compare(plain[after], ours[after]).rel_l2 > 0.01
    assert np.array_equal(ours[untouched].array, plain[untouched].array)
    if oracle.run.entry == "full_sequence":
        return
    theirs = oracle.run.record(force=given)
    limit = 1e-5 if oracle.bundle.dtype == "float32" else 0.05
    for tap in (name, after, untouched):
        assert compare(theirs[tap], ours[tap]).rel_l2 < limit, tap


def test_both_sides_answer_the_tokens_that_they_are_given(oracle_of, subject_of):
    oracle, subject = oracle_of("x2t_image-bf16-kv"), subject_of("x2t_image-bf16-kv")
    tokens = oracle.taps["tokens"].array
    other = {"tokens": Tap(np.roll(tokens, 1), "int32")}
    ours, theirs = subject.run(set(oracle.taps), other).recording, oracle.run.record(force=other)
    after, before = (f"cond.decode{step}/language_model.model.embed_tokens" for step in (3, 2))
    for recording in (ours, theirs):
        # The token before it decides what is embedded.
        assert np.array_equal(recording[after].array, oracle.own[before].array)
        # What would have been answered is told beside it.
        assert recording["tokens"].array[0] == tokens[0] and len(recording["tokens"].array) == len(tokens)


def test_a_steered_run_takes_the_integers_that_it_is_given(oracle_of, subject_of):
    oracle, subject = oracle_of("t2i-fp32-kv"), subject_of("t2i-fp32-kv")
    moved = oracle.exact.arrays["inputs/position_ids.cond"] + np.int32(3)
    exact = replace(oracle.exact, arrays=oracle.exact.arrays | {"inputs/position_ids.cond": moved})
    observed = subject.run(set(oracle.taps), exact=exact)
    # What it computes itself is what is compared with the oracle.
    own = observed.exact["inputs/position_ids.cond"].array
    assert np.array_equal(own, oracle.exact.arrays["inputs/position_ids.cond"])
    used = observed.recording["cond.step0/position_ids"].array
    assert np.array_equal(used, oracle.taps["cond.step0/position_ids"].array + 3)


def test_what_a_function_raises_is_a_failure_where_the_oracle_stands_in(oracle_of, subject_of, monkeypatch):
    oracle, subject = oracle_of("t2i-fp32-kv"), subject_of("t2i-fp32-kv")

    def broken(*arguments):
        raise ValueError("no times")

    monkeypatch.setattr(flow, "timesteps", broken)
    with pytest.raises(ParityError, match="ValueError: no times"):
        subject.run(set(oracle.taps))
    observed = steered(subject, oracle)
    assert observed.failures == {"inputs/timesteps": "ValueError: no times"}
    assert "inputs/timesteps" not in observed.exact and "pixels" in observed.recording


def test_the_mode_in_which_torch_counts_is_left_alone(oracle_of):
    before = torch.is_inference_mode_enabled(), torch.get_num_threads()
    oracle_of("t2i-fp32-kv").run.record({"latent"})
    assert (torch.is_inference_mode_enabled(), torch.get_num_threads()) == before


@pytest.mark.parametrize("variant", ["Lance_3B", "Lance_3B_Video"])
def test_the_variant_that_a_bundle_names_is_loaded(copy_bundle, variant):
    path = copy_bundle("t2i-fp32-nokv")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(manifest | {"variant": variant}), encoding="utf-8")
    folder = path.parent / "checkpoint-a" / variant
    name = "language_model.model.layers.0.self_attn.q_norm.weight"
    loaded = dict(MlxPort(read_bundle(path)).weights())[name]
    assert np.array_equal(np.asarray(loaded), load_file(folder / "model.safetensors")[name].float())
