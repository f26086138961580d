"""The page in a real browser, from disk, with the network off."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import formula
import pytest
from conftest import SMALL
from test_launch import Watch
from test_report import full_report, measured

from harness.launch.local import LocalLauncher
from harness.report.document import Document
from harness.results.store import Store
from harness.spec.trial import TrialSpec
from harness.tuning.study import tune


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium without a screen. Where it is missing the tests are skipped, except where CI is set."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver) and not os.environ.get("CI"):
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium or "chromium"
    for flag in (
        "--headless=new",
        "--no-sandbox",  # CI runs as root
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,1000",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver or "chromedriver"))
    try:
        started.execute_cdp_cmd("Network.enable", {})
        conditions = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        started.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)
        yield started
    finally:
        started.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Document, str]:
    """The report of a whole grid, and the address of its page."""
    folder = tmp_path_factory.mktemp("page")
    measured(lambda **overrides: TrialSpec.model_validate(SMALL | overrides), folder / "results" / "g")
    document = full_report(folder / "results" / "g", folder / "out")
    return document, (folder / "out" / "report.html").as_uri()


def test_the_page_works_from_disk_without_a_network(browser: Any, report: tuple[Document, str]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    document, address = report
    browser.get(address)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "body[data-drawn=yes]"))

    # Every chart is drawn, and marks with it.
    charts = browser.find_elements(By.CSS_SELECTOR, "[data-chart]")
    assert [chart.get_attribute("data-chart") for chart in charts] == [chart.id for chart in document.charts]
    for chart in charts:
        drawn = chart.find_element(By.CSS_SELECTOR, "svg")
        assert drawn.size["width"] > 200
        assert drawn.find_elements(By.CSS_SELECTOR, "path, rect")

    # What came from data is text.
    assert not browser.find_elements(By.XPATH, "//td//script | //li//script | //summary//script")
    table = browser.find_element(By.ID, "techniques-rows")
    assert "<script>alert(1)</script>" in table.text

    def column(number: int) -> list[str]:
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr:not([hidden])")
        return [row.find_elements(By.TAG_NAME, "td")[number].text for row in rows]

    # Sorting goes by size, not by text: 800 B comes before 1000 B.
    memory = table.find_elements(By.CSS_SELECTOR, "th button")[2]
    memory.click()
    assert column(2) == ["800 B", "1000 B", "1000 B", "1.27 KiB", "3.91 KiB"]
    memory.click()
    assert column(2)[0] == "3.91 KiB"

    field = browser.find_element(By.CSS_SELECTOR, "[data-table=techniques-rows]")
    field.send_keys("lora_r=8")
    assert column(0) == ["lora_r=8"]
    assert browser.find_element(By.CSS_SELECTOR, "#techniques .tools span").text == "1 of 5"

    # The title of a row is its configuration.
    assert "lora_r: 8" in table.find_element(By.CSS_SELECTOR, "tbody tr:not([hidden])").get_attribute("title")

    errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not errors, errors


def test_both_colour_schemes_are_drawn(browser: Any, report: tuple[Document, str]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    _, address = report
    colours = set()
    for scheme in ("dark", "light"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        browser.get(address)
        WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "body[data-drawn=yes]"))
        label = browser.find_element(By.CSS_SELECTOR, "[data-chart=memory] .role-axis-title text")
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        colours.add((paper, label.get_attribute("fill")))
    assert colours == {("rgb(20, 23, 26)", "#e6e9ec"), ("rgb(255, 255, 255)", "#1b1f24")}


def test_a_search_is_drawn_and_its_recommendation_can_be_copied(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    store = Store(tmp_path / "results" / "t")
    with LocalLauncher(child=formula.child, preload="harness.grids.search") as launcher:
        tune(formula.search(trials=12, confirm=1), store, launcher, Watch())
    document = full_report(store.folder, tmp_path / "out")
    browser.get((tmp_path / "out" / "report.html").as_uri())
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "body[data-drawn=yes]"))
    there = {chart.id for chart in document.charts}
    assert {"tuning-front", "tuning-history", "tuning-importance", "tuning-slices"} <= there
    for chart in browser.find_elements(By.CSS_SELECTOR, "[data-chart^=tuning]"):
        assert chart.find_elements(By.CSS_SELECTOR, "svg path")
    recommended = browser.find_element(By.CSS_SELECTOR, "#summary pre").text
    assert recommended.strip() == (tmp_path / "out" / "recommended.yml").read_text().strip()
    assert "lora_r:" in recommended
    errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not errors, errors
