"""How often explanations were right: counted by sort and kind, and told of a kind by what the others say."""

import json
from dataclasses import replace

import numpy as np
import pytest

from parity.hypotheses import Hypothesis
from parity.lance import definition
from parity.localize import confidence
from parity.localize.confidence import FEWEST, Record, counted, record_of
from parity.localize.findings import LOCAL, Explanation, Finding


@pytest.fixture
def graded(monkeypatch):
    """Makes record_of tell of these."""

    def given(*graded):
        monkeypatch.setattr(definition, "CONFIDENCE", counted(list(graded)))
        record_of.cache_clear()

    yield given
    record_of.cache_clear()


def trials(kind, right, wrong, read=True):
    return [(read, kind, True)] * right + [(read, kind, False)] * wrong


def test_a_kind_is_told_by_the_others(graded):
    graded(*trials("layers.*.mlp", 30, 0), *trials("euler", 10, 20), *trials("euler", 5, 0, read=False))
    assert record_of(True, "euler") == Record(30, 30) and record_of(True, "layers.*.mlp") == Record(10, 30)
    assert record_of(True, "norm") == Record(40, 60)
    assert record_of(False, "norm") is None


def test_too_few_tell_nothing(graded):
    graded(*trials("euler", FEWEST - 1, 0))
    assert record_of(True, "norm") is None
    graded(*trials("euler", FEWEST, 0))
    assert record_of(True, "norm") == Record(FEWEST, FEWEST)


def test_an_explanation_of_a_sort_that_is_often_wrong_is_a_hint(graded):
    explanation = Explanation("the scale is 2", 1.0, size=np.float64(1))
    finding = Finding("layers.0.mlp", "cond.step0/x", "cond.step0", LOCAL, 1.0, 0.1, explanations=[explanation])
    graded(*trials("euler", 90, 10))
    assert finding.certain and finding.record == Record(90, 100) and finding.to_json()["record"]["right"] == 90
    assert json.loads(json.dumps(finding.to_json()))["explanations"][0]["read"] is True
    graded(*trials("euler", 80, 20))
    assert finding.explained and not finding.certain
    said = replace(finding, explanations=[replace(explanation, size=0)])
    assert said.certain and said.record is None
    assert replace(finding, explanations=[]).record is None


def test_what_is_kept_is_what_is_counted():
    kept = definition.CONFIDENCE
    assert set(kept) == set(confidence._SORTS.values())
    assert all(0 <= right <= told for counts in kept.values() for right, told in counts.values())


def test_explanations_that_say_as_little_and_do_the_same_are_told_together():
    first = Explanation("positions are places", 1.0, 1.0)
    others = [replace(first, name="positions are off by +1"), replace(first, name="a longer one", size=2)]
    finding = Finding("positions", "x", "x", "exact", 0.1, None, explanations=[first, *others])
    assert finding.cause_names == "positions are places or positions are off by +1"
    assert replace(finding, explanations=[]).cause_names == ""


def test_of_what_leaves_more_than_rounding_none_is_told_beside_another_that_leaves_as_little():
    first = Explanation("the renorm is used to 0.7", 0.977, 0.975, 9.5, size=0.9)
    rival = replace(first, name="the renorm compares the deviation", residual_removed=0.976, size=1.8)
    finding = Finding("guidance", "x", "x", LOCAL, 0.1, 0.01, rated=False, explanations=[first, rival])
    assert not finding.certain and finding.explained
    # What leaves no more than rounding, or much less than the others, is told.
    assert replace(finding, explanations=[replace(first, left=1.0), rival]).certain
    assert replace(finding, explanations=[first, replace(rival, residual_removed=0.96)]).certain
    assert replace(finding, explanations=[first, replace(rival, agrees=False)]).certain
    # So is what another does worse on a second input, or with a number more.
    assert replace(finding, explanations=[first, replace(rival, second=0.9)]).certain
    assert replace(finding, explanations=[first, replace(rival, size=1.9)]).certain


def test_what_is_read_with_numbers_of_numpy_goes_into_json():
    law = Hypothesis("the scale is 2", ("*",), size=np.float64(1.5))
    told = Explanation.of(law, 1.0)
    finding = Finding("layers.0.mlp", "x", "x", LOCAL, 1.0, 0.1, explanations=[told])
    assert json.loads(json.dumps(finding.to_json()))["explanations"][0]["read"] is True
