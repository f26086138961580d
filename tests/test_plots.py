"""Charts: where their names are, and what they draw."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import vl_convert
from chromium import chromium
from rows import keep

from harness.analysis import comparison, loading
from harness.analysis.estimate import Estimate
from harness.analysis.measurements import Measurements
from harness.environment import Environment, current
from harness.report import document, labels, ladder_plot, plots
from harness.report.chart import Extent
from harness.report.labels import Box, PixelAxis
from harness.results.store import Store
from harness.spec.trial import TrialSpec

ROOT = Path(__file__).parent.parent
TECHNIQUES = ROOT / "results" / "techniques"
OF_TECHNIQUES = "fb116a5f"
GIB = 2**30
Small = Callable[..., TrialSpec]
PLOT = Box(0.0, 0.0, 640.0, 400.0)
RADIUS = 6.0


# ------------------------------------------------------------------------------------ where names are


def names(number: int) -> list[str]:
    return [f"gradient_accumulation_steps={i}, and more of it" for i in range(number)]


def covers(box: Box, point: tuple[float, float]) -> bool:
    x, y = point
    return box.overlaps(Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS))


def cross(a: labels.Segment, b: labels.Segment) -> bool:
    """Whether two segments do, by solving for where."""
    (x, y, x2, y2), (u, v, u2, v2) = a, b
    determinant = (x2 - x) * (v2 - v) - (y2 - y) * (u2 - u)
    if abs(determinant) < 1e-9:
        return False
    s = ((u - x) * (v2 - v) - (v - y) * (u2 - u)) / determinant
    t = ((u - x) * (y2 - y) - (v - y) * (x2 - x)) / determinant
    return 1e-6 < s < 1 - 1e-6 and 1e-6 < t < 1 - 1e-6


def enters(segment: labels.Segment, box: Box) -> bool:
    """Whether some of many points of the segment are in the box."""
    x, y, x2, y2 = segment
    steps = [number / 200 for number in range(201)]
    return any(box.left < x + t * (x2 - x) < box.right and box.top < y + t * (y2 - y) < box.bottom for t in steps)


@pytest.mark.parametrize(("spreading", "seed"), [*((200.0, seed) for seed in range(8)), (60.0, 0), (60.0, 1)])
def test_names_overlap_nothing(spreading: float, seed: int) -> None:
    generator = random.Random(seed)
    points = [
        (min(630.0, max(10.0, generator.gauss(320, spreading))), min(390.0, max(10.0, generator.gauss(200, spreading))))
        for _ in range(22)
    ]
    placed = labels.place(points, names(22), PLOT, radius=RADIUS)
    there = [label for label in placed if label is not None]
    assert len(there) >= (18 if spreading > 100 else 9)
    assert all(len(label.text) <= labels.LONGEST and label.text.endswith("…") for label in there)
    for one, other in itertools.combinations(there, 2):
        assert not one.box.overlaps(other.box)
        assert not (one.leader and other.leader and cross(one.leader, other.leader))
    for label in there:
        assert label.box.within(PLOT)
        assert not any(covers(label.box, point) for point in points)
        assert not any(each.leader and enters(each.leader, label.box) for each in there if each is not label)


def test_a_lonely_point_has_its_name_at_its_right() -> None:
    (label,) = labels.place([(100.0, 100.0)], ["lora_r=8"], PLOT, radius=RADIUS)
    assert label is not None
    assert (label.text, label.align, label.leader) == ("lora_r=8", "left", None)
    assert label.box.left == pytest.approx(100 + RADIUS + 3)
    assert label.y == 100
    assert label.box.right - label.box.left == 6 * len("lora_r=8")


def test_a_name_at_the_edge_turns_around() -> None:
    (label,) = labels.place([(630.0, 100.0)], ["lora_r=8"], PLOT, radius=RADIUS)
    assert label is not None
    assert label.align == "right"


def test_a_name_moves_off_a_line_and_away_from_points_that_it_is_not_of() -> None:
    across: labels.Segment = (0.0, 100.0, 640.0, 100.0)
    (label,) = labels.place([(100.0, 100.0)], ["lora_r=8"], PLOT, radius=RADIUS, lines=[across])
    assert label is not None
    assert not label.box.top < 100 < label.box.bottom
    row = [(285.0, 100.0), (300.0, 100.0), (315.0, 100.0)]
    _, middle, other = labels.place(row, [None, "a long name here", None], PLOT, radius=RADIUS)
    assert other is None
    assert middle is not None
    assert middle.leader is not None, "above and below it would be of any of them"


def test_a_name_is_left_out_where_nothing_is_free() -> None:
    crowd = [(x, y) for x in range(0, 641, 10) for y in range(0, 401, 10)]
    placed = labels.place([(320.0, 200.0), *crowd], ["lora_r=8", *[None] * len(crowd)], PLOT, radius=RADIUS)
    assert placed == [None] * len(placed)


def test_names_at_the_ends_of_curves_keep_their_order() -> None:
    ends = [(300.0, 100.0 + 2 * i) for i in range(8)]
    placed = labels.place(ends, names(8), Box(0, 0, 600, 260), radius=4.0, to_the_right=True)
    there = [label for label in placed if label is not None]
    assert len(there) == 8
    levels = [label.y for label in there]
    assert levels == sorted(levels)
    assert sum(levels) / 8 == pytest.approx(107), "no further from their curves than they must be"
    assert all(label.box.left > 300 for label in there)
    for one, other in itertools.combinations(there, 2):
        assert not one.box.overlaps(other.box)
        assert one.leader is not None
        assert other.leader is not None
        assert not cross(one.leader, other.leader)


def test_levels_are_spread_no_further_than_they_must() -> None:
    assert labels.spread([10.0, 0.0, 100.0, 11.0], 14) == [pytest.approx(x) for x in (7, -7, 100, 21)]
    assert labels.spread([], 14) == []


@pytest.mark.parametrize(("log", "upright"), [(False, False), (True, False), (False, True), (True, True)])
def test_pixels_and_values(log: bool, upright: bool) -> None:
    axis = PixelAxis.of([3.0, 12.0, 5.0], 640, 24, log=log, upright=upright)
    assert axis.at(3.0) == pytest.approx(616 if upright else 24)
    assert axis.at(12.0) == pytest.approx(24 if upright else 616)
    assert axis.at(6.0) == pytest.approx(320) if log else axis.at(7.5) == pytest.approx(320)
    assert axis.value(axis.at(5.0)) == pytest.approx(5.0)
    one = PixelAxis.of([5.0, 5.0], 640, 24, log=log, upright=upright)
    assert one.at(5.0) == pytest.approx(320)


def test_wide_characters_take_twice_as_much() -> None:
    assert labels.width_of("模型") == 2 * labels.width_of("ab")


# ------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all tests here."""
    with chromium() as started:
        yield started


_TEXTS = """
return [...document.querySelectorAll('.mark-text:not(.role-axis-label):not(.role-axis-title) text')]
  .filter(text => text.textContent && !text.closest('.role-axis, .role-legend, .role-title'))
  .map(text => {
    const box = text.getBoundingClientRect();
    return [text.textContent, box.left, box.top, box.right, box.bottom];
  });
"""
_POINTS = """
return [...document.querySelectorAll('.mark-symbol path')]
  .filter(path => !path.closest('.role-legend'))
  .map(path => {
    const box = path.getBoundingClientRect();
    return [box.left, box.top, box.right, box.bottom];
  });
"""


@pytest.fixture(scope="module")
def charts() -> dict[str, plots.Chart]:
    """Of the committed grid of 22 techniques."""
    m = loading.load(TECHNIQUES, OF_TECHNIQUES)
    return {chart.id: chart for chart in plots.all_charts(comparison.compare(m), document._steps(m, TECHNIQUES))}


def drawn(browser: Any, chart: plots.Chart, folder: Path) -> None:
    import vl_convert

    page = folder / "chart.html"
    page.write_text(vl_convert.vegalite_to_html(chart.spec(), bundle=True, renderer="svg"))
    browser.get(page.as_uri())
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "svg .mark-symbol path"))


@pytest.mark.parametrize(("chart", "least"), [("pareto", 11), ("time-to-loss", 18), ("loss", 14)])
def test_no_two_names_of_22_techniques_overlap(
    chart: str, least: int, browser: Any, charts: dict[str, plots.Chart], tmp_path: Path
) -> None:
    drawn(browser, charts[chart], tmp_path)
    texts = [(text, Box(*box)) for text, *box in browser.execute_script(_TEXTS)]
    assert len(texts) >= least
    for (one, box), (other, other_box) in itertools.combinations(texts, 2):
        assert not box.overlaps(other_box), (one, other)
    points = [Box(*box) for box in browser.execute_script(_POINTS)]
    assert len(points) >= least
    if chart != "loss":  # steps of other curves may be beneath a name
        assert not [text for text, box in texts if any(box.overlaps(point) for point in points)]


# ------------------------------------------------------------------------------------ what is drawn


def layers(spec: Any, kind: str) -> list[dict[str, Any]]:
    """All layers of a mark, wherever they are."""
    mark = spec.get("mark")
    own = [spec] if (mark if isinstance(mark, str) else (mark or {}).get("type")) == kind else []
    inner = [each for key in ("layer", "hconcat", "vconcat") for each in spec.get(key, [])]
    return own + [layer for each in inner for layer in layers(each, kind)]


def rows_of(spec: Any, layer: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = spec["datasets"][layer["data"]["name"]]
    return rows


def on_card(gib: float) -> Environment:
    return current("cpu").model_copy(update={"device_type": "cuda", "device_memory_bytes": int(gib * GIB)})


def sizes(peak: float) -> dict[str, Any]:
    """Figures of a trial with that peak, in GiB."""
    parts = {f"memory_{c}_bytes": int(peak * GIB / 4) for c in ("weights", "adapters", "gradients", "activations")}
    return parts | {"peak_memory_bytes": int(peak * GIB), "tokens_per_second": 100.0, "eval_loss": 2.0}


def compared(folder: Path) -> comparison.Comparison:
    return comparison.compare(loading.load(folder))


def test_memory_has_what_was_predicted_and_the_card(small: Small, tmp_path: Path) -> None:
    environment = on_card(24)
    for label, r, predicted in (("baseline", 4, 9.5), ("lora_r=8", 8, 11.0), ("lora_r=9", 9, None)):
        figures = sizes(r + 6) | ({"predicted_peak_memory_bytes": int(predicted * GIB)} if predicted else {})
        keep(Store(tmp_path), small(lora_r=r), label, [2.0], environment=environment, **figures)
    chart = plots.memory(compared(tmp_path))
    assert chart is not None
    spec = chart.spec()
    (ticks,) = layers(spec, "tick")
    assert {(row["technique"], round(row["predicted"], 3)) for row in rows_of(spec, ticks)} == {
        ("baseline", 9.5), ("lora_r=8", 11.0),
    }  # fmt: skip
    (line,) = layers(spec, "rule")
    assert [(row["at"], row["limit"]) for row in rows_of(spec, line)] == [(24.0, "card: 24.00 GiB")]
    assert line["encoding"]["x"]["scale"]["domain"][1] > 24
    assert layers(spec, "text")


def test_memory_of_a_machine_without_a_card_has_no_line(small: Small, tmp_path: Path) -> None:
    keep(Store(tmp_path), small(), "baseline", [2.0], **sizes(10))
    chart = plots.memory(compared(tmp_path))
    assert chart is not None
    spec = chart.spec()
    assert not layers(spec, "rule")
    assert not layers(spec, "tick"), "nothing was predicted"


def test_a_card_far_beyond_all_bars_is_named_only(small: Small, tmp_path: Path) -> None:
    keep(Store(tmp_path), small(), "baseline", [2.0], environment=on_card(140), **sizes(10))
    chart = plots.memory(compared(tmp_path))
    assert chart is not None
    spec = chart.spec()
    assert not layers(spec, "rule")
    assert "Far below the card: 140.00 GiB." in chart.caption


@pytest.mark.parametrize("budgets", [(12 * GIB, 12 * GIB), (12 * GIB, 16 * GIB), (12 * GIB, None)])
def test_a_memory_budget_that_all_have_is_a_line(
    budgets: tuple[int | None, int | None], small: Small, tmp_path: Path
) -> None:
    first, second = budgets
    base = small(memory_budget=first)
    for label, r, budget in (("baseline", 4, first), ("lora_r=8", 8, second)):
        keep(Store(tmp_path), small(lora_r=r, memory_budget=budget), label, [2.0], baseline_id=base.id, **sizes(r))
    chart = plots.memory(compared(tmp_path))
    assert chart is not None
    spec = chart.spec()
    lines = [row["limit"] for line in layers(spec, "rule") for row in rows_of(spec, line)]
    assert lines == (["memory budget: 12.00 GiB"] if first == second else [])


def test_an_effect_of_a_ten_thousandth_looks_like_none(small: Small, tmp_path: Path) -> None:
    for label, r, peak in (("baseline", 4, 1.0), ("lora_r=8", 8, 1.0003)):
        keep(Store(tmp_path), small(lora_r=r), label, [2.0], **sizes(peak))
    chart = plots.effects(compared(tmp_path))
    assert chart is not None
    panel = chart.spec()["hconcat"][0]
    (dots,) = [layer for layer in panel["layer"] if layer["mark"]["type"] == "point"]
    x = dots["encoding"]["x"]
    assert {0.99, 1.0, 1.01} <= {*x["axis"]["values"]}
    assert x["scale"]["domain"] == pytest.approx([1 / 1.01, 1.01]), "what is negligible"


@pytest.mark.parametrize("log", [False, True])
def test_one_wide_interval_presses_nothing_together(log: bool) -> None:
    """Its line goes on at the frame; the others are seen whole."""

    def extent(*wide: float) -> Extent:
        rows = [(0.1, 0.05, 0.15), (0.2, 0.1, 0.3), (0.3, 0.2, 0.4), (0.2, *wide), (0.3, None, None)]
        data = pandas.DataFrame(rows, columns=["at", "low", "high"]).astype(float)
        return Extent.of(
            data.map(math.exp) if log else data, ("at", "low", "high"), holds=(1.0,) if log else (0.0,), log=log
        )

    def on_line(*values: float) -> Any:
        return pytest.approx([math.exp(value) for value in values] if log else values)

    usual = extent(0.05, 0.35)
    assert ([usual.least, usual.most], usual.cuts) == (on_line(0.0, 0.4), False)
    cut = extent(-3.0, 4.0)
    assert ([cut.least, cut.most], cut.cuts) == (on_line(-0.3, 0.6), True)


def test_what_is_learnt_and_forgotten_is_readable_next_to_a_wide_interval(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for r in (4, 8, 9, 10):
        keep(Store(tmp_path), small(lora_r=r), "baseline" if r == 4 else f"lora_r={r}", [2.0], **sizes(r))
    ends = [(-0.4, -0.45, -0.35), (-0.3, -0.35, -0.25), (-0.5, -0.55, -0.45), (-0.242, -2.975, 2.492)]
    changes = {config: Estimate("eval_loss", *each, 8, "stories", 0.5, "better") for config, each in enumerate(ends)}
    monkeypatch.setattr(Measurements, "learnt", lambda m, metric, configs: changes)
    drawn = plots.forgetting(compared(tmp_path))
    assert drawn is not None
    assert "Intervals that go on at the frame" in drawn.caption
    spec = drawn.spec()
    assert all(rule["mark"]["clip"] for rule in layers(spec, "rule") if "tooltip" in rule["encoding"])
    (points,) = layers(spec, "point")
    low, high = points["encoding"]["x"]["scale"]["domain"]
    assert 0.3 * (high - low) < 0.5 - 0.242, "the points take a part of the picture"


def trained(small: Small, folder: Path, steps: int) -> tuple[comparison.Comparison, pandas.DataFrame]:
    """Two techniques that trained for so many steps, at 100 and 50 tokens a second."""
    for label, r, speed in (("baseline", 4, 100.0), ("lora_r=8", 8, 50.0)):
        figures = sizes(r) | {"tokens_per_second": speed}
        keep(Store(folder), small(lora_r=r), label, [2.0, 2.1], rates=[speed] * steps, **figures)
    m = loading.load(folder)
    return comparison.compare(m), document._steps(m, folder)


@pytest.mark.parametrize(("steps", "smoothed"), [(60, True), (12, True), (11, False), (4, False)])
def test_losses_of_enough_steps_are_smoothed(steps: int, smoothed: bool, small: Small, tmp_path: Path) -> None:
    chart = plots.loss_curves(*trained(small, tmp_path, steps))
    assert chart is not None
    spec = chart.spec()
    lines = layers(spec, "line")
    fields = {line["encoding"]["y"]["field"] for line in lines}
    assert fields == ({"loss", "smooth"} if smoothed else {"loss"})
    assert len(lines) == (4 if smoothed else 2), "a panel over tokens and one over seconds"
    assert ("strong ones the mean" in chart.caption) == smoothed
    assert any(line["mark"].get("point") for line in lines) != smoothed
    texts = [row["name"] for text in layers(spec, "text") for row in rows_of(spec, text)]
    assert sorted(texts) == sorted(["baseline", "lora_r=8"] * 2), "names at the ends, in both"
    assert not json.dumps(spec).count('"legend": {')
    if smoothed:
        (front,) = [line for line in lines[:2] if line["encoding"]["y"]["field"] == "smooth"]
        window = max(3, steps // 10)
        last = max(rows_of(spec, front), key=lambda row: (row["technique"] == "baseline", row["step"]))
        assert last["smooth"] == pytest.approx(sum(3.0 - i / 10 for i in range(steps - window + 1, steps + 1)) / window)
        assert len([r for r in rows_of(spec, front) if r["technique"] == "baseline"]) == steps - window + 1


def test_time_to_a_loss_is_a_bar_for_each_technique(small: Small, tmp_path: Path) -> None:
    trained(small, tmp_path, 60)
    keep(Store(tmp_path), small(lora_r=16), "higher", [2.0, 2.1], rates=[200.0] * 20, **sizes(3))
    m = loading.load(tmp_path)
    chart = plots.time_to_loss(comparison.compare(m), document._steps(m, tmp_path))
    assert chart is not None
    spec = chart.spec()
    assert chart.id == "time-to-loss"
    reached, never = layers(spec, "bar")
    # 60 steps of 100 tokens.
    unit = 60 if "minutes" in layers(spec, "bar")[0]["encoding"]["x"]["title"] else 1
    times = {row["technique"]: unit * row["time"] for row in rows_of(spec, reached)}
    assert times == {"baseline": pytest.approx(60), "lora_r=8": pytest.approx(120)}
    (short,) = rows_of(spec, never)
    assert (short["technique"], short["kept"]) == ("higher", None)
    assert short["reached"].startswith("not in ")
    assert spec["title"] == "Time to a training loss of -2.750 nats"


def test_a_loss_that_rises_again_has_a_longer_line(small: Small, tmp_path: Path) -> None:
    compared_, steps = trained(small, tmp_path, 40)
    m = compared_.measurements
    (other,) = m.configs.index[m.configs["label"] == "lora_r=8"]
    # It is as low as the baseline's end after 20 steps, rises for five, and ends lower.
    course = [3.0 - i / 4 for i in range(1, 21)] + [3.0] * 5 + [-2.0] * 15
    steps.loc[steps["config"] == other, "loss"] = course
    chart = plots.time_to_loss(compared_, steps)
    assert chart is not None
    spec = chart.spec()
    (line,) = layers(spec, "rule")
    of = {row["technique"]: row for row in rows_of(spec, line)}
    assert of["baseline"]["time"] == of["baseline"]["kept"]
    assert of["lora_r=8"]["kept"] > of["lora_r=8"]["time"] + 0.1


def test_trainings_of_few_steps_show_their_loss_against_their_time(small: Small, tmp_path: Path) -> None:
    chart = plots.time_to_loss(*trained(small, tmp_path, 4))
    assert chart is not None
    spec = chart.spec()
    (points,) = layers(spec, "point")
    assert {row["technique"]: row["x"] for row in rows_of(spec, points)} == {
        "baseline": pytest.approx(4), "lora_r=8": pytest.approx(8),
    }  # fmt: skip


def test_without_losses_there_is_no_time_to_one(small: Small, tmp_path: Path) -> None:
    keep(Store(tmp_path), small(), "baseline", [], rates=[100.0] * 4, peak_memory_bytes=1, tokens_per_second=1.0)
    m = loading.load(tmp_path)
    of = comparison.compare(m), document._steps(m, tmp_path)
    assert plots.time_to_loss(*of) is None
    assert plots.loss_curves(*of) is None


# ------------------------------------------------------------------------------------ ladders

RUNGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("baseline", {}),
    ("gradient_checkpointing=true", {"gradient_checkpointing": True}),
    ("optimizer=adamw_bnb_8bit", {"optimizer": "adamw_bnb_8bit"}),
    ("micro_batch_size=1", {"micro_batch_size": 1}),
)


def climbed(small: Small, folder: Path, prefix: str = "", factor: str = "f", environment: Any = None) -> None:
    """Four rungs, recorded in no order; the first two end out of memory."""
    changes: dict[str, Any] = {}
    rungs = []
    for number, (label, more) in enumerate(RUNGS):
        changes = changes | more
        rungs.append((number, label if label == "baseline" else f"{prefix}{label}", changes))
    for number, label, keys in (rungs[2], rungs[0], rungs[3], rungs[1]):
        figures: dict[str, Any] = sizes(20.0 - 4 * number)
        if number < 2:
            figures = {"status": "oom", "oom_reached_bytes": (30 - number) * GIB, "oom_requested_bytes": GIB}
        keep(Store(folder), small(**keys), label, [], environment=environment or on_card(24),
             **{"factor": None if label == "baseline" else factor} | figures)  # fmt: skip


@pytest.mark.parametrize(("prefix", "factor"), [("+ ", "f"), ("", "f")])
def test_a_ladder_is_drawn_until_it_fits(prefix: str, factor: str, small: Small, tmp_path: Path) -> None:
    climbed(small, tmp_path, prefix, factor)
    chart = plots.ladder(compared(tmp_path))
    assert chart is not None
    spec = chart.spec()
    bars = [row for bar in layers(spec, "bar") for row in rows_of(spec, bar)]
    states = {row["technique"]: (row["state"], round(row["size"], 2), row["needs"]) for row in bars}
    assert states == {
        "baseline": ("unknown", 31.0, "at least 31.00 GiB, out of memory"),
        f"{prefix}gradient_checkpointing=true": ("unknown", 30.0, "at least 30.00 GiB, out of memory"),
        f"{prefix}optimizer=adamw_bnb_8bit": ("first", 12.0, "12.00 GiB, the first that fits"),
        f"{prefix}micro_batch_size=1": ("fits", 8.0, "8.00 GiB"),
    }
    (unfilled,) = [bar for bar in layers(spec, "bar") if bar["mark"].get("fillOpacity") == 0]
    assert {row["state"] for row in rows_of(spec, unfilled)} == {"unknown"}
    rungs = [name for name in unfilled["encoding"]["y"]["scale"]["domain"] if name.strip()]
    assert rungs == ["baseline", *(f"{prefix}{label}" for label, _ in RUNGS[1:])]
    (line,) = layers(spec, "rule")
    assert [row["at"] for row in rows_of(spec, line)] == [24.0]


def test_levels_of_a_factor_called_ladder_are_rungs(small: Small, tmp_path: Path) -> None:
    for number, r in ((10, 4), (2, 64), (1, 128), (9, 8)):
        figures = {"factor": "ladder"} | sizes(r / 4 + 1)
        keep(Store(tmp_path), small(lora_r=r, lora_alpha=1), f"rung {number}, lora_r={r}", [2.0], **figures)
    chart = plots.ladder(compared(tmp_path))
    assert chart is not None
    spec = chart.spec()
    (bars,) = layers(spec, "bar")
    assert [name.split(",")[0] for name in bars["encoding"]["y"]["scale"]["domain"]] == [
        "rung 1", "rung 2", "rung 9", "rung 10",
    ]  # fmt: skip
    assert not layers(spec, "rule")


def test_single_changes_and_combinations_are_no_ladder(
    charts: dict[str, plots.Chart], small: Small, tmp_path: Path
) -> None:
    assert "ladder" not in charts
    options = {"gradient_checkpointing": True, "optimizer": "adamw_bnb_8bit", "micro_batch_size": 1}
    for number, chosen in enumerate(itertools.product([False, True], repeat=3)):
        keys = dict(itertools.compress(options.items(), chosen))
        keep(Store(tmp_path), small(**keys), "baseline" if not keys else f"{number}", [2.0], **sizes(9.0 - number))
    assert plots.ladder(compared(tmp_path)) is None


def test_the_longest_chain() -> None:
    a, b, c = {"x": 1}, {"x": 1, "y": 2}, {"x": 1, "y": 2, "z": None}
    assert ladder_plot.longest_chain({5: c, 1: a, 2: b, 9: {"w": 1}}) == [1, 2, 5]
    assert ladder_plot.longest_chain({1: a, 2: b, 3: {"y": 2}}) == [], "two ways of two"
    assert ladder_plot.longest_chain({1: a, 2: {"x": 2, "y": 2}, 3: {"w": 1}}) == []
    assert ladder_plot.longest_chain({}) == []


@pytest.mark.parametrize(("first", "second"), [(64, 8), (8, 64)])
def test_a_rung_may_replace_the_level_of_another(first: int, second: int, small: Small, tmp_path: Path) -> None:
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("baseline", {}),
        (f"+ lora_r={first}", {"lora_r": first}),
        (f"+ lora_r={second}", {"lora_r": second}),
        ("+ gradient_checkpointing=true", {"lora_r": second, "gradient_checkpointing": True}),
    )
    for number, (label, keys) in reversed(list(enumerate(kinds))):
        keep(Store(tmp_path), small(**keys), label, [2.0], **sizes(9.0 - number))
    of = compared(tmp_path)
    assert of.measurements.labels(ladder_plot.rungs_of(of)) == [label for label, _ in kinds]


@pytest.mark.parametrize("timed", ["all", "some", "none"])
def test_a_configuration_without_a_speed_is_drawn(timed: str, small: Small, tmp_path: Path) -> None:
    """Without a place among the speeds: a missing one is neither the slowest nor on the front."""
    for number, (label, r) in enumerate((("baseline", 4), ("lora_r=8", 8), ("lora_r=16", 16))):
        speed = 100.0 + number if timed == "all" or (timed == "some" and label != "lora_r=16") else None
        keep(Store(tmp_path), small(lora_r=r), label, [3.0 - number] * 3, peak_memory_bytes=1000 + number,
             eval_loss=3.0 - number, tokens_per_second=speed)  # fmt: skip
    chart = plots.pareto(comparison.compare(loading.load(tmp_path)))
    assert chart is not None
    assert chart.title == ("Memory and loss" if timed == "none" else "Memory, loss and speed")
    drawn = chart.chart.to_dict()
    (rows,) = {json.dumps(each) for each in drawn["datasets"].values() if len(each) == 3 and "front" in each[0]}
    kinds = {row["technique"]: row["front"] for row in json.loads(rows)}
    assert set(kinds) == {"baseline", "lora_r=8", "lora_r=16"}
    assert kinds["lora_r=16"] == ("no speed" if timed == "some" else "on the front")
    (points,) = (layer for layer in drawn["layer"] if "shape" in layer["encoding"])
    assert ("color" in points["encoding"]) == (timed != "none")
    picture = vl_convert.vegalite_to_svg(json.dumps(drawn))
    assert len(re.findall(r'aria-roledescription="point"', picture)) == 3
    assert ("NaN" in picture, "lora_r=16</text>" in picture) == (False, True)
    assert (f'fill="{plots.GREY}"' in picture.split("no speed; technique")[-1].split("/>")[0]) == (timed == "some")


@pytest.mark.parametrize("timed", [True, False])
def test_levels_without_a_speed_have_no_panel_of_speeds(timed: bool, small: Small, tmp_path: Path) -> None:
    for size in (1, 2, 4):
        keys = {"micro_batch_size": size, "gradient_accumulation_steps": 4 // size}
        speed = 100.0 * size if timed else None
        keep(Store(tmp_path), small(**keys), f"micro_batch_size={size}", [3.0], peak_memory_bytes=1000 * size,
             tokens_per_second=speed)  # fmt: skip
    chart = plots.levels(comparison.compare(loading.load(tmp_path)))
    assert chart is not None
    picture = vl_convert.vegalite_to_svg(json.dumps(chart.chart.to_dict()))
    assert ("NaN" in picture, "Tokens/s" in picture) == (False, timed)
