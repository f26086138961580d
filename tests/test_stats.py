"""Effects and verdicts on data with a known truth."""

from __future__ import annotations

import math

import numpy
import pandas
import pytest
from scipy import stats as scipy_stats

from harness.analysis import stats

FAMILY = 20


def pairs(values: numpy.ndarray) -> tuple[pandas.Series, pandas.Series]:
    """One row of `values` per comparison, one column per pair."""
    comparisons = numpy.repeat(numpy.arange(values.shape[0]), values.shape[1])
    return pandas.Series(values.ravel()), pandas.Series(comparisons)


def verdicts(values: numpy.ndarray, floor: float | None = None, negligible: float = 0.0) -> pandas.DataFrame:
    return stats.verdicts(stats.paired(*pairs(values)), "higher", negligible, floor)


def test_intervals_and_p_values_are_students() -> None:
    values = numpy.array([[0.5, 0.1, 0.6, 0.2], [0.0, -0.3, 0.1, 0.1]])
    effects = stats.paired(*pairs(values))
    for row, given in zip(effects.itertuples(), values, strict=True):
        expected = scipy_stats.ttest_1samp(given, 0)
        low, high = expected.confidence_interval(0.95)
        assert (row.low, row.high, row.p) == pytest.approx((low, high, expected.pvalue))
        assert row.n == 4


def test_welch_is_scipys() -> None:
    a, b = numpy.array([5.0, 5.2, 4.9]), numpy.array([4.1, 4.6, 4.0, 4.3])
    columns = [pandas.DataFrame({"mean": [x.mean()], "var": [x.var(ddof=1)], "count": [len(x)]}) for x in (a, b)]
    row = stats.welch(*columns).iloc[0]
    expected = scipy_stats.ttest_ind(a, b, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert (row.p, row.low, row.high) == pytest.approx((expected.pvalue, low, high))


def test_one_pair_has_an_effect_and_no_interval() -> None:
    row = verdicts(numpy.array([[0.7]])).iloc[0]
    assert row.effect == 0.7
    assert math.isnan(row.low)
    assert math.isnan(row.p)
    assert row.verdict == "not distinguishable"
    assert stats.paired(pandas.Series([math.nan]), pandas.Series([0])).empty


def test_exact_figures_need_one_pair() -> None:
    differences, by = pairs(numpy.array([[0.0], [-0.3], [0.002]]))
    effects = stats.verdicts(stats.exact(differences, by), "lower", 0.01)
    assert effects["verdict"].tolist() == ["same", "better", "same"]


def test_holm_is_the_step_down_procedure() -> None:
    adjusted = stats.holm(pandas.Series([0.01, 0.04, 0.03, 0.005, math.nan]))
    assert adjusted.tolist()[:4] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert math.isnan(adjusted[4])


def test_false_differences_are_rare() -> None:
    """Family-wise: families of 20 null comparisons at n = 6, each with a Student's t of its own."""
    generator = numpy.random.default_rng(1)
    wrong = 0
    for _ in range(1000):
        effects = verdicts(generator.normal(0.0, 0.02, (FAMILY, 6)))
        wrong += bool((effects["verdict"] != "not distinguishable").any())
    assert wrong / 1000 <= 0.06


def grid_of_speeds(
    generator: numpy.random.Generator, true_effects: list[float], repeats: int, with_floor: bool
) -> pandas.DataFrame:
    """Verdicts on a grid: each trial has 2 % of noise, each repeat a drift of 10 %, and the baseline runs twice."""
    levels = numpy.array([0.0, 0.0, *true_effects])
    values = generator.normal(0.0, 0.02, (len(levels), repeats)) + levels[:, None]
    values += generator.normal(0.0, 0.1, repeats)
    treatment = numpy.array([0, 0, *range(1, 1 + len(true_effects))])
    every = pandas.Series(values.ravel())
    noise = stats.noise(
        every,
        pandas.Series(numpy.repeat(treatment, repeats)),
        pandas.Series(numpy.tile(numpy.arange(repeats), len(levels))),
    )
    assert noise is not None
    effects = stats.paired(*pairs(values[2:] - values[:2].mean(axis=0)))
    weights = pandas.Series(1 / repeats + 1 / (2 * repeats), effects.index)
    floor = stats.noise_floor(pandas.Series(values[1] - values[0])) if with_floor else None
    return stats.verdicts(stats.in_blocks(effects, weights, noise), "higher", 0.0, floor)


@pytest.mark.parametrize("with_floor", [False, True])
def test_a_grid_of_equal_trials_shows_no_difference(with_floor: bool) -> None:
    """8,000 null comparisons in 400 grids at n = 6: the share of grids that show a difference."""
    generator = numpy.random.default_rng(2)
    grids = [grid_of_speeds(generator, [0.0] * FAMILY, 6, with_floor)["verdict"] for _ in range(400)]
    wrong = sum(bool(verdict.isin(["better", "worse"]).any()) for verdict in grids)
    assert wrong / 400 <= (0.03 if with_floor else 0.06)


def test_three_per_cent_are_detected_in_two_per_cent_of_noise() -> None:
    generator = numpy.random.default_rng(3)
    effect = [math.log(1.03)]
    seen = [grid_of_speeds(generator, effect, 8, with_floor=True)["verdict"].iloc[0] for _ in range(300)]
    assert seen.count("better") / 300 >= 0.8
    assert "worse" not in seen


def test_noise_is_what_configuration_and_repeat_leave() -> None:
    generator = numpy.random.default_rng(5)
    rows = [
        (config, repeat, 10 * config - 3 * repeat + generator.normal(0.0, 0.5))
        for config in range(30)
        for repeat in range(8)
        if (config + repeat) % 5  # not every configuration is in every repeat
    ]
    frame = pandas.DataFrame(rows, columns=["config", "repeat", "value"])
    noise = stats.noise(frame["value"], frame["config"], frame["repeat"])
    assert noise is not None
    assert noise.df == len(frame) - 30 - 8 + 1
    assert noise.sigma == pytest.approx(0.5, rel=0.1)
    single = frame[frame["repeat"] == 0]
    assert stats.noise(single["value"], single["config"], single["repeat"]) is None


def test_intervals_cover_the_truth() -> None:
    """Loss differences of stories that differ from one another, each seen in three repeats."""
    generator = numpy.random.default_rng(4)
    truth, stories, repeats, times = 0.03, 12, 3, 3000
    of_story = truth + generator.normal(0.0, 0.1, (times, stories, 1))
    seen = (of_story + generator.normal(0.0, 0.05, (times, stories, repeats))).mean(axis=2)
    effects = stats.paired(*pairs(seen))
    assert 0.93 <= ((effects["low"] <= truth) & (truth <= effects["high"])).mean() <= 0.97


def test_nothing_below_the_noise_floor_is_a_difference() -> None:
    steady = numpy.array([[0.050, 0.051, 0.049, 0.050]])
    assert verdicts(steady)["verdict"].tolist() == ["better"]
    assert verdicts(steady, floor=0.06)["verdict"].tolist() == ["not distinguishable"]
    assert stats.noise_floor(pandas.Series([0.03, -0.03, 0.03, -0.03])) == pytest.approx(0.015)
    assert stats.noise_floor(pandas.Series([0.04])) == pytest.approx(0.08)
    assert stats.noise_floor(pandas.Series([math.nan])) is None


def test_same_needs_the_whole_interval() -> None:
    narrow, wide = numpy.array([[0.001, 0.002, 0.0, 0.001]]), numpy.array([[0.03, -0.03, 0.02, -0.02]])
    assert verdicts(narrow, negligible=0.02)["verdict"].tolist() == ["same"]
    assert verdicts(wide, negligible=0.02)["verdict"].tolist() == ["not distinguishable"]
    assert verdicts(narrow, floor=0.05, negligible=0.02)["verdict"].tolist() == ["not distinguishable"]
