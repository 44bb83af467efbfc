"""The table of faults: which are tried where, what counts as found, named and explained, and how it is written."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fault_table
import pytest
import typer
from fault_trials import BUNDLES, Rows, Trial, judge, markdown, plan, summary, try_fault, try_faults, untried
from typer.testing import CliRunner

from parity.bundle.reading import read_bundle
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE
from parity.errors import ParityError
from parity.lance.faults import CATALOGUE, Fault
from parity.lance.faults.base import Need, replaced
from parity.localize.findings import LOCAL, STRUCTURE, Explanation, Finding, Localization


def bundle(name, task="t2i", dtype="float32", entry="kv_cache"):
    return SimpleNamespace(name=name, path=Path(name), task=task, dtype=dtype, entry=entry)


def fault(name="f", component="norm", tasks=("t2i",), explanation="the norm is missing", **only):
    def patch(target):
        raise AssertionError("never applied")

    return Fault(name, "about", component, patch, frozenset(tasks), explanation=explanation, **only)


def chosen(faults, bundles):
    """Names of the bundles that each fault is tried on."""
    found = {each.name: [] for each in faults}
    for where, which in plan(faults, bundles):
        for each in which:
            found[each.name].append(where.name)
    return found


def test_only_the_folders_that_are_named_are_looked_at_for_a_fault(monkeypatch, oracles):
    def stop(*arguments):
        raise ParityError("nothing more is recorded")

    looked = []
    monkeypatch.setattr(fault_table, "record_more", stop)
    monkeypatch.setattr(fault_table, "try_faults", lambda paths, *rest: looked.extend(paths) or [])
    app = typer.Typer()
    app.command()(fault_table.main)
    path = oracles / "t2i-fp32-kv"
    named = CliRunner().invoke(app, [str(path), "--fault", "query-norm-missing"])
    assert looked == [path] and "nothing more" not in named.stderr
    for further in (["--fault", "query-norm-missing"], [str(path)]):
        assert "nothing more is recorded" in CliRunner().invoke(app, further).stderr


# The plan.


def test_a_fault_is_tried_on_two_bundles_that_it_touches():
    bundles = [bundle("a"), bundle("b", "t2v"), bundle("c", "t2v"), bundle("d", "i2v")]
    faults = [fault("one", tasks=("t2i",)), fault("two", tasks=("t2v", "i2v")), fault("none", tasks=("x2t_image",))]
    found = chosen(faults, bundles)
    assert found["one"] == ["a"] and len(found["two"]) == BUNDLES and found["none"] == []
    # The second is of another task where there is one.
    assert "d" in found["two"]
    # Bundles on which nothing is tried are left out, the others come in their order.
    assert [where.name for where, _ in plan(faults, bundles)] == ["a", "b", "d"]


def test_numerics_entry_and_needs_decide_too():
    bundles = [bundle("a"), bundle("b", dtype="bfloat16"), bundle("c", entry="full_sequence")]
    assert chosen([fault(dtypes=("bfloat16",))], bundles)["f"] == ["b"]
    assert chosen([fault(entries=("full_sequence",))], bundles)["f"] == ["c"]
    assert chosen([fault(needs=Need("to be c", lambda b: b.name == "c"))], bundles)["f"] == ["c"]
    never = fault(needs=Need("a picture of the moon", lambda b: False))
    assert chosen([never], bundles)["f"] == []
    assert untried([never, fault()], bundles) == [
        "f is not tried: it needs a t2i run in float32 or bfloat16, a picture of the moon"
    ]


def test_faults_are_spread_over_the_bundles():
    bundles = [bundle(name) for name in "abcdef"]
    faults = [fault(f"f{index}") for index in range(30)]
    loads = Counter(name for names in chosen(faults, bundles).values() for name in names)
    assert set(loads.values()) == {30 * BUNDLES // 6}


def test_every_fault_of_the_catalogue_is_planned_on_bundles_that_suit_it(oracles):
    bundles = [read_bundle(path.parent) for path in sorted(oracles.glob("*/manifest.json"))]
    found = chosen(CATALOGUE.values(), bundles)
    by_name = {each.name: each for each in bundles}
    for name, where in found.items():
        assert len(set(where)) == len(where) <= BUNDLES
        assert all(CATALOGUE[name].suits(by_name[each]) for each in where)
    # Those that need what no embedded bundle has are tried on recorded ones.
    assert sum(len(where) == BUNDLES for where in found.values()) > 0.8 * len(CATALOGUE)


# The judgement.


def localization(*findings, verdict=DIVERGE):
    return Localization(
        "b", "mlx", "t2i", "kv_cache", "float32", verdict, "", list(findings), [], [], None, seconds=2.5
    )


def finding(component="norm", *explanations, kind=LOCAL):
    listed = [Explanation(name, amount) for name, amount in explanations]
    return Finding(component, "cond.step0/x", "cond.step0", kind, 0.1, 1e-7, explanations=listed)


RIGHT = ("the norm is missing", 1.0)


@pytest.mark.parametrize(
    ("found", "marks", "first", "why"),
    [
        ([finding("norm", RIGHT)], (True, True, True), "norm", "the norm is missing"),
        ([finding("norm", ("another", 0.95), RIGHT)], (True, True, False), "norm", "another"),
        ([finding("norm", ("the norm is missing", 0.5))], (True, True, False), "norm", "(the norm is missing)"),
        ([finding("norm")], (True, True, False), "norm", ""),
        ([finding("llm2vae", RIGHT), finding("norm", RIGHT)], (True, False, True), "llm2vae", "the norm is missing"),
        ([finding("norm", kind=STRUCTURE)], (True, True, False), "norm", ""),
        ([], (True, False, False), "", ""),
    ],
)
def test_the_first_finding_counts(found, marks, first, why):
    trial = judge(fault(), localization(*found))
    assert (trial.detected, trial.named, trial.explained) == marks
    assert (trial.first, trial.why, trial.bundle, trial.seconds) == (first, why, "b", 2.5)


@pytest.mark.parametrize("verdict", [AGREE, INCONCLUSIVE])
def test_only_a_divergence_is_a_detection(verdict):
    assert not judge(fault(), localization(finding("norm", RIGHT), verdict=verdict)).detected


def test_components_match_by_pattern_and_what_no_hypothesis_covers_is_not_explained():
    trial = judge(
        fault(component="layers.*.q_norm*", explanation=None), localization(finding("layers.2.q_norm_moe_gen"))
    )
    assert trial.named and trial.explained is None
    assert not judge(fault(component="layers.?"), localization(finding("layers.1.mlp"))).named


# The table.


def trial(name, where="a", detected=True, named=True, explained=True, first="norm", why="why"):
    return Trial(fault(name), where, detected, named, explained, first, why, 1.0)


def test_the_summary_counts_faults_trials_and_shares():
    trials = [trial("x"), trial("x", "b", named=False), trial("y", explained=None), trial("z", explained=False)]
    assert summary(trials) == (
        "3 faults, 4 trials: 100.0% detected, 75.0% with the right component first, "
        "66.7% of the 3 that a hypothesis covers with the right explanation first; "
        "0 with a finding about another component"
    )
    assert summary([]).startswith("0 faults, 0 trials: none detected")


def test_the_table_has_a_row_for_every_trial_in_order():
    trials = [trial("y", why="(half)"), trial("x", "b", False, False, False, "", ""), trial("x", "a", explained=None)]
    text = markdown(trials)
    assert text.endswith("\n") and text.startswith(summary(trials) + ".\n\n| fault | bundle |")
    head, line, *rows = text.splitlines()[2:]
    assert set(line) == {"|", "-"} and line.count("|") == head.count("|") == 8
    assert rows == [
        "| x | a | `norm` | why | ✓ | ✓ | – |",
        "| x | b | – | – | ✗ | ✗ | ✗ |",
        "| y | a | `norm` | (half) | ✓ | ✓ | ✓ |",
    ]


# Trials.


def test_trials_load_each_bundle_once_and_tell_what_they_do(oracles, monkeypatch):
    loaded, told = [], []

    def start(name):
        told.append(name)
        return told.append

    monkeypatch.setattr("fault_trials.Oracle.of", lambda bundle: loaded.append(bundle.name) or "oracle")
    monkeypatch.setattr("fault_trials.MlxPort", lambda bundle: "subject")
    monkeypatch.setattr("fault_trials.try_fault", lambda *parts: (parts[0].name, parts[1].name, *parts[2:]))
    paths = [oracles / "t2i-fp32-kv", oracles / "t2v-bf16-kv"]
    faults = [CATALOGUE["rope-pairs"], CATALOGUE["renorm-channel"]]
    found = list(try_faults(paths, faults, start))
    assert sorted(found) == sorted((f.name, p.name, "oracle", "subject") for f in faults for p in paths)
    assert loaded == ["t2i-fp32-kv", "t2v-bf16-kv"]
    assert told == ["t2i-fp32-kv", "rope-pairs", "renorm-channel", "t2v-bf16-kv", "rope-pairs", "renorm-channel"]


def test_trials_that_were_made_are_not_made_again(oracles, monkeypatch, tmp_path):
    tried, path = [], tmp_path / "rows.jsonl"

    def once(fault, bundle, *rest):
        tried.append(fault.name)
        return Trial(fault, bundle.name, True, True, None, "norm", "why", 1.0, ("x",))

    monkeypatch.setattr("fault_trials.Oracle.of", lambda bundle: "oracle")
    monkeypatch.setattr("fault_trials.MlxPort", lambda bundle: "subject")
    monkeypatch.setattr("fault_trials.try_fault", once)
    paths, faults = [oracles / "t2i-fp32-kv"], [CATALOGUE["rope-pairs"], CATALOGUE["renorm-channel"]]
    first = list(try_faults(paths, faults[:1], lambda name: tried.append, Rows(path)))
    tried.clear()
    assert list(try_faults(paths, faults, lambda name: lambda what: None, Rows(path)))[:1] == first
    assert tried == ["renorm-channel"] and len(path.read_text().splitlines()) == 2


def test_a_fault_on_a_real_bundle(oracle_of, subject_of):
    oracle, subject = oracle_of("t2i-fp32-nokv"), subject_of("t2i-fp32-nokv")
    chosen = CATALOGUE["schedule-shift-1"]
    found = try_fault(chosen, oracle.bundle, oracle, subject)
    assert (found.detected, found.named, found.explained) == (True, True, True)
    assert found.first == "schedule" and found.seconds > 0
    # Nothing is broken: nothing is found.
    harmless = replace(chosen, patch=lambda target: replaced(target.pipeline, "harmless", True))
    none = try_fault(harmless, oracle.bundle, oracle, subject)
    assert (none.detected, none.named, none.explained, none.first) == (False, False, False, "")
    assert not hasattr(subject.pipeline, "harmless")


def test_a_fault_that_cannot_be_applied_is_not_found_and_says_why(oracle_of, subject_of):
    def patch(target):
        raise ParityError("it cannot be applied: why")

    oracle, subject = oracle_of("t2i-fp32-nokv"), subject_of("t2i-fp32-nokv")
    broken = replace(CATALOGUE["schedule-shift-1"], patch=patch)
    found = try_fault(broken, oracle.bundle, oracle, subject)
    assert (found.detected, found.named, found.explained) == (False, False, False)
    assert found.first == "it cannot be applied: why"
    assert try_fault(replace(broken, explanation=None), oracle.bundle, oracle, subject).explained is None
