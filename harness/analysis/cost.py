"""What reaching a loss takes: seconds, energy and money, from training losses and measured speeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import pandas

from harness.analysis.comparison import Comparison

LEAST_STEPS = 20
"""Of a training whose loss has a course: below that it is noise."""
_WINDOW = 0.1
"""Part of the baseline's steps over which losses are averaged."""
_LEAST_WINDOW = 5


@dataclass(frozen=True)
class Cost:
    """Of one configuration."""

    config: int
    seconds: float | None
    """Of training, until its loss is as low as the target for the first time; null: it never is."""
    joules: float | None
    """Of the card, for as long; null where energy was not measured."""
    money: float | None
    """At the price of the machine; null without one."""
    loss: float | None
    """Training loss after as many seconds as all of them trained for; null: it trained for less than a window."""


@dataclass(frozen=True)
class Costs:
    """Of all configurations with enough steps and a speed."""

    target: float
    """Training loss that the baseline ends with, in nats."""
    equal_seconds: float
    """Seconds that each of them trained for at least."""
    window: int
    """Steps that a loss is the mean of."""
    rows: tuple[Cost, ...]


def costs(comparison: Comparison, steps: pandas.DataFrame) -> Costs | None:
    """What the baseline's last loss takes in each configuration, and the loss of each after equal time.

    A loss is the mean over tokens of some steps, each before its update, and over the repeats that all of them have.
    There every configuration sees the same examples in the same order, so that losses at equal tokens are of the same
    texts.

    Args:
        comparison: with the speeds.
        steps: optimizer steps with the columns config, repeat, step, loss and tokens.

    Returns:
        Null where the baseline has too few steps or no speed, where nothing else has, or where losses mean nothing.
    """
    m = comparison.measurements
    if m.baseline is None or not comparison.means["eval_loss"].notna().any():
        return None
    by_config = steps.groupby(["config", "step"])["loss"].mean().groupby("config")
    usable = (by_config.size() >= LEAST_STEPS) & (by_config.count() == by_config.size())
    speeds = comparison.speeds
    wanted = [c for c in comparison.shown if usable.get(c, False) and speeds.get(c, numpy.nan) > 0]
    means = in_common_repeats(steps, wanted).groupby(["config", "step"])[["loss", "tokens"]].mean()
    curves = {}
    for config in wanted:
        own = means.xs(config)
        curves[config] = own.assign(seconds=own["tokens"].cumsum() / speeds[config])
    if m.baseline not in curves or len(curves) < 2:
        return None
    window = max(_LEAST_WINDOW, round(_WINDOW * len(curves[m.baseline])))
    smooth = {config: _smoothed(curve, window) for config, curve in curves.items()}
    target = float(smooth[m.baseline]["loss"].iloc[-1])
    equal = min(float(curve["seconds"].iloc[-1]) for curve in curves.values())
    rows = tuple(_cost(comparison, config, curve, target, equal) for config, curve in smooth.items())
    return Costs(target, equal, window, rows)


def in_common_repeats(steps: pandas.DataFrame, configs: Sequence[int]) -> pandas.DataFrame:
    """The steps of these configurations in the repeats that all of them have, whose means are of the same texts in the
    same order; of all repeats where they have none in common.
    """
    own = steps[steps["config"].isin(configs)]
    having = own.groupby("repeat")["config"].nunique()
    common = own[own["repeat"].isin(having.index[having == own["config"].nunique()])]
    return own if common.empty else common


def _smoothed(curve: pandas.DataFrame, window: int) -> pandas.DataFrame:
    """The mean loss of the last steps, and the seconds until then; from the first whole window on."""
    weighted = (curve["loss"] * curve["tokens"]).rolling(window).sum() / curve["tokens"].rolling(window).sum()
    return pandas.DataFrame({"loss": weighted, "seconds": curve["seconds"]}).dropna()


def _cost(comparison: Comparison, config: int, curve: pandas.DataFrame, target: float, equal: float) -> Cost:
    reached = curve.loc[curve["loss"] <= target, "seconds"]
    seconds = float(reached.iloc[0]) if len(reached) else None
    figures = comparison.mean(config)
    watts = figures.get("joules_per_token", numpy.nan) * figures["tokens_per_second"]
    price = comparison.measurements.price_per_hour
    within = curve.loc[curve["seconds"] <= equal * (1 + 1e-9), "loss"]
    return Cost(
        config,
        seconds,
        None if seconds is None or not watts > 0 else seconds * watts,
        None if seconds is None or price is None else seconds / 3600 * price,
        float(within.iloc[-1]) if len(within) else None,
    )
