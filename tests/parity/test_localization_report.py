import base64
import json
import math
import re
import runpy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from parity.errors import ParityError
from parity.lance.names import parse
from parity.localize.findings import LOCAL, Explanation, Finding, Picture, TapError
from parity.report import drawing as localization_drawing
from parity.report import localization_page as localization_report
from parity.report.localization_page import draw, localization_markdown, render, write_localization
from parity.report.map import lay_out, shade
from parity.report.pictures import axis_names, binned, frames_of, is_frames, picture_plot
from parity.report.words import failures, percent, sentence, times

CASES = runpy.run_path(str(Path(__file__).with_name("localization_cases.py")))
SENTENCES = {
    "one": "✗ DIVERGES: positions of the conditional arm are wrong first: t advances by 1 a latent frame instead of 2 "
    "(removes 100 % of the difference).",
    "several": "✗ DIVERGES: layers.1.self_attn.q_norm_moe_gen is wrong first, in cond.step0: local error 0.412, "
    "270,000 times the floor, most of it in head 3 (97 %); explanation: the weights of the other expert are used "
    "(removes 100 % of the difference); wrong by itself too: vae.decoder.upsamples.2.upsamples.1.residual.6, t "
    "advances by 1 a latent frame instead of 2, layers.2.mlp.down_proj, vae.pixels.",
    "large": "✗ DIVERGES: layers.29.self_attn.sdpa is wrong first, in cond.step0: local error 0.2, 200,000 times the "
    "floor, most of it in tokens 0 to 11; no hypothesis explains it (the best of 1 removes 40 %).",
    "answer": "✗ DIVERGES: lm_head is wrong first, in cond.decode0: local error 0.31, 77.5 times the floor, most of it "
    "in token 5; no hypothesis explains it.",
    "agreeing": "✓ AGREES: none of 1,030 taps is farther from the oracle than rounding allows (the farthest, "
    "layers.2.mlp.down_proj in cond.step3, by 2.4 times its floor), and 8 integer inputs and 4 weights are equal.",
    "undecided": "? INCONCLUSIVE: 312 of 1,834 taps have no floor: the orders of rounding were not measured for "
    "bfloat16 at this size.",
    "nothing": "! UNUSABLE: the bundle lists no taps: capture it again.",
}


class Page(HTMLParser):
    """Collects elements, text and data of a page, and checks that all elements are closed."""

    VOID = {"meta", "link", "br", "img", "input", "source", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts, self.ids = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag] = self.texts.get(tag, "") + data

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes the page of a case once; returns its localization and its path."""
    folder, known = tmp_path_factory.mktemp("pages"), {}

    def page(name):
        if name not in known:
            localization = CASES[name]()
            known[name] = localization, write_localization(folder / name, localization)
        return known[name]

    return page


@pytest.fixture
def light(monkeypatch):
    """Draws the light theme alone, in half the time."""
    monkeypatch.setattr(localization_drawing, "THEMES", (localization_drawing.LIGHT,))


def words_of(text):
    return " ".join(text.split())


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def finding(component="layers.0.mlp", tap="cond.step0/language_model.model.layers.0.mlp", kind=LOCAL, **more):
    error, floor = more.pop("error", 0.5), more.pop("floor", 1e-6)
    return Finding(component, tap, tap.partition("/")[0], kind, error, floor, **more)


@pytest.mark.parametrize("name", CASES["CASES"])
def test_a_page_is_whole_and_needs_nothing_else(written, name):
    _, path = written(name)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.attributes("src") + page.attributes("srcset")) == {
        source for source in page.attributes("src") + page.attributes("srcset") if source.startswith("data:image/png;")
    }
    links = page.attributes("href")
    assert all(link == "data:," or link.removeprefix("#") in page.ids for link in links)
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text
    assert [tag for tag, _ in page.elements].count("h1") == 1
    assert all("alt" in attributes for tag, attributes in page.elements if tag == "img")


@pytest.mark.parametrize("name", SENTENCES)
def test_the_verdict_and_the_first_finding_are_one_sentence_at_the_top(written, name):
    localization, path = written(name)
    assert sentence(localization) == SENTENCES[name]
    assert words_of(Page(path.read_text(encoding="utf-8")).texts["h1"]) == SENTENCES[name]


def test_the_sections_come_in_order(written):
    ids = Page(written("several")[1].read_text(encoding="utf-8")).ids
    sections = ["findings", "map", "order", "trajectory", "slices", "frames", "explanations", "provenance", "taps"]
    assert [i for i in ids if i in sections] == sections
    assert "answer" in Page(written("answer")[1].read_text(encoding="utf-8")).ids


def test_what_there_is_nothing_of_has_no_section(written):
    ids = Page(written("nothing")[1].read_text(encoding="utf-8")).ids
    assert {"provenance", "taps"} <= set(ids)
    assert not {"findings", "map", "order", "trajectory", "answer", "slices", "frames", "explanations"} & set(ids)
    assert not list((written("nothing")[1].parent / "nothing-plots").glob("*.png"))


def test_every_finding_is_listed_and_linked_to_its_details(written):
    localization, path = written("several")
    page = Page(path.read_text(encoding="utf-8"))
    for number, found in enumerate(localization.findings, 1):
        assert f"#finding-{number}" in page.attributes("href") and f"finding-{number}" in page.ids
        assert f"explanations-{number}" in page.ids
        assert found.component in page.texts["table"] and found.tap in page.texts["table"]
    assert "the best removes 42 %" in words_of(page.texts["table"])
    assert "No hypothesis explains it." in page.texts["article"]


def test_provenance_request_and_false_alarms_are_shown(written):
    text = words_of(Page(written("several")[1].read_text(encoding="utf-8")).texts["section"])
    for words in (
        "4baeee086648996f6ab12e673cbe461b0b149997",
        "make the car red",
        "913 MiB",
        "41.3 s",
        "at most 1 % of",
    ):
        assert words in text
    assert "was not measured" in Page(written("undecided")[1].read_text(encoding="utf-8")).texts["section"]


def test_the_table_holds_every_tap_as_strict_json(written):
    localization, path = written("several")
    data = data_of(path.read_text(encoding="utf-8"))
    assert len(data["taps"]) == len(localization.taps)
    for row, tap in zip(data["taps"], localization.taps, strict=True):
        texts = [data["strings"][row[index]] for index in (0, 1, 2, 3, 11, 12, 13, 14, 15)]
        assert texts[0] + texts[1] == tap.tap.name and texts[2:4] == [tap.tap.component, tap.tap.call]
        assert texts[7] == (tap.mismatch or "") and texts[8] == shade(tap.ratio, tap.wrong) and row[10] == tap.wrong
        local = {"nan": math.nan, "inf": math.inf}.get(row[4], row[4])
        assert local == (tap.local and pytest.approx(tap.local, rel=6e-3, nan_ok=True))


def test_the_largest_page_is_at_most_5_mb(written):
    localization, path = written("large")
    assert len(localization.taps) > 3000 and path.stat().st_size <= 5_000_000


def test_names_are_escaped_wherever_they_stand(written):
    localization, path = written("hostile")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert all("onerror" not in attributes for _, attributes in page.elements)
    data = data_of(text)
    assert data["strings"][data["taps"][0][2]] == localization.taps[0].tap.component
    assert CASES["HOSTILE"] in words_of(page.texts["h1"]) and CASES["HOSTILE"] in page.texts["title"]


def test_half_a_surrogate_pair_is_no_reason_to_fail(tmp_path):
    localization = replace(CASES["nothing"](), reason="\ud800", provenance={"a": "\udcff"}, exact=["\ud800"])
    assert "UNUSABLE" in write_localization(tmp_path / "report", localization).read_text(encoding="utf-8")


def test_the_plots_lie_beside_the_page_as_they_are_in_it(written):
    for name in ("several", "answer"):
        _, path = written(name)
        text = path.read_text(encoding="utf-8")
        plots = sorted(path.parent.glob("[!.]*.png"))
        assert plots and path.name == "index.html"
        for plot in plots:
            assert plot.read_bytes().startswith(b"\x89PNG")
            assert base64.b64encode(plot.read_bytes()).decode() in text
    assert {plot.name for plot in plots} == {"map.png", "order.png", "margins.png"}


def test_the_same_localization_gives_the_same_page(written, tmp_path):
    again = write_localization(tmp_path / "again", CASES["one"]())
    assert again.read_bytes() == written("one")[1].read_bytes()


def test_the_page_is_replaced_as_a_whole(light, tmp_path, monkeypatch):
    folder, localization = tmp_path / "deep" / "report", CASES["answer"]()
    path = write_localization(folder, localization)
    before = path.read_bytes()
    monkeypatch.setattr(localization_report, "order_plot", lambda localization: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_localization(folder, localization)
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_localization(folder, CASES["nothing"]())
    assert path.read_bytes() != before
    assert [file.name for file in folder.glob("[!.]*")] == ["index.html"] and len(list(folder.parent.iterdir())) == 1


def test_a_report_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ParityError, match="cannot be written"):
        write_localization(tmp_path / "file" / "report", CASES["nothing"]())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ParityError, match="holds thesis.txt, which lance-parity did not write"):
        write_localization(tmp_path / "mine", CASES["nothing"]())
    with pytest.raises(ParityError, match="file cannot take a report .*: name another folder"):
        write_localization(tmp_path / "file", CASES["nothing"]())
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")} == {"file", "mine", "mine/thesis.txt"}


def test_a_link_to_a_report_stays_one(tmp_path):
    page = write_localization(tmp_path / "report", CASES["nothing"]())
    (tmp_path / "link").symlink_to("report")
    write_localization(tmp_path / "link", CASES["nothing"]())
    assert (tmp_path / "link").is_symlink() and page.is_file()


def test_without_a_script_the_wrong_taps_and_the_map_are_shown(written):
    localization, path = written("several")
    hidden = re.findall(r"<noscript>(.*?)</noscript>", path.read_text(encoding="utf-8"), re.S)
    assert "data:image/png" in hidden[0]
    for tap in (tap for tap in localization.taps if tap.wrong):
        assert tap.tap.name in hidden[1]


def test_the_map_has_a_row_for_a_layer_and_a_column_for_a_kind_of_tap():
    laid = lay_out(CASES["several"]())
    assert [panel.name for panel in laid.panels] == ["Language model", "Vision encoder", "VAE encoder", "VAE decoder"]
    layers, _, encoder, decoder = laid.panels
    assert layers.rows == ["0", "1", "2", "3"]
    headings = [heading for heading, _ in layers.columns]
    assert headings[:4] == ["input norm", "input norm · gen", "q", "q · gen"] and headings[-1] == "whole"
    assert laid.places["layers.1.self_attn.q_norm_moe_gen"] == (0, 1, headings.index("q norm · gen"))
    assert laid.places["layers.3"] == (0, 3, headings.index("whole"))
    assert laid.places["layers.2.mlp_moe_gen.gate_proj"] == (0, 2, headings.index("gate · gen"))
    assert encoder.rows[:3] == ["conv1", "down 0.0", "down 0.1"] and encoder.rows[-1] == "head"
    assert decoder.rows[:4] == ["conv1", "middle 0", "middle 1", "middle 2"]
    place = laid.places["vae.decoder.upsamples.2.upsamples.1.residual.6"]
    assert decoder.rows[place[1]] == "up 2.1" and decoder.columns[place[2]][0] == "residual.6"
    assert {"positions", "sequence", "embeddings", "vae.pixels"} <= set(laid.around)


def test_layers_come_in_order_of_their_number():
    taps = CASES["taps_of"](CASES["llm"]("cond.step0", 12, True))
    assert lay_out(CASES["localization"](taps=taps)).panels[0].rows == [str(layer) for layer in range(12)]


@pytest.mark.parametrize(
    ("ratio", "wrong", "step"),
    [(0.0, False, "r0"), (0.9, False, "r1"), (5.0, False, "r2"), (None, False, "none"), (7.0, True, "w1"),
     (70.0, True, "w2"), (1e4, True, "w4"), (1e9, True, "w5"), (math.inf, True, "wi"), (None, True, "wi"),
     (math.nan, True, "wi")],
)  # fmt: skip
def test_colours_tell_right_from_wrong_and_then_decades(ratio, wrong, step):
    assert shade(ratio, wrong) == step


@pytest.mark.parametrize(
    ("name", "shape", "drawn"),
    [
        ("cond.step0/language_model.model.layers.1.self_attn.q_rope", (30, 4, 16), "token by head.*head_dim by head"),
        ("vae.decode.chunk1/decoder.upsamples.2", (1, 8, 4, 6, 8), "channel by t.*w by h"),
        ("vae.decode.chunk0/decoder.upsamples.2", (1, 8, 1, 6, 8), "channel by h.*w by h"),
        ("vae.decode.chunk1/decoder.upsamples.2.upsamples.0.residual.2", (1, 8, 4, 6, 8), "channel by t"),
        ("sampler.x_t1", (96, 48), "channel by latent"),
        ("latent", (2, 3, 4, 48), "channel by t"),
        ("cond.step0/hidden_out", (300, 8), "token by hidden"),
        ("inputs/position_ids.cond", (3, 40), "along token"),
        ("time_embedder", (64,), "along hidden"),
        ("sampler.timestep0", (1,), "along latent"),
        ("vit_model0.blocks.0", (16, 32), "hidden by patch"),
        ("weights/language_model.model.layers.0.mlp.down_proj.weight", (6, 12), "axis 1 by axis 0"),
    ],
)
def test_a_tap_is_drawn_along_its_axes(light, name, shape, drawn):
    expected = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = expected.copy()
    got.flat[0] = np.nan
    plot = picture_plot(Picture(parse(name), expected, got), "tap-1")
    assert re.search(drawn, plot.caption) and name in plot.caption
    assert plot.light.startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e-30, 3e38])
def test_extreme_values_are_drawn(light, value):
    array = np.full((4, 5), value, np.float32)
    for pair in ((array, array), (np.zeros_like(array), array)):
        assert picture_plot(Picture(parse("sampler.x_t1"), *pair), "tap-1")


def test_a_tap_of_another_shape_is_not_drawn_but_named():
    picture = Picture(parse("sampler.x_t1"), np.zeros((4, 5), np.float32), np.zeros((4, 6), np.float32))
    drawn = draw(CASES["localization"](pictures=[picture]))
    assert drawn.left_out == ["sampler.x_t1 (its shape is [4, 6] where the oracle has [4, 5])"]
    clip = Picture(parse("pixels"), np.zeros((3, 5, 4, 4), np.float32), np.zeros((3, 4, 4, 4), np.float32))
    assert not is_frames(clip) and len(draw(CASES["localization"](pictures=[clip])).left_out) == 1
    empty = Picture(parse("sampler.x_t1"), np.zeros((0, 5), np.float32), np.zeros((0, 5), np.float32))
    assert len(draw(CASES["localization"](pictures=[empty])).left_out) == 1


def test_a_large_map_keeps_its_largest_cells():
    matrix = np.zeros((1000, 3))
    matrix[777, 1], matrix[5, 2] = -4, np.nan
    small = binned(matrix, 100)
    assert small.shape == (100, 3) and small[77, 1] == -4 and np.isnan(small[0, 2])


def test_frames_are_shown_with_the_worst_and_how_much_the_difference_is_enlarged():
    expected = np.zeros((3, 21, 8, 8), np.float32)
    got = expected.copy()
    got[:, 9] = 0.003
    clip = frames_of(Picture(parse("pixels"), expected, got))
    assert [frame.number for frame in clip.frames] == [0, 9, 10, 20] and clip.total == 21
    assert clip.factor == 200 and clip.frames[1].largest == pytest.approx(0.003)
    got[:] = 1
    assert frames_of(Picture(parse("pixels"), expected, got)).factor == 1
    same = frames_of(Picture(parse("pixels"), expected, expected))
    assert same.factor == 1 and all(frame.error == 0 for frame in same.frames)
    levels = np.full((3, 1, 8, 8), 200, np.float32)
    assert frames_of(Picture(parse("pixels"), levels, levels + 10)).factor == 10


def test_frames_that_are_not_finite_are_drawn():
    expected, got = (np.zeros((3, 2, 8, 8), np.float32) for _ in range(2))
    got[0, 0], got[1, 1] = np.nan, np.inf
    assert all(frame.png.startswith(b"\x89PNG") for frame in frames_of(Picture(parse("pixels"), expected, got)).frames)


def test_axes_that_the_registry_does_not_name_are_numbered():
    assert axis_names(Picture(parse("sampler.x_t1"), np.zeros((2, 3, 4)), np.zeros((2, 3, 4)))) == [
        "axis 0", "axis 1", "axis 2",
    ]  # fmt: skip


def test_no_more_pictures_are_drawn_than_a_page_can_hold(monkeypatch):
    monkeypatch.setattr(localization_report, "PICTURES", 1)
    picture = CASES["positions"]()
    drawn = draw(CASES["localization"](findings=[CASES["POSITIONS"]], pictures=[picture, picture]))
    assert len(drawn.of_finding[1]) == 1 and "only the first 1" in drawn.left_out[0]


def test_a_best_hypothesis_that_removes_too_little_is_no_explanation():
    weak = finding(explanations=[Explanation("the moon is full", 0.89), Explanation("it rains", -2.0)])
    text = sentence(CASES["localization"](findings=[weak]))
    assert "moon" not in text and text.endswith("no hypothesis explains it (the best of 2 removes 89 %).")
    page = render(CASES["localization"](findings=[weak]), draw(CASES["localization"](findings=[weak])))
    assert "makes it worse" in page


def test_hypotheses_that_failed_are_counted_and_the_first_are_named():
    failed = [("the moon is <full>", "ZeroDivisionError"), *((f"h{i}", "ValueError: no") for i in range(4))]
    localization = CASES["localization"](findings=[finding(failed=failed), finding(failed=failed[:1]), finding()])
    assert failures(localization.findings[0]) == (
        "5 hypotheses failed: the moon is <full> (ZeroDivisionError); h0 (ValueError: no); h1 (ValueError: no); "
        "and 2 more"
    )
    assert failures(localization.findings[1]) == "1 hypothesis failed: the moon is <full> (ZeroDivisionError)"
    assert failures(localization.findings[2]) == ""
    page = render(localization, draw(localization))
    assert page.count("5 hypotheses failed: the moon is &lt;full&gt; (ZeroDivisionError); h0") == 1
    assert page.count("failed:") == 2
    assert localization_markdown(localization).count("- 5 hypotheses failed: the moon is") == 1


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            finding(error=None, detail="shape [2] instead of [3]"),
            "in cond.step0: shape [2] instead of [3]; no hypothesis",
        ),
        (finding(floor=0.0), "local error 0.5; no hypothesis"),
        (finding(error=math.nan), "local error nan; no hypothesis"),
        (finding(floor=None), "local error 0.5; no hypothesis"),
        (CASES["WEIGHT"], "the weight language_model.model.layers.2.mlp.down_proj.weight is wrong first: the first"),
        (replace(CASES["POSITIONS"], tap="inputs/position_ids.uncond"), "positions of the unconditional arm are wrong"),
        (replace(CASES["POSITIONS"], component="preprocess", tap="x"), "preprocess is wrong first: t advances"),
    ],
)
def test_the_sentence_says_what_is_known(found, words):
    assert words in sentence(CASES["localization"](findings=[found]))


def test_a_verdict_without_findings_gives_its_reason():
    assert sentence(CASES["localization"](reason="It rains.")) == "✗ DIVERGES: It rains."
    assert sentence(CASES["localization"]()) == "✗ DIVERGES: nothing was compared."


def test_taps_without_any_number_are_reported():
    tap = TapError(parse("sampler.x_t1"), "upstream", (), "float32", None, None, None, None, None, None)
    localization = CASES["localization"](taps=[tap, replace(tap, mismatch="dtype")])
    assert data_of(render(localization, draw(localization)))["taps"][0][4:10] == [None] * 6


def test_markdown_has_the_sentence_a_table_and_the_explanations():
    text = localization_markdown(CASES["several"]())
    assert text.startswith("**✗ DIVERGES**: layers.1.self_attn.q_norm_moe_gen is wrong first, in cond.step0")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 5 and all(line.count("|") == 9 for line in rows)
    assert "- the weights of the other expert are used: removes 100 %, 99.97 % on a second input" in text
    assert "called wrong in at most 1 %" in text
    assert localization_markdown(CASES["nothing"]()).startswith("**! UNUSABLE**")


def test_markdown_shows_hostile_names_as_they_are():
    text = localization_markdown(CASES["hostile"]())
    outside = re.sub(r"`[^`]*`", "", text.replace("\\`", ""))
    assert "<script" not in outside and "<img" not in outside and "](b)" not in outside.replace("\\](b)", "")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 9 for line in rows)
    newlines = replace(CASES["WEIGHT"], component="a\n\n# b", detail="c\nd")
    assert "\n# b" not in localization_markdown(CASES["localization"](findings=[newlines]))


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (2.314, "2.31"), (268123.0, "270,000"), (3.1e9, "3.1e9"), (math.inf, "∞")]
)
def test_multiples_are_short(value, text):
    assert times(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100 %"), (0.99998, "100 %"), (0.9996, "99.96 %"), (0.31, "31 %"), (-3.0, "0 %")]
)
def test_shares_are_in_percent(share, text):
    assert percent(share) == text
