"""Whether the oracle and the reference agree is judged before a port: what disagrees first, and the likely cause."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reference.sampler
from parity.bundle.reading import read_bundle
from parity.comparison.check import check_bundle
from parity.errors import ParityError
from parity.lance.names import logits_name
from parity.localize.investigation import localize
from parity.oracle.floors_file import floors_of, judge_bundle
from parity.oracle.judgement import Cause, judge
from parity.oracle.oracle import Oracle
from parity.oracle.verify import verify_bundle
from parity.tensors.recording import Tap, read_tensors, write_tensors
from parity.tensors.rounding import rounded

SMALL, DETAILED = "t2i-fp32-nokv", "t2i-fp32-kv"


def with_tap(bundle, name, change):
    taps = read_tensors(bundle / "taps.safetensors")
    write_tensors(bundle / "taps.safetensors", taps | {name: Tap(change(taps[name].array), taps[name].dtype)})


def zeroed(array):
    array = array.copy()
    array.reshape(-1)[:400] = 0
    return array


def noisy(array):
    return (array + 1e-3 * np.random.default_rng(0).standard_normal(array.shape)).astype(np.float32)


@pytest.mark.parametrize("name", [SMALL, DETAILED, "t2v-bf16-kv", "x2t_image-bf16-kv"])
def test_upstreams_own_captures_agree(oracles, name):
    judgement = judge_bundle(oracles / name)
    assert judgement.agree and judgement.sentence() == "" and not judgement.names


@pytest.mark.parametrize(("behind", "agrees"), [(3e-3, True), (0.3, False)])
def test_a_near_tie_between_two_tokens_is_no_disagreement(oracles, behind, agrees):
    oracle = Oracle.of(read_bundle(oracles / "x2t_image-bf16-kv"))
    tokens, name = oracle.bundle.taps["tokens"].array, logits_name(7)
    logits = oracle.own[name].array.copy()
    logits[..., (tokens[7] + 1) % logits.shape[-1]] = logits.max() + behind * np.linalg.norm(logits)
    likelier = replace(oracle, own=oracle.own | {name: Tap(rounded(logits, "bfloat16"), "bfloat16")})
    assert ("tokens" not in judge(likelier, floors_of(oracle)).names) == agrees


@pytest.mark.parametrize(
    ("name", "tap", "change"),
    [
        (SMALL, "pixels", zeroed),
        (SMALL, "pixels", lambda x: np.roll(x, 1, -1)),
        (SMALL, "velocity_call2", noisy),
        (DETAILED, "cond.step0/language_model.model.layers.1.mlp_moe_gen", noisy),
        (DETAILED, "pixels", noisy),
    ],
)
def test_a_damaged_tap_is_told_from_wrong_weights(copy_bundle, name, tap, change):
    bundle = copy_bundle(name)
    with_tap(bundle, tap, change)
    judgement = judge_bundle(bundle)
    assert judgement.departures[0].tap.name == tap and judgement.causes == (Cause.CAPTURE,)
    assert judgement.sentence().startswith(f"oracle and reference disagree at {tap} (error ")
    assert "\n" not in judgement.sentence()


def test_nothing_is_said_of_a_port_then(copy_bundle):
    bundle = copy_bundle(SMALL)
    with_tap(bundle, "pixels", zeroed)
    checked, localized = check_bundle(bundle, "mlx"), localize(bundle)
    for found in (checked, localized):
        assert found.verdict == "inconclusive" and "disagree at pixels" in found.reason and not found.remark
    assert not localized.findings
    verified = verify_bundle(bundle)
    assert any(problem.place == "pixels" and "disagree" in problem.what for problem in verified.problems)


def reweighted(bundle, name, factor):
    path = bundle.parent / "checkpoint-a" / read_bundle(bundle).variant / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] * factor
    path.unlink()
    save_file(tensors, path)


@pytest.mark.parametrize(("name", "cause"), [(SMALL, Cause.CODE), (DETAILED, Cause.CONFIG)])
@pytest.mark.parametrize("factor", [1.001, 1.05])
def test_other_weights_than_the_captured_ones_are_no_agreement(copy_bundle, name, cause, factor):
    # The port and the reference have the same weights: each agrees with the other.
    bundle = copy_bundle(name)
    reweighted(bundle, "language_model.model.layers.1.mlp_moe_gen.down_proj.weight", factor)
    causes = judge_bundle(bundle).causes
    assert causes[0] is Cause.WEIGHTS and causes[-1] is cause
    assert check_bundle(bundle, "mlx").verdict == localize(bundle).verdict == "inconclusive"


@pytest.mark.parametrize("factor", [1.001, pytest.param(1.005, marks=pytest.mark.exhaustive)])
def test_a_factor_below_bfloat16s_rounding_is_seen_of_weights_whose_output_no_tap_holds(copy_bundle, factor):
    bundle = copy_bundle("t2v-bf16-kv")
    reweighted(bundle, "language_model.model.layers.1.self_attn.v_proj_moe_gen.weight", factor)
    judgement = judge_bundle(bundle)
    assert judgement.departures[0].tap.component == "layers.1.self_attn.sdpa"
    assert judgement.causes == (Cause.WEIGHTS, Cause.CONFIG, Cause.CODE)
    assert "it reads layers.1.self_attn.v_proj_moe_gen" in judgement.why
    assert check_bundle(bundle, "mlx").verdict == localize(bundle).verdict == "inconclusive"


def test_where_nothing_can_be_judged_that_is_said(copy_bundle):
    bundle = copy_bundle(SMALL)
    assert not verify_bundle(bundle).unjudged
    (bundle.parent / "checkpoint-a" / read_bundle(bundle).variant / "model.safetensors").unlink()
    verified = verify_bundle(bundle)
    assert not verified.problems and "model.safetensors" in verified.unjudged


def test_other_noise_is_an_input(copy_bundle):
    bundle = copy_bundle(SMALL)
    with_tap(bundle, "sampler.noise", lambda x: x[::-1].copy())
    assert judge_bundle(bundle).causes == (Cause.INPUTS,)


def test_another_request_is_an_input(copy_bundle):
    bundle = copy_bundle(SMALL)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["request"]["spec"] = "another prompt of another length"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / "floors.safetensors").unlink()
    with pytest.raises(Exception, match="t2i-fp32-nokv"):
        localize(bundle)


@pytest.mark.exhaustive
def test_another_guidance_is_a_setting_of_the_request(copy_bundle):
    bundle = copy_bundle(SMALL)
    edited(bundle, lambda m: m["request"].update(cfg_text_scale=4.01))
    (bundle / "floors.safetensors").unlink()
    judgement = judge_bundle(bundle)
    assert judgement.departures[0].tap.component == "euler" and judgement.causes == (Cause.INPUTS, Cause.CODE)


def test_what_lies_alone_between_two_taps_is_named(copy_bundle):
    bundle = copy_bundle("x2t_image-bf16-kv")
    reweighted(bundle, "language_model.model.norm.weight", 1.001)
    judgement = judge_bundle(bundle)
    assert judgement.causes[0] is Cause.WEIGHTS and judgement.why == "norm differs in all 3 places"


def test_one_damaged_element_of_a_schedule_is_no_other_request(copy_bundle):
    bundle = copy_bundle(SMALL)
    with_tap(bundle, "sampler.timestep2", lambda t: np.where(np.arange(len(t)) == 3, 1.001 * t, t).astype(np.float32))
    with pytest.raises(ParityError, match="likely the captured file: most of its values fit"):
        check_bundle(bundle, "mlx")


def test_one_altered_token_is_sought_in_the_file_that_holds_it(copy_bundle):
    bundle = copy_bundle(SMALL)
    inputs = read_tensors(bundle / "inputs.safetensors")
    ids = inputs["text_ids"].array.copy()
    ids[2] += 1
    write_tensors(bundle / "inputs.safetensors", inputs | {"text_ids": Tap(ids, "int32")})
    with pytest.raises(ParityError, match="likely inputs.safetensors, most of whose values fit: copy it again; or the"):
        check_bundle(bundle, "mlx")


def test_a_token_that_is_not_likely_is_settled_for_no_port(copy_bundle):
    bundle = copy_bundle("x2t_image-bf16-kv")
    with_tap(bundle, "tokens", lambda tokens: np.append(tokens[:-1], tokens[-1] + 1).astype(np.int32))
    assert check_bundle(bundle, "mlx").verdict == "inconclusive"


def edited(bundle, change):
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


CONTRADICTIONS = [
    (SMALL, lambda m: m["request"].update(spec="another prompt"), "inputs/text_ids has shape"),
    (SMALL, lambda m: m["request"].update(timestep_shift=3.51), "sampler.timestep1 holds"),
    (SMALL, lambda m: m["request"].update(num_steps=5), "sampler.timestep4 is missing, but the request makes 5 steps"),
    (SMALL, lambda m: m["request"].update(num_steps=3), "sampler.timestep3 is there, but the request makes 3 steps"),
    (
        "x2t_image-bf16-kv",
        lambda m: m["request"].update(max_new_tokens=4),
        "tokens holds 8 tokens, the request allows 4",
    ),
    (SMALL, lambda m: m["source"].update(dtype="bfloat16"), "it says bfloat16 and sampler.noise is float32"),
    (SMALL, lambda m: m["source"].update(entry="kv_cache"), "it says kv_cache and holds velocity_call0"),
    (DETAILED, lambda m: m["source"].update(entry="full_sequence"), "it says full_sequence and holds "),
]


@pytest.mark.parametrize(("name", "change", "problem"), CONTRADICTIONS)
def test_a_bundle_that_contradicts_its_request_is_told_so_first(copy_bundle, name, change, problem):
    bundle = copy_bundle(name)
    edited(bundle, change)
    for run in (lambda: check_bundle(bundle, "mlx"), lambda: localize(bundle)):
        with pytest.raises(ParityError, match=f"^[^\n]*does not fit its request: {problem}[^\n]*; likely the inputs: "):
            run()


def test_another_tokenizer_is_to_be_restored(copy_bundle):
    bundle = copy_bundle(SMALL)
    merges = bundle.parent / "checkpoint-a" / read_bundle(bundle).variant / "merges.txt"
    merges.write_text("\n".join(merges.read_text(encoding="utf-8").splitlines()[:20]) + "\n", encoding="utf-8")
    with pytest.raises(
        ParityError,
        match="inputs/text_ids .*likely the inputs: the request or the tokenizer is not .*"
        "restore manifest.json, or vocab.json, merges.txt and tokenizer_config.json in checkpoint-a/",
    ):
        check_bundle(bundle, "mlx")


def test_what_breaks_what_is_derived_is_one_line(copy_bundle, monkeypatch):
    def _integers(facts):
        raise IndexError("no such\nrow")
        yield

    monkeypatch.setattr("parity.lance.derive._integers", _integers)
    with pytest.raises(ParityError, match="^[^\n]*cannot be derived: IndexError: no such row[^\n]*$"):
        check_bundle(copy_bundle(SMALL), "mlx")


def test_a_bundle_is_not_sound_where_what_is_there_keeps_the_reference_from_judging(copy_bundle):
    bundle = copy_bundle(SMALL)
    path = bundle / "floors.safetensors"
    with safe_open(path, "pt") as file:
        tables = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 -- no mapping
        metadata = file.metadata()
    tables |= {name: table[:, None] for name, table in tables.items() if name.endswith("spreads")}
    for write in (lambda: path.write_bytes(b""), lambda: save_file(tables, path, metadata)):
        write()
        verified = verify_bundle(bundle)
        assert verified.verdict == "unusable" and "floors.safetensors" in verified.problems[0].what


def test_a_wrong_reference_is_told_where_the_port_agrees_with_the_oracle(oracles, monkeypatch):
    real = reference.sampler.guide

    def guide(cond: torch.Tensor, uncond: torch.Tensor, request: object) -> torch.Tensor:
        return real(cond, uncond, request) * 1.01

    monkeypatch.setattr(reference.sampler, "guide", guide)
    found = localize(oracles / SMALL)
    assert found.verdict == "agree" and "mlx agrees with the oracle there" in found.remark
    assert "upstream's commit or the reference" in found.remark


@pytest.fixture
def oracles(oracles, tmp_path):
    """The embedded bundles, in a place where nothing is remembered of them."""
    return shutil.copytree(oracles, tmp_path / "oracles")


def test_an_altered_picture_is_named_before_what_reads_it(copy_bundle):
    bundle = copy_bundle("x2t_image-fp32-nokv")
    (bundle.parent / "media").symlink_to(Path(__file__).parents[2] / "oracles" / "media")
    assert not verify_bundle(bundle).problems
    inputs = read_tensors(bundle / "inputs.safetensors")
    patches = inputs["vit_patches0"]
    write_tensors(bundle / "inputs.safetensors", inputs | {"vit_patches0": Tap(patches.array * 1.01, patches.dtype)})
    judgement = judge_bundle(bundle)
    assert [each.tap.name for each in judgement.departures] == ["inputs/vit_patches0", "vit_model0"]
    assert judgement.causes == (Cause.INPUTS,) and "the visuals' files" in judgement.why
    assert verify_bundle(bundle).problems[0].place == "inputs/vit_patches0"


def test_the_tap_that_was_altered_is_named_before_what_does_not_follow_from_it(copy_bundle):
    bundle = copy_bundle(SMALL)
    with_tap(bundle, "velocity_call2", noisy)
    first, *others = verify_bundle(bundle).problems
    assert first.place == "velocity_call2" and "disagree at velocity_call2" in first.what
    assert any("derived is" in problem.what for problem in others)
