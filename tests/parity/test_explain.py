"""What explains a place: alone, on a second input, together, beyond what is known, or nothing."""

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity.hypotheses import DoesNotApply, Hypothesis
from parity.laws import Component, Law
from parity.localize import explain as explaining
from parity.localize.explain import BASES, DEPTH, FINALISTS, LISTED, explain, removed, rules_out
from parity.localize.findings import EXPLAINS

CASES = runpy.run_path(str(Path(__file__).with_name("explain_cases.py")))
ALL, SIZE, at, base, caused_by, names = (CASES[name] for name in ("ALL", "SIZE", "at", "base", "caused_by", "names"))


def test_the_right_hypothesis_removes_the_whole_residual():
    site = caused_by(ALL[3])
    causes = explain(site, None, ALL)
    assert names(causes) == ["h3"] and causes.removed == pytest.approx(1)
    assert causes.ranked[0].name == "h3" and causes.ranked[0].second is None
    assert causes.ranked[0].residual_removed == pytest.approx(1)
    # One that changes what is right makes it worse.
    assert all(e.residual_removed < 0 for e in causes.ranked[1:])
    assert len(causes.ranked) == LISTED


def test_a_cause_that_changes_what_is_right_beside_it_is_none():
    right = caused_by(exact=True)

    def unlike(name, there, elsewhere):
        def transform(site, array):
            change = there if site is right else elsewhere
            return change and change.transform(site, array)

        return replace(at(3, name), transform=transform)

    both, alone = at(3, "both"), unlike("alone", None, ALL[3])
    site = caused_by(ALL[3], exact=True)
    site.right = [right]
    assert names(explain(site, None, [both])) == []
    assert names(explain(site, None, [both, alone])) == ["alone"]
    # Two that together leave it as it is are no less a cause.
    back = unlike("back", at(3, amount=-1.0), ALL[4])
    site = caused_by(ALL[3], ALL[4], exact=True)
    site.right = [right]
    assert sorted(names(explain(site, None, [both, back]))) == ["back", "both"]


def test_what_is_further_off_than_agrees_is_ruled_out():
    site = caused_by()
    assert not rules_out(site, [ALL[3]])
    site.allowed = 0.01
    assert rules_out(site, [ALL[3]]) and not rules_out(site, [at(3, amount=1e-3)])
    assert not rules_out(caused_by(ALL[3], floor=0.0), [ALL[3]])


def test_rounding_does_not_hide_the_right_one_and_a_part_is_told_as_such():
    site = caused_by(ALL[3])
    site.got = site.got + np.random.default_rng(1).standard_normal(SIZE).astype(np.float32) * 1e-4
    causes = explain(site, None, ALL)
    assert names(causes) == ["h3"] and EXPLAINS < causes.removed < 1
    part = explain(caused_by(at(3, amount=1.5)), None, ALL)
    assert names(part) == [] and part.removed == pytest.approx(2 / 3, rel=1e-3)
    assert part.ranked[0].name == "h3"


def test_only_hypotheses_about_the_component_are_tried():
    tried = []

    def spy(site, array):
        tried.append(site.component)
        return None

    hypotheses = [Hypothesis("norms", ("norm*",), transform=spy), Hypothesis("heads", ("lm_head",), transform=spy)]
    causes = explain(caused_by(ALL[0]), None, hypotheses)
    assert tried == ["norm"] and causes.ranked == () and causes.together == ()


def test_a_second_place_decides_between_equals():
    def anywhere(site, array):
        return ALL[2].transform(site, array)

    def by_chance(site, array):
        # Right at one place only.
        return ALL[2].transform(site, array) if site.computed_first else array

    right, lucky = Hypothesis("right", ("*",), transform=anywhere), Hypothesis("lucky", ("*",), transform=by_chance)
    first, second = caused_by(ALL[2]), caused_by(ALL[2])
    first.computed_first, second.computed_first = True, False
    assert names(explain(first, None, [lucky, right])) == ["lucky"], "the earlier of two that explain equally well"
    causes = explain(first, second, [lucky, right])
    assert names(causes) == ["right"]
    assert [(e.name, e.second) for e in causes.ranked] == [("right", pytest.approx(1)), ("lucky", None)]


def test_what_does_not_apply_at_the_second_place_does_not_hold():
    def sometimes(site, array):
        return ALL[2].transform(site, array) if site is first else None

    first, second = caused_by(ALL[2]), caused_by(ALL[2])
    only_here = Hypothesis("only here", ("*",), transform=sometimes)
    causes = explain(first, second, [only_here, ALL[2]])
    assert names(causes) == ["h2"]
    assert next(e for e in causes.ranked if e.name == "only here").second is None


def test_only_finalists_are_tried_at_the_second_place():
    seen = set()

    def make(index):
        def transform(site, array):
            if site is second:
                seen.add(index)
            return array + 1

        return Hypothesis(f"n{index}", ("*",), transform=transform)

    first, second = caused_by(ALL[1]), caused_by(ALL[1])
    explain(first, second, [make(index) for index in range(2 * FINALISTS)])
    assert len(seen) == FINALISTS


@pytest.mark.parametrize("count", range(2, DEPTH + 1))
@pytest.mark.parametrize("exact", [False, True])
def test_causes_that_meet_in_a_place_are_found_together(count, exact):
    causes = explain(caused_by(*ALL[:count], exact=exact), None, ALL[::-1])
    assert sorted(names(causes)) == [f"h{index}" for index in range(count)]
    assert causes.removed == pytest.approx(1)
    # Ranked is what each does alone, which is not enough.
    assert all(e.residual_removed < EXPLAINS for e in causes.ranked)


def test_more_causes_than_that_are_not_guessed():
    causes = explain(caused_by(*ALL[: DEPTH + 3]), None, ALL)
    assert names(causes) == [] and causes.removed < EXPLAINS


def test_one_cause_is_enough_where_another_adds_little():
    # 93% are explained; a second hypothesis that removes a little more is no second cause.
    noise = np.random.default_rng(5).standard_normal(SIZE).astype(np.float32)
    site = caused_by(ALL[0])
    site.got = site.got + noise * np.float32(0.07 * np.linalg.norm(site.got - site.expected) / np.linalg.norm(noise))
    helps = Hypothesis("helps a little", ("*",), transform=lambda site, array: array + noise * np.float32(0.01))
    causes = explain(site, None, [ALL[0], helps])
    assert names(causes) == ["h0"] and EXPLAINS < causes.removed < 1 - (1 - EXPLAINS) / 2


def test_integers_have_to_be_equal():
    site = caused_by(ALL[0], at(5, amount=0.01), exact=True)
    # 99% are explained by the first, but an integer that is almost right is wrong.
    assert sorted(names(explain(site, None, [ALL[0], ALL[1], at(5, amount=0.01)]))) == ["h0", "h5"]
    assert names(explain(caused_by(ALL[0], at(5, amount=0.01)), None, [ALL[0], ALL[1]])) == ["h0"]


def test_what_fails_or_has_another_shape_explains_nothing():
    def broken(site, array):
        raise ZeroDivisionError

    def patch(site):
        raise DoesNotApply

    bad = [
        Hypothesis("broken", ("*",), transform=broken),
        Hypothesis("inapplicable", ("*",), patch=patch),
        Hypothesis("short", ("*",), transform=lambda site, array: array[:-1]),
        Hypothesis("none", ("*",), transform=lambda site, array: None),
    ]
    site = caused_by(ALL[0])
    assert [removed(site, [hypothesis], {}) for hypothesis in bad] == [None] * 4
    assert explain(site, None, bad).ranked == ()
    assert names(explain(site, None, [*bad, ALL[0]])) == ["h0"]
    # Stacked on one that works they are skipped too.
    assert sorted(names(explain(caused_by(ALL[0], ALL[1]), None, [*bad, *ALL]))) == ["h0", "h1"]


def test_the_residual_of_another_shape_is_the_whole_of_what_was_computed():
    site = caused_by()
    site.got = site.expected[: SIZE // 2] * 2
    halved = Hypothesis("halved", ("*",), transform=lambda site, array: array[: SIZE // 2] * 2)
    assert removed(site, [halved], {}) == pytest.approx(1)
    assert removed(site, [Hypothesis("cut", ("*",), transform=lambda site, array: array[: SIZE // 2])], {}) == (
        pytest.approx(0.5)
    )


def test_where_nothing_is_wrong_only_what_changes_nothing_removes_it():
    site = caused_by(exact=True)
    assert removed(site, [Hypothesis("same", ("*",))], {}) == 1
    assert removed(site, [ALL[0]], {}) == 0
    assert removed(caused_by(), [Hypothesis("same", ("*",))], {}) is None


def test_beyond_what_is_known_only_what_is_missing_is_named():
    site = caused_by(ALL[0], ALL[4])
    causes = explain(site, None, ALL, known=[ALL[0]])
    assert names(causes) == ["h4"] and causes.removed == pytest.approx(1)
    assert "h0" not in [e.name for e in causes.ranked]
    # What is known suffices, or nothing that is known of does: no other cause.
    assert names(explain(caused_by(ALL[0]), None, ALL, known=[ALL[0]])) == []
    odd = caused_by(ALL[0])
    odd.got = odd.got * np.linspace(1, 2, SIZE, dtype=np.float32)
    assert names(explain(odd, None, ALL, known=[ALL[0]])) == []
    assert BASES <= len(ALL)


def test_patches_are_nested_and_undone_and_the_transforms_composed():
    order = []

    def patching(name):
        from contextlib import contextmanager

        @contextmanager
        def patch(site):
            order.append(f"+{name}")
            yield
            order.append(f"-{name}")

        return Hypothesis(name, ("*",), patch, lambda site, array: order.append(name) or array)

    site = caused_by()
    removed(site, [patching("a"), patching("b")], {})
    # Computed once under both, and once as it is.
    assert order == ["+a", "+b", "a", "b", "-b", "-a"] and site.computed == 2


def test_of_causes_that_meet_one_that_moves_no_more_than_rounding_says_how_the_other_rounds():
    def placed(amount):
        small = at(5, "rounded otherwise", amount)
        site = caused_by(ALL[3], small)
        site.allowed, site.dtype = 1e-4, "bfloat16"
        return explain(site, None, [*ALL[:5], small, *ALL[6:]])

    # What is left beside the first has to be told, or there is nothing to see.
    few = placed(0.007)
    assert set(names(few)) == {"h3", "rounded otherwise"} and [h.name for h in few.beside] == ["rounded otherwise"]
    many = placed(0.1)
    assert set(names(many)) == {"h3", "rounded otherwise"} and not many.beside


def test_what_was_read_and_is_no_better_where_the_component_is_wrong_again_is_not_told():
    read = replace(at(5), size=1.0)
    first, second = caused_by(ALL[3], at(5)), caused_by(ALL[3])
    assert set(names(explain(first, None, [ALL[3], read]))) == {"h3", "h5"}
    # A law about a layer is true of its other calls.
    assert names(explain(first, second, [ALL[3], read])) == []
    assert set(names(explain(first, caused_by(ALL[3], at(5)), [ALL[3], read]))) == {"h3", "h5"}
    assert set(names(explain(first, second, [ALL[3], at(5)]))) == {"h3", "h5"}


def test_what_is_read_on_top_of_a_cause_may_have_no_meaning_alone(monkeypatch):
    def on_top(site, array):
        if np.array_equal(array, site.expected):
            raise ValueError("nothing to change")
        return at(5).transform(site, array)

    late = Hypothesis("on top", ("*",), transform=on_top, size=1.0)
    monkeypatch.setattr(explaining, "_read", lambda site, base, failed: [late] if base else [])
    site = caused_by(ALL[3], at(5))
    site.allowed, site.dtype = 1e-4, "float32"
    causes = explain(site, None, ALL[:5])
    assert names(causes) == ["h3", "on top"] and not causes.beside
    assert causes.failed == {"on top": "ValueError: nothing to change"}


def test_what_is_true_of_some_tokens_alone_is_told_with_them():
    class Known(type(caused_by(ALL[0]))):
        def known(self, own):
            return Component("any", {}, {}, own, 1e-6, ("token", "channel"))

    own = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    doubled = Hypothesis("all is doubled", ("*",), transform=lambda site, array: 2 * array)
    site = Known(np.where(np.arange(9)[:, None] == 8, 2 * own, own))
    site.own = site.expected = own
    causes = explain(site, None, [doubled])
    assert names(causes) == ["in token 8 only: all is doubled"] and causes.removed == pytest.approx(1)
    # Where a token is neither, nothing is told of some.
    site = Known(site.got + (np.arange(9)[:, None] == 2))
    site.own = site.expected = own
    assert not any("only" in explanation.name for explanation in explain(site, None, [doubled]).ranked)


def test_what_is_read_and_right_to_the_last_bit_comes_before_what_is_nearly_so(monkeypatch):
    near = at(3, "nearly", amount=0.97)
    site = caused_by(at(3), floor=1e-3)
    site.allowed = 1.0
    law = Law("the whole", 1.0, lambda component: at(3).transform(None, component.own))
    monkeypatch.setattr(explaining, "fitted", lambda component, got: [law])
    monkeypatch.setattr(site, "known", lambda own: Component("norm", {}, {}, own))
    causes = explain(site, None, [near])
    assert causes.ranked[0].name == "the whole" and causes.ranked[0].residual_removed == 1
    # What leaves nothing but rounding was said beforehand, and says it well enough.
    monkeypatch.setattr(site, "floor", 0.1)
    assert explain(site, None, [near]).ranked[0].name == "nearly"


def test_many_numbers_are_no_proof_though_they_leave_nothing():
    exact, near = replace(at(3, "read"), size=20.0), at(3, "said", amount=0.99999)
    site = caused_by(at(3), floor=1e-3)
    assert [h.name for h, _ in explaining._ordered(site, [(exact, 1.0), (near, 0.9999)])] == ["said", "read"]
    few = replace(exact, size=1.0)
    assert [h.name for h, _ in explaining._ordered(site, [(near, 0.9999), (few, 1.0)])] == ["read", "said"]


def test_what_was_said_beforehand_may_be_computed_in_bfloat16_where_it_should_not_be():
    def rough(left):
        got = at(3, amount=1 - left).transform(None, base())
        return CASES["Place"](got, floor=1e-7, dtype="bfloat16", allowed=2e-7)

    (told,) = explain(rough(0.005), None, [at(3)]).ranked
    assert told.agrees and told.residual_removed == pytest.approx(0.995, abs=1e-3)
    assert not explain(rough(0.03), None, [at(3)]).ranked[0].agrees
    # A number that was read of it is chosen to fit.
    assert not explain(rough(0.005), None, [replace(at(3), size=1.0)]).ranked[0].agrees
    single = rough(0.005)
    single.dtype = "float32"
    assert not explain(single, None, [at(3)]).ranked[0].agrees


def test_several_causes_of_a_single_integer_are_a_hint():
    def whole(*causes):
        first = np.arange(SIZE, dtype=np.int32)
        got = first
        for cause in causes:
            got = cause.transform(None, got)
        return CASES["Place"](got, first, exact=True)

    def adding(places, amount):
        hit = np.isin(np.arange(SIZE), places)
        return Hypothesis(
            f"{amount} at {places}", ("*",), transform=lambda site, x: (x + amount * hit).astype(np.int32)
        )

    one, two, more = adding([3], 5), adding([3, 9], 2), adding([9], -2)
    chance = explain(whole(one), None, [two, more, adding([3], 3)])
    assert len(chance.together) == 3 and not chance.agrees
    assert explain(whole(one), None, [one]).agrees
    both = explain(whole(two, adding([20, 21], 1)), None, [two, adding([20, 21], 1)])
    assert len(both.together) == 2 and both.agrees
    # Nor is a part told that one integer alone speaks for.
    four = adding([30, 31, 32, 33], 7)
    causes = explain(whole(two, adding([20], 1), four), None, [adding([20], 1), four])
    assert names(causes) == [four.name] and causes.parts == (pytest.approx(4 / 7),)
