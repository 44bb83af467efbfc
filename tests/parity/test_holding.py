"""Where a cause holds among the compared taps of its kind, and which taps without a cause are one finding."""

from types import SimpleNamespace

import pytest

from parity.lance.names import parse
from parity.localize.explain import Causes
from parity.localize.holding import holding
from parity.localize.investigation import Investigation

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
    covered = Investigation._covered(None, wrong[0], wrong[1:], Causes((), 0.0, ()), TAPS, {})
    alike = [tap for tap in wrong if together or tap.tap.component == wrong[0].tap.component]
    assert covered == {tap.tap.name for tap in alike[1:]}
