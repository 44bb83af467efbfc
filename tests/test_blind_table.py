"""scripts/blind_table.py: the same bundles every time, nothing tried twice, and grades that hold for one text."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import blind_table
import pytest
from blind_faults import BLIND

from parity.bundle.reading import read_bundle
from parity.errors import ParityError
from parity.localize.findings import Explanation, Finding, Localization

ROOT = Path(__file__).parents[1]


def row(fault, bundle="t2i-fp32-kv", told="", verdict="diverge", named=True):
    about = {"fault": fault.name, "about": fault.about, "kind": fault.kind, "bundle": bundle}
    return about | {"verdict": verdict, "named": named, "findings": [], "told": told, "seconds": 1.0}


def localized(component, removed):
    finding = Finding(component, "tap", "call", "local", 0.1, 0.0, explanations=[Explanation("turned", removed, 0.99)])
    empty = {"findings": [finding], "taps": [], "exact": [], "alarm": None}
    return Localization("bundle", "mlx", "t2i", "kv_cache", "float32", "diverge", "because", **empty)


def test_every_fault_is_tried_on_two_bundles_that_differ():
    bundles = [read_bundle(path.parent) for path in sorted((ROOT / "oracles").glob("*/manifest.json"))]
    for fault in BLIND:
        chosen = blind_table.choose(fault, bundles)
        assert chosen == blind_table.choose(fault, bundles) and all(fault.suits(bundle) for bundle in chosen)
        assert len(chosen) == min(2, sum(fault.suits(bundle) for bundle in bundles))
        tasks = {bundle.task for bundle in bundles if fault.suits(bundle)}
        assert len({bundle.task for bundle in chosen}) == min(2, len(tasks))


def test_only_what_explains_is_told():
    fault = next(fault for fault in BLIND if fault.name == "blind-rope-llama3-scaling")
    right = blind_table.told_of(fault, localized("layers.0.self_attn.q_rope", 0.97))
    assert right["named"] and right["told"] == "layers.0.self_attn.q_rope: turned"
    assert right["findings"][0]["removed"] == 0.97 and right["findings"][0]["second"] == 0.99
    tied = localized("euler", 1.0)
    first = tied.findings[0].explanations[0]
    both = replace(tied.findings[0], explanations=[first, replace(first, name="moved")])
    assert blind_table.told_of(fault, replace(tied, findings=[both]))["told"] == "euler: turned or moved"
    weak = blind_table.told_of(fault, localized("positions", 0.5))
    assert not weak["named"] and weak["told"] == "" and weak["findings"][0]["explanation"] == "turned"


def test_what_was_tried_is_not_tried_again(tmp_path, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(blind_table, "attempt", lambda fault, bundle: tried.append(bundle) or row(fault, bundle.name))
    path, only = tmp_path / "rows.jsonl", ["blind-rope-llama3*"]
    blind_table.try_all(path, [ROOT / "oracles"], only)
    assert len(tried) == len(blind_table.read_rows(path)) == 2
    path.write_text(path.read_text().splitlines(keepends=True)[0] + '{"fault": "bl')
    blind_table.try_all(path, [ROOT / "oracles"], only)
    assert len(tried) == 3 and len(blind_table.read_rows(path)) == 2
    assert "1/1 blind-rope-llama3-scaling on " in capsys.readouterr().err
    with pytest.raises(ParityError, match="no blind fault is called nothing"):
        blind_table.try_all(path, [ROOT / "oracles"], ["nothing"])


def test_the_table_counts_by_kind_and_grades_hold_for_one_text(tmp_path, monkeypatch, capsys):
    plain, small = (next(fault for fault in BLIND if fault.kind == kind) for kind in ("plain", "small"))
    rows = [row(plain, told="a: b"), row(plain, "t2v-fp32-kv", told="a: c"), row(small, verdict="agree", named=False)]
    rows[0]["findings"] = [{"component": "layers.1.mlp", "certain": True, "read": True}]
    path, grades = tmp_path / "rows.jsonl", tmp_path / "grades.json"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["blind_table.py", str(path), *map(str, arguments)])
        return blind_table.main()

    assert run("--ungraded", grades) == 0
    listed = json.loads(grades.read_text())
    assert [each["told"] for each in listed] == ["a: b", "a: c"] and listed[0]["about"] == plain.about
    listed[0]["grade"], listed[1]["grade"] = "right", "wrong"
    grades.write_text(json.dumps(listed))
    assert run("--grades", grades, "--confidence", tmp_path / "confidence.json") == 0
    assert json.loads((tmp_path / "confidence.json").read_text()) == {"said": {}, "read": {"layers.*.mlp": [1, 1]}}
    text = capsys.readouterr().out
    assert "| plain | 1 | 2 | 2 (100%) | 2 (100%) | 1 (50%) | 0 (0%) | 1 (50%) | 0 (0%) |" in text
    assert f"Not detected: {small.name} on t2i-fp32-kv, agree." in text
    assert f"Told wrong: {plain.name} on t2v-fp32-kv: a: c" in text
    path.write_text(json.dumps(rows[0] | {"told": "a: other"}) + "\n")
    assert run("--grades", grades) == 1
    listed[0]["grade"] = "maybe"
    grades.write_text(json.dumps(listed))
    assert run("--grades", grades) == 2
    assert "say right, wrong, none" in capsys.readouterr().err
