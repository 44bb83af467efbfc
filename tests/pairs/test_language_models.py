"""mlx-lm's models against transformers': as they are, and broken."""

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("mlx_lm", reason="the other side of the pairs: pip install '.[test]'")

from pair_faults import FAULTS  # noqa: E402
from pair_models import MODELS  # noqa: E402
from pair_table import OURS, trial  # noqa: E402

from parity.cli.main import app  # noqa: E402
from parity.comparison.verdict import AGREE, DIVERGE  # noqa: E402
from parity.pairs import localize_pair  # noqa: E402

# Departures of theirs that were looked at.
FINDS = {("starcoder2", "float32"): "GELU instead of tanh GELU", ("gpt_neox", "float32"): "tanh GELU instead of GELU"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_agree_but_for_what_they_compute_otherwise(name, dtype):
    if dtype not in MODELS[name].dtypes:
        pytest.skip("MLX's CPU backend has no such product")
    found = localize_pair(MODELS[name].pair(dtype), name)
    if (name, dtype) in FINDS:
        assert found.verdict == DIVERGE and FINDS[name, dtype] in found.first.explanations[0].name
        assert len(found.findings) == 1
    else:
        assert found.verdict == AGREE, [finding.to_json() for finding in found.findings[:1]]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_mistakes_are_found_where_they_are_and_named(fault):
    done = trial("qwen2" if "qwen2" in fault.models else fault.models[0], "float32", fault)
    assert done.right(OURS), done
    assert done.named and done.certain, done


@pytest.mark.parametrize("name, broken", [("qwen2", False), ("gemma3", False), ("qwen2", True)])
def test_the_command(tmp_path, monkeypatch, request, name, broken):
    example = request.config.rootpath / "examples" / f"pair_{name}.py"
    monkeypatch.chdir(tmp_path)
    if broken:
        (tmp_path / "broken.py").write_text(
            f"import runpy\ngood = runpy.run_path({str(example)!r})['pair']\n"
            "def pair(dtype):\n    made = good(dtype)\n    made.port.model.norm.eps = 1e-2\n    return made\n"
        )
        example = tmp_path / "broken.py"
    result = CliRunner().invoke(app, ["port", str(example), "--json", "found.json"])
    assert result.exit_code == int(broken), result.output
    document = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert document["verdict"] == ("diverge" if broken else "agree")
    assert ("eps is 0.01" in result.stdout) is broken
    page = tmp_path / result.stdout.splitlines()[-1]
    assert "<html" in page.read_text(encoding="utf-8")[:200]


def test_no_file_is_overwritten_that_is_no_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def pair(dtype): ...")
    (tmp_path / "notes.md").write_text("mine")
    for given in (["--json", "own.py"], ["--output", "notes.md"]):
        result = CliRunner().invoke(app, ["port", "own.py", *given])
        assert result.exit_code == 2 and "choose another name" in result.stderr
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_a_file_that_makes_no_pair_is_unusable_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.py").write_text("")
    result = CliRunner().invoke(app, ["port", "none.py", "--json", "found.json"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "pair(dtype)" in result.stderr
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["verdict"] == "unusable"
