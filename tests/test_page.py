"""The page in a real browser, from disk, with the network off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import formula
import pytest
from chromium import chromium
from conftest import SMALL
from rows import keep
from test_launch import Watch
from test_report import full_report, measured
from typer.testing import CliRunner

from harness.analysis import loading, recommend
from harness.analysis.measurements import Measurements
from harness.cli.app import app
from harness.launch.local import LocalLauncher
from harness.report import document, writers
from harness.report.document import Document
from harness.results.store import Store
from harness.spec.trial import TrialSpec
from harness.tuning.study import tune

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all tests here."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Document, str]:
    """The report of a whole grid, and the address of its page."""
    folder = tmp_path_factory.mktemp("page")
    measured(lambda **overrides: TrialSpec.model_validate(SMALL | overrides), folder / "results" / "g")
    document = full_report(folder / "results" / "g", folder / "out")
    return document, (folder / "out" / "report.html").as_uri()


def opened(browser: Any, address: str, width: int = 1280, height: int = 800) -> None:
    """Open a page in a window whose inside has this size, and wait until its plots are drawn."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)
    WebDriverWait(browser, 110).until(lambda b: b.find_elements(By.CSS_SELECTOR, "body[data-drawn=yes]"))


def all_of(browser: Any, selector: str) -> list[Any]:
    from selenium.webdriver.common.by import By

    elements: list[Any] = browser.find_elements(By.CSS_SELECTOR, selector)
    return elements


def complaints(browser: Any) -> list[Any]:
    """What the page wrote to the console since the last call."""
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def colours(browser: Any, scheme: str) -> None:
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)


def test_the_page_works_from_disk_without_a_network(browser: Any, report: tuple[Document, str]) -> None:
    whole, address = report
    opened(browser, address)

    # Every chart is drawn, and marks with it; the effects are the picture of the first screen.
    charts = all_of(browser, "[data-chart]")
    drawn = [chart.id for chart in whole.charts if chart.id != "effects"]
    assert [chart.get_attribute("data-chart") for chart in charts] == drawn
    for chart in charts:
        svg = all_of(chart, "svg")[0]  # another is of the menu
        assert svg.size["width"] > 200
        assert all_of(svg, "path, rect")

    # What came from data is text.
    assert not all_of(browser, "td script, th script, li script, summary script, article script, figure script")
    assert "<script>alert(1)</script>" in all_of(browser, "#techniques-rows")[0].text
    assert "<script>alert(1)</script>" in all_of(browser, "#picture")[0].text
    assert not complaints(browser)


def test_tables_sort_filter_hide_columns_and_open(browser: Any, report: tuple[Document, str]) -> None:
    _, address = report
    opened(browser, address)
    (table,) = all_of(browser, "#techniques-rows")

    def column(number: int) -> list[str]:
        rows = all_of(table, "tbody tr:not([hidden]):not(.detail)")
        return [all_of(row, "th, td")[number].text for row in rows]

    # Sorting goes by size, not by text: 800 B comes before 1000 B.
    memory = all_of(table, "thead button")[2]
    memory.click()
    assert column(2) == ["800 B", "1000 B", "1000 B", "1.27 KiB", "3.91 KiB"]
    memory.click()
    assert column(2)[0] == "3.91 KiB"

    (field,) = all_of(browser, "[data-table=techniques-rows]")
    field.send_keys("lora_r=8")
    assert column(0) == ["lora_r=8"]
    assert all_of(browser, "#techniques .tools span")[0].text == "1 of 5"

    # A row opens to its configuration, figures, steps and stories, and closes again.
    (row,) = all_of(table, "tbody tr:not([hidden]) .open")
    row.click()
    (detail,) = all_of(table, ".detail")
    assert "lora_r: 8" in all_of(detail, "pre")[0].text
    assert "lora_r: 8" in all_of(detail, "p")[0].text
    assert "Predicted peak memory" in detail.text
    assert len(all_of(detail, "svg polyline")[0].get_attribute("points").split()) == 2
    assert len(all_of(detail, ".scroll")[-1].text.splitlines()) == 2 * 6, "six stories"
    assert "(+0.0" in all_of(detail, ".scroll")[-1].text
    assert row.get_attribute("aria-expanded") == "true"
    row.click()
    assert not all_of(table, ".detail")

    # A column is hidden, and comes back.
    all_of(browser, "#techniques .columns summary")[0].click()
    (box,) = all_of(browser, "#techniques [data-column='2']")
    box.click()
    assert not all_of(table, "thead th")[2].is_displayed()
    assert not all_of(table, "tbody tr:not([hidden]) td")[1].is_displayed()
    box.click()
    assert all_of(table, "thead th")[2].is_displayed()
    assert not complaints(browser)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measurements, Document, str]:
    """The techniques grid as it was committed: 22 techniques."""
    folder = tmp_path_factory.mktemp("committed")
    measurements = loading.load(ROOT / "results/techniques", "fb116a5f")
    whole = document.document(measurements, ROOT / "results/techniques")
    writers.write(whole, folder, formats=["html"])
    return measurements, whole, (folder / "report.html").as_uri()


def test_the_first_screen_answers(browser: Any, committed: tuple[Measurements, Document, str]) -> None:
    _, whole, address = committed
    opened(browser, address)
    (picture,) = all_of(browser, "#picture")
    ends = browser.execute_script("const r = arguments[0].getBoundingClientRect(); return [r.top, r.bottom]", picture)
    assert 0 < ends[0] < 250
    assert ends[1] <= 800, "all techniques can be seen at once"
    cards = all_of(browser, "article.card")
    assert [all_of(card, "h2")[0].text for card in cards] == ["Least memory", "Fastest", "Lowest loss"]
    for card in cards:
        top, bottom = card.rect["y"], card.rect["y"] + card.rect["height"]
        assert 0 < top < bottom <= 800
    assert len(all_of(picture, "[data-memory]")) == len(whole.front.lines) == 21
    # A dot stands where its figure is: on the other side of the line of no effect from its opposite.
    for line in all_of(picture, ".line.better, .line.worse"):
        text = line.get_attribute("title")
        none = float(line.get_attribute("style").split("--none:")[1].strip().rstrip("%;"))
        at = float(all_of(line, ".dot")[0].get_attribute("style").split("left:")[1].strip().rstrip("%;"))
        effect = text.split(": ", 1)[1].split()[0]
        is_less = effect.startswith("−") or (effect.startswith("×") and float(effect[1:]) < 1)
        assert (at < none) == is_less, text


def test_the_slider_recommends_as_the_command_does(browser: Any, committed: tuple[Measurements, Document, str]) -> None:
    measurements, whole, address = committed
    opened(browser, address)
    (slider,) = all_of(browser, "#have")
    most = max(whole.front.memory.values())
    for position in (0, 105, 190, 215, 240, 1000):
        browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", slider, position
        )
        have = int(most * 1.1 * position / 1000)
        shown = all_of(browser, "#choice")[0].text
        too_large = {
            line.get_attribute("data-memory") for line in all_of(browser, "#picture .over, #techniques-rows .over")
        }
        assert all(int(memory) > have for memory in too_large)
        assert {str(line.memory) for line in whole.front.lines if (line.memory or 0) > have + 10} <= too_large
        if have == 0:
            assert shown.startswith("Nothing measured fits; the least needs 0.26 GiB")
            continue
        best = recommend.recommend(measurements, memory=have)
        assert shown.startswith(f"Take {best.label}: it needs "), have


def test_claims_are_shown_by_verdict(browser: Any, committed: tuple[Measurements, Document, str]) -> None:
    _, whole, address = committed
    opened(browser, address)
    assert len(all_of(browser, ".claim")) == len(whole.verdicts)
    supported = [each for each in whole.verdicts if each.word == "supported"]
    for button in all_of(browser, ".filter:not([data-word=supported])"):
        button.click()
    visible = [claim for claim in all_of(browser, ".claim") if claim.is_displayed()]
    assert sorted(all_of(claim, ".says")[0].text for claim in visible) == sorted(each.claim.says for each in supported)
    assert not [section for section in all_of(browser, ".claims") if section.is_displayed() and not section.text]
    unmeasured = next(each for each in whole.verdicts if each.word == "not measured here")
    text = browser.execute_script(
        "return document.querySelector('.claim[data-word=\"not measured here\"]').textContent"
    )
    assert unmeasured.claim.says in text
    assert "harness run" in text


def test_nothing_is_wider_than_the_window(browser: Any, committed: tuple[Measurements, Document, str]) -> None:
    for width, height in ((320, 640), (768, 1024), (1280, 800), (2560, 1440)):
        opened(browser, committed[2], width, height)
        browser.execute_script("for (const each of document.querySelectorAll('#techniques-rows .open')) each.click()")
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        names = all_of(browser, "#picture .name")
        assert all(0 <= name.rect["x"] < name.rect["x"] + name.rect["width"] <= width for name in names)


@pytest.mark.parametrize(("scheme", "width"), [("light", 320), ("dark", 1280)])
def test_the_page_is_accessible(
    browser: Any, committed: tuple[Measurements, Document, str], scheme: str, width: int
) -> None:
    import selenium_axe_python

    colours(browser, scheme)
    opened(browser, committed[2], width)
    browser.execute_script("document.querySelectorAll('#techniques-rows .open')[2].click()")
    browser.execute_script(
        "const s = document.getElementById('have'); s.value = 200; s.dispatchEvent(new Event('input'))"
    )
    script = Path(selenium_axe_python.__file__).with_name("axe-core") / "axe.min.js"
    browser.execute_script(script.read_text(encoding="utf-8"))
    violations = browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then(result => done(result.violations))"
    )
    grave = [
        (each["id"], each["nodes"][0]["html"][:200], len(each["nodes"]))
        for each in violations
        if each["impact"] in ("serious", "critical")
    ]
    assert not grave
    assert not complaints(browser)


def test_what_a_row_opens_to_is_text(browser: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "results" / "g")
    hostile = "</script><script>alert(1)</script>\u202e<img src=x onerror=alert(2)>"
    template = {"system_prompt": hostile}
    data = [{"path": "storyteller", "type": template}]
    for label, more, status in (
        ("baseline", {}, "ok"),
        ("other", {"datasets": data}, "ok"),
        ("bad", {"lora_r": 9}, "failed"),
    ):
        spec = TrialSpec.model_validate(SMALL | more)
        figures = {"peak_memory_bytes": 1000} if status == "ok" else {}
        keep(store, spec, label, [], status=status, **figures)
    full_report(store.folder, tmp_path / "out")
    opened(browser, (tmp_path / "out" / "report.html").as_uri())
    browser.execute_script("for (const each of document.querySelectorAll('#techniques-rows .open')) each.click()")
    details = {row.text.split("\n")[1]: row for row in all_of(browser, ".detail")}
    assert len(details) == 3
    texts = " ".join(browser.execute_script("return arguments[0].textContent", row) for row in details.values())
    assert "</script><script>alert(1)</script>\ufffd<img src=x" in texts
    assert "failed in forward: no" in texts
    assert not all_of(browser, ".detail script, .detail img")
    assert not complaints(browser)


def test_runs_that_are_compared_have_the_same_picture(browser: Any, tmp_path: Path) -> None:
    def small(**overrides: Any) -> TrialSpec:
        return TrialSpec.model_validate(SMALL | overrides)

    folders = [tmp_path / "results" / name for name in ("old", "new", "<b>other")]
    for factor, folder in zip((1.0, 0.5, 2.0), folders, strict=True):
        for seed in range(2):
            for label, r in (("baseline", 4), ("lora_r=8", 8)):
                figures = {"peak_memory_bytes": int(1000 * factor), "tokens_per_second": 100.0, "eval_loss": 2.0}
                keep(Store(folder), small(seed=seed, lora_r=r), label, [2.0, 2.0], **figures)
    file = tmp_path / "compare.html"
    result = CliRunner().invoke(app, ["compare", *map(str, folders), "-o", str(file)])
    assert result.exit_code == 0, result.output
    assert "<b>other" in result.output
    opened(browser, file.as_uri())
    assert all_of(browser, "h1")[0].text == f"2 results against {folders[0]}"
    groups = all_of(browser, "#picture .group")
    assert [group.text for group in groups] == [str(folder) for folder in folders[1:]]
    titles = [line.get_attribute("title") for line in all_of(browser, "#picture .line.better, #picture .line.worse")]
    assert len(titles) == 4
    for title, effect in zip(titles, ["×0.50"] * 2 + ["×2.00"] * 2, strict=True):
        assert f"Peak memory: {effect} " in title
    assert [len(all_of(table, "tbody tr")) for table in all_of(browser, "table")] == [2, 0, 2, 0]
    assert not complaints(browser)


def test_both_colour_schemes_are_drawn(browser: Any, report: tuple[Document, str]) -> None:
    _, address = report
    drawn = set()
    for scheme in ("dark", "light"):
        colours(browser, scheme)
        opened(browser, address)
        label = all_of(browser, "[data-chart=memory] .role-axis-title text")[0]
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        drawn.add((paper, label.get_attribute("fill")))
    assert drawn == {("rgb(20, 23, 26)", "#e6e9ec"), ("rgb(255, 255, 255)", "#1b1f24")}


def test_a_search_is_drawn_and_its_recommendation_can_be_copied(browser: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "results" / "t")
    with LocalLauncher(child=formula.child, preload="harness.grids.search") as launcher:
        tune(formula.search(trials=12, confirm=1), store, launcher, Watch())
    whole = full_report(store.folder, tmp_path / "out")
    opened(browser, (tmp_path / "out" / "report.html").as_uri())
    there = {chart.id for chart in whole.charts}
    assert {"tuning-front", "tuning-history", "tuning-importance", "tuning-slices"} <= there
    for chart in all_of(browser, "[data-chart^=tuning]"):
        assert all_of(chart, "svg path")
    recommended = all_of(browser, "#answers pre")[0].text
    assert recommended.strip() == (tmp_path / "out" / "recommended.yml").read_text().strip()
    assert "lora_r:" in recommended
    assert not complaints(browser)
