"""Where a cause holds among the compared taps of its kind, and which taps without a cause are one finding."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from parity.lance.names import parse
from parity.localize.explain import Causes
from parity.localize.findings import LOCAL, Explanation, Finding
from parity.localize.holding import holding
from parity.localize.search import Search

CASES = runpy.run_path(str(Path(__file__).with_name("explain_cases.py")))
CAUSE, OTHER, caused_by = CASES["ALL"][3], CASES["ALL"][4], CASES["caused_by"]
CALLS = [f"{arm}.{call}" for arm in ("cond", "uncond") for call in ("prefix0", "step0", "step1", "step2", "step3")]
NAMES = [f"{call}/language_model.model.layers.{layer}.self_attn.q_norm" for call in CALLS for layer in range(3)]
TAPS = [parse(name) for name in NAMES]


def where(test):
    return holding([tap for tap in TAPS if test(tap)], TAPS)


@pytest.mark.parametrize(
    ("test", "words"),
    [
        (lambda tap: True, None),
        (lambda tap: tap.layer == 1, "in layers.1 only"),
        (lambda tap: tap.layer != 1, "in layers 0 and 2"),
        (lambda tap: tap.layer > 0, "from layer 1 on"),
        (lambda tap: tap.arm == "uncond", "in the unconditional arm only"),
        (lambda tap: "step" in tap.numbers, "in the step calls only"),
        (lambda tap: tap.numbers.get("step", -1) >= 2, "from step 2 on"),
        (lambda tap: tap.numbers.get("step") == 0, "in step 0 only"),
        (lambda tap: tap.layer == 2 and tap.arm == "cond", "in layers.2 only, in the conditional arm only"),
        (lambda tap: tap.name in (NAMES[3], NAMES[-1]), "in layers 0 and 2, in steps 0 and 3, in 2 of 8 taps there"),
    ],
)
def test_where_a_cause_holds_is_said(test, words):
    found = where(test)
    assert found == words


def test_other_components_are_named():
    taps = [parse(f"vae.decode.chunk{i}/decoder.middle.0.residual.{part}") for i in range(3) for part in (0, 2, 3, 6)]
    wrong = [tap for tap in taps if tap.component.endswith("residual.2")]
    assert holding(wrong, taps) == "in vae.decoder.middle.0.residual.2 only"
    assert holding(wrong[1:], taps) == "in vae.decoder.middle.0.residual.2 only, from chunk 1 on"


@pytest.mark.parametrize(("layers", "together"), [((0, 1, 2), True), ((0, 2), False), ((1,), False)])
def test_what_has_no_cause_is_one_finding_where_no_layer_is_right(layers, together):
    wrong = [SimpleNamespace(tap=tap) for tap in TAPS if tap.layer in layers]
    covered = Search._covered(None, wrong[0], wrong[1:], Causes((), 0.0, ()), TAPS, {})
    alike = [tap for tap in wrong if together or tap.tap.component == wrong[0].tap.component]
    assert covered == {tap.tap.name for tap in alike[1:]}


class Searched(Search):
    """What was found at some sites, by the number of their taps: the causes of each."""

    def __init__(self, causes, sites):
        self.sites = {TAPS[number].name: site for number, site in sites.items()}
        self.found = SimpleNamespace(
            all=[
                Finding("layers", TAPS[n].name, "", LOCAL, 1.0, 0.0, cause=c, explanations=[Explanation("", 1.0)])
                for n, c in causes
            ]
        )

    def _site(self, tap, recording):
        return self.sites[tap.tap.name]

    def support(self):
        compared = [
            SimpleNamespace(tap=tap, allowed=self.sites[tap.name].allowed, mismatch=None)
            for tap in TAPS
            if tap.name in self.sites
        ]
        return self._held(self.found.all[0], {"layers.*.self_attn.q_norm": compared}, {}).support


def site(*causes, allowed=1e-3):
    made = caused_by(*causes)
    made.allowed = allowed
    return made


@pytest.mark.parametrize(
    ("others", "other", "words"),
    [
        ([], site(), "in layers.0 only"),
        # There it would not show, or nobody knows how much is too much.
        ([], site(allowed=1.0), None),
        ([], site(allowed=None), None),
        # There something else is wrong: what is explained without the cause, with it, and what is not explained.
        ([(1, OTHER)], site(OTHER), "in layers.0 only"),
        ([(1, OTHER), (1, CAUSE)], site(OTHER, CAUSE), None),
        ([(1, None)], site(OTHER), None),
        # There the same was told in other words.
        ([(1, replace(CAUSE, name="the same"))], site(CAUSE), None),
    ],
)
def test_what_is_right_limits_a_cause_that_would_show_there(others, other, words):
    found = Searched([(0, CAUSE), *others], {0: site(CAUSE), 1: other})
    assert found.support() == words


def test_what_has_no_cause_is_told_where_it_shows():
    assert Searched([(0, None)], {0: site(CAUSE), 1: site(allowed=1.0)}).support() == "in layers.0 only"
