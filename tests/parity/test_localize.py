"""Localizing: nothing where nothing is wrong, the first wrong thing and what explains it where something is."""

import re
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from fault_trials import judge

import lance_mlx.sampling.flow as flow
from lance_mlx.model.mot import MoTModel
from lance_mlx.model.vae_decoder import Decoder
from parity.errors import ParityError
from parity.lance.faults import CATALOGUE, Fault
from parity.localize.findings import EXACT, EXPLAINS, LOCAL, STRUCTURE
from parity.localize.investigation import Investigation, localize
from parity.report.words import sentence
from parity.tensors.recording import Observed

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
    assert re.fullmatch(r"\d{3,4} tensors, crc32:[0-9a-f]{8}", found.provenance["weights"])
    assert (found.provenance["numerics"], found.provenance["entry"]) == (oracle.bundle.dtype, oracle.bundle.entry)
    assert {"oracle", "this code", "machine", "command"} <= set(found.provenance) and found.seconds > 0


def test_local_and_propagated_errors_and_the_reference_s_own_add_up(localized, oracle_of):
    oracle = oracle_of("t2i-fp32-kv")
    norms = {name: np.linalg.norm(tap.array.astype(np.float64)) for name, tap in oracle.taps.items()}
    for found in (localized("t2i-fp32-kv"), localized("t2i-fp32-kv", "rope-pairs")):
        added = [tap for tap in found.taps if None not in (tap.local, tap.propagated, tap.total)]
        assert len(added) > 1000
        for tap in added:
            # As vectors they add up, with what the reference is off from upstream by, which `local` is held against: so
            # no side of the polygon is longer than the others.
            name = tap.tap.name
            own = oracle.own[name].array.astype(np.float64)
            local = tap.local * np.linalg.norm(own) / norms[name]
            off = np.linalg.norm(own - oracle.taps[name].array) / norms[name]
            assert off == 0 or tap.source == "upstream"
            sides = sorted([local, tap.propagated, tap.total, float(off)])
            assert sides[3] <= sum(sides[:3]) * (1 + 1e-9) + 1e-12, name


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


def test_a_rotation_of_the_vit_is_compared_before_the_attention_that_hides_it(localized):
    found = localized("image_edit-fp32-nokv", "vit-rope-pairs", thorough=False)
    assert found.first.component == "vit_model.blocks.0.attn.q_rope"


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
    with pytest.raises(ParityError, match="there is no implementation 'torch': name mlx, reference, or FILE.py:NAME"):
        localize(oracles / "t2i-fp32-nokv", "torch")
    with pytest.raises(ParityError, match="does not exist: name the folder of a bundle"):
        localize(oracles / "nothing")


def test_integers_are_explained_in_part_and_what_is_left_is_a_finding(localized):
    @contextmanager
    def moved(target):
        real = flow.position_ids

        def ids(*arguments):
            found = real(*arguments) + 1
            found[:, -2:] = 3
            return found

        with patch.object(flow, "position_ids", ids):
            yield

    found = localized("t2i-fp32-kv", own_fault(moved))
    first, second = [f for f in found.findings if f.tap == "inputs/position_ids.cond"]
    assert first.explained and first.explanations[0].name.endswith("are off by +1")
    assert not second.explained and second.detail.startswith(f"{second.part:.1%} of the values that differ are left; ")
    assert first.part + second.part == pytest.approx(1) and 0 < second.part < 0.1
    assert "accounts for" in sentence(found)


def test_a_question_in_whole_passes_agrees_with_the_reference_itself(oracles):
    # Its parts have one row, the passes that they are cut from many.
    assert localize(oracles / "x2t_image-fp32-nokv", "reference", hypotheses=()).verdict == "agree"
