"""The report in a real Chromium: what a person does with it, and that nothing on it runs or asks for more."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from runfolders import CLOSE, SCRIPT, write_films, write_hostile_run, write_run
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver as Chrome
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from causalvae.cli import main
from causalvae.report.watch import Watch

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
LIMIT_S = 120  # until a page that never changes is given up; nothing is measured by it
PAGE_MB = 15.0  # of a run of 50,000 steps
SHOW_ALL = "for (const plot of charts.keys()) draw(plot)"
PIXELS = (
    "const c = arguments[0]; return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = webdriver.ChromeOptions()
    for word in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "window-size=1280,900",
    ):
        options.add_argument(f"--{word}")
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50,000 steps, each of them logged, with two clips at 50 saves."""
    run = write_run(tmp_path_factory.mktemp("long") / "long", max_steps=50_000, log_steps=1, saves=50)
    write_films(run, steps=[1000 * (n + 1) for n in range(50)], frames=17, size=256, distinct=3)
    return run


def show(browser: Chrome, tmp_path: Path, *runs: Path) -> Path:
    """Write the page of these runs and open it, with nothing logged before."""
    out = tmp_path / "page.html"
    assert main("report", [*(str(run) for run in runs), "--out", str(out)]) == 0
    open_page(browser, out.as_uri())
    return out


def open_page(browser: Chrome, address: str) -> None:
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(address)
    ready = "return document.documentElement.dataset.ready === 'yes' && location.href === arguments[0]"
    wait(browser, ready, address)


def wait(browser: Chrome, script: str, *args: Any) -> Any:
    """What a script gives, once that is something."""
    return WebDriverWait(browser, LIMIT_S, 0.05).until(lambda driver: driver.execute_script(script, *args))


def one(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element("css selector", selector)


def painted(browser: Chrome, player: WebElement, what: str) -> list[int]:
    """The pixels of a film, once it shows this: mode, frame, step."""
    wait(browser, "return arguments[0].dataset.painted === arguments[1]", player, what)
    return browser.execute_script(PIXELS, player.find_element("css selector", "canvas"))


def requests(browser: Chrome) -> list[str]:
    """Addresses that the page asked for since it was opened, but for those that carry their data."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith("data:")]


def test_curves_are_drawn_when_seen_and_follow_the_switches(
    browser: Chrome, tmp_path: Path, long_run: Path
) -> None:
    out = show(browser, tmp_path, long_run)
    assert out.stat().st_size < PAGE_MB * 1e6
    chart = one(browser, '.chart[data-name="total"]')
    assert browser.execute_script("return drawn.size") < browser.execute_script("return charts.size")
    browser.execute_script("arguments[0].scrollIntoView()", chart)
    wait(browser, "return arguments[0].querySelector('.plot').dataset.drawn", chart)
    lines = "return [...arguments[0].querySelectorAll('.js-line')].map((line) => line.getAttribute('d'))"
    before = browser.execute_script(lines, chart)
    assert len(before) == 2  # every value, and their average
    assert all(line.startswith("M") for line in before)
    points = "return [...arguments[0].querySelectorAll('.point')].length"
    assert browser.execute_script(points, chart) == 50 + 1 + 1  # checkpoints, the warning, the skipped step
    one(browser, "#smoothing").send_keys(Keys.END)
    assert browser.execute_script(lines, chart) != before
    one(browser, "#smoothing").send_keys(Keys.HOME)
    assert len(browser.execute_script(lines, chart)) == 1
    highest = "return arguments[0].querySelector('.plot').layout.yaxis.range[1]"
    assert browser.execute_script(highest, chart) < 0.5  # the spike of 9.75 is cut
    one(browser, "#cut").click()
    assert browser.execute_script(highest, chart) > 9
    one(browser, "#log").click()
    assert (
        browser.execute_script("return arguments[0].querySelector('.plot').layout.yaxis.type", chart) == "log"
    )
    browser.execute_script(SHOW_ALL)
    drag = (
        "Plotly.relayout(arguments[0].querySelector('.plot'), {'xaxis.range[0]': 100, 'xaxis.range[1]': 200})"
    )
    browser.execute_script(drag, chart)
    along = "[...drawn].filter((plot) => charts.get(plot).x === 'step')"
    ranges = f"return {along}.map((plot) => plot.layout.xaxis.range.map(Math.round))"
    assert {tuple(each) for each in browser.execute_script(ranges)} == {(100, 200)}
    one(browser, "#unzoom").click()
    assert all(high > 40_000 for _, high in browser.execute_script(ranges))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_two_runs_are_compared_and_one_can_be_hidden(browser: Chrome, tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, max_steps=2000, batch_size=size) for name, size in (("a", 1), ("b", 2))
    ]
    show(browser, tmp_path, *runs)
    browser.execute_script(SHOW_ALL)
    lines = "return document.querySelectorAll('[data-name=\"pixel\"] .js-line').length"
    both = browser.execute_script(lines)
    one(browser, "#legend label:last-child input").click()
    assert browser.execute_script(lines) == both // 2
    assert "batch_size" in one(browser, "#overview").text.split("What differs between the runs")[1]


def test_a_film_is_stepped_wiped_and_compared_by_keys(browser: Chrome, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=300, saves=3)
    write_films(run, steps=[100, 200, 300], clips=2, size=64)
    show(browser, tmp_path, run)
    player = one(browser, ".player")
    scores = [float(each.text.split()[1]) for each in browser.find_elements("css selector", ".score")]
    assert scores == sorted(scores)  # worst first
    first = painted(browser, player, "side 0 300")
    score = player.find_element("css selector", ".score").text
    browser.execute_script("arguments[0].focus()", player)
    keys = browser.switch_to.active_element
    keys.send_keys(Keys.ARROW_RIGHT)
    assert painted(browser, player, "side 1 300") != first
    assert player.find_element("css selector", ".score").text != score
    keys.send_keys(Keys.END)
    painted(browser, player, "side 8 300")
    keys.send_keys(Keys.HOME, Keys.ARROW_LEFT)
    assert painted(browser, player, "side 0 300") == first
    keys.send_keys("[", "[")
    noisier = painted(browser, player, "side 0 100")
    assert noisier != first
    keys.send_keys("3")
    difference = painted(browser, player, "difference 0 100")
    keys.send_keys("]", "]", "2")
    painted(browser, player, "wipe 0 300")
    edge = player.find_element("css selector", "input[name=wipe]")
    canvas = player.find_element("css selector", "canvas")
    edge.send_keys(Keys.END)
    original = browser.execute_script(PIXELS, canvas)
    edge.send_keys(Keys.HOME)
    reconstruction = browser.execute_script(PIXELS, canvas)
    assert original != reconstruction
    assert mean(difference) > 4 * mean(apart(original, reconstruction))  # amplified, and of a worse film
    bars = player.find_elements("css selector", ".strip rect")
    assert len(bars) == 9
    assert browser.execute_script("return arguments[0].querySelectorAll('.strip .worst').length", player) == 1


def apart(a: list[int], b: list[int]) -> list[int]:
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


def mean(rgba: list[int]) -> float:
    """Of red, green and blue."""
    colours = [value for place, value in enumerate(rgba) if place % 4 != 3]
    return sum(colours) / len(colours)


def test_language_theme_and_width_change_in_the_page(browser: Chrome, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=300, saves=3)
    write_films(run, steps=[300], clips=1)
    show(browser, tmp_path, run)
    browser.execute_script(SHOW_ALL)
    for selector, word in (("#lang option[value=zh]", "概览"), ("#lang option[value=en]", "Overview")):
        one(browser, selector).click()
        assert one(browser, "nav a").text == word
    one(browser, "#lang option[value=zh]").click()
    left = browser.execute_script(
        "return [...document.querySelectorAll('[data-t]')].map((each) => each.textContent)"
    )
    assert {text for text in left if re.fullmatch(r"[A-Z][a-z ]+", text)} == set()
    paper = "return getComputedStyle(document.body).backgroundColor"
    seen: set[str] = set()
    for theme in ("light", "dark"):
        one(browser, f"#theme option[value={theme}]").click()
        seen.add(browser.execute_script(paper))
        picture(browser, f"{theme}")
    assert len(seen) == 2
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    wait(browser, "return document.documentElement.scrollWidth === 390")
    picture(browser, "phone")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    printed = browser.execute_cdp_cmd("Page.printToPDF", {})
    assert len(printed["data"]) > 20_000


def picture(browser: Chrome, name: str) -> None:
    """Keep a picture of the window where CAUSALVAE_PICTURES asks for it, to be looked at."""
    if folder := os.environ.get("CAUSALVAE_PICTURES"):
        browser.save_screenshot(f"{folder}/report-{name}.png")


def test_a_hostile_run_is_shown_as_text_and_asks_for_nothing(browser: Chrome, tmp_path: Path) -> None:
    run = write_hostile_run(tmp_path)
    out = show(browser, tmp_path, run)
    browser.execute_script(SHOW_ALL)
    browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    browser.execute_script(
        "applyLanguage('zh'); document.querySelectorAll('.player button').forEach((b) => b.click())"
    )
    assert browser.execute_script("return typeof window.__pwned") == "undefined"
    assert browser.execute_script("return document.scripts.length") == 3
    assert (
        browser.execute_script(
            "return document.querySelectorAll('main img, main a[href^=javascript]').length"
        )
        == 0
    )
    links = "return [...document.querySelectorAll('a')].map((a) => a.href.baseVal ?? a.getAttribute('href'))"
    assert all(re.fullmatch(r"#[\w-]+", link) for link in browser.execute_script(links))
    text = one(browser, "body").text
    assert SCRIPT in text
    assert CLOSE in text
    assert requests(browser) == [out.as_uri()]
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_a_watched_page_takes_up_what_the_training_writes(browser: Chrome, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=300, saves=3)
    server = Watch([run], defaults={}, lang="en", every=0.5, port=0)
    thread = Thread(target=server.serve)
    thread.start()
    try:
        open_page(browser, server.address)
        browser.execute_script("window.kept = true; " + SHOW_ALL)
        wait(browser, "return look.version !== undefined")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4321, "time": 1.79e9, "total": 0.05}\n')
        wait(browser, "return document.getElementById('overview').textContent.includes('4,321')")
        last = "return document.querySelector('[data-name=\"total\"] .plot').data[0].x.at(-1)"
        assert browser.execute_script(last) == 4321
        assert browser.execute_script("return window.kept") is True  # it was not loaded again
        assert all(url.startswith(server.address) for url in requests(browser))
    finally:
        browser.get("about:blank")
        server.stop()
        thread.join()
