"""What the error of a result is owed to: complete where all is found, additive, and what each cause does alone."""

import pytest

from parity.errors import ParityError
from parity.localize.attribution import EVERY, ORDERS, Attributing, Attribution, Cause, _orders
from parity.localize.investigation import localize
from parity.model import definition

FAULTS = ("grid-origin-0", "renorm-channel")


@pytest.fixture(scope="module")
def found(oracles):
    faults = [definition().CATALOGUE[name] for name in FAULTS]
    return localize(oracles / "t2i-fp32-kv", faults=faults, attribute=True)


def test_all_that_is_found_mended_leaves_rounding(found):
    attribution = found.attribution
    assert attribution.complete and attribution.sentence() == "with all of them mended nothing is left but rounding"
    assert [worth.cause for worth in attribution.worths] == [
        "positions: the target's grid starts at 0",
        "guidance: the renorm is per token",
    ]
    assert not attribution.orders and not attribution.unmended
    assert found.to_json()["attribution"]["complete"] is True


def test_shares_add_up(found):
    attribution = found.attribution
    for name, before in attribution.before.items():
        total = sum(worth.share[name] for worth in attribution.worths)
        assert total == pytest.approx(before - attribution.left[name])
    # Of two, each share is the mean of what it does first and of what it does last.
    first, second = attribution.worths
    as_first = attribution.before["latent"] - first.without["latent"]
    as_last = first.alone["latent"] - attribution.left["latent"]
    assert first.share["latent"] == pytest.approx((as_first + as_last) / 2)
    assert second.alone == first.without and first.alone == second.without


def test_a_cause_alone_does_what_its_fault_alone_does(oracles, found):
    for name, worth in zip(FAULTS, found.attribution.worths, strict=True):
        alone = localize(oracles / "t2i-fp32-kv", faults=[definition().CATALOGUE[name]])
        latent = next(tap for tap in alone.taps if tap.tap.name == "latent")
        assert worth.alone["latent"] == pytest.approx(latent.total, rel=1e-4)
        pixels = next(picture for picture in alone.pictures if picture.tap.name == "pixels")
        assert worth.result.shape == pixels.got.shape


def test_what_is_not_among_the_findings_is_left(oracles, monkeypatch):
    every = Attributing._causes
    monkeypatch.setattr(Attributing, "_causes", lambda self, findings: every(self, findings[:1]))
    faults = [definition().CATALOGUE[name] for name in FAULTS]
    attribution = localize(oracles / "t2i-fp32-kv", faults=faults, attribute=True).attribution
    assert not attribution.complete and attribution.left["latent"] > 0.01
    assert "of the error is left: something is not among the findings" in attribution.sentence()


def test_in_whole_passes_what_lies_within_calls_is_not_mended(oracles):
    faults = [definition().CATALOGUE[name] for name in (*FAULTS, "noise-block-causal")]
    attribution = localize(oracles / "t2i-fp32-nokv", faults=faults, attribute=True).attribution
    mended = [worth.cause for worth in attribution.worths]
    assert [cause.partition(":")[0] for cause in mended] == ["positions", "guidance"]
    assert len(attribution.unmended) == 1 and "layers.0.self_attn.sdpa" in attribution.unmended[0]
    assert 0 < attribution.left["latent"] < attribution.before["latent"]


def test_a_run_without_a_result_is_one_line(oracles):
    with pytest.raises(ParityError, match="^--attribute needs a run that ends in one of latent, pixels, frames"):
        fault = definition().CATALOGUE["vit-block-causal"]
        localize(oracles / "x2t_image-bf16-kv", faults=[fault], attribute=True)


@pytest.mark.parametrize("count", [EVERY, EVERY + 2])
def test_causes_are_mended_in_every_way_or_in_some_orders(monkeypatch, count):
    attributing = Attributing.__new__(Attributing)
    attributing.causes = [Cause(str(number), (number,)) for number in range(count)]
    attributing._orders = list(_orders(count)) if count > EVERY else []
    worth, tried = [2.0**number for number in range(count)], set()

    def errors(mended):
        tried.add(mended)
        return {"x": sum(worth) - sum(worth[n] for n in mended)}

    monkeypatch.setattr(attributing, "errors", errors, False)
    assert all(sorted(order) == list(range(count)) for order in attributing._orders)
    # What adds up is told exactly by any order.
    for number, amount in enumerate(worth):
        assert attributing._shapley(number)["x"] == pytest.approx(amount)
    planned = set(attributing._subsets())
    assert tried <= planned and len(planned) == (2**count if count == EVERY else len(planned))
    assert len(attributing._orders) == (0 if count == EVERY else 2 * ORDERS) and len(planned) <= 2**EVERY


def test_each_run_is_told_of_how_many_and_how_long(oracles):
    told = []
    faults = [definition().CATALOGUE[name] for name in FAULTS]
    localize(oracles / "t2i-fp32-kv", faults=faults, attribute=True, progress=told.append)
    told = [line for line in told if line.startswith("attribution")]
    assert len(told) == 4 and told[0] == "attribution, run 1 of 4: 0 of 2 mended"
    assert all(line.endswith(" mended, about 1 min left") for line in told[1:])


def test_where_nothing_has_a_bound_nothing_is_complete():
    only_colours = Attribution({"frames": 0.5}, {"frames": 0.5}, {"frames": 0.0}, [], [], 0)
    assert not only_colours.complete and "of the error is left" in only_colours.sentence()
