"""Effects on speeds: paired within blocks of timing visits, with the noise of all of them."""

from __future__ import annotations

import numpy
import pandas

from harness.analysis import stats
from harness.analysis.family import NO_ERRORS, Effects


def logarithms(readings: pandas.DataFrame, metric: str) -> pandas.Series:
    """The logarithm of a figure of each reading.

    Where visits took steps of the baseline in turn, it is that of the ratio to the baseline's: what slows the machine
    for seconds or minutes slows both, and cancels.

    Args:
        readings: see `Measurements.readings`.
        metric: one of `TIMED_FIGURES`, or a rate.
    """
    values: pandas.Series = numpy.log(readings[metric])
    if not in_turn(readings):
        return values
    of_baseline: pandas.Series = numpy.log(readings["reference_seconds"]).fillna(0.0)  # of what is alone in its block
    return values.sub(of_baseline) if metric.startswith("step_seconds") else values.add(of_baseline)


def in_turn(readings: pandas.DataFrame) -> bool:
    """Whether ratios to the baseline's steps are compared: all visits that share a block with others took some in turn.

    With one block, whose intervals are over the steps of a trial, speeds are compared as they are.

    Args:
        readings: see `Measurements.readings`.
    """
    shared = readings[readings.groupby("block")["trial"].transform("nunique") > 1]
    return shared["block"].nunique() > 1 and bool(shared["reference_seconds"].notna().all())


def effects(
    pairs: pandas.DataFrame,
    metric: str,
    readings: pandas.DataFrame,
    rates: pandas.DataFrame,
    configs: pandas.Series,
) -> Effects:
    """Effects of each comparison on a figure of timed steps.

    Only blocks in which both sides were timed count: speeds that were taken hours apart are never compared.

    Args:
        pairs: columns comparison, reference, config.
        metric: one of `TIMED_FIGURES`.
        readings: see `Measurements.readings`.
        rates: see `Measurements.rates`.
        configs: by trial, the configuration that it stands for.
    """
    known = readings[["trial", "block", "visit"]].assign(
        config=readings["trial"].map(configs), value=logarithms(readings, metric)
    )
    others = known.rename(columns={"config": "reference", "trial": "other", "value": "reference_value"})
    matched = pairs.merge(known, on="config").merge(others.drop(columns="visit"), on=["reference", "block"])
    matched["difference"] = matched["value"] - matched["reference_value"]
    # Both runs of a baseline, and several pairs of a comparison, average to one figure per block.
    by_block = matched.groupby(["comparison", "block"], sort=False)["difference"].mean().reset_index()
    effects = stats.paired(by_block["difference"], by_block["comparison"])
    visited = matched.groupby("comparison")["visit"].all().reindex(effects.index)
    effects["basis"] = numpy.where(visited, "visits", "repeats")
    if known["block"].nunique() > 1:
        # What is alone in its block says nothing of noise, and would take a degree of freedom for its block.
        together = known[known.groupby("block")["config"].transform("nunique") > 1]
        noise = stats.noise(together["value"], together["config"], together["block"])
        return Effects(effects, NO_ERRORS) if noise is None else in_blocks(effects, matched, "block", noise, configs)
    return Effects(_by_steps(effects, matched, rates) if metric == "tokens_per_second" else effects, NO_ERRORS)


def in_blocks(
    effects: pandas.DataFrame, matched: pandas.DataFrame, block: str, noise: stats.Noise, configs: pandas.Series
) -> Effects:
    """`effects` with errors from the noise of all trials: a trial varies in each block for itself."""
    of_trials = weights(matched, ["other", "trial"], block)
    errors = noise.errors(of_trials, configs.reindex(of_trials.index.get_level_values("unit").astype(int)))
    return Effects(stats.in_blocks(effects, (errors**2).groupby("comparison").sum(), noise), errors)


def _by_steps(effects: pandas.DataFrame, matched: pandas.DataFrame, rates: pandas.DataFrame) -> pandas.DataFrame:
    """`effects` of single trials from before there were visits, with intervals over the timed steps of the two."""
    single = matched.drop_duplicates("comparison")
    ours, theirs = (rates.reindex(single[side]).set_axis(single["comparison"]) for side in ("trial", "other"))
    by_steps = stats.welch(ours, theirs).dropna(subset=["effect"]).assign(basis="steps")
    # The effect stays the ratio of the recorded figures; the steps give the width of the interval.
    effect = effects.loc[by_steps.index, "effect"]
    return pandas.concat([effects.drop(by_steps.index), stats.with_intervals(by_steps.assign(effect=effect))])


def weights(matched: pandas.DataFrame, sides: list[str], block: str = "repeat") -> pandas.Series:
    """By comparison, source (the block) and unit, the weight in its mean difference of what varies independently.

    Args:
        matched: see `Measurements.matched`.
        sides: columns of what is subtracted and of what remains, or of this alone: trials, or configurations, which
            repeat under seeds.
        block: column of the repeat, or the block, within which pairs are formed.
    """
    blocks = matched.groupby("comparison")[block].transform("nunique")
    weight = 1.0 / (blocks * matched.groupby(["comparison", block])["trial"].transform("size"))
    source = f"{block} " + matched[block].astype(str)
    tables = [
        pandas.DataFrame({
            "comparison": matched["comparison"], "source": source, "unit": matched[side].astype(str), "w": sign * weight
        })
        for side, sign in zip(reversed(sides), (1.0, -1.0), strict=False)
    ]  # fmt: skip
    return pandas.concat(tables).groupby(["comparison", "source", "unit"])["w"].sum()
