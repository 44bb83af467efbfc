import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from parity.comparison.check import check_bundle
from parity.errors import ParityError
from parity.report import plots
from parity.report.plots import error_plot
from parity.report.run_page import UNSUPPORTED, Row, row_of, significant, write_report
from parity.report.terminal import progress_bar


class Page(HTMLParser):
    """Collects what a page links to and which elements it has, and checks that they are closed."""

    VOID = {"meta", "link", "br", "img", "source"}

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src") and not value.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def halved(array):
    return array / 2


LISTED = ".written-by-lance-parity"


@pytest.fixture
def rows(bundle, replayed):
    taken = {"index.html"}
    results = [
        check_bundle(bundle, replayed()),
        check_bundle(bundle, replayed(name="reference", changed={"sampler.x_t2": halved, "pixels": halved})),
        check_bundle(bundle, replayed(dropped=("pixels",))),
    ]
    refused = Row("t2i-<b>", "mlx", "unusable", message="tap <x> holds nan")
    return [*(row_of(result, taken) for result in results), refused, Row("i2v", "mlx", UNSUPPORTED, "float32")]


def test_every_comparison_gets_a_page_of_its_own(rows):
    assert [row.page for row in rows] == [
        "t2i-fp32-nokv-mlx.html",
        "t2i-fp32-nokv-reference.html",
        "t2i-fp32-nokv-mlx-2.html",
        "",
        "",
    ]


def test_a_question_without_a_size_has_a_page_too(oracles, tmp_path):
    result = check_bundle(oracles / "x2t_image-fp32-nokv", "mlx")
    index = write_report(tmp_path / "report", [row_of(result, {"index.html"})], ["oracles"])
    text = (index.parent / "x2t_image-fp32-nokv-mlx.html").read_text(encoding="utf-8")
    assert "x2t_image, at most 8 tokens" in text


@pytest.mark.parametrize(
    ("source", "said"),
    [({}, "unknown"), ({"implementation": "bytedance/Lance", "device": "a GPU"}, "bytedance/Lance, on a GPU")],
)
def test_a_page_says_what_is_known_of_where_the_oracle_comes_from(rows, tmp_path, source, said):
    row = replace(rows[0], result=replace(rows[0].result, source=source))
    page = write_report(tmp_path / "report", [row], []).parent / row.page
    assert f"<dt>Oracle</dt><dd>{said}</dd>" in page.read_text()


def test_pages_stand_alone(rows, tmp_path):
    index = write_report(tmp_path / "reports" / "latest", rows, ["oracles"])
    pages = {path.name: path.read_text(encoding="utf-8") for path in index.parent.glob("*.html")}
    assert set(pages) == {"index.html", *(row.page for row in rows if row.page)}
    for text in pages.values():
        page = Page(text)
        assert "script" not in page.tags
        assert all(link in pages or link.startswith("data:") for link in page.links)
        assert 'name="viewport"' in text and "url(http" not in text


def test_the_index_shows_what_failed_in_words(rows, tmp_path):
    text = write_report(tmp_path / "latest", rows, ["oracles"]).read_text(encoding="utf-8")
    assert "✗ 1 of 5 comparisons diverge, 2 unusable" in text
    assert "first divergence: sampler in sampler" in text and "missing: pixels" in text
    assert "tap &lt;x&gt; holds nan" in text and "<b>" not in text
    agreeing = write_report(tmp_path / "latest", rows[:1], ["oracles"]).read_text(encoding="utf-8")
    assert "✓ all 1 comparisons agree" in agreeing and "diverging" not in agreeing.partition("<body>")[2]
    nothing = write_report(tmp_path / "latest", rows[4:], ["oracles"]).read_text(encoding="utf-8")
    assert "nothing was compared" in nothing


def test_what_is_inconclusive_says_why(bundle, unsteady, rows, tmp_path):
    random = row_of(check_bundle(bundle, unsteady("latent")), {"index.html"})
    text = write_report(tmp_path / "latest", [rows[0], random], ["oracles"]).read_text(encoding="utf-8")
    assert "? 1 of 2 comparisons are inconclusive" in text and "comparisons agree" not in text
    # In the banner and in the table.
    assert text.count("? inconclusive") == 1 and text.count("two equal runs differ first at latent") == 1
    page = (tmp_path / "latest" / random.page).read_text(encoding="utf-8")
    assert "two equal runs differ first at latent" in page


def test_a_page_lists_every_tap_with_its_error(rows, tmp_path):
    write_report(tmp_path / "latest", rows, ["oracles"])
    text = (tmp_path / "latest" / rows[1].page).read_text(encoding="utf-8")
    assert len(re.findall(r"<tr", text)) == 1 + 9 + 20
    assert len(re.findall('<tr class="diverging">', text)) == 2
    for words in ("float32", "full_sequence", "numpy", "MiB", "UTC", "sampler.x_t2", "1 × 4 × 6 × 48"):
        assert words in text


def test_the_plot_marks_the_first_divergence(rows, monkeypatch):
    marked = []
    monkeypatch.setattr(plots, "_mark", lambda axes, marks, taps, theme: marked.append(marks))
    for row in rows[:2]:
        assert error_plot(row.result).light.startswith(b"\x89PNG")
    first = rows[1].result.first_divergence
    assert marked[0] == [] and marked[-1] == [(first["tap"], first["component"])]


def test_the_report_is_replaced_as_a_whole(rows, tmp_path):
    folder = tmp_path / "latest"
    write_report(folder, rows[:1], [])
    write_report(folder, rows[1:2], [])
    assert {path.name for path in folder.glob("*.*")} == {"index.html", rows[1].page, LISTED}
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "oracles"}


@pytest.mark.parametrize("before", [False, True])
def test_a_folder_that_holds_what_is_not_ours_is_left_as_it_is(rows, tmp_path, before):
    folder = tmp_path / "thesis"
    folder.mkdir()
    if before:
        write_report(folder, rows[:1], [])
    (folder / "notes.txt").write_text("mine")
    held = {path.name for path in folder.iterdir()}
    with pytest.raises(ParityError, match="notes.txt, which lance-parity did not write: name another folder"):
        write_report(folder, rows[1:2], [])
    assert {path.name for path in folder.iterdir()} == held and (folder / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir() if path.name != "oracles"} == {"thesis"}


def test_a_report_that_cannot_take_its_place_leaves_the_one_before(rows, tmp_path, monkeypatch):
    folder, replace = tmp_path / "latest", os.replace
    write_report(folder, rows[:1], [])

    def refused(source, target):
        if (Path(source).name, Path(target)) == ("new", folder):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr("parity.report.output.os.replace", refused)
    with pytest.raises(ParityError, match="Permission denied"):
        write_report(folder, rows[1:2], [])
    assert (folder / rows[0].page).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "oracles"}


def test_a_link_to_a_report_stays_one(rows, tmp_path):
    write_report(tmp_path / "there", rows[:1], [])
    (tmp_path / "latest").symlink_to("there")
    write_report(tmp_path / "latest", rows[1:2], [])
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "there" / rows[1].page).is_file()


def test_a_report_that_cannot_be_written_is_an_error_and_leaves_nothing(rows, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ParityError, match="cannot be written"):
        write_report(tmp_path / "file" / "latest", rows, [])
    write_report(tmp_path / "latest", rows[:1], [])
    monkeypatch.setattr("parity.report.run_page.error_plot", lambda result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path / "latest", rows, [])
    assert {path.name for path in (tmp_path / "latest").iterdir()} == {"index.html", rows[0].page, LISTED}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".latest")]


def test_what_takes_minutes_is_told_with_or_without_a_bar(capsys):
    with progress_bar(1, "bundle") as start:
        tell = start("a")
        for what in ("floors cannot be kept", "floors", "floors 1 of 2: x", "step0", "floors 2 of 2: y"):
            tell(what)
    once = "a: measuring what rounding does, once on this machine"
    shown = ["a: floors cannot be kept", once, "a: floors 1 of 2: x", "a: floors 2 of 2: y"]
    assert capsys.readouterr().err.splitlines() == shown


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0"), (1.23456e-6, "1.23e-06"), (12345.0, "1.23e+04"), (float("inf"), "inf")]
)
def test_numbers_are_short(value, text):
    assert significant(value) == text
