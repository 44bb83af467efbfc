"""Answers under rounding: tokens are compared up to where equally right orders of rounding part."""

import numpy as np
import pytest

from parity.bundle import read_bundle
from parity.check import Run, check_recording
from parity.implementations import Mlx
from parity.recording import Recording, Tap
from parity.verdict import bfloat16_limits


@pytest.fixture(scope="module")
def answered(request):
    """A bfloat16 question and what lance_mlx makes of it."""
    bundle = read_bundle(request.path.parents[2] / "oracles" / "x2t_image-bf16-kv")
    return bundle, Mlx().record(bundle)


def changed_from(tokens: np.ndarray, start: int) -> Tap:
    return Tap(np.where(np.arange(len(tokens)) < start, tokens, tokens + 1).astype(np.int32), "int32")


def verdict(answered, recording: Recording) -> str:
    bundle, _ = answered
    return check_recording(Run(bundle, recording, Mlx())).verdict


def test_the_answer_is_compared_to_its_end_where_no_order_of_rounding_changes_it(answered):
    bundle, recording = answered
    assert verdict(answered, recording) == "agree"
    tokens = bundle.taps["tokens"].array
    for start in (0, len(tokens) - 1):
        assert verdict(answered, recording | {"tokens": changed_from(tokens, start)}) == "diverge"
    assert verdict(answered, recording | {"tokens": Tap(tokens[:-1], "int32")}) == "diverge"


def test_only_the_tokens_before_the_first_order_that_parts_are_compared(answered):
    bundle, recording = answered
    tokens = bundle.taps["tokens"].array
    orders = [
        {"tokens": bundle.taps["tokens"]},
        {"tokens": changed_from(tokens, 5)},
        {"tokens": changed_from(tokens, 3)},
    ]
    assert bfloat16_limits(bundle, recording, orders)["tokens"].leading == 3
    assert bfloat16_limits(bundle, recording, orders[:1])["tokens"].leading is None
    shorter = [{"tokens": Tap(tokens[:6], "int32")}]
    assert bfloat16_limits(bundle, recording, shorter)["tokens"].leading == 6


def test_an_answer_that_parts_after_a_tie_agrees_and_before_it_does_not(answered, monkeypatch):
    bundle, recording = answered
    tokens = bundle.taps["tokens"].array
    orders = [recording | {"tokens": changed_from(tokens, 4)}]
    monkeypatch.setattr("parity.check.limits_of", lambda bundle: bfloat16_limits(bundle, recording, orders))
    flipped = [check_recording(Run(bundle, recording | {"tokens": changed_from(tokens, at)}, Mlx())) for at in (4, 3)]
    by_name = [{tap.tap.name: tap for tap in result.taps}["tokens"] for result in flipped]
    assert [tap.diverges for tap in by_name] == [False, True]
    assert by_name[0].to_json()["leading"] == 4
