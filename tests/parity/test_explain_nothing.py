"""What is no explanation: what changes nothing or no more than rounding, what only computes anew, what fails."""

import runpy
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from parity.hypotheses import DoesNotApply, Hypothesis
from parity.hypotheses.tap_probe import TapProbe, site_of
from parity.lance.hypotheses import HYPOTHESES
from parity.lance.names import parse
from parity.localize.explain import Causes, explain, removed

CASES = runpy.run_path(str(Path(__file__).with_name("explain_cases.py")))
ALL, Place, at, base, caused_by, names = (CASES[name] for name in ("ALL", "Place", "at", "base", "caused_by", "names"))


def to_bfloat16(array):
    return torch.from_numpy(array).bfloat16().float().numpy()


def a_unit_off(array, index=5):
    """A bfloat16 array with one element off by a unit in its last place."""
    bits = array.view(np.uint32).copy()
    bits[index] += 0x10000
    return bits.view(np.float32)


def apart(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


UNIT = apart(a_unit_off(to_bfloat16(base())), to_bfloat16(base()))
REWEIGHTED = Hypothesis("the weight is rounded to bfloat16", ("*",), patch=lambda site: nullcontext())
ROUNDED = Hypothesis("the result is rounded to bfloat16", ("*",), transform=lambda site, array: to_bfloat16(array))
TIMES_ONE = Hypothesis("the result is multiplied by 1", ("*",), transform=lambda site, array: array * np.float32(1))
HALVED = Hypothesis("the result is half as large", ("*",), transform=lambda site, array: array / 2)


@pytest.mark.parametrize("floor", [0.0, UNIT / 2, UNIT])
@pytest.mark.parametrize("whose", ["the port's", "the oracle's", "the reference's"])
def test_a_rounding_that_falls_the_other_way_has_no_cause(whose, floor):
    right = to_bfloat16(base())
    flipped = a_unit_off(right)
    got, expected, own = {
        "the port's": (flipped, right, right),
        # The reference, computed anew, comes out on the port's side.
        "the oracle's": (right, flipped, right),
        "the reference's": (flipped, right, a_unit_off(right, 9)),
    }[whose]
    site = Place(got, expected, own=own, floor=floor)
    causes = explain(site, None, [REWEIGHTED, ROUNDED, TIMES_ONE, HALVED, *ALL])
    assert causes.together == () and causes.removed <= 0
    assert {"the weight", "the result is r", "the result is m"}.isdisjoint(e.name[:15] for e in causes.ranked)
    assert all(e.residual_removed <= 0 for e in causes.ranked)


@pytest.mark.parametrize("tap", ["language_model.model.layers.1.self_attn.q_proj_moe_gen", "llm2vae"])
def test_no_hypothesis_of_ours_explains_a_rounding_that_falls_the_other_way(oracle_of, tap):
    oracle, name = oracle_of("t2v-bf16-kv"), f"cond.step0/{tap}"
    own = site_of(oracle, name, oracle.taps[name].array, {}).recompute()
    flipped = a_unit_off(own, (3, 7))
    for got, expected in ((flipped, own), (own, flipped), (flipped, a_unit_off(own, (2, 5)))):
        causes = explain(TapProbe(oracle, parse(name), expected, got, {}), None, HYPOTHESES)
        assert causes.together == () and causes.failed == {}
        assert all(e.residual_removed <= 0 for e in causes.ranked)


@pytest.mark.parametrize("nothing", [REWEIGHTED, TIMES_ONE], ids=lambda h: h.name)
def test_what_changes_nothing_is_no_explanation_of_anything(nothing):
    site = caused_by(ALL[3], own=caused_by(at(3, amount=0.95)).got)
    # Of what the oracle and the port differ by, the reference alone removes 95 %.
    assert removed(site, [nothing], {}) is None
    assert names(explain(caused_by(ALL[3]), None, [nothing, ALL[3]])) == ["h3"]
    assert nothing.name not in [e.name for e in explain(caused_by(ALL[3]), None, [nothing, *ALL[:4]]).ranked]


def test_what_is_removed_is_not_earned_by_computing_anew():
    # The oracle is off the reference by as much as the port is: half of the way is no merit of the hypothesis.
    site = caused_by(ALL[3], own=caused_by(at(3, amount=0.5)).got)
    most = Hypothesis("most", ("*",), transform=lambda site, array: at(3, amount=0.45).transform(site, array))
    part = Hypothesis("part", ("*",), transform=lambda site, array: at(3, amount=0.25).transform(site, array))
    assert removed(site, [most], {}) == pytest.approx(0.9, abs=1e-5)
    assert removed(site, [part], {}) == pytest.approx(0.5, abs=1e-5)


def test_a_change_within_rounding_is_none_and_one_beyond_it_is_found():
    whole = apart(ALL[3].transform(None, base()), base())
    assert names(explain(caused_by(ALL[3], floor=0.9 * whole), None, ALL)) == ["h3"]
    assert explain(caused_by(ALL[3], floor=1.1 * whole), None, ALL).ranked == ()
    # Beyond the change of the hypothesis, what it removes has to be more than rounding too.
    site = caused_by(at(3, amount=2.0), floor=0.8 * whole)

    def both(site, array):
        return ALL[5].transform(site, at(3, amount=1.2).transform(site, array))

    hint = Hypothesis("hint", ("*",), transform=both)
    assert 0 < removed(caused_by(at(3, amount=2.0)), [hint], {}) and removed(site, [hint], {}) == 0


def test_a_second_cause_within_rounding_is_none():
    causes = [at(0, amount=12.0), at(1, amount=1.0)]
    damaged = [*causes, at(2, amount=0.3)]
    assert names(explain(caused_by(*damaged), None, causes)) == ["h0", "h1"]
    alone = apart(ALL[1].transform(None, base()), base())
    assert names(explain(caused_by(*damaged, floor=0.9 * alone), None, causes)) == ["h0"]


def test_what_is_not_finite_is_not_explained():
    site = caused_by(ALL[3])
    assert removed(site, [Hypothesis("nan", ("*",), transform=lambda site, array: array * np.nan)], {}) is None
    site.got = np.full_like(site.got, np.nan)
    assert explain(site, None, ALL) == Causes((), 0.0, ())


# What fails.


def failing(error, name="broken"):
    def transform(site, array):
        raise error

    return Hypothesis(name, ("*",), transform=transform)


def test_what_raises_is_listed_and_what_does_not_apply_is_not():
    hypotheses = [failing(ZeroDivisionError()), failing(DoesNotApply(), "silent"), failing(ValueError("a\nb"), "odd")]
    causes = explain(caused_by(ALL[0]), None, [*hypotheses, ALL[0]])
    assert names(causes) == ["h0"]
    assert causes.failed == {"broken": "ZeroDivisionError", "odd": "ValueError: a"}
    assert explain(caused_by(ALL[0]), None, hypotheses).failed == causes.failed
    assert explain(caused_by(ALL[0]), None, hypotheses, known=[ALL[1]]).failed.keys() == {"h1 and broken", "h1 and odd"}


def test_what_raises_at_the_second_place_or_on_top_of_another_is_listed():
    def there(site, array):
        if site is second:
            raise KeyError("x")
        return ALL[0].transform(site, array)

    second = caused_by(ALL[0])
    causes = explain(caused_by(ALL[0]), second, [Hypothesis("here", ("*",), transform=there)])
    assert causes.failed == {"here": "KeyError: 'x'"}

    def alone(site, array):
        if not np.array_equal(array, base()):
            raise IndexError
        return ALL[0].transform(site, array)

    causes = explain(caused_by(ALL[0], ALL[1]), None, [ALL[1], Hypothesis("alone", ("*",), transform=alone)])
    assert causes.failed["h1 and alone"] == "IndexError"


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_interrupt_is_no_failure_of_a_hypothesis(wrapped):
    error = KeyboardInterrupt()
    if wrapped:
        error, error.__cause__ = RuntimeError("in making a class"), error
    with pytest.raises(type(error)):
        removed(caused_by(ALL[0]), [failing(error)], {})
