"""What a grid is said to show beforehand is what it shows, and its size is chosen accordingly."""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy
import pandas
import pytest
from conftest import SMALL
from rows import keep

from harness.analysis import crossed, forecast, loading, sizing, stats, timed
from harness.analysis.forecast import Known, Plan
from harness.analysis.pilot import PILOT, Variances
from harness.analysis.sizing import Choices, Cost, Work
from harness.analysis.stats import Noise
from harness.cli.beforehand import seconds_of
from harness.errors import InputError
from harness.grids import grid
from harness.record import ItemScore
from harness.results.store import Store
from harness.spec.trial import TrialSpec

ROOT = Path(__file__).parents[1]
VARIANCES = Variances(reading=Noise(0.03, 40), story=0.06, seeds=Noise(0.008, 40), seeds_alone=Noise(0.016, 40))
PLAN = Plan(configurations=9, twin=True, visits=3, stories=48, repeats=4, baseline_repeats=4)

# ------------------------------------------------------------------------------------ forecasts


@pytest.mark.parametrize(("visits", "twin"), [(2, False), (3, True)])
def test_speeds_of_the_forecast_size_show_four_times_in_five(visits: int, twin: bool) -> None:
    plan = Plan(9, twin, visits, 0, 1, 1)
    size = math.log1p(float(forecast.smallest_speed_difference(plan, VARIANCES.reading)))
    random = numpy.random.default_rng(0)
    stands_for = pandas.Series([*range(9), *([0] if twin else [])])
    pairs = pandas.DataFrame({"comparison": range(1, 9), "config": range(1, 9), "reference": 0})
    positions = [(trial, block) for trial in stands_for.index for block in range(visits)]
    readings = pandas.DataFrame(positions, columns=["trial", "block"]).assign(visit=True)
    of_config = numpy.where(readings["trial"].map(stands_for) > 0, size, 0.0)
    p = []
    for _ in range(50):
        drift = random.normal(0, 0.2, visits)[readings["block"]]
        noise = random.normal(0, VARIANCES.reading.sigma, len(readings))
        speed = numpy.exp(of_config + drift + noise)
        known = readings.assign(tokens_per_second=speed, reference_seconds=numpy.nan)
        effects = timed.effects(pairs, "tokens_per_second", known, pandas.DataFrame(), stands_for)
        p += effects.table["p"].tolist()
    assert numpy.mean(numpy.asarray(p) < stats.ALPHA) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(("stories", "repeats", "baseline_repeats"), [(32, 1, 1), (200, 1, 3), (48, 4, 4), (256, 2, 2)])
def test_losses_of_the_forecast_size_show_four_times_in_five(stories: int, repeats: int, baseline_repeats: int) -> None:
    plan = Plan(9, True, 3, stories, repeats, baseline_repeats)
    size = float(forecast.smallest_loss_difference(plan, VARIANCES))
    count = 4000
    random = numpy.random.default_rng(0)
    alone = repeats == 1 and baseline_repeats > 1
    of_seed = (VARIANCES.seeds_alone if alone else VARIANCES.seeds).sigma * math.sqrt(2)
    losses = (
        size + random.normal(0, of_seed, (count, repeats, 1)) + random.normal(0, VARIANCES.story, (count, 1, stories))
    )
    # The noise between seeds is estimated from other trials too.
    df = (repeats - 1) * 8 if repeats > 1 else baseline_repeats - 1 if alone else VARIANCES.seeds.df
    known = (of_seed**2 / repeats * random.chisquare(df, count) / df, 0.0, df)
    p = crossed.of_tables(losses, numpy.ones((count, stories)), known)["p"]
    assert numpy.mean(p < stats.ALPHA) == pytest.approx(0.8, abs=0.08)


def test_more_of_what_is_named_shows_the_negligible() -> None:
    text = forecast.describe(Plan(9, True, 3, 32, 20, 20), Known(VARIANCES))[1]
    named = re.search(r"; 0.01 nats needs (\d+) stories \(val_set_size\)$", text)
    assert named
    enough = [
        forecast.smallest_loss_difference(Plan(9, True, 3, int(named[1]) + n, 20, 20), VARIANCES) for n in (0, -1)
    ]
    assert enough[0] <= 0.01 < enough[1]


def test_nothing_is_printed_of_what_is_not_measured() -> None:
    assert forecast.describe(Plan(9, True, 0, 0, 1, 1), Known()) == []
    assert forecast.describe(Plan(1, False, 3, 32, 1, 1), Known()) == [], "nothing to compare with"
    speed, source = forecast.describe(Plan(9, True, 3, 0, 1, 1), Known(PILOT, frozenset({"reading"}), 22))
    assert speed.startswith("speed ")
    assert source.endswith("; from 22 recorded trials"), "the pilot has no part in it"
    source = forecast.describe(Plan(9, True, 3, 32, 1, 1), Known(PILOT, frozenset({"reading"}), 22))[-1]
    assert source.endswith("; speeds from 22 recorded trials, the rest from pilot measurements of SmolLM2-135M")
    assert forecast.describe(Plan(9, True, 1, 0, 1, 1), Known())[0].startswith("speed nothing")


def test_the_pilot_is_that_of_the_committed_rows() -> None:
    """Within a factor: constants are good for a plan, and rows are measured anew."""
    m = loading.load(ROOT / "results/techniques")
    known = forecast.variances_of(m)
    assert {"story", "reading"} <= known.recorded
    assert known.trials == len(m.trials)
    assert known.variances.reading.sigma == pytest.approx(PILOT.reading.sigma, rel=1)
    assert known.variances.story == pytest.approx(PILOT.story, rel=1)
    assert forecast.variances_of(None) == Known(PILOT)


# ------------------------------------------------------------------------------------ sizes

WORK = Work(each_repeat=100.0, each_story=2.0, each_story_before=0.5, each_visit=60.0)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30min", 1800), ("2h", 7200), ("1.5h", 5400)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "0min", "-3min", "3 days", "1e3s", "nan s", "h"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="give one like 90s, 30min"):
        seconds_of(text)


def score(size: sizing.Size) -> float:
    return float(forecast.ratio_to_negligible(size.speed, size.loss))


def test_no_size_that_fits_shows_more() -> None:
    choices = Choices(sizing.story_counts(32, 224))
    size, fits = sizing.choose(3600, PLAN, VARIANCES, WORK, choices)
    assert fits
    assert size.seconds == WORK.seconds(size.visits, size.repeats, size.stories) <= 3600
    for visits in range(3, 30):
        for repeats in range(1, 15):
            for stories in (32, 64, 128, 224):
                if WORK.seconds(visits, repeats, stories) <= 3600:
                    speed = float(forecast.smallest_speed_difference(PLAN, VARIANCES.reading, visits))
                    loss = float(forecast.smallest_loss_difference(PLAN, VARIANCES, stories, repeats))
                    assert score(size) <= forecast.ratio_to_negligible(speed, loss) + 1e-9
    more, _ = sizing.choose(7200, PLAN, VARIANCES, WORK, choices)
    assert score(more) < score(size)


def test_time_that_decides_nothing_is_not_spent() -> None:
    plan = Plan(9, True, 3, 0, 1, 1)
    size, fits = sizing.choose(1e6, plan, VARIANCES, WORK, Choices([0]))
    assert fits
    assert (size.repeats, size.stories) == (1, 0), "without losses, repeats decide nothing"
    assert size.speed <= 0.02 < float(forecast.smallest_speed_difference(plan, VARIANCES.reading, size.visits - 1))
    assert math.isnan(size.loss)


def test_too_short_a_time_names_the_smallest() -> None:
    size, fits = sizing.choose(60, PLAN, VARIANCES, WORK, Choices([32, 64]))
    assert not fits
    assert (size.visits, size.repeats, size.stories) == (3, 1, 32)


def test_a_size_reads_well() -> None:
    size = sizing.Size(visits=4, repeats=1, stories=64, seconds=1590.0, speed=0.021, loss=0.03)
    assert size.describe(1800) == "30 min: 4 visits, 1 repeat, 64 stories: speed 2.1%, loss 0.03 nats; about 27 min"


def test_story_counts_end_with_all_there_are() -> None:
    assert sizing.story_counts(32, 224) == [32, 48, 64, 96, 128, 192, 224]
    assert sizing.story_counts(32, 32) == [32]


def test_the_work_of_a_grid_counts_every_trial(tmp_path: Path) -> None:
    base = ", ".join(f"{key}: {value}" for key, value in SMALL.items())
    (tmp_path / "g.yml").write_text(f"name: g\nbase: {{{base}}}\nvary: {{lora_r: [8]}}\nbaseline_repeats: 3\n")
    trials = grid.load(tmp_path / "g.yml", repeats=1).trials
    cost = Cost(start=2.0, step=1.0, steps=4, story=0.5)
    costs = {sizing.cost_key(trial.spec): cost for trial in trials}
    assert len(costs) == 2, "a seed and a second run cost the same"
    work = sizing.work_of(trials, costs, visit_seconds=4.0, in_turn=False)
    trained = 3 * (2 + 4 * 1.0 + 10 * 0.5) + 2 * (2 + 4 * 1.0 + 10 * 0.5)
    timed_steps = 3 * 3 * (2 + 1 + 6 * 1.0)
    before = 10 * 0.5
    assert work.seconds(3, 1, 10) == trained + timed_steps + before
    one = 2 + 4 * 1.0 + 10 * 0.5
    assert work.seconds(3, 2, 10) == work.seconds(3, 1, 10) + one, "the baseline was repeated, and runs twice once"
    in_turn = sizing.work_of(trials, costs, visit_seconds=4.0, in_turn=True)
    assert in_turn.seconds(3, 1, 10) == trained + 2 * timed_steps + before, "the baseline takes as many steps"


def test_costs_of_recorded_trials_add_up(tmp_path: Path) -> None:
    m = loading.load(ROOT / "results/techniques")
    costs = sizing.recorded_costs(m, sizing.trained_seconds(Store(ROOT / "results/techniques")))
    ok = m.trials[m.trials["step_seconds_median"].notna()]
    assert len(costs) == ok.loc[~ok["twin"], "config"].nunique()
    baseline = costs[sizing.cost_key(m.spec(int(m.baseline or 0)))]
    stories = int(ok["evaluated_stories"].iloc[0])
    total = baseline.start + baseline.steps * baseline.step + stories * baseline.story
    assert total == pytest.approx(ok.loc[ok["config"] == m.baseline, "trial_seconds"].median(), rel=0.5)


def test_trials_that_were_never_timed_cost_what_they_took(small: Callable[..., TrialSpec], tmp_path: Path) -> None:
    store = Store(tmp_path)
    took = {"load_seconds": 5.0, "optimizer_steps": 4, "evaluated_stories": 10}
    keep(store, small(), "baseline", [3.0] * 10, step_seconds_median=1.0, trial_seconds=19.0, rates=[50] * 4, **took)
    # Later repeats are never timed, and steps of a trial are slower under its memory tracker.
    later = {"started_at": dt.datetime(2026, 1, 2, tzinfo=dt.UTC)}
    keep(store, small(seed=1), "baseline", [3.0] * 10, trial_seconds=23.0, rates=[50] * 4, **took, **later)
    keep(store, small(lora_r=8), "lora_r=8", [3.0] * 10, trial_seconds=115.0, rates=[4, 5, 5, 6], **took)
    m = loading.load(tmp_path)
    costs = sizing.recorded_costs(m, sizing.trained_seconds(store))
    timed, untimed = (costs[sizing.cost_key(spec)] for spec in (small(), small(lora_r=8)))
    assert (timed.step, timed.story) == (1.0, 1.0)
    assert (untimed.step, untimed.steps, untimed.story) == (20.0, 4, 3.0)


def test_general_passages_and_questions_cost_the_same_at_any_number_of_stories(
    small: Callable[..., TrialSpec], tmp_path: Path
) -> None:
    """Of 25 s, 20 were for evaluation: of 10 stories, 20 passages and 10 questions, half a second each."""
    store = Store(tmp_path)
    took = {"load_seconds": 1.0, "optimizer_steps": 4, "step_seconds_median": 1.0, "trial_seconds": 25.0}
    scores = tuple(ItemScore(task="t", item=i, when="after", metric="acc", score=1.0) for i in range(10))
    general = {"measure_forgetting": True, "general_samples": 20}
    forgets, asked = small(**general), small(**general, evaluate_tasks=["story-questions"])
    keep(store, forgets, "baseline", [3.0] * 10, evaluated_stories=10, **took | {"trial_seconds": 20.0})
    keep(store, asked, "asked", [3.0] * 10, evaluated_stories=10, tasks=scores, **took)
    keep(store, small(val_set_size=0), "no story", [], **took)
    costs = sizing.recorded_costs(loading.load(tmp_path), sizing.trained_seconds(store))
    of = {spec: costs[sizing.cost_key(spec)] for spec in (forgets, asked, small(val_set_size=0))}
    assert [(cost.start, cost.story, cost.general) for cost in of.values()] == [(2, 0.5, 10), (2, 0.5, 15), (2, 0, 20)]


# ------------------------------------------------------------------------------------ on the command line

GRID = """
name: g
base: {base_model: BASE, datasets: [{path: storyteller}], train_samples: 8, val_set_size: 32}
vary: {lora_r: [8]}
visits: VISITS
"""
Ask = Callable[..., tuple[int, str, str]]


def test_a_dry_run_says_what_could_be_shown(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "g.yml").write_text(GRID.replace("BASE", "smollm2-135m-instruct").replace("VISITS", "3"))
    code, output, _ = ask("run", "g.yml", "--dry-run")
    assert code == 0
    assert "can show: speed " in output
    assert "(3 visits)" in output
    assert "(32 stories, 1 seed)" in output
    assert "pilot measurements of SmolLM2-135M" in output
    lines = output[output.index("can show") :].splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert all(line.startswith("          ") for line in lines[1:4]), "under what it belongs to, and no word left over"


@pytest.mark.parametrize(("visits", "shown"), [("0", False), ("3", True)])
def test_random_weights_have_no_losses_to_show(ask: Ask, tmp_path: Path, visits: str, shown: bool) -> None:
    (tmp_path / "g.yml").write_text(GRID.replace("BASE", "random:tiny").replace("VISITS", visits))
    _, output, _ = ask("run", "g.yml", "--dry-run")
    assert ("can show: speed" in output) == shown
    assert "loss" not in output


def test_nothing_is_compared_where_no_trial_has_the_values_of_base(ask: Ask, tmp_path: Path) -> None:
    product = GRID.replace("BASE", "random:tiny").replace("VISITS", "3").replace("[8]", "[4, 8]") + "design: grid\n"
    for base, warned in (("random:tiny, lora_r: 4", False), ("random:tiny, lora_r: 16", True)):
        (tmp_path / "g.yml").write_text(product.replace("random:tiny", base))
        _, output, _ = ask("run", "g.yml", "--dry-run")
        assert ("no trial has the values of base" in output, "can show" in output) == (warned, not warned)
    code, _, errors = ask("run", "g.yml", "--dry-run", "--size", "30min")
    assert code == 2
    assert "no trial has the values of base" in errors


def test_a_size_is_chosen_for_a_dry_run(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "g.yml").write_text(GRID.replace("BASE", "smollm2-135m-instruct").replace("VISITS", "3"))
    cost = Cost(start=1.0, step=1.0, steps=2, story=0.1)
    monkeypatch.setattr(sizing, "predicted_costs", lambda specs, *_: {sizing.cost_key(s): cost for s in specs})
    monkeypatch.setattr("harness.cli.beforehand.predict_trials", lambda *_, **__: None)
    code, output, errors = ask("run", "g.yml", "--dry-run", "--size", "30min")
    assert code == 0, errors
    first = output.splitlines()[0]
    assert first.startswith("30 min: ")
    repeats = int(first.split(" repeat")[0].split()[-1])
    assert f"{1 + 2 * repeats} trials, {1 + 2 * repeats} to run" in output
    stories = first.split(" stories")[0].split()[-1]
    assert f"({stories} stories, " in output, "the grid has what was chosen"
    code, output, errors = ask("run", "g.yml", "--size", "20s")
    assert code == 2
    assert "its smallest size takes about " in errors
    assert not (tmp_path / "results").exists(), "nothing was run"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["--repeats", "2"], "leave --repeats out"),
        (["--until-decided", "4"], "leave --until-decided out"),
        (["--workers", "2"], "leave --workers out"),
    ],
)
def test_size_goes_without_what_it_chooses(ask: Ask, tmp_path: Path, other: list[str], message: str) -> None:
    (tmp_path / "g.yml").write_text(GRID.replace("BASE", "random:tiny").replace("VISITS", "3"))
    code, _, errors = ask("run", "g.yml", "--size", "2h", *other)
    assert code == 2
    assert message in errors
