import io
import json
import os
import xml.etree.ElementTree as ET

import numpy as np
import pandas
import pytest

import parity
from parity.comparison.check import Result, TapResult
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE, UNUSABLE
from parity.errors import ParityError
from parity.lance.names import parse
from parity.localize.findings import EXACT, LOCAL, Explanation, Finding, Localization, TapError
from parity.oracle.bounds import Bound
from parity.oracle.oracle import UPSTREAM
from parity.report.formats import render
from parity.report.output import Format, emit
from parity.report.run_page import Row, row_of
from parity.tensors.metrics import compare
from parity.tensors.recording import Tap

VALUES = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
NORM = "cond.step0/language_model.model.layers.1.self_attn.q_norm_moe_gen"


def tap_result(name, got=VALUES, limit=1e-5, expected=VALUES):
    dtype = "int32" if expected.dtype == np.int32 else "float32"
    difference = compare(Tap(expected, dtype), Tap(got, dtype))
    return TapResult(parse(name), expected.shape, dtype, difference, Bound(limit))


def result_of(taps, verdict=AGREE, missing=(), first=None, inputs=(), **values):
    named = first and {"tap": first, "call": parse(first).call, "component": parse(first).component, "rel_l2": 1.0}
    return Result("t2i-fp32-kv", "mlx", "t2i", "kv_cache", "float32", verdict, list(taps), list(inputs), list(missing),
                  named, **values)  # fmt: skip


IDS = np.arange(3, dtype=np.int32)
FINE = result_of(
    [tap_result("sampler.noise"), tap_result("pixels")], inputs=[tap_result("inputs/text_ids", IDS, 0, IDS)]
)
WRONG = result_of(
    [tap_result("sampler.noise"), tap_result(NORM, VALUES * 2), tap_result("pixels", VALUES.T)],
    DIVERGE,
    missing=["latent"],
    first=NORM,
    seconds=1.5,
)
ROWS = [
    row_of(FINE, set()),
    row_of(WRONG, set()),
    Row("broken|one", "mlx", UNUSABLE, message="broken|one has no inputs.safetensors: copy it"),
    Row("other", "mlx", "unsupported", "float32", message="task 'depth' is not supported yet"),
]


def suites(text):
    """The counts of a JUnit document, and its cases as {suite: {case: (status, message)}}."""
    root = ET.fromstring(text)
    assert root.tag == "testsuites"
    found = {}
    for suite in root:
        cases = {}
        for case in suite:
            status = [(child.tag, child.get("message")) for child in case]
            cases[case.get("name")] = status[0] if status else ("passed", "")
            assert case.get("classname")
        assert int(suite.get("tests")) == len(list(suite)) > 0
        found[suite.get("name")] = cases
    for key, status in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(root.get(key)) == sum(s == status for cases in found.values() for s, _ in cases.values())
    return found


def table(text):
    return pandas.read_csv(io.StringIO(text))


@pytest.mark.parametrize("form", Format)
@pytest.mark.parametrize("items", [FINE, WRONG, ROWS])
def test_every_form_ends_with_a_line_and_names_what_was_compared(form, items):
    text = render(items, form)
    assert text.endswith("\n") and "t2i-fp32-kv" in text and "mlx" in text


def test_json_is_the_document_of_check_or_a_list_of_them():
    assert json.loads(render(WRONG, Format.JSON)) == json.loads(json.dumps(WRONG.to_json()))
    results = json.loads(render(ROWS, Format.JSON))["results"]
    assert [result["verdict"] for result in results] == ["agree", "diverge", "unusable", "unsupported"]
    assert results[2]["error"].startswith("broken|one has no") and results[2]["compared"] == 0


def test_csv_has_a_line_for_each_tap_and_for_each_result_without_any():
    frame = table(render(ROWS, Format.CSV))
    assert len(frame) == 3 + 4 + 1 + 1
    wrong = frame[frame.verdict == "diverge"].set_index("tap")
    assert wrong.loc[NORM, "diverges"] and wrong.loc[NORM, "rel_l2"] == pytest.approx(1)
    assert (wrong.loc[NORM, "shape"], wrong.loc[NORM, "max_abs_at"]) == ("3x4", "0 0")
    assert wrong.loc["pixels", "mismatch"] == "shape [4, 3] instead of [3, 4]"
    assert wrong.loc["latent", "mismatch"] == "missing"
    assert frame[frame.verdict == "unusable"].reason.item().endswith("copy it")
    alone = table(render([ROWS[2]], Format.CSV))
    assert list(alone.columns) == ["bundle", "impl", "verdict", "reason"]


def test_junit_has_a_case_for_each_tap_and_is_never_green_by_accident():
    found = suites(render(ROWS, Format.JUNIT))
    assert len(found) == 3  # the first two are of one bundle
    assert set(suites(render(FINE, Format.JUNIT))["t2i-fp32-kv mlx"].values()) == {("passed", "")}
    cases = suites(render(WRONG, Format.JUNIT))["t2i-fp32-kv mlx"]
    assert cases["sampler.noise"] == ("passed", "")
    assert cases[NORM] == ("failure", "error 1, limit 1e-05")
    assert cases["pixels"] == ("failure", "shape [4, 3] instead of [3, 4]")
    assert cases["latent"][0] == "error"
    assert 'time="1.500"' in render(WRONG, Format.JUNIT)
    assert found["broken|one mlx"] == {"verdict": ("error", f"unusable: {ROWS[2].message}")}
    assert found["other mlx"]["verdict"][0] == "skipped"
    # A verdict that no tap explains stands for itself.
    far = result_of([tap_result("sampler.noise"), tap_result("pixels")], DIVERGE, first="pixels")
    assert suites(render(far, Format.JUNIT))["t2i-fp32-kv mlx"]["verdict"][0] == "failure"
    nothing = result_of([], UNUSABLE)
    assert suites(render(nothing, Format.JUNIT))["t2i-fp32-kv mlx"] == {
        "verdict": ("error", "unusable: nothing was compared")
    }


def test_junit_holds_what_xml_cannot():
    row = Row("a\x00<b>\ud800", "mlx", UNUSABLE, message='"\x1b[31m" & <more>')
    ((name, cases),) = suites(render([row], Format.JUNIT)).items()
    assert name == "a\ufffd<b>\ufffd mlx" and cases["verdict"][1] == 'unusable: "\ufffd[31m" & <more>'


def test_markdown_summarises_and_shows_what_diverges():
    text = render(ROWS, Format.MD)
    lines = text.splitlines()
    assert lines[0].startswith("| bundle |") and lines[1].startswith("| ---")
    assert all(line.count("|") - line.count("\\|") == 8 for line in lines[:6])
    assert f"| `{NORM}` | 3×4 | float32 | 1 | 1e-05 |" in text
    assert "missing: `latent`" in text and "first divergence: layers.1" in text
    assert "### `broken\\|one`, `mlx`: ! unusable" in text
    assert text.count("### ") == 2 and "'depth' is not supported yet" in text
    alone = render(FINE, Format.MD)
    assert alone.startswith("### `t2i-fp32-kv`, `mlx`: ✓ agree") and "3 taps compared, every bit equal" in alone


def comparison(**values):
    other = VALUES.copy()
    other[1, 1] += 1e-3
    return parity.compare({"x": VALUES, "only|here": VALUES}, {"x": other, "there": VALUES}, **values)


def test_comparisons_have_every_form():
    compared = comparison(allow_missing=True)
    assert compared.verdict == INCONCLUSIVE
    assert suites(render(compared, Format.JUNIT))["a b"] == {
        "x": ("passed", ""),
        "only|here": ("error", "missing from b"),
    }
    diverging = comparison(within=1e-6)
    assert suites(render(diverging, Format.JUNIT))["a b"]["x"][0] == "failure"
    agreeing = comparison(within=1, allow_missing=True)
    assert suites(render(agreeing, Format.JUNIT))["a b"]["only|here"][0] == "skipped"
    document = json.loads(render(diverging, Format.JSON))
    assert (document["verdict"], document["only_a"], document["only_b"]) == ("diverge", ["only|here"], ["there"])
    frame = table(render(diverging, Format.CSV)).set_index("tap")
    assert frame.loc["x", "diverges"] and frame.loc["only|here", "mismatch"] == "missing"
    assert list(frame.columns[:3]) == ["a", "b", "verdict"]
    text = render(compared, Format.MD)
    assert "? inconclusive" in text and "give a bound" in text and "missing: `only\\|here`" in text
    alike = parity.compare({"x": VALUES}, {"x": VALUES + np.float32(1e-3)})
    assert suites(render(alike, Format.JUNIT))["a b"]["verdict"][0] == "error"


def localized(verdict=DIVERGE, findings=(), wrong=()):
    taps = []
    for name in ("sampler.noise", NORM, "latent", "pixels"):
        far = name in wrong
        taps.append(
            TapError(parse(name), UPSTREAM, (3, 4), "float32", 0.5 if far else 1e-7, 0.0, 0.5, None, 1e-7, 1e-6)
        )
    return Localization("t2i-fp32-kv", "mlx", "t2i", "kv_cache", "float32", verdict, "", list(findings), taps,
                        ["inputs/text_ids", "inputs/modality"], None)  # fmt: skip


def test_localizations_have_every_form():
    first = Finding("sequence", "inputs/modality", "inputs", EXACT, None, 0.0, detail="holds 1 at [3], not 0")
    second = Finding(
        *("layers.1.self_attn.q_norm_moe_gen", NORM, "cond.step0", LOCAL, 0.5, 1e-7),
        explanations=[Explanation("the norms are swapped", 0.99)],
        also=["latent"],
    )
    found = localized(findings=[first, second], wrong=(NORM, "latent", "pixels"))
    cases = suites(render(found, Format.JUNIT))["t2i-fp32-kv mlx"]
    assert cases["inputs/modality"] == ("failure", "holds 1 at [3], not 0")
    assert cases[NORM][0] == "failure" and "the norms are swapped: removes 99" in render(found, Format.JUNIT)
    # What belongs to a finding fails once; what belongs to none fails by itself.
    assert "latent" not in cases and cases["pixels"][0] == "failure"
    assert cases["sampler.noise"] == cases["inputs/text_ids"] == ("passed", "")
    assert json.loads(render(found, Format.JSON))["findings"][1]["component"] == second.component
    frame = table(render(found, Format.CSV)).set_index("tap")
    assert frame.loc[NORM, "wrong"] and len(frame) == 4
    assert "q_norm_moe_gen" in render(found, Format.MD)
    assert set(suites(render(localized(AGREE), Format.JUNIT))["t2i-fp32-kv mlx"].values()) == {("passed", "")}
    nothing = suites(render(localized(INCONCLUSIVE), Format.JUNIT))["t2i-fp32-kv mlx"]
    assert nothing["verdict"][0] == "error"


def test_documents_are_written_whole_or_printed(tmp_path, capsys):
    emit("text\n", None)
    assert capsys.readouterr().out == "text\n"
    emit("täxt\n", tmp_path / "new" / "file.md")
    assert (tmp_path / "new" / "file.md").read_bytes() == "täxt\n".encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.md"]
    with pytest.raises(ParityError, match="cannot be written"):
        emit("text\n", tmp_path / "new" / "file.md" / "x")
    (tmp_path / "link.md").symlink_to(tmp_path / "new" / "file.md")
    emit("other\n", tmp_path / "link.md")
    assert (tmp_path / "link.md").is_symlink() and (tmp_path / "new" / "file.md").read_text() == "other\n"


def test_devices_and_pipes_are_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    emit("text\n", tmp_path / "pipe")
    assert os.read(reader, 100) == b"text\n" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
