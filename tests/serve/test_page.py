"""The page in a browser: Debian's Chromium, without a window and without a network."""

import pytest

pytest.importorskip("gradio", reason="the server needs its extra: pip install '.[serve,test]'")
pytest.importorskip("selenium", reason="selenium drives the browser: pip install '.[test]'")
from selenium.webdriver.common.keys import Keys  # noqa: E402 - only where there is selenium

WIDE, NARROW = (1280, 1000), (400, 900)


@pytest.fixture
def page(browser, resize, server, until):
    """Opens the page anew; afterwards the browser has nothing to complain of, and the server nothing left to do."""

    def opened(size=WIDE, scheme="light"):
        resize(size, scheme)
        browser.get(server.address)
        until(lambda: browser.find_elements("css selector", "#go"), 60)
        until(lambda: said(browser) == "Ready.")
        return browser

    yield opened
    # Gradio writes down the requests that it ends itself; a page that is left complains of its connection.
    told = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    browser.get("about:blank")
    server.settle(30)
    browser.get_log("browser")
    assert [message for message in told if "AbortError" not in message] == []


def one(browser, selector):
    return browser.find_element("css selector", selector)


def said(browser) -> str:
    return browser.execute_script("return document.querySelector('#status')?.innerText.trim()")


def choose(browser, until, selector: str, name: str) -> None:
    """Choose from a list by the keyboard alone, as it filters what is typed."""
    field = one(browser, f"{selector} input")
    field.click()
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(name, Keys.ENTER)
    until(lambda: name in field.get_attribute("value"))


def fill(browser, selector: str, value: object) -> None:
    field = one(browser, selector)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(str(value), Keys.TAB)


def visible(browser, selector: str) -> bool:
    script = "return !!document.querySelector(arguments[0])?.checkVisibility()"
    return browser.execute_script(script, selector)


def shown(browser, selector: str) -> bool:
    """Whether an element is there, to be seen, with what it shows loaded."""
    script = """
        const found = document.querySelector(arguments[0]);
        return !!found && found.checkVisibility() && (found.naturalWidth || found.readyState || 0) > 0;"""
    return browser.execute_script(script, selector)


def prepare(browser, until, prompt: str) -> None:
    choose(browser, until, "#resolution", "256 px")
    fill(browser, "#steps input[type=number]", 2)
    one(browser, "#prompt textarea").send_keys(prompt)


def draw_long(browser, until) -> None:
    """Start what takes longer than a test, in steps that do not."""
    choose(browser, until, "#resolution", "512 px")
    fill(browser, "#steps input[type=number]", 100)
    one(browser, "#prompt textarea").send_keys("a red bird")
    one(browser, "#go").click()
    until(lambda: "enoising" in said(browser), 60)


def sideways(browser) -> int:
    return browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")


FAINT = """
    const parts = colour => (colour.match(/[\\d.]+/g) ?? []).map(Number);
    const light = colour => colour.slice(0, 3).reduce((sum, part, k) => sum + [0.2126, 0.7152, 0.0722][k]
        * (part <= 10 ? part / 3295 : ((part / 255 + 0.055) / 1.055) ** 2.4), 0);
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = parts(getComputedStyle(element).backgroundColor);
            if (colour.length && (colour[3] ?? 1) > 0.9) return colour;
        }
        return [255, 255, 255];
    };
    const texts = [...document.querySelectorAll("label, span, p, button, input, textarea, h1, div")].filter(element =>
        element.checkVisibility({opacityProperty: true, visibilityProperty: true}) && (element.value
            || [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.textContent.trim())));
    return texts.map(element => {
        const both = [parts(getComputedStyle(element).color), behind(element)].map(light).sort((a, b) => b - a);
        return [(both[0] + 0.05) / (both[1] + 0.05), element.outerHTML.slice(0, 200)];
    }).filter(([contrast]) => contrast < 4.5);"""
"""Texts whose contrast with what is behind them is less than WCAG asks for."""


def test_an_image_is_drawn_kept_and_drawn_again(page, server, until, tmp_path):
    browser = page()
    prepare(browser, until, "a red bird")
    fill(browser, "#seed input", 7)
    one(browser, "#prompt textarea").send_keys(Keys.SHIFT, Keys.ENTER)
    until(lambda: said(browser).startswith("Done"), 60)
    until(lambda: shown(browser, "#image img"))
    first = one(browser, "#image img").get_attribute("src")
    assert first.startswith(f"{server.address}/gradio_api/file=") and first.endswith("lance-7.png")
    assert one(browser, "#history input").get_attribute("value") == "t2i: a red bird, seed 7"
    fill(browser, "#seed input", 8)
    one(browser, "#go").click()
    until(lambda: "seed 8" in one(browser, "#history input").get_attribute("value"), 60)
    choose(browser, until, "#history", "t2i: a red bird, seed 7")
    one(browser, "#replay").click()
    until(lambda: one(browser, "#seed input").get_attribute("value") == "7")
    one(browser, "#show").click()
    until(lambda: one(browser, "#image img").get_attribute("src") == first)
    browser.save_screenshot(str(tmp_path / "drawn.png"))
    # Nothing is asked of anybody but the server.
    assert {host for host in requested(browser)} <= {server.address}


def requested(browser) -> set[str]:
    import json
    from urllib.parse import urlsplit

    urls = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.append(urlsplit(message["params"]["request"]["url"]))
    return {f"{url.scheme}://{url.netloc}" for url in urls if url.scheme.startswith("http")}


def test_a_job_is_cancelled_by_the_button_and_by_leaving(page, server, until):
    browser = page()
    draw_long(browser, until)
    assert one(browser, "#status progress").get_attribute("max") == "100"
    one(browser, "#cancel").click()
    until(lambda: said(browser) == "Cancelled.", 60)
    server.settle()
    one(browser, "#go").click()
    until(lambda: server.worker.load[1])
    browser.get("about:blank")
    server.settle(30)
    browser.get_log("browser")


def test_what_cannot_be_done_is_said(page, until):
    browser = page()
    one(browser, "#go").click()
    until(lambda: said(browser) == "Write a prompt first.")
    choose(browser, until, "#task", "Animate an image")
    until(lambda: visible(browser, "#images") and visible(browser, "#seconds") and not visible(browser, "#aspect"))
    one(browser, "#go").click()
    until(lambda: said(browser) == "Add an image first.")


def test_an_image_is_edited_and_asked_about(page, until, picture, tmp_path):
    browser = page()
    (tmp_path / "cat.png").write_bytes(picture)
    choose(browser, until, "#task", "Edit an image")
    until(lambda: browser.find_elements("css selector", "#images input[type=file]"))
    one(browser, "#images input[type=file]").send_keys(str(tmp_path / "cat.png"))
    until(lambda: browser.find_elements("css selector", "#images img"))
    prepare(browser, until, "make it blue")
    one(browser, "#go").click()
    until(lambda: said(browser).startswith("Done"), 60)
    until(lambda: shown(browser, "#image img"))
    choose(browser, until, "#task", "Ask about images")
    until(lambda: browser.find_elements("css selector", "#tokens input[type=number]"))
    fill(browser, "#tokens input[type=number]", 8)
    choose(browser, until, "#resolution", "256 px")
    one(browser, "#go").click()
    until(lambda: "x2t_image" in one(browser, "#history input").get_attribute("value"), 60)
    assert one(browser, "#answer textarea").get_attribute("value")
    browser.save_screenshot(str(tmp_path / "answered.png"))


def test_a_video_is_drawn_and_asked_about(page, until, clip, tmp_path):
    browser = page()
    choose(browser, until, "#task", "Text to video")
    until(lambda: browser.find_elements("css selector", "#seconds input[type=number]"))
    choose(browser, until, "#resolution", "192p")
    fill(browser, "#seconds input[type=number]", 1)
    fill(browser, "#steps input[type=number]", 1)
    one(browser, "#prompt textarea").send_keys("a red bird flies")
    one(browser, "#go").click()
    until(lambda: said(browser).startswith("Done"), 120)
    until(lambda: shown(browser, "#video video"))
    choose(browser, until, "#task", "Ask about a video")
    until(lambda: browser.find_elements("css selector", "#source input[type=file]"))
    one(browser, "#source input[type=file]").send_keys(str(clip))
    until(lambda: browser.find_elements("css selector", "#source video"))
    fill(browser, "#tokens input[type=number]", 4)
    choose(browser, until, "#resolution", "192p")
    one(browser, "#go").click()
    until(lambda: "x2t_video" in one(browser, "#history input").get_attribute("value"), 120)
    browser.save_screenshot(str(tmp_path / "video.png"))


def give(browser, until, field: str, file, shown: str) -> None:
    """Give a field a file, and wait until it shows it."""
    until(lambda: browser.find_elements("css selector", f"{field} input[type=file]"))
    one(browser, f"{field} input[type=file]").send_keys(str(file))
    until(lambda: browser.find_elements("css selector", f"{field} {shown}"))


@pytest.mark.parametrize(
    ("task", "name", "made"),
    [
        ("subject", "Draw the subject of images", "#image img"),
        ("i2v", "Animate an image", "#video video"),
        ("video_edit", "Edit a video", "#video video"),
    ],
)
def test_what_is_given_is_drawn_anew_animated_and_edited(page, until, picture, clip, tmp_path, task, name, made):
    browser = page()
    (tmp_path / "cat.png").write_bytes(picture)
    choose(browser, until, "#task", name)
    if task == "video_edit":
        give(browser, until, "#source", clip, "video")
    else:
        give(browser, until, "#images", tmp_path / "cat.png", "img")
    choose(browser, until, "#resolution", "256 px" if task == "subject" else "192p")
    fill(browser, "#steps input[type=number]", 1)
    if task == "i2v":
        fill(browser, "#seconds input[type=number]", 1)
    one(browser, "#prompt textarea").send_keys("make it blue")
    one(browser, "#go").click()
    until(lambda: said(browser).startswith("Done"), 120)
    until(lambda: shown(browser, made))
    assert one(browser, "#history input").get_attribute("value").startswith(f"{task}: make it blue, seed ")


def test_a_second_user_waits_and_is_told_where(page, server, until):
    browser = page()
    draw_long(browser, until)
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    page()
    prepare(browser, until, "a blue bird")
    one(browser, "#go").click()
    until(lambda: said(browser) == "In the queue, 1 before this one")
    second = browser.current_window_handle
    browser.switch_to.window(first)
    one(browser, "#cancel").click()
    until(lambda: said(browser) == "Cancelled.", 60)
    browser.switch_to.window(second)
    until(lambda: said(browser).startswith("Done"), 60)
    browser.close()
    browser.switch_to.window(first)


def test_reloading_ends_what_runs_and_the_page_is_ready_again(page, server, until):
    browser = page()
    draw_long(browser, until)
    browser.refresh()
    until(lambda: browser.find_elements("css selector", "#go") and said(browser) == "Ready.", 60)
    server.settle(60)
    prepare(browser, until, "a blue bird")
    one(browser, "#go").click()
    until(lambda: said(browser).startswith("Done"), 60)
    browser.get_log("browser")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_it_fits_wide_and_narrow_in_light_and_dark(page, until, size, scheme, tmp_path):
    browser = page(size, scheme)
    for task in ("Text to image", "Animate an image", "Ask about a video"):
        choose(browser, until, "#task", task)
        assert sideways(browser) <= 0 and browser.execute_script(FAINT) == []
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    browser.save_screenshot(str(tmp_path / f"{size[0]}-{scheme}.png"))


def test_every_field_has_a_name_and_is_reached_by_the_keyboard(page):
    browser = page()
    nameless = browser.execute_script("""
        return [...document.querySelectorAll("input, textarea, button")].filter(e => e.checkVisibility()
            && !(e.labels && e.labels.length) && !e.getAttribute("aria-label") && !e.innerText.trim() && !e.title)
            .map(e => e.outerHTML.slice(0, 200))""")
    assert nameless == []
    seen = []
    for _ in range(40):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(browser.execute_script("return document.activeElement.closest('[id]')?.id ?? ''"))
    for name in ("prompt", "go", "cancel", "show", "replay"):
        assert any(name in identity for identity in seen), name
