"""Localizing: nothing where nothing is wrong, the first wrong thing and what explains it where something is."""

import json
from contextlib import contextmanager
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

import lance_mlx.sampling.flow as flow
from lance_mlx.model.mot import MoTModel
from lance_mlx.model.vae_decoder import Decoder
from parity.cli import app
from parity.errors import ParityError
from parity.fault_table import judge
from parity.faults import CATALOGUE, Fault, load_fault
from parity.findings import EXACT, EXPLAINS, LOCAL, STRUCTURE
from parity.hypotheses import HYPOTHESES, load_hypotheses
from parity.localize import Investigation, localize
from parity.subject import Observed

EMBEDDED = (
    "t2i-fp32-kv",
    "t2i-fp32-nokv",
    "t2v-bf16-kv",
    "t2v-fp32-nokv",
    "i2v-fp32-nokv",
    "image_edit-fp32-nokv",
    "x2t_image-bf16-kv",
    "x2t_image-fp32-nokv",
)
# A few of the catalogue, for the ways in which things are found; more are in the tests of several at once.
TRIED = (
    ("t2i-fp32-kv", "latents-through-und-q-norm"),
    ("t2i-fp32-kv", "rope-pairs"),
    ("t2i-fp32-kv", "weight-transposed"),
    ("t2i-fp32-kv", "schedule-shift-1"),
    ("image_edit-fp32-nokv", "vit-rope-pairs"),
    ("image_edit-fp32-nokv", "encoder-mean-not-normalised"),
    ("image_edit-fp32-nokv", "visuals-stretched"),
    ("i2v-fp32-nokv", "given-frame-missing"),
    ("x2t_image-bf16-kv", "head-tied"),
    ("x2t_image-bf16-kv", "answers-drawn-at-random"),
    ("t2v-bf16-kv", "euler-float32-state"),
    ("t2v-bf16-kv", "vae-cache-dropped"),
)


@pytest.fixture(scope="module")
def localized(oracle_of, subject_of):
    """What an investigation of an embedded bundle finds with these faults; each is made once."""

    def run(name, *faults, impl="mlx", hypotheses=tuple(HYPOTHESES), subject=None, thorough=True):
        chosen = [CATALOGUE[fault] if isinstance(fault, str) else fault for fault in faults]
        oracle, subject = oracle_of(name), subject or subject_of(name, impl)
        parts = (oracle.bundle, oracle, subject, chosen, list(hypotheses), lambda what: None, thorough)
        return Investigation(*parts).run()

    return cache(run)


@cache
def own_fault(patch):
    return Fault("of-a-test", "What a test breaks.", "*", patch)


def components(found):
    return [finding.component for finding in found.findings]


# Nothing is wrong.


@pytest.mark.parametrize(
    ("name", "impl"), [*((name, "mlx") for name in EMBEDDED), *((name, "reference") for name in EMBEDDED[1:3])]
)
def test_what_is_right_agrees(localized, oracle_of, name, impl):
    found, oracle = localized(name, impl=impl), oracle_of(name)
    assert (found.verdict, found.reason, found.findings) == ("agree", "", [])
    assert (found.impl, found.task, found.dtype) == (impl, oracle.bundle.task, oracle.bundle.dtype)
    # Every tap was compared, upstream's and the reference's, in order of execution, and none is wrong by itself.
    compared = [tap.tap.name for tap in found.taps]
    assert set(oracle.bundle.taps) <= set(compared) <= set(oracle.taps)
    order = {tap: place for place, tap in enumerate(oracle.taps)}
    assert compared == sorted(compared, key=order.get)
    assert len(compared) > 0.9 * len(oracle.taps) and not any(tap.wrong for tap in found.taps)
    assert all(tap.ratio is not None and tap.ratio <= found.alarm.threshold for tap in found.taps)
    assert {"inputs/text_ids", "inputs/modality", "inputs/position_ids.cond"} <= set(found.exact)
    steps = oracle.bundle.request.get("num_steps", 0)
    assert len(found.trajectory) == steps and bool(found.margins) == (not steps)
    for departure in found.trajectory:
        assert departure.latent < 1e3 * departure.envelope
    assert found.provenance["weights"].endswith(found.provenance["weights"].split(", ")[1])
    assert "command" in found.provenance and found.seconds > 0


def test_local_and_propagated_errors_add_up(localized):
    for found in (localized("t2i-fp32-kv"), localized("t2i-fp32-kv", "rope-pairs")):
        added = [tap for tap in found.taps if None not in (tap.local, tap.propagated, tap.total)]
        assert len(added) > 1000
        for tap in added:
            # As vectors they add up, so no side of the triangle is longer than the other two.
            sides = sorted([tap.local, tap.propagated, tap.total])
            assert sides[2] <= (sides[0] + sides[1]) * (1 + 1e-9) + 1e-12, tap.tap.name


# One thing is wrong.


@pytest.mark.parametrize(("name", "fault"), TRIED)
def test_a_fault_is_found_named_and_explained(localized, name, fault):
    found = localized(name, fault, thorough=False)
    trial = judge(CATALOGUE[fault], found)
    assert trial.detected and trial.named, (trial.first, [f.detail for f in found.findings])
    assert trial.explained is not False, trial.why
    assert found.faults == [fault] and found.bundle == name
    # It is one thing.
    assert len({finding.component for finding in found.findings}) == 1


def test_what_only_propagates_is_not_found(localized):
    found = localized("t2i-fp32-kv", "latents-through-und-q-norm")
    (finding,) = found.findings
    assert (finding.component, finding.call, finding.kind) == (
        "layers.0.self_attn.q_norm_moe_gen",
        "cond.step0",
        LOCAL,
    )
    assert finding.tap == "cond.step0/language_model.model.layers.0.self_attn.q_norm_moe_gen"
    assert finding.local_error > 1000 * finding.floor
    # The same in the other layers, steps and arm is the same cause; nothing else is.
    assert {tap.rpartition(".")[2] for tap in finding.also} == {"q_norm_moe_gen"}
    assert len(finding.also) == 3 * 4 * 2 - 1
    by_name = {tap.tap.name: tap for tap in found.taps}
    behind = by_name["cond.step0/language_model.model.layers.1"]
    assert not behind.wrong and behind.total > 100 * behind.local and behind.propagated > 100 * behind.local
    before = by_name["cond.prefix2/language_model.model.layers.1"]
    assert before.total < 1e-5
    assert {tap.tap.name for tap in found.taps if tap.wrong} == {finding.tap, *finding.also}
    assert found.trajectory[0].velocity["cond"] > 1e-3 and found.trajectory[-1].latent > 1e-3
    # The first picture to draw is that tap's.
    assert found.pictures[0].tap.name == finding.tap
    assert finding.explained and finding.explanations[0].residual_removed > 0.999
    assert finding.explanations[0].second > 0.999


def test_a_wrong_weight_is_corrected_before_activations_are_judged(localized):
    found = localized("t2i-fp32-kv", "weight-transposed")
    (finding,) = found.findings
    assert (finding.kind, finding.floor) == (EXACT, 0.0)
    assert finding.tap == "weights/language_model.model.layers.1.self_attn.q_proj.weight"
    assert not any(tap.wrong for tap in found.taps)
    by_name = {tap.tap.name: tap for tap in found.taps}
    assert by_name["cond.step0/language_model.model.layers.1"].total > 1e-3


def test_a_refused_request_is_the_structure(localized):
    found = localized("i2v-fp32-nokv", "i2v-missing")
    (finding,) = found.findings
    assert (finding.component, finding.kind, finding.local_error) == ("request", STRUCTURE, None)
    assert "i2v" in finding.detail and found.verdict == "diverge" and "i2v" in found.reason
    # With the oracle's sequence in its place everything else is right.
    assert len(found.taps) > 1000 and not any(tap.wrong for tap in found.taps)


def test_a_visual_that_is_resized_in_another_way_is_found_without_a_run(localized):
    found = localized("image_edit-fp32-nokv", "visuals-stretched")
    assert components(found) == ["preprocess"] and found.findings[0].tap.startswith("inputs/v")
    assert not any(tap.wrong for tap in found.taps)


# Several things are wrong.


def test_several_faults_are_all_found_in_order(localized):
    faults = ("frames-blue-first", "renorm-channel", "activation-gelu", "rope-pairs", "template-missing")
    found = localized("t2i-fp32-kv", *faults, thorough=False)
    assert components(found) == [
        "sequence",
        "layers.0.self_attn.q_rope",
        "layers.0.mlp.down_proj",
        "guidance",
        "frames",
    ]
    right = [CATALOGUE[fault].explanation for fault in reversed(faults)]
    assert [finding.explanations[0].name for finding in found.findings] == right
    assert found.faults == list(faults)


def test_weights_and_positions_and_activations_are_corrected_one_after_another(localized):
    found = localized("t2v-bf16-kv", "norm-rounded-once", "target-anchored-1000", "weight-zero", thorough=False)
    assert components(found) == ["layers.1.self_attn.o_proj_moe_gen", "positions", "layers.0.input_layernorm"]
    assert [finding.kind for finding in found.findings] == [EXACT, EXACT, LOCAL]
    assert all(finding.explained for finding in found.findings)


def test_a_random_answer_is_found_beside_other_faults(localized):
    # The logits of a wrong run are far off, but the tokens are chosen from the right ones: no tie excuses them.
    found = localized("x2t_image-bf16-kv", "rope-pairs", "answers-drawn-at-random")
    assert components(found) == ["layers.0.self_attn.q_rope", "tokens"]


def test_two_causes_in_one_place_are_two_findings(localized):
    found = localized("t2i-fp32-kv", "renorm-channel", "guidance-from-the-conditional", thorough=False)
    assert components(found) == ["guidance", "guidance"]
    causes = {finding.explanations[0].name for finding in found.findings}
    assert causes == {"the renorm is per token", "guidance starts from the conditional velocity"}
    assert all(finding.explanations[0].residual_removed > EXPLAINS for finding in found.findings)


# What cannot be judged.


@contextmanager
def noisy(target):
    original = flow.advance

    def advance(x_t, velocity, interval):
        return original(x_t, velocity, interval) + mx.random.normal(x_t.shape).astype(x_t.dtype) * 1e-3

    flow.advance = advance
    try:
        yield
    finally:
        flow.advance = original


def test_what_is_random_is_inconclusive(localized):
    found = localized("t2i-fp32-kv", own_fault(noisy), hypotheses=())
    assert found.verdict == "inconclusive"
    assert found.reason.startswith("two equal runs differ first at sampler.x_t1")


@contextmanager
def failing_schedule(target):
    original = flow.timesteps

    def timesteps(*arguments):
        raise ZeroDivisionError("no steps\nat all")

    flow.timesteps = timesteps
    try:
        yield
    finally:
        flow.timesteps = original


@contextmanager
def failing_decoder(target):
    original = Decoder.__call__

    def call(module, *arguments):
        raise ValueError("no pixels")

    Decoder.__call__ = call
    try:
        yield
    finally:
        Decoder.__call__ = original


def test_a_function_that_raises_is_a_finding_and_the_rest_goes_on(localized):
    found = localized("t2i-fp32-kv", own_fault(failing_schedule), "rope-pairs")
    assert found.verdict == "diverge"
    first, second = found.findings
    assert (first.component, first.kind, first.tap) == ("schedule", STRUCTURE, "inputs/timesteps")
    assert "ZeroDivisionError" in first.detail and second.component == "layers.0.self_attn.q_rope"
    assert "ZeroDivisionError" in found.reason and "\n" not in found.reason


def test_what_ends_the_run_is_the_last_finding(localized):
    found = localized("t2i-fp32-kv", own_fault(failing_decoder), hypotheses=())
    assert found.verdict == "diverge"
    assert (found.findings[-1].kind, found.findings[-1].component) == (STRUCTURE, "run")
    assert "ValueError: no pixels" in found.findings[-1].detail
    # What is wrong with the integers is found all the same.
    both = localized("t2i-fp32-kv", own_fault(failing_decoder), "weight-zero")
    assert components(both) == ["layers.1.self_attn.o_proj_moe_gen", "run"]


@pytest.mark.parametrize("patch", [None, failing_schedule, failing_decoder, noisy])
def test_everything_is_as_it_was_afterwards(localized, oracle_of, subject_of, patch):
    def held():
        return flow.advance, flow.timesteps, flow.guided_velocity, Decoder.__call__, MoTModel.__call__

    before, oracle, subject = held(), oracle_of("t2i-fp32-kv"), subject_of("t2i-fp32-kv")
    localized("t2i-fp32-kv", *([own_fault(patch)] if patch else ["rope-pairs", "weight-zero"]), hypotheses=())
    assert held() == before
    again = Investigation(oracle.bundle, oracle, subject, [], [], lambda what: None).run()
    assert (again.verdict, again.findings) == ("agree", [])


class Losing:
    """A subject that computes no value for some of the taps."""

    def __init__(self, inner, lost):
        self._inner, self._lost = inner, lost

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def _without(self, observed):
        kept = {name: tap for name, tap in observed.recording.items() if not self._lost(name)}
        return Observed(kept, observed.exact, observed.failures)

    def run(self, *arguments, **values):
        return self._without(self._inner.run(*arguments, **values))

    def steered(self, oracle):
        return self._without(self._inner.steered(oracle))


def test_taps_of_upstreams_that_are_missing_are_inconclusive(localized, subject_of):
    inner = subject_of("t2i-fp32-nokv", "reference")
    found = localized("t2i-fp32-nokv", subject=Losing(inner, lambda name: name == "velocity_call2"))
    assert found.verdict == "inconclusive"
    assert found.reason == "1 of upstream's taps were not computed, the first is velocity_call2"
    none = localized("t2i-fp32-nokv", subject=Losing(inner, lambda name: True))
    assert none.verdict == "inconclusive" and none.taps == []
    # Finer taps than upstream's may be missing: an implementation need not have them.
    finer = localized("t2i-fp32-nokv", subject=Losing(inner, lambda name: "q_proj" in name))
    assert finer.verdict == "agree"


def test_faults_break_lance_mlx_only(oracles):
    with pytest.raises(ParityError, match="^faults break lance_mlx, not reference"):
        localize(oracles / "t2i-fp32-nokv", "reference", [CATALOGUE["rope-pairs"]])
    with pytest.raises(ParityError, match="implementation 'torch' is not one of mlx, reference"):
        localize(oracles / "t2i-fp32-nokv", "torch")
    with pytest.raises(ParityError, match="is not a bundle folder"):
        localize(oracles / "nothing")


# Faults and hypotheses of others.

FAULTS = '''
from contextlib import contextmanager

import lance_mlx.sampling.flow as flow


@contextmanager
def long_steps(model):
    """Every Euler step is 3% too long."""
    assert model.language_model.model.layers[0] is model.pipeline.model.language_model.model.layers[0]
    original = flow.advance
    flow.advance = lambda x_t, velocity, interval: original(x_t, velocity, interval * 1.03)
    try:
        yield
    finally:
        flow.advance = original


@contextmanager
def broken(model):
    model.no_such_thing
    yield


def raising(model):
    raise RuntimeError("not today")


number = 3
'''
HYPOTHESES_FILE = """
from unittest.mock import patch

import reference.sampler as sampler
from parity.hypotheses import Hypothesis


def longer(site):
    original = sampler.advance
    return patch.object(sampler, "advance", lambda x_t, velocity, dt, made: original(x_t, velocity, dt * 1.03, made))


LONG = Hypothesis("the Euler step is 3% too long", ("euler",), longer)
"""


@pytest.fixture
def third_party(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS, encoding="utf-8")
    (tmp_path / "hypotheses.py").write_text(HYPOTHESES_FILE, encoding="utf-8")
    return tmp_path


def test_faults_and_hypotheses_of_others_are_used_like_our_own(localized, third_party):
    fault = load_fault(f"{third_party / 'faults.py'}:long_steps")
    unexplained = localized("t2i-fp32-kv", fault)
    (finding,) = unexplained.findings
    assert finding.component == "euler" and finding.tap == "sampler.x_t1" and not finding.explained
    own = load_hypotheses(third_party / "hypotheses.py")
    (finding,) = localized("t2i-fp32-kv", fault, hypotheses=(*own, *HYPOTHESES)).findings
    assert finding.explained and finding.explanations[0].name == "the Euler step is 3% too long"
    assert finding.explanations[0].residual_removed == pytest.approx(1, abs=1e-3)
    assert unexplained.faults == [f"{third_party / 'faults.py'}:long_steps"]


# The command.


@pytest.fixture
def lance_parity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        result = CliRunner().invoke(app, ["localize", *(str(argument) for argument in arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_command_finds_a_fault_of_a_file_and_exits_1(lance_parity, oracles, third_party, tmp_path):
    arguments = ["--fault", f"{third_party / 'faults.py'}:long_steps", "--fault", "renorm-channel"]
    arguments += ["--hypotheses", third_party / "hypotheses.py", "--json", "out/found.json", "--report", "page.html"]
    result = lance_parity(oracles / "t2i-fp32-kv", *arguments)
    assert result.exit_code == 1 and result.stderr == ""
    assert result.stdout.splitlines()[-1] == "page.html" and (tmp_path / "page.html").is_file()
    assert "1. guidance" in result.stdout and "2. euler" in result.stdout
    document = strict(tmp_path / "out" / "found.json")
    assert document["verdict"] == "diverge" and document["bundle"] == "t2i-fp32-kv"
    assert [finding["component"] for finding in document["findings"]] == ["guidance", "euler"]
    for finding in document["findings"]:
        assert {"component", "tap", "call", "local_error", "floor", "slice", "explanations"} <= set(finding)
        assert finding["local_error"] > finding["floor"] > 0
        best = finding["explanations"][0]
        assert {"name", "residual_removed"} <= set(best) and best["residual_removed"] > EXPLAINS
    assert document["findings"][1]["explanations"][0]["name"] == "the Euler step is 3% too long"
    assert document["taps"] and document["trajectory"]
    floats = [tap for tap in document["taps"] if tap["dtype"] != "int32"]
    assert document["alarm"]["taps"] >= len(floats) > 1000


@pytest.fixture
def returns(monkeypatch):
    """The command is given these results, as they were found before."""

    def replace(found):
        monkeypatch.setattr("parity.localize.localize", lambda *arguments: found)

    return replace


@pytest.mark.parametrize(("fault", "status", "words"), [(None, 0, "agree"), (noisy, 2, "inconclusive")])
def test_the_exit_status_tells_the_verdict(lance_parity, localized, returns, oracles, tmp_path, fault, status, words):
    found = localized("t2i-fp32-kv", *([own_fault(fault)] if fault else []), hypotheses=())
    returns(found)
    result = lance_parity(oracles / "t2i-fp32-kv", "--json", "r.json", "--report", "r.html")
    assert result.exit_code == status and words in result.stdout
    document = strict(tmp_path / "r.json")
    assert document["verdict"] == found.verdict == words and document["reason"] == found.reason
    assert bool(document["findings"]) == bool(found.findings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fault", "rope-pair"], "did you mean 'rope-pairs'?"),
        (["--fault", "faults.py:nothing"], "faults.py defines no nothing"),
        (["--fault", "nowhere.py:x"], "there is no file nowhere.py"),
        (["--fault", "faults.py:number"], "number is no function but a int"),
        (["--fault", "faults.py:broken"], "fault faults.py:broken cannot be applied: AttributeError"),
        (["--fault", "faults.py:raising"], "fault faults.py:raising cannot be applied: RuntimeError: not today"),
        (["--fault", "rope-pairs", "--impl", "reference"], "faults break lance_mlx"),
        (["--impl", "torch"], "implementation 'torch'"),
        (["--profile", "nobody"], "there is no profile 'nobody'"),
        (["--hypotheses", "faults.py"], "holds no Hypothesis"),
        (["--hypotheses", "nowhere.py"], "nowhere.py is not a file"),
    ],
)
def test_bad_input_is_one_line_and_exits_2(lance_parity, oracles, third_party, tmp_path, arguments, words):
    result = lance_parity(oracles / "t2i-fp32-nokv", *arguments, "--json", "r.json")
    assert result.exit_code == 2
    assert result.stderr.startswith("lance-parity: ") and result.stderr.count("\n") == 1 and words in result.stderr
    assert strict(tmp_path / "r.json")["verdict"] == "unusable"
    assert not (tmp_path / "reports").exists()


def test_a_broken_bundle_is_one_line_and_exits_2(lance_parity, bundle, tmp_path):
    (bundle / "taps.safetensors").write_bytes(b"\0" * 20)
    for folder in (bundle, tmp_path / "nothing"):
        result = lance_parity(folder, "--json", "r.json")
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert strict(tmp_path / "r.json")["findings"] == []


def test_the_help_tells_the_exit_status(lance_parity):
    result = lance_parity("--help")
    assert result.exit_code == 0 and "Exit status: 0 agrees, 1 diverges, 2 inconclusive" in result.stdout


def test_the_errors_of_a_run_are_not_those_of_noise():
    # What `noisy` adds would be missed by a check of one run against itself only if it drew the same twice.
    draws = [np.array(mx.random.normal((3,))) for _ in range(2)]
    assert not np.array_equal(*draws)
