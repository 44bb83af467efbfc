"""Answers under rounding: run with the oracle's tokens to the end; logits are compared, and choices that are no tie."""

from dataclasses import replace

import numpy as np
import pytest

from parity.bundle.reading import read_bundle
from parity.comparison.check import Run, check_recording, limits_of, replayed, trusted_of
from parity.comparison.trajectory import margins
from parity.lance.ports import PORTS, MlxPort
from parity.oracle.floors import logits_of
from parity.tensors.recording import Recording, Tap


@pytest.fixture(scope="module")
def answered(request):
    """A bfloat16 question and what lance_mlx makes of it."""
    bundle = read_bundle(request.path.parents[2] / "oracles" / "x2t_image-bf16-kv")
    return bundle, replayed(MlxPort(bundle), bundle)


def changed_from(tokens: np.ndarray, start: int) -> Tap:
    return Tap(np.where(np.arange(len(tokens)) < start, tokens, tokens + 1).astype(np.int32), "int32")


def changed_at(tokens: np.ndarray, step: int) -> Tap:
    return Tap(np.where(np.arange(len(tokens)) == step, tokens + 1, tokens).astype(np.int32), "int32")


def checked(answered, recording: Recording):
    bundle, _ = answered
    return check_recording(Run(bundle, recording, MlxPort(bundle)))


def logits_at(step: int) -> str:
    return f"cond.decode{step}/language_model.lm_head"


def test_the_answer_is_compared_to_its_end(answered):
    bundle, recording = answered
    assert checked(answered, recording).verdict == "agree"
    tokens = bundle.taps["tokens"].array
    for start in range(len(tokens)):
        result = checked(answered, recording | {"tokens": changed_from(tokens, start)})
        assert result.verdict == "diverge" and result.first_divergence["tap"] == "tokens"
    assert checked(answered, recording | {"tokens": Tap(tokens[:-1], "int32")}).verdict == "diverge"


def test_the_logits_of_every_token_are_compared(answered):
    bundle, recording = answered
    compared = {tap.tap.name: tap for tap in checked(answered, recording).taps}
    limits, _ = limits_of(bundle)
    for step in range(bundle.taps["tokens"].array.size):
        assert compared[logits_at(step)].limit == limits[logits_at(step)] and limits[logits_at(step)].floor > 0
    last = logits_at(bundle.taps["tokens"].array.size - 1)
    # The likeliest token stays the likeliest.
    moved = recording | {last: replace(recording[last], array=2 * recording[last].array)}
    result = checked(answered, moved)
    assert result.verdict == "diverge" and result.first_divergence["tap"] == last


@pytest.mark.parametrize("implementation", ["mlx", "reference"])
def test_an_answer_is_run_with_the_oracle_s_tokens(answered, implementation):
    bundle, _ = answered
    port = PORTS[implementation](bundle)
    tokens = bundle.taps["tokens"].array
    # Another second token, which nobody would choose: what follows it is computed from it.
    taps = bundle.taps | {"tokens": changed_at(tokens, 1)}
    plain, other = replayed(port, bundle), replayed(port, replace(bundle, taps=taps))
    for step, alike in ((0, True), (1, True), (2, False)):
        assert np.array_equal(plain[logits_at(step)].array, other[logits_at(step)].array) == alike
    if implementation == "mlx":
        # Its own choice is what is recorded.
        assert other["tokens"].array[1] == tokens[1] != taps["tokens"].array[1]


def test_a_choice_may_be_another_one_where_the_logits_are_a_rounding_apart(answered):
    bundle, recording = answered
    tokens, oracle = bundle.taps["tokens"].array, trusted_of(bundle).oracle
    found = margins(oracle, recording)
    tied = [margin.step for margin in found if margin.tie]
    assert len(found) == len(tokens) and 0 < len(tied) < len(tokens)
    for step in range(len(tokens)):
        logits = oracle.taps[logits_at(step)].array.reshape(-1)[: len(oracle.run.pipeline.tokenizer)]
        second, third = (int(token) for token in np.argsort(logits)[[-2, -3]])
        for token, agrees in ((second, step in tied), (third, False)):
            chosen = np.where(np.arange(len(tokens)) == step, token, tokens).astype(np.int32)
            result = checked(answered, recording | {"tokens": Tap(chosen, "int32")})
            assert result.verdict == ("agree" if agrees else "diverge"), (step, token)


def test_logits_that_are_far_off_make_no_tie_of_a_wrong_choice(answered):
    bundle, recording = answered
    tokens, name = bundle.taps["tokens"].array, logits_at(0)
    logits = recording[name].array.copy()
    logits.reshape(-1)[tokens[0]] = -128
    moved = recording | {name: Tap(logits, recording[name].dtype), "tokens": changed_at(tokens, 0)}
    assert 0 in [margin.step for margin in margins(trusted_of(bundle).oracle, moved) if margin.tie]
    # What the choice hangs on is compared itself.
    result = checked(answered, moved)
    assert result.verdict == "diverge" and result.first_divergence["tap"] == name


def test_logits_are_what_the_reference_computes_of_its_own(answered):
    bundle, _ = answered
    trusted = trusted_of(bundle)
    logits = logits_of(trusted.own)
    assert list(logits) == [logits_at(step) for step in range(bundle.taps["tokens"].array.size)]
    assert not logits.keys() & bundle.expected.keys() and logits.keys() <= limits_of(bundle)[0].keys()
