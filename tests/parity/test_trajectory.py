"""Errors over the steps of a run, against what one rounding of the first state does, and over an answer's tokens."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from parity.comparison.trajectory import Departure, Margin, first_departure, margins, teacher_forced, trajectory
from parity.comparison.verdict import DIVERGE
from parity.localize.findings import Localization
from parity.oracle.bounds import Alarm
from parity.report.words import departs
from parity.tensors.recording import Tap

DRAWN = ("t2i-fp32-kv", "t2i-fp32-nokv", "t2v-bf16-kv")
ROUNDING = {"float32": 1e-5, "bfloat16": 0.05}


def scaled(tap, factor):
    return Tap((tap.array * np.float32(factor)).astype(np.float32), "float32")


def departures(*latents, envelope=1e-6):
    return [Departure(step, 1.0, {}, latent, envelope) for step, latent in enumerate(latents)]


@pytest.mark.parametrize("name", DRAWN)
def test_every_step_has_velocities_a_state_and_an_envelope(oracle_of, name):
    oracle = oracle_of(name)
    steps = trajectory(oracle, oracle.taps, oracle.taps)
    assert [step.step for step in steps] == list(range(oracle.run.request.num_steps))
    assert [step.t for step in steps] == oracle.bundle.timesteps
    for step, guided in zip(steps, oracle.bundle.guided, strict=True):
        assert set(step.velocity) == ({"cond", "uncond", "guided"} if guided else {"cond"})
        assert set(step.velocity.values()) == {0.0} and step.latent == 0.0
        # One rounding moves the state by about one rounding, and the model makes little more of it.
        ulp = 2.0**-24 if oracle.bundle.dtype == "float32" else 2.0**-8
        assert 0.1 * ulp < step.envelope < 100 * ulp
    assert first_departure(steps, 1.0) is None
    # The draws are numbered: the same envelope every time.
    again = replace(oracle)
    assert [step.envelope for step in trajectory(again, oracle.taps, oracle.taps)] == [s.envelope for s in steps]


def test_an_arm_that_is_not_run_has_no_velocity(oracle_of):
    oracle = oracle_of("t2i-fp32-kv")
    without = {name: tap for name, tap in oracle.taps.items() if not name.startswith("uncond.step2")}
    steps = trajectory(oracle, without, oracle.taps)
    assert [set(step.velocity) for step in steps][1:3] == [{"cond", "uncond", "guided"}, {"cond", "guided"}]


@pytest.mark.parametrize("name", DRAWN[:2])
def test_the_step_after_which_a_state_is_wrong_departs_first(oracle_of, name):
    oracle = oracle_of(name)
    wrong = {tap: scaled(oracle.taps[tap], 1.001) for tap in ("sampler.x_t2", "sampler.x_t3", "latent")}
    steps = trajectory(oracle, oracle.taps, oracle.taps | wrong)
    assert [step.latent == 0.0 for step in steps] == [True, False, False, False]
    assert steps[1].latent == pytest.approx(1e-3, rel=1e-2)
    assert first_departure(steps, 10.0) == 1
    # The velocities are those of the other run, which was given the right states.
    assert all(set(step.velocity.values()) == {0.0} for step in steps)
    velocity = "velocity_call2" if name.endswith("nokv") else "cond.step1/llm2vae"
    steps = trajectory(oracle, oracle.taps | {velocity: scaled(oracle.taps[velocity], 1.5)}, oracle.taps)
    assert [step.velocity["cond"] for step in steps] == [0, pytest.approx(0.5), 0, 0]
    assert first_departure(steps, 10.0) is None


def test_the_last_step_makes_the_latent(oracle_of):
    oracle = oracle_of("t2i-fp32-kv")
    steps = trajectory(oracle, oracle.taps, oracle.taps | {"latent": scaled(oracle.taps["latent"], 2)})
    assert [step.latent for step in steps] == [0, 0, 0, pytest.approx(1)]


def test_the_threshold_counts_envelopes():
    steps = departures(1e-7, 2e-6, 5e-6, 4e-5)
    assert [first_departure(steps, threshold) for threshold in (1, 3, 10, 100)] == [1, 2, 3, None]
    assert first_departure(departures(1.0, 1.0, envelope=None), 1) is None
    assert first_departure(departures(None, 5e-6), 1) == 1 and first_departure([], 1) is None


def test_questions_have_no_trajectory(oracle_of):
    oracle = oracle_of("x2t_image-bf16-kv")
    assert trajectory(oracle, oracle.taps, oracle.taps) == []
    assert margins(oracle_of("t2i-fp32-kv"), {}) == []


@pytest.mark.parametrize("name", DRAWN)
def test_teacher_forcing_gives_the_states_and_nothing_else(oracle_of, subject_of, name):
    oracle = oracle_of(name)
    led = teacher_forced(subject_of(name), oracle).recording
    steps = trajectory(oracle, led, led)
    assert all(0 < error < ROUNDING[oracle.bundle.dtype] for step in steps for error in step.velocity.values())
    # A state is recorded as computed, from the oracle's state of the step before.
    assert all(0 <= step.latent < ROUNDING[oracle.bundle.dtype] for step in steps)
    inner = "cond.step3/language_model.model.layers.2"
    free = subject_of(name).run({inner}).recording[inner]
    assert free.array.shape == led[inner].array.shape


# Answers.


def asked(expected, got, vocabulary=6, names="cond.decode{}/language_model.lm_head"):
    """An oracle and a run with these logits [tokens, more than the vocabulary]."""
    tokens = np.array([row[:vocabulary].argmax() for row in map(np.asarray, expected)], np.int32)
    taps, forced = (
        {names.format(i): Tap(np.array([row], np.float32), "float32") for i, row in enumerate(rows)}
        for rows in (expected, got)
    )
    run = SimpleNamespace(pipeline=SimpleNamespace(tokenizer=range(vocabulary)))
    return SimpleNamespace(taps=taps | {"tokens": Tap(tokens, "int32")}, run=run), forced


def test_a_flip_between_all_but_equal_logits_is_a_tie_and_another_is_not():
    right = [0, 0, 3.0, 1.0, 0, 0, 9.0]
    close = [0, 0, 3.0, 2.999, 0, 0, 9.0]
    off = [0, 0, 3.0, 3.0005, 0, 0, 9.0]
    far = [0, 0, 3.0, 5.0, 0, 0, 9.0]
    found = margins(*asked([right, close, right, close], [right, off, far, close]))
    assert [(m.step, m.expected, m.got) for m in found] == [(0, 2, 2), (1, 2, 3), (2, 2, 3), (3, 2, 2)]
    assert [round(m.margin, 4) for m in found] == [2.0, 0.001, 2.0, 0.001]
    assert [round(m.error, 4) for m in found] == [0.0, 0.0015, 4.0, 0.0]
    # An error of 4 explains a flip over a margin of 2; that it is so large is for the logits' own floor to say.
    assert [m.tie for m in found] == [False, True, True, False]


@pytest.mark.parametrize(("margin", "error", "tie"), [(1.0, 0.49, False), (1.0, 0.5, True), (0.0, 0.0, True)])
def test_an_error_flips_what_is_closer_than_twice_it(margin, error, tie):
    assert Margin(0, 1, 2, margin, error).tie is tie


def test_ids_beyond_the_tokenizer_do_not_count():
    expected, got = [0, 0, 3.0, 1.0, 0, 0, 9.0], [0, 0, 3.0, 1.0, 0, 0, 99.0]
    (found,) = margins(*asked([expected], [got]))
    assert (found.expected, found.got, found.error) == (2, 2, 0.0)


def test_tokens_without_logits_are_left_out():
    oracle, forced = asked([[1.0, 2, 3, 0, 0, 0]] * 3, [[1.0, 2, 3, 0, 0, 0]] * 3)
    del forced["cond.decode1/language_model.lm_head"], oracle.taps["cond.decode2/language_model.lm_head"]
    assert [m.step for m in margins(oracle, forced)] == [0]


def test_the_answer_of_lance_mlx_has_margins(oracle_of, subject_of):
    oracle = oracle_of("x2t_image-bf16-kv")
    led = teacher_forced(subject_of("x2t_image-bf16-kv"), oracle).recording
    found = margins(oracle, led)
    assert [m.expected for m in found] == oracle.taps["tokens"].array.tolist()
    assert all(m.margin >= 0 and m.error >= 0 for m in found)
    # Given the right tokens before it, each is answered rightly, or so close are two of them.
    assert all(m.got == m.expected or m.tie for m in found)


def test_the_report_says_where_the_state_departs_first():
    def said(*latents, alarm):
        shared = ("b", "mlx", "t2i", "kv_cache", "float32", DIVERGE, "", (), (), ())
        return departs(Localization(*shared, alarm, departures(*latents)))

    three = Alarm(0.01, 10, 3.0, 100)
    assert said(1e-7, 2e-6, 5e-6, alarm=three).startswith("The state departs first after step 2: it is farther off")
    assert said(1e-7, 2e-6, alarm=three).startswith("No state is farther off than 3")
    assert said(alarm=three) == said(1.0, alarm=None) == ""
