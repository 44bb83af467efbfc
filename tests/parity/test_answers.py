"""Answers under rounding: tokens are compared up to where equally right orders of rounding part."""

from dataclasses import replace

import numpy as np
import pytest

from parity.bundle import read_bundle
from parity.check import Run, check_recording
from parity.floors import measure_free, shared_start, variants_of
from parity.floors_file import free_floors
from parity.implementations import Mlx
from parity.recording import Recording, Tap
from parity.replay_torch import TorchReplay
from parity.verdict import limits_from


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


def test_only_the_tokens_before_the_first_variant_that_parts_are_compared(answered, monkeypatch):
    bundle, _ = answered
    tokens = bundle.taps["tokens"].array
    answers = [changed_from(tokens, 5), changed_from(tokens, 3)]
    assert [shared_start(bundle.taps["tokens"], answer) for answer in answers] == [5, 3]
    assert shared_start(bundle.taps["tokens"], bundle.taps["tokens"]) is None
    assert shared_start(bundle.taps["tokens"], Tap(tokens[:6], "int32")) == 6

    def leading(*turns):
        """What measuring finds where the reference and its variants answer in turn; all else is upstream's."""
        turns = list(turns)

        def record(run, names=None):
            return bundle.taps | {"tokens": turns.pop(0) if len(turns) > 1 else turns[0]}

        monkeypatch.setattr(TorchReplay, "record", record)
        return measure_free(bundle).leading

    same = bundle.taps["tokens"]
    assert leading(same) is None
    assert leading(same, *answers, same) == 3
    assert leading(same, Tap(tokens[:6], "int32"), same) == 6
    assert len(variants_of(bundle.dtype)) > 3


def test_an_answer_that_parts_after_a_tie_agrees_and_before_it_does_not(answered, monkeypatch):
    bundle, recording = answered
    tokens = bundle.taps["tokens"].array
    measured = free_floors(bundle)
    tied = replace(measured, leading=4)
    assert limits_from(bundle, measured)[0]["tokens"].leading is None
    assert limits_from(bundle, tied)[0]["tokens"].leading == 4
    monkeypatch.setattr("parity.check.limits_of", lambda bundle: limits_from(bundle, tied))
    flipped = [check_recording(Run(bundle, recording | {"tokens": changed_from(tokens, at)}, Mlx())) for at in (4, 3)]
    by_name = [{tap.tap.name: tap for tap in result.taps}["tokens"] for result in flipped]
    assert [tap.diverges for tap in by_name] == [False, True]
    assert [result.verdict for result in flipped] == ["agree", "diverge"]
    assert by_name[0].to_json()["leading"] == 4
