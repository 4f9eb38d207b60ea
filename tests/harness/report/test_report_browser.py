"""The report in a real browser: empty console, sorting, pictures, narrow and wide, light and dark."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.report.write import write_report

FIXTURE = Path(__file__).parent / "fixtures" / "report_results"
HOSTILE = (
    "</pre></td></details><script>document.title='owned'</script>"
    "<img src=x onerror=\"document.title='owned'\">"
    "\"'`&#60;b&#62; \u202egnirts\u202c \u05e9\u05dc\u05d5\u05dd \x00\x1b[31m\r\n\tend"
)

Browser = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; without one these tests are skipped, with a warning."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        lacking = "chromium and chromium-driver are not installed: the report was NOT opened in a browser"
        warnings.warn(lacking, stacklevel=1)
        pytest.skip(lacking)
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.chrome.service.Service(driver)
    opened = webdriver.Chrome(options=options, service=service)
    opened.set_page_load_timeout(60)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a report of all stored results."""
    report = write_report(FIXTURE, ["small"], tmp_path_factory.mktemp("report"), ["half-ram"])
    return report.html.as_uri()


def show(browser: Browser, page: str, width: int = 1600, scheme: str = "light") -> None:
    """Open the page at a width, in light or dark."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page)


def run(browser: Browser, script: str) -> Any:
    """The result of a script in the page."""
    return browser.execute_script(script)


OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true);"


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_overflows_and_the_console_is_silent(browser: Browser, page: str, width: int) -> None:
    show(browser, page, width)
    assert browser.get_log("browser") == []
    for prepare in ("", OPEN_ALL):
        wide, seen = run(browser, prepare + "return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= seen == width
    small = run(
        browser,
        "return [...document.querySelectorAll('p, td, th, pre, summary, figcaption')].filter(e =>"
        " e.offsetParent && e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 12).length",
    )
    assert small == 0, "no text smaller than 12 pixels"


def test_tables_sort_by_pointer_and_keyboard(browser: Browser, page: str) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, page)
    column = (
        "const t = document.querySelector('#summary table');"
        "return [...t.tBodies[0].rows].map(r => r.cells[1].dataset.v)"
    )
    before = run(browser, column)
    head = browser.find_element("css selector", "#summary thead th:nth-child(2) button")
    head.click()
    assert [float(v) for v in run(browser, column)] == sorted(map(float, before), reverse=True)
    assert head.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    head.send_keys(Keys.ENTER)
    assert [float(v) for v in run(browser, column)] == sorted(map(float, before))
    head.send_keys(Keys.SPACE)
    assert run(browser, column) == before, "the third time as it was"
    bits = run(
        browser,
        "const t = document.querySelector('#accuracy-against-bits figure table');"
        "t.querySelectorAll('th button')[4].click();"
        "return [...t.tBodies[0].rows].map(r => r.cells[4].dataset.v)",
    )
    assert bits != sorted(bits, reverse=True), "letters would be in another order"
    assert list(map(float, bits)) == sorted(map(float, bits), reverse=True)


def test_requests_open_and_show_both_answers(browser: Browser, page: str) -> None:
    show(browser, page)
    group = browser.find_element("css selector", "#disagreements details.group")
    run(browser, "document.querySelector('#disagreements').scrollIntoView()")
    group.find_element("css selector", "summary").click()
    case = group.find_element("css selector", "details.case")
    case.find_element("css selector", "summary").click()
    answers = case.find_elements("css selector", ".answers > div")
    assert len(answers) == 2 and all(a.is_displayed() and a.text.strip() for a in answers)
    assert {word for a in answers for word in ("right", "wrong") if word in a.text} == {"right", "wrong"}
    assert "Field:" in case.text or "?" in case.text or case.find_element("css selector", "pre").text


def test_pictures_are_there_and_not_empty(browser: Browser, page: str) -> None:
    show(browser, page)
    pictures = run(
        browser,
        "return [...document.querySelectorAll('figure')].map(f => { const s = f.querySelector('svg');"
        " const b = s.getBoundingClientRect(); return {name: s.querySelector('title').textContent,"
        " width: b.width, height: b.height, texts: s.querySelectorAll('text').length,"
        " shapes: s.querySelectorAll('path, use').length,"
        " rows: f.querySelectorAll('details tbody tr').length} })",
    )
    assert len(pictures) >= 11
    for picture in pictures:
        assert picture["width"] > 250 and picture["height"] > 80, picture
        assert picture["texts"] >= 3 and picture["shapes"] >= 5 and picture["rows"] >= 1, picture


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out_from_their_ground(browser: Browser, page: str, scheme: str) -> None:
    """The contrast of every text colour, on the page and in pictures, is at least 4.5."""
    show(browser, page, scheme=scheme)
    colors = run(
        browser,
        OPEN_ALL + "const ground = getComputedStyle(document.body).backgroundColor; const seen = new Set();"
        "for (const e of document.querySelectorAll('h1,h2,h3,p,td,th,a,summary,figcaption,dt,dd,code,b'))"
        " seen.add(getComputedStyle(e).color);"
        "for (const e of document.querySelectorAll('figure svg text')) seen.add(getComputedStyle(e).fill);"
        "return [ground, [...seen]]",
    )
    ground, letters = brightness(colors[0]), [brightness(color) for color in colors[1]]
    assert (ground > 0.5) == (scheme == "light")
    for one in letters:
        light, dark = max(one, ground), min(one, ground)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (colors, one)


def test_print_is_light(browser: Browser, page: str) -> None:
    show(browser, page, scheme="dark")
    media = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    ground = run(browser, "return getComputedStyle(document.body).backgroundColor")
    ink = run(browser, "return getComputedStyle(document.querySelector('figure svg text')).fill")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert brightness(ground) > 0.9 and brightness(ink) < 0.2


def brightness(color: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG defines it."""
    parts = [int(float(part)) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_hostile_texts_are_shown_and_do_nothing(browser: Browser, tmp_path: Path) -> None:
    results = Path(shutil.copytree(FIXTURE, tmp_path / "results"))
    for path in results.glob("runs/small/*/scenario_state.json"):
        state = json.loads(path.read_text())
        for number, request in enumerate(state["request_states"]):
            request["instance"]["input"]["text"] = HOSTILE + str(number)
            request["instance"]["references"][0]["output"]["text"] = HOSTILE
            request["request"]["prompt"] += HOSTILE
            for completion in request["result"]["completions"]:
                completion["text"] += HOSTILE
        path.write_text(json.dumps(state))
    table = json.loads((results / "runs" / "small" / "table.json").read_text())
    for row in table["rows"]:
        row["run_entry"] = HOSTILE + row["run_entry"]
    (results / "runs" / "small" / "table.json").write_text(json.dumps(table))
    show(browser, write_report(results, ["small"], tmp_path / "out").html.as_uri(), width=360)
    assert browser.title == "Suite small" and browser.get_log("browser") == []
    count, images, wide = run(
        browser,
        OPEN_ALL
        + "return [document.scripts.length, document.images.length, document.documentElement.scrollWidth]",
    )
    assert (count, images) == (1, 0) and wide <= 360
    shown = run(browser, "return document.querySelector('.case pre').textContent")
    assert "<script>document.title='owned'</script>" in shown and "\u05e9\u05dc\u05d5\u05dd" in shown
    assert "\u202e" not in run(browser, "return document.documentElement.textContent")
    assert "\x1b" not in shown and "\ufffd" in shown
