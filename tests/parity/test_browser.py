"""The report of a localization in a browser: Debian's Chromium, without a window and without a network."""

import runpy
from pathlib import Path

import pytest

from parity.report.localization_page import write_localization
from parity.report.words import sentence

CASES = runpy.run_path(str(Path(__file__).with_name("localization_cases.py")))
pytest.importorskip("selenium", reason="selenium drives the browser: pip install '.[test]'")
from selenium.webdriver import ActionChains  # noqa: E402 - only where there is selenium
from selenium.webdriver.common.keys import Keys  # noqa: E402 - only where there is selenium

WIDE, NARROW = (1280, 800), (400, 900)

# The contrast of every visible text with what lies behind it, lowest first; glyphs of the map's cells have titles.
CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgb(colour) {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function light(colour) {
  const [r, g, b] = colour.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const found = new Map();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest("script, .cell")) continue;
  let behind = element;
  while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
  const ink = getComputedStyle(element).color;
  const paper = behind ? getComputedStyle(behind).backgroundColor : "white";
  const [a, b] = [light(rgb(ink).slice(0, 3)), light(rgb(paper).slice(0, 3))];
  found.set(`${ink} on ${paper}`, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
}
return [...found].sort((a, b) => a[1] - b[1]);
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Writes the page of a case once; returns its localization and its address."""
    folder, known = tmp_path_factory.mktemp("pages"), {}

    def page(name):
        if name not in known:
            localization = CASES[name]()
            known[name] = localization, write_localization(folder / name, localization).as_uri()
        return known[name]

    return page


@pytest.fixture
def visit(browser, resize, pages):
    """Opens a case; afterwards the browser's log must be empty."""

    def go(name, size=WIDE, scheme="light", scripts=True):
        resize(size, scheme)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        localization, address = pages(name)
        browser.get(address)
        return localization

    yield go
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert browser.get_log("browser") == []


def one(browser, selector):
    return browser.find_element("css selector", selector)


def rows(browser):
    """Return the names in the table's rows."""
    script = (
        "return [...document.querySelectorAll('#table tbody tr:not(.empty) td:nth-child(2)')].map(e => e.innerText)"
    )
    return browser.execute_script(script)


def count(browser):
    return one(browser, "#count").text


def type_filter(browser, text):
    field = one(browser, "#filter")
    field.clear()
    field.send_keys(text)
    # Typing is acted on after a moment without a key.
    browser.execute_async_script("setTimeout(arguments[0], 150)")


def active(browser):
    return browser.switch_to.active_element


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("name", CASES["CASES"])
def test_a_page_opens_without_errors_and_fits_its_window(browser, visit, name, size):
    localization = visit(name, size)
    assert one(browser, "h1").text == " ".join(sentence(localization).split())
    assert count(browser).startswith(f"{len(localization.taps):,} of {len(localization.taps):,} taps")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]


@pytest.mark.parametrize("name", ["several", "large"])
def test_the_failing_layer_is_within_the_first_screen(browser, visit, name):
    found = visit(name).first
    cell = one(browser, f".cell[data-component='{found.component}']")
    assert "wrong" in cell.get_attribute("class") and "finding" in cell.get_attribute("class") and cell.text == "1"
    row = cell.find_element("xpath", "ancestor::tr/th")
    for element in (one(browser, "h1"), cell, row):
        box = element.rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= WIDE[0]
        assert box["y"] >= 0 and box["height"] > 5 and box["y"] + box["height"] <= WIDE[1]
    assert row.text.endswith(found.component.split(".")[1]) and "hit" in row.get_attribute("class")
    assert found.component in cell.get_attribute("title") and cell.get_attribute("aria-label")


def test_what_is_wrong_outside_the_layers_is_within_the_first_screen_too(browser, visit):
    visit("one")
    chip = one(browser, ".chip.hit")
    assert chip.text.endswith("positions") and chip.rect["y"] + chip.rect["height"] <= WIDE[1]


def test_the_filter_finds_words_components_and_calls(browser, visit):
    localization = visit("several")
    type_filter(browser, "q_norm uncond.STEP0")
    expected = [t.tap.name for t in localization.taps if "q_norm" in t.tap.name and "uncond.step0" in t.tap.name]
    assert rows(browser) == expected and count(browser) == f"{len(expected)} of 1,262 taps"
    type_filter(browser, "component=layers.1.self_attn.q_norm call=cond.step3")
    assert rows(browser) == ["cond.step3/language_model.model.layers.1.self_attn.q_norm"]
    type_filter(browser, "no such tap")
    assert rows(browser) == [] and count(browser) == "0 of 1,262 taps"
    assert one(browser, "#table tbody").text == "No tap matches."
    one(browser, "#filter").send_keys(Keys.ESCAPE)
    assert len(rows(browser)) == 1262


def test_only_the_wrong_taps_can_be_listed(browser, visit):
    localization = visit("several")
    one(browser, "#only").click()
    wrong = [tap.tap.name for tap in localization.taps if tap.wrong]
    assert rows(browser) == wrong and count(browser) == f"{len(wrong)} of 1,262 taps"
    one(browser, "#only").click()
    assert len(rows(browser)) == 1262


def test_columns_sort_both_ways_and_what_has_no_number_comes_last(browser, visit):
    localization = visit("several")
    script = "return [...document.querySelectorAll('#table tbody td:nth-child(3)')].map(e => e.innerText)"
    head = one(browser, "#table th:nth-child(3) button")
    head.click()
    assert one(browser, "#table th:nth-child(3)").get_attribute("aria-sort") == "descending"
    shown = browser.execute_script(script)
    assert set(shown[:2]) == {"NaN", "∞"} and shown[-1] == "–"
    head.click()
    shown = browser.execute_script(script)
    assert shown[0] == "0" and shown[-1] == "–" and set(shown[-3:-1]) == {"NaN", "∞"}
    one(browser, "#table th:nth-child(1) button").click()
    assert rows(browser) == [tap.tap.name for tap in localization.taps]


def test_a_large_table_is_listed_in_part_and_whole_on_demand(browser, visit):
    localization = visit("large")
    assert len(rows(browser)) == 2000 and count(browser).endswith("the first 2,000 listed")
    one(browser, "#all").click()
    assert len(rows(browser)) == len(localization.taps) and not one(browser, "#all").is_displayed()


def test_a_cell_lists_its_taps(browser, visit):
    found = visit("several").first
    one(browser, f".cell[data-component='{found.component}']").click()
    assert one(browser, "#filter").get_attribute("value") == f"component={found.component}"
    assert rows(browser) and all(name.endswith("layers.1.self_attn.q_norm_moe_gen") for name in rows(browser))
    assert active(browser).get_attribute("id") == "filter"
    assert 0 <= browser.execute_script("return document.getElementById('table').getBoundingClientRect().y") < WIDE[1]


def test_the_map_shows_one_call_or_the_worst_of_all(browser, visit):
    visit("several")
    cell = one(browser, ".cell[data-component='layers.1.self_attn.q_norm_moe_gen']")
    assert "w5" in cell.get_attribute("class").split()
    call = one(browser, "#call")
    for name, step in (("uncond.step0", "w4"), ("cond.step3", "r2"), ("", "w5")):
        browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))", call, name
        )
        assert step in cell.get_attribute("class").split()
    vision = one(browser, ".cell[data-component='vit_model.blocks.0.norm1']")
    browser.execute_script("arguments[0].value = 'cond.step0'; arguments[0].dispatchEvent(new Event('change'))", call)
    assert "absent" in vision.get_attribute("class")


def test_everything_is_reached_by_keyboard(browser, visit):
    localization = visit("several")
    active(browser).send_keys("/")
    assert active(browser).get_attribute("id") == "filter" and active(browser).get_attribute("value") == ""
    active(browser).send_keys("q/")
    assert active(browser).get_attribute("value") == "q/"
    visit("several")
    reached = []
    for _ in range(80):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        element = active(browser)
        reached.append(element.get_attribute("id") or element.get_attribute("class") or element.text)
        if "finding" in element.get_attribute("class").split():
            break
    assert "call" in reached and active(browser).get_attribute("data-component") == localization.first.component
    assert localization.first.component in one(browser, "#told").text
    active(browser).send_keys(Keys.ARROW_RIGHT)
    assert active(browser).get_attribute("data-component") == "layers.1.self_attn.k_norm"
    active(browser).send_keys(Keys.ARROW_DOWN)
    assert active(browser).get_attribute("data-component") == "layers.2.self_attn.k_norm"
    active(browser).send_keys(Keys.ENTER)
    assert one(browser, "#filter").get_attribute("value") == "component=layers.2.self_attn.k_norm"
    following = []
    for _ in range(3):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        following.append(active(browser).get_attribute("id") or active(browser).get_attribute("class"))
    assert following[:2] == ["only", "box tall"] and active(browser).tag_name == "button"
    active(browser).send_keys(Keys.ENTER)
    assert one(browser, "#table th").get_attribute("aria-sort") == "descending"


def test_a_finding_leads_to_its_details(browser, visit):
    visit("several")
    one(browser, "#findings a[href='#finding-2']").click()
    box = "return document.getElementById('finding-2').getBoundingClientRect().y"
    assert -1 <= browser.execute_script(box) < WIDE[1]
    one(browser, "#finding-2 button").click()
    assert len(rows(browser)) == 2


def test_names_do_no_harm(browser, visit):
    visit("hostile")
    assert browser.execute_script("return document.querySelectorAll('img:not([src^=\"data:\"])').length") == 0
    chip = one(browser, ".chip")
    assert chip.text.endswith(CASES["HOSTILE"])
    chip.click()
    assert len(rows(browser)) >= 1
    type_filter(browser, "component=layers.0.__proto__")
    assert rows(browser) == ["__proto__"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["several", "agreeing", "undecided", "answer"])
def test_text_is_readable_in_both_schemes(browser, visit, name, scheme):
    visit(name, scheme=scheme)
    browser.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    colour, contrast = browser.execute_script(CONTRASTS)[0]
    assert contrast >= 4.5, colour
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark is (scheme == "dark")
    shown = browser.execute_script("return document.querySelector('#order img').currentSrc")
    assert (shown == one(browser, "#order source").get_attribute("srcset")) is (scheme == "dark")


def test_without_scripts_the_finding_the_map_and_the_wrong_taps_are_shown(browser, visit):
    localization = visit("several", scripts=False)
    assert one(browser, "h1").text == sentence(localization)
    assert one(browser, "#map noscript img").is_displayed() and not one(browser, "#filter").is_displayed()
    assert localization.first.tap in one(browser, "#taps noscript table").text
