"""The command localize, with faults and hypotheses of our own and of others."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from parity.cli.main import app
from parity.hypotheses import load_hypotheses
from parity.lance.faults import CATALOGUE, PROFILES, load_fault
from parity.lance.hypotheses import HYPOTHESES
from parity.localize.findings import EXPLAINS

FAULTS = '''
from contextlib import contextmanager

import lance_mlx.sampling.flow as flow


@contextmanager
def long_steps(model):
    """Every Euler step is 3% too long."""
    assert model.language_model.model.layers[0] is model.pipeline.model.language_model.model.layers[0]
    original = flow.advance
    flow.advance = lambda x_t, velocity, interval: original(x_t, velocity, interval * 1.03)
    try:
        yield
    finally:
        flow.advance = original


@contextmanager
def broken(model):
    model.no_such_thing
    yield


def raising(model):
    raise RuntimeError("not today")


number = 3
'''
HYPOTHESES_FILE = """
from unittest.mock import patch

import reference.sampler as sampler
from parity.hypotheses import Hypothesis


def longer(site):
    original = sampler.advance
    return patch.object(sampler, "advance", lambda x_t, velocity, dt, made: original(x_t, velocity, dt * 1.03, made))


LONG = Hypothesis("the Euler step is 3% too long", ("euler",), longer)
BROKEN = Hypothesis("the Euler step is divided by nothing", ("euler",), lambda site: 1 / 0)
"""


@pytest.fixture
def third_party(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS, encoding="utf-8")
    (tmp_path / "hypotheses.py").write_text(HYPOTHESES_FILE, encoding="utf-8")
    return tmp_path


def test_faults_and_hypotheses_of_others_are_used_like_our_own(localized, third_party):
    fault = load_fault(f"{third_party / 'faults.py'}:long_steps")
    unexplained = localized("t2i-fp32-kv", fault)
    (finding,) = unexplained.findings
    assert finding.component == "euler" and finding.tap == "sampler.x_t1"
    # What nobody wrote down is read.
    assert "1.03 times" in finding.explanations[0].name
    own = load_hypotheses(third_party / "hypotheses.py")
    (finding,) = localized("t2i-fp32-kv", fault, hypotheses=(*own, *HYPOTHESES)).findings
    assert finding.explained and finding.explanations[0].name == "the Euler step is 3% too long"
    assert finding.explanations[0].residual_removed == pytest.approx(1, abs=1e-3)
    assert unexplained.faults == [f"{third_party / 'faults.py'}:long_steps"]


# The command.


@pytest.fixture
def lance_parity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        result = CliRunner().invoke(app, ["localize", *(str(argument) for argument in arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_command_finds_a_fault_of_a_file_and_exits_1(lance_parity, oracles, third_party, tmp_path):
    arguments = ["--fault", f"{third_party / 'faults.py'}:long_steps", "--fault", "renorm-channel"]
    arguments += ["--hypotheses", third_party / "hypotheses.py", "--json", "out/found.json", "--report", "report"]
    result = lance_parity(oracles / "t2i-fp32-kv", *arguments)
    assert result.exit_code == 1 and result.stderr == ""
    assert result.stdout.splitlines()[-1] == "report/index.html" and (tmp_path / "report/index.html").is_file()
    assert "1. guidance" in result.stdout and "2. euler" in result.stdout
    document = strict(tmp_path / "out" / "found.json")
    assert document["verdict"] == "diverge" and document["bundle"] == "t2i-fp32-kv"
    assert [finding["component"] for finding in document["findings"]] == ["guidance", "euler"]
    for finding in document["findings"]:
        assert {"component", "tap", "call", "local_error", "floor", "slice", "explanations"} <= set(finding)
        assert finding["local_error"] > finding["floor"] > 0
        best = finding["explanations"][0]
        assert {"name", "residual_removed"} <= set(best) and best["residual_removed"] > EXPLAINS
    assert document["findings"][1]["explanations"][0]["name"] == "the Euler step is 3% too long"
    assert document["findings"][0]["failed"] == []
    assert document["findings"][1]["failed"] == [
        {"name": "the Euler step is divided by nothing", "error": "ZeroDivisionError: division by zero"}
    ]
    failed = "1 hypothesis failed: the Euler step is divided by nothing (ZeroDivisionError: division by zero)"
    assert result.stdout.count("failed") == result.stdout.count(failed) == 1
    assert document["taps"] and document["trajectory"]
    floats = [tap for tap in document["taps"] if tap["dtype"] != "int32"]
    assert document["alarm"]["taps"] >= len(floats) > 1000


@pytest.fixture
def returns(monkeypatch):
    """The command is given these results, as they were found before."""

    def use(found):
        monkeypatch.setattr("parity.localize.investigation.localize", lambda *arguments: found)

    return use


@pytest.mark.parametrize(("verdict", "status"), [("agree", 0), ("diverge", 1), ("inconclusive", 2)])
def test_the_exit_status_tells_the_verdict(lance_parity, localized, returns, oracles, tmp_path, verdict, status):
    found = replace(localized("t2i-fp32-kv"), verdict=verdict, reason="for a reason" if status else "")
    returns(found)
    result = lance_parity(oracles / "t2i-fp32-kv", "--json", "r.json", "--report", "r")
    assert result.exit_code == status and verdict in result.stdout
    document = strict(tmp_path / "r.json")
    assert (document["verdict"], document["reason"], document["findings"]) == (verdict, found.reason, [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fault", "rope-pair"], "did you mean 'rope-pairs'?"),
        (["--fault", "faults.py:nothing"], "faults.py defines no nothing"),
        (["--fault", "nowhere.py:x"], "there is no Python file nowhere.py"),
        (["--fault", "faults.py:number"], "number is no function but a int"),
        (["--fault", "faults.py:broken"], "fault faults.py:broken cannot be applied: AttributeError"),
        (["--fault", "faults.py:raising"], "fault faults.py:raising cannot be applied: RuntimeError: not today"),
        (["--fault", "rope-pairs", "--impl", "reference"], "faults break lance_mlx"),
        (["--impl", "torch"], "implementation 'torch'"),
        (["--profile", "nobody"], "there is no profile 'nobody'"),
        (["--hypotheses", "faults.py"], "holds no Hypothesis"),
        (["--hypotheses", "nowhere.py"], "there is no Python file nowhere.py"),
    ],
)
def test_bad_input_is_one_line_and_exits_2(lance_parity, oracles, third_party, tmp_path, arguments, words):
    result = lance_parity(oracles / "t2i-fp32-nokv", *arguments, "--json", "r.json")
    assert result.exit_code == 2
    assert result.stderr.startswith("lance-parity: ") and result.stderr.count("\n") == 1 and words in result.stderr
    assert strict(tmp_path / "r.json")["verdict"] == "unusable"
    assert not (tmp_path / "reports").exists()


def test_a_broken_bundle_is_one_line_and_exits_2(lance_parity, bundle, tmp_path):
    (bundle / "taps.safetensors").write_bytes(b"\0" * 20)
    for folder in (bundle, tmp_path / "nothing"):
        result = lance_parity(folder, "--json", "r.json")
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert strict(tmp_path / "r.json")["findings"] == []


def test_the_help_tells_the_exit_status(lance_parity):
    result = lance_parity("--help")
    assert result.exit_code == 0 and "Exit status: 0 agrees, 1 diverges, 2 inconclusive" in result.stdout


def test_faults_lists_the_catalogue_and_the_profiles():
    result = CliRunner().invoke(app, ["faults"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    first_words = {line.split()[0] for line in result.stdout.splitlines() if line.split()}
    assert set(CATALOGUE) <= first_words
    for name, profile in PROFILES.items():
        assert f"profile {name}: {profile.about}" in result.stdout
