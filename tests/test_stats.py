"""Effects and verdicts on data with a known truth."""

from __future__ import annotations

import math

import numpy
import pandas
import pytest
from scipy import stats as scipy_stats

from harness.analysis import compare_runs, crossed, power, stats, timed, words
from harness.analysis.crossed import NO_SEED_BETWEEN, SeedNoise
from harness.analysis.estimate import Estimate
from harness.analysis.family import NO_ERRORS, Effects, Family, judge
from harness.analysis.undecided import with_power
from harness.metrics import METRICS

FAMILY = 20


def pairs(values: numpy.ndarray) -> tuple[pandas.Series, pandas.Series]:
    """One row of `values` per comparison, one column per pair."""
    comparisons = numpy.repeat(numpy.arange(values.shape[0]), values.shape[1])
    return pandas.Series(values.ravel()), pandas.Series(comparisons)


def alone(table: pandas.DataFrame, basis: str = "repeats") -> Effects:
    """Effects whose errors have nothing in common."""
    return Effects(table.assign(basis=basis), NO_ERRORS)


def verdicts(values: numpy.ndarray, floor: float | None = None, negligible: float = 0.0) -> pandas.DataFrame:
    return judge(alone(stats.paired(*pairs(values))), "higher", negligible, floor)


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
    effects = judge(alone(stats.exact(differences, by), "exact"), "lower", 0.01)
    assert effects["verdict"].tolist() == ["same", "better", "same"]


def test_a_family_of_independent_comparisons_is_judged_as_sidak_says() -> None:
    effects = alone(stats.in_blocks(pandas.DataFrame({"effect": [0.0] * FAMILY, "n": 3}), 1.0, stats.Noise(1.0, 10**6)))  # type: ignore[arg-type]
    independent = Effects(effects.table.assign(pooled="none"), NO_ERRORS)
    assert Family(independent).level() == pytest.approx(1 - 0.95 ** (1 / FAMILY), rel=0.1)
    one = Effects(effects.table.iloc[:1], NO_ERRORS)
    assert Family(one).level() == stats.ALPHA
    for count in range(2, 12):
        assert Family(Effects(independent.table.iloc[:count], NO_ERRORS)).level() >= stats.ALPHA / count
    p = Family(independent).adjusted(pandas.Series([0.5, 0.01, 1e-5, math.nan]))
    assert p.tolist()[:2] == pytest.approx([1.0, 1 - 0.99**FAMILY], rel=0.1)
    assert p[2] <= FAMILY * 1e-5
    assert math.isnan(p[3])


def test_comparisons_that_err_together_need_less() -> None:
    """All with one baseline, whose error is theirs; and the same comparison many times is one comparison."""
    errors = pandas.concat([
        pandas.DataFrame({"comparison": range(FAMILY), "source": "trial", "unit": unit, "error": 1.0})
        for unit in ("baseline", "own")
    ])  # fmt: skip
    errors.loc[errors["unit"] == "own", "unit"] = [f"own {i}" for i in range(FAMILY)]
    table = pandas.DataFrame({"effect": [0.0] * FAMILY, "n": 3, "se": math.sqrt(2), "df": 50.0, "basis": "visits"})
    keys = ["comparison", "source", "unit"]
    shared = Effects(stats.with_intervals(table), errors.set_index(keys)["error"])
    equal = Effects(shared.table, shared.errors[shared.errors.index.get_level_values("unit") == "baseline"])
    levels = [Family(each).level() for each in (alone(shared.table, "visits"), shared, equal)]
    assert levels[0] < 0.95 * levels[1] < levels[2]
    assert levels[2] > 0.01, "what is left is that each has an estimated variance of its own"
    once = Effects(equal.table.assign(pooled="all"), equal.errors)
    assert Family(once).level() == pytest.approx(stats.ALPHA, rel=0.05)


def test_intervals_say_what_verdicts_say() -> None:
    generator = numpy.random.default_rng(13)
    for floor in (None, 0.01, 0.2):
        judged = verdicts(generator.normal(0.03, 0.05, (50, 4)), floor)
        excluded = (judged["low"] > 0) | (judged["high"] < 0)
        assert (excluded == judged["verdict"].isin(["better", "worse"])).all()
        assert (judged.loc[judged["effect"].abs() <= (floor or 0), "p_family"] == 1).all()


def test_false_differences_are_rare() -> None:
    """Family-wise: families of 20 null comparisons at n = 6, each with a Student's t of its own."""
    values = numpy.random.default_rng(1).normal(0.0, 0.02, (1000 * FAMILY, 6))
    p = stats.paired(*pairs(values))["p"].to_numpy().reshape(1000, FAMILY)
    level = judge(alone(stats.paired(*pairs(values[:FAMILY]))), "higher", 0.0)["level"].iloc[0]
    assert 0.03 <= (p < level).any(axis=1).mean() <= 0.07


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
    return judge(alone(stats.in_blocks(effects, noise.sigma**2 * weights, noise)), "higher", 0.0, floor)


@pytest.mark.parametrize("with_floor", [False, True])
def test_a_grid_of_equal_trials_shows_no_difference(with_floor: bool) -> None:
    """2,000 null comparisons in 100 grids at n = 6: the share of grids that show a difference."""
    generator = numpy.random.default_rng(2)
    grids = [grid_of_speeds(generator, [0.0] * FAMILY, 6, with_floor)["verdict"] for _ in range(100)]
    wrong = sum(bool(verdict.isin(["better", "worse"]).any()) for verdict in grids)
    assert wrong <= (6 if with_floor else 11)


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


def test_a_noisier_configuration_has_more_than_the_pooled_noise() -> None:
    """And none has less: what is quiet in three blocks may be so by chance."""
    generator = numpy.random.default_rng(15)
    config, block = (pandas.Series(x) for x in numpy.divmod(numpy.arange(20 * 6), 6))
    values = pandas.Series(generator.normal(0.0, 0.02, 120) * numpy.where(config == 3, 4.0, 1.0))
    noise = stats.noise(values, config, block)
    assert noise is not None
    assert max(noise.larger, key=noise.larger.__getitem__) == 3
    assert 1.3 * noise.sigma < noise.larger[3] < 0.08
    assert min(noise.larger.values()) > noise.sigma
    weights = pandas.Series([1.0, -0.5])
    assert noise.errors(weights, [3, -1]).tolist() == [noise.larger[3], -0.5 * noise.sigma]
    assert stats.Noise(1.0, 2, {3: 2.0}) == stats.Noise(1.0, 2)


def test_two_noisier_configurations_are_rarely_called_different() -> None:
    """Of 22, twice as noisy: with the pooled noise alone, 11 % of families at 4 %."""
    generator = numpy.random.default_rng(16)
    config, block = (pandas.Series(x) for x in numpy.divmod(numpy.arange(22 * 3), 3))
    keys = ["comparison", "source", "unit"]
    sides = [
        (c, f"block {b}", side, sign / 3) for c in range(1, 22) for b in range(3) for side, sign in ((0, -1), (c, 1))
    ]
    weights = pandas.DataFrame(sides, columns=[*keys, "w"]).set_index(keys)["w"]
    false = 0
    for _ in range(60):
        values = pandas.Series(generator.normal(0.0, 1.0, 66) * numpy.where(config > 19, 2.0, 1.0))
        noise = stats.noise(values, config, block)
        assert noise is not None
        means = values.groupby(config).mean()
        errors = noise.errors(weights, weights.index.get_level_values("unit"))
        table = pandas.DataFrame({"effect": means[1:] - means[0], "n": 3})
        table = stats.in_blocks(table, (errors**2).groupby("comparison").sum(), noise)
        judged = judge(Effects(table.assign(basis="visits"), errors), "higher", 0.0)
        false += bool(judged["verdict"].isin(["better", "worse"]).any())
    assert false <= 7


def test_what_is_timed_alone_takes_no_noise_from_the_others() -> None:
    """A search times its trials one by one, and its finalists together."""
    generator = numpy.random.default_rng(17)
    together = [(trial, block) for block in range(3) for trial in range(3)]
    alone_in_block = [(trial, 10 + trial) for trial in range(3, 12)]
    readings = pandas.DataFrame(together + alone_in_block, columns=["trial", "block"]).assign(visit=True)
    readings["tokens_per_second"] = numpy.exp(generator.normal(0, 0.02, len(readings)))
    readings["reference_seconds"] = math.nan
    pair = pandas.DataFrame({"comparison": [0], "reference": [0], "config": [1]})
    configs = pandas.Series(range(12))
    row = timed.effects(pair, "tokens_per_second", readings, pandas.DataFrame(), configs).table.loc[0]
    assert row["df"] == 4
    assert row["pooled"] == "all"


def test_equal_runs_are_rarely_called_different() -> None:
    """The blocks of two runs drift independently, and all configurations of a block together."""
    generator = numpy.random.default_rng(18)
    rows = [(run, block, 8 * run + config) for run in (0, 1) for block in range(3) for config in range(8)]
    readings = pandas.DataFrame(rows, columns=["run", "block", "config"]).assign(visit=True)
    readings["trial"] = readings["config"]
    pairs = pandas.DataFrame({"comparison": range(8), "reference": range(8), "config": range(8, 16)})
    words = []
    for _ in range(40):
        drift = generator.normal(0.0, 0.1, (2, 3))[readings["run"], readings["block"]]
        effects = compare_runs._between_runs(pairs, readings.assign(value=drift + generator.normal(0, 0.03, 48)))
        assert ((effects.errors**2).groupby("comparison").sum() - effects.table["se"] ** 2).abs().max() < 1e-12
        words.append(judge(effects, "higher", 0.02)["verdict"].isin(["better", "worse"]).any())
    assert sum(words) <= 4
    faster = readings.assign(value=math.log(2) * readings["run"] + 0.1 * drift)
    twice = judge(compare_runs._between_runs(pairs, faster), "higher", 0.02)
    assert (twice["verdict"] == "better").all()


def test_runs_are_not_compared_by_ratios_to_their_own_baselines() -> None:
    """A run that is slower throughout would look the same."""
    readings = pandas.DataFrame({"block": [7, 9], "tokens_per_second": [1.0, 2.0], "reference_seconds": [3.0, 4.0]})
    assert compare_runs._numbered(readings, 1)["reference_seconds"].isna().all()


# ------------------------------------------------------------------------------------ seeds and stories


def losses(
    generator: numpy.random.Generator, times: int, seeds: int, stories: int, deviations: tuple[float, float, float]
) -> numpy.ndarray:
    """Differences with mean 0 by comparison, seed and story; deviations of seeds, of stories, and of what is left."""
    between_seeds, between_stories, left = deviations
    return (
        generator.normal(0.0, between_seeds, (times, seeds, 1))
        + generator.normal(0.0, between_stories, (times, 1, stories))
        + generator.normal(0.0, left, (times, seeds, stories))
    )


def as_rows(table: numpy.ndarray, tokens: numpy.ndarray | None = None) -> pandas.DataFrame:
    """One comparison's seeds × stories as rows."""
    seeds, stories = table.shape
    return pandas.DataFrame(
        {
            "comparison": 0,
            "repeat": numpy.repeat(numpy.arange(seeds), stories),
            "story": numpy.tile(numpy.arange(stories), seeds),
            "tokens": numpy.tile(numpy.full(stories, 10) if tokens is None else tokens, seeds),
            "loss": table.ravel(),
        }
    )


def test_losses_have_the_variance_of_two_crossed_factors() -> None:
    """With equal weights that of the textbook: (MS of seeds + MS of stories − MS of the rest) ÷ (seeds × stories)."""
    table = losses(numpy.random.default_rng(6), 1, 4, 7, (0.1, 0.2, 0.05))[0]
    row = crossed.crossed(as_rows(table)).table.iloc[0]
    of_seeds, of_stories = table.mean(axis=1), table.mean(axis=0)
    rest = table - of_seeds[:, None] - of_stories + table.mean()
    squares = 7 * of_seeds.var(ddof=1), 4 * of_stories.var(ddof=1), (rest**2).sum() / (3 * 6)
    assert row["effect"] == pytest.approx(table.mean())
    assert row["se"] ** 2 == pytest.approx((squares[0] + squares[1] - squares[2]) / 28)
    assert (row["n"], row["seeds"], row["df"], row["seed_df"]) == (7, 4, pytest.approx(6), 3)
    assert row["seed_share"] == pytest.approx(squares[0] / 28 / row["se"] ** 2)


def test_losses_are_weighted_by_tokens_over_the_texts_of_every_repeat() -> None:
    tokens = numpy.array([10, 30, 60])
    rows = as_rows(numpy.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]), tokens)
    assert crossed.crossed(rows).table.loc[0, "effect"] == pytest.approx((0.1 + 0.6 + 1.8 + 0.3 + 0.6 + 0.6) / 20)
    without = crossed.crossed(rows.drop(index=5)).table.loc[0]  # the second repeat lacks the third text
    assert without["effect"] == pytest.approx((0.1 + 0.6 + 0.3 + 0.6) / 8)
    assert without["n"] == 2
    one_long = crossed.crossed(as_rows(numpy.array([[0.1, 0.2, 0.3]]), numpy.array([1000, 1, 1]))).table.loc[0]
    assert one_long["df"] < 0.1, "three texts of which one has all tokens vary as one does"


def of_stories(table: numpy.ndarray, noise: SeedNoise | None = None) -> Effects:
    """One comparison's effect."""
    effects = crossed.crossed(as_rows(table), noise)
    return Effects(effects.table.assign(basis="stories"), effects.errors)


def test_errors_of_stories_and_seeds_add_up_to_the_variance() -> None:
    effects = of_stories(losses(numpy.random.default_rng(14), 1, 4, 12, (0.02, 0.1, 0.01))[0])
    assert (effects.errors**2).sum() == pytest.approx(effects.table.loc[0, "se"] ** 2)
    assert set(effects.errors.index.get_level_values("source")) == {"text", "seed"}


@pytest.mark.parametrize("deviations", [(0.010, 0.038, 0.013), (0.010, 0.109, 0.013), (0.004, 0.0, 0.019)])
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_intervals_of_losses_cover_the_truth(seeds: int, deviations: tuple[float, float, float]) -> None:
    """At measured variances; one seed takes the noise of six others. `benchmarks/coverage.py` is the long version."""
    table = losses(numpy.random.default_rng(7), 4000, seeds + (6 if seeds == 1 else 0), 32, deviations)
    known = None
    if seeds == 1:
        table, others = table[:, :1], table[:, 1:]
        means = others.mean(axis=2)
        left = (others - means[:, :, None]).var(axis=1, ddof=1).mean(axis=1)
        known = (means.var(axis=1, ddof=1), left, 5)
    effects = crossed.of_tables(table, numpy.ones((len(table), 32)), known)
    held = (effects["low"] <= 0) & (effects["high"] >= 0)
    assert 0.925 <= held.mean() <= 0.975
    assert (held == (effects["p"] >= stats.ALPHA)).all(), "the p-value says what the interval says"


def test_few_seeds_do_not_multiply_false_differences() -> None:
    """In the tails that a family of twenty needs, two seeds that dominate are the hardest case."""
    table = losses(numpy.random.default_rng(8), 40_000, 2, 16, (0.1, 0.05, 0.01))
    p = crossed.of_tables(table, numpy.ones((len(table), 16)))["p"]
    assert (p < 0.05 / FAMILY).mean() <= 3 * 0.05 / FAMILY


def test_one_seed_takes_the_noise_of_repeated_trials() -> None:
    generator = numpy.random.default_rng(9)
    rows = [
        (config, repeat, story, 10, value)
        for config in range(20)
        for repeat, of_repeat in enumerate(losses(generator, 1, 3 if config else 1, 8, (0.05, 0.0, 0.01))[0])
        for story, value in enumerate(of_repeat)
    ]
    frame = pandas.DataFrame(rows, columns=["config", "repeat", "story", "tokens", "loss"])
    noise = crossed.seed_noise(frame, paired=True)
    assert noise is not None
    assert (noise.mean.sigma, math.sqrt(noise.left)) == (pytest.approx(0.05, rel=0.3), pytest.approx(0.01, rel=0.2))
    single = as_rows(numpy.full((1, 8), 0.02) + generator.normal(0, 0.01, (1, 8)))
    keys = ["comparison", "source", "unit"]
    two = pandas.DataFrame({"comparison": 0, "source": "repeat 0", "unit": ["0", "1"], "w": [-1.0, 1.0]})
    weights = two.set_index(keys)["w"]
    by_itself, among = (crossed.crossed(single, *known).table.loc[0] for known in ((), (noise, weights)))
    of_seeds = crossed.crossed(single, noise, weights).errors.drop("text", level="source")
    assert (of_seeds**2).sum() == pytest.approx(2 * noise.mean.sigma**2), "errors add up to the variance"
    assert among["seed_df"] == noise.mean.df == 36
    assert among["se"] == pytest.approx(math.sqrt(2) * 0.05, rel=0.3)
    assert math.isnan(by_itself["p"]), "one seed alone says nothing of others"
    baseline_alone = frame[(frame["config"] == 1) | (frame["repeat"] == 0)]
    unpaired = crossed.seed_noise(baseline_alone, paired=True)
    assert unpaired is not None
    assert unpaired.mean.df == 2
    assert crossed.seed_noise(frame[frame["repeat"] == 0], paired=True) is None


def test_several_seeds_have_the_noise_of_all_configurations() -> None:
    """Two seeds of a comparison may agree by chance; those of twenty configurations do not."""
    generator = numpy.random.default_rng(19)
    table = losses(generator, 20, 2, 8, (0.05, 0.0, 0.01))
    frame = pandas.concat([as_rows(each).assign(config=config) for config, each in enumerate(table)])
    noise = crossed.seed_noise(frame, paired=True)
    assert noise is not None
    keys = ["comparison", "source", "unit"]
    sides = [(0, f"repeat {r}", str(side), sign / 2) for r in range(2) for side, sign in ((0, -1.0), (1, 1.0))]
    weights = pandas.DataFrame(sides, columns=[*keys, "w"]).set_index(keys)["w"]
    effects = crossed.crossed(as_rows(table[1] - table[0]), noise, weights)
    row = effects.table.loc[0]
    assert (row["seeds"], row["seed_df"], row["pooled"]) == (2, 19, "seeds")
    assert row["se"] ** 2 >= noise.mean.sigma**2
    assert (effects.errors**2).sum() == pytest.approx(row["se"] ** 2)
    equal = crossed.crossed(as_rows(numpy.zeros((2, 8))), noise, weights)
    assert judge(Effects(equal.table.assign(basis="stories"), equal.errors), "lower", 0.01)["verdict"].tolist() == [
        "same"
    ]
    unpaired = crossed.SeedNoise(noise.mean, noise.left, paired=False)
    assert crossed.crossed(as_rows(table[1] - table[0]), unpaired, weights).table.loc[0, "seed_df"] == 19
    three = losses(generator, 1, 3, 8, (0.05, 0.1, 0.01))[0]
    sides = [(0, f"repeat {r}", str(side), sign / 3) for r in range(3) for side, sign in ((0, -1.0), (1, 1.0))]
    weights = pandas.DataFrame(sides, columns=[*keys, "w"]).set_index(keys)["w"]
    assert crossed.crossed(as_rows(three), unpaired, weights).table.loc[0, "seed_df"] == 2, "their own"


def test_one_more_repeat_of_one_configuration_leaves_the_noise_of_the_others() -> None:
    """A single pair of trials gives one degree of freedom, which would make every interval endless."""
    trials = [("baseline", seed) for seed in range(5)] + [(f"r{n}", 0) for n in range(7)]
    random = numpy.random.default_rng(3)

    def noise(extra: list[tuple[str, int]]) -> SeedNoise:
        rows = [
            {"config": config, "repeat": repeat, "story": story, "tokens": 50, "loss": loss}
            for config, repeat in trials + extra
            for of_trial in [random.normal(0, 0.01)]
            for story, loss in enumerate(of_trial + random.normal(0, 0.02, 16))
        ]
        known = crossed.seed_noise(pandas.DataFrame(rows), paired=True)
        assert known is not None
        return known

    four = [(f"r{n}", 1) for n in range(4)]
    for extra, df, paired in (([], 4, False), (four[:1], 5, False), (four, 4, True)):
        known = noise(extra)
        assert (known.mean.df, known.paired) == (df, paired)


@pytest.mark.parametrize(("seeds", "expected"), [(2, 19), (3, 2)])
def test_one_training_computed_in_two_ways_has_its_own_noise_from_three_seeds_on(seeds: int, expected: int) -> None:
    """Two have one degree of freedom: their interval would be a hundred times as wide as what they differ by."""
    table = losses(numpy.random.default_rng(23), 20, seeds, 8, (0.05, 0.0, 0.01))
    noise = SeedNoise(stats.Noise(0.05, 19), 0.0001)
    keys = ["comparison", "source", "unit"]
    sides = [(0, f"repeat {r}", str(side), sign / seeds) for r in range(seeds) for side, sign in ((0, -1.0), (1, 1.0))]
    weights = pandas.DataFrame(sides, columns=[*keys, "w"]).set_index(keys)["w"]
    effects = crossed.crossed(as_rows(table[1] - table[0]), noise, weights, pandas.Index([0]))
    assert effects.table.loc[0, "seed_df"] == expected


def test_intervals_are_the_same_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of linear algebra choose the signs of eigenvectors by the processor that they run on."""
    table = losses(numpy.random.default_rng(29), 5, 3, 16, (0.01, 0.05, 0.05))
    frame = pandas.concat([as_rows(each).assign(comparison=number) for number, each in enumerate(table)])
    effects = crossed.crossed(frame)
    effects = Effects(effects.table.assign(basis="stories"), effects.errors)
    here = judge(effects, "lower", 0.01)[["low", "high", "p_family"]]
    eigh, signs = numpy.linalg.eigh, numpy.array([1, -1, -1, 1, -1])

    def of_another(matrix: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        values, vectors = eigh(matrix)
        return values, vectors * signs

    monkeypatch.setattr(numpy.linalg, "eigh", of_another)
    pandas.testing.assert_frame_equal(judge(effects, "lower", 0.01)[["low", "high", "p_family"]], here, rtol=1e-9)


def test_what_cancels_is_no_part_of_a_deviation() -> None:
    """Stories that all pairs have in common: what is left of their difference is the seeds', with few of them."""
    generator = numpy.random.default_rng(20)
    common = generator.normal(0.0, 0.2, 32)
    rows = pandas.concat([
        as_rows(common + losses(generator, 1, 2, 32, (0.01, 0.0, 0.0))[0]).assign(comparison=number)
        for number in range(2)
    ])  # fmt: skip
    effects = crossed.crossed(rows)
    effects = Effects(effects.table.assign(basis="stories"), effects.errors).combined([{0: 0.5, 1: -0.5}], 2)
    assert effects.table.loc[[0, 1], "seed_share"].max() < 0.3
    assert effects.table.loc[2, "seed_share"] == pytest.approx(1.0)
    assert effects.table.loc[2, "se"] < 0.02


def test_one_seed_is_never_the_same() -> None:
    same = numpy.random.default_rng(10).normal(0.0, 0.0001, (3, 12))
    judged = [judge(of_stories(table, NO_SEED_BETWEEN), "lower", 0.01) for table in (same[:1], same)]
    assert [table["verdict"].iloc[0] for table in judged] == ["not distinguishable", "same"]


# ------------------------------------------------------------------------------------ what would decide it


def test_the_smallest_detectable_difference_is_seen_four_times_in_five() -> None:
    seeds, stories, sd_seed, sd_story = 4, 32, 0.02, 0.1
    smallest = float(power.smallest_loss_difference(stories, seeds, sd_story, sd_seed))
    table = smallest + losses(numpy.random.default_rng(11), 4000, seeds, stories, (sd_seed, sd_story, 0.0))
    seen = crossed.of_tables(table, numpy.ones((4000, stories)))["p"] < stats.ALPHA
    assert 0.75 <= seen.mean() <= 0.87
    assert power.stories_needed(smallest, seeds, sd_story, sd_seed) == stories
    assert power.seeds_needed(smallest, stories, sd_story, sd_seed) == seeds
    assert math.isnan(power.stories_needed(0.001, seeds, sd_story, sd_seed)), "the seeds alone vary by more"
    assert power.visits_needed(0.02, 6, 0.01, 5) > 6
    one_sample = scipy_stats.t.ppf([0.975, 0.8], 9).sum() * 0.05
    assert power.smallest_difference(0.05, 9) == pytest.approx(one_sample)


def test_an_undecided_loss_says_what_would_decide_it() -> None:
    """Stories where they vary most; seeds where these do; and a second one where the stories are enough."""
    generator = numpy.random.default_rng(12)
    cases = {
        "stories": 0.01 + losses(generator, 1, 4, 8, (0.001, 0.1, 0.001))[0],
        "seeds": 0.02 + losses(generator, 1, 3, 8, (0.05, 0.001, 0.001))[0],
        "second seed": losses(generator, 1, 1, 8, (0.0, 0.0001, 0.0))[0],
    }
    units = {}
    for name, table in cases.items():
        judged = judge(of_stories(table, NO_SEED_BETWEEN), "lower", 0.01)
        row = with_power(judged, METRICS["eval_loss"], None).iloc[0]
        assert row["verdict"] == "not distinguishable"
        assert row["detectable"] > row["high"] - row["effect"], "power asks for more than the interval"
        units[name] = (row["unit"], row["needed"])
    assert units["stories"][0] == "stories"
    assert units["stories"][1] > 50
    assert units["seeds"][0] == "seeds"
    assert units["seeds"][1] > 3
    assert units["second seed"] == ("seeds", 2)


@pytest.mark.parametrize("basis", ["repeats", "steps", "visits"])
def test_an_undecided_speed_needs_visits_whatever_it_was_paired_by(basis: str) -> None:
    differences = pandas.Series([0.05, -0.02, 0.04])
    judged = judge(alone(stats.paired(differences, pandas.Series(0, differences.index)), basis), "higher", 0.02)
    floor = 0.5
    row = with_power(judged, METRICS["tokens_per_second"], floor).iloc[0]
    assert (row["unit"], row["detectable"]) == ("visits", floor), "nothing below the noise floor is detected"
    speed = Estimate(
        "tokens_per_second", 1.02, 0.9, 1.1, 3, basis, 0.5, "not distinguishable", None, 0.041, 9, "visits"
    )  # type: ignore[arg-type]
    assert (words.detectable(speed), words.what_decides(speed)) == ("4.1%", "9 visits")


def test_words_name_seeds_and_what_to_set() -> None:
    def of(seeds: int, needed: int, unit: str) -> Estimate:
        return Estimate(
            "eval_loss", 0.01, -0.01, 0.03, 32, "stories", 0.5, "not distinguishable", seeds, 0.02, needed, unit
        )  # type: ignore[arg-type]

    assert words.pairs(of(3, 150, "stories")) == "32 stories × 3 seeds"
    assert words.pairs(of(1, 150, "stories")) == "32 stories, one seed"
    assert words.what_decides(of(3, 150, "stories")) == "150 stories (val_set_size)"
    assert words.what_decides(of(3, 9, "seeds")) == "9 seeds (repeats)"
    assert words.what_decides(of(3, 2, "times")) == "64 stories (val_set_size) and 6 seeds (repeats)"
