"""The best measured configuration within limits, and its trade-offs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas

from harness.analysis import words
from harness.analysis.measurements import Measurements
from harness.analysis.pareto import pareto_front
from harness.errors import InputError
from harness.grids.yaml_file import spec_to_yaml
from harness.metrics import FITS, HEADLINE, METRICS, show_bytes


@dataclass(frozen=True)
class Recommendation:
    """A configuration, its trade-offs in sentences, and its YAML."""

    config: int
    label: str
    sentences: tuple[str, ...]
    yaml: str
    choices: pandas.DataFrame
    """The Pareto front within the limits: label and figures, the recommended configuration first."""


def recommend(
    m: Measurements, *, memory: int | None = None, max_loss: float | None = None, min_speed: float | None = None
) -> Recommendation:
    """The configuration with the lowest loss; among equals the fastest, and among these the smallest.

    Configurations that are not distinguishable are equals.

    Args:
        m: the candidates.
        memory: most bytes that loading, training and evaluating may take.
        max_loss: highest eval loss, in nats.
        min_speed: least tokens per second.

    Raises:
        InputError: no measured configuration lies within the limits.
    """
    figures = _figures(m)
    within = figures[
        (figures["memory"] <= (memory or math.inf))
        & (figures["eval_loss"].fillna(-math.inf) <= (math.inf if max_loss is None else max_loss))
        & (figures["tokens_per_second"].fillna(math.inf) >= (min_speed or 0.0))
    ]
    if max_loss is not None:
        within = within[within["eval_loss"].notna()]
    if within.empty:
        raise InputError(_nothing_fits(m, figures, memory, max_loss, min_speed))
    best = _choose(m, within)
    front = within[pareto_front(_to_minimise(within))]
    choices = pandas.concat([within.loc[[best]], front.drop(index=best, errors="ignore").sort_values("memory")])
    return Recommendation(
        best,
        str(m.configs.at[best, "label"]),
        tuple(_sentences(m, figures, within, best, memory)),
        spec_to_yaml(m.spec(best)),
        choices.assign(label=m.configs["label"].reindex(choices.index)),
    )


def _figures(m: Measurements) -> pandas.DataFrame:
    ok = m.trials[(m.trials["status"] == "ok") & ~m.trials["twin"]]
    if ok.empty:
        raise InputError(f"{m.name}: no trial ended well; there is nothing to recommend")
    means = ok.groupby("config")[["tokens_per_second", "eval_loss"]].mean()
    # The repeat with the highest peak must fit.
    return means.assign(memory=ok.groupby("config")[list(FITS)].max().max(axis=1)).dropna(subset=["memory"])


def _to_minimise(figures: pandas.DataFrame) -> pandas.DataFrame:
    costs = pandas.DataFrame({"memory": figures["memory"], "slowness": -figures["tokens_per_second"].fillna(0.0)})
    return costs if figures["eval_loss"].isna().all() else costs.assign(loss=figures["eval_loss"])


def _choose(m: Measurements, within: pandas.DataFrame) -> int:
    candidates = within
    if within["eval_loss"].notna().any():
        lowest = _extreme(within["eval_loss"], lowest=True)
        candidates = within.loc[_as_good(m, within, lowest, "eval_loss")]
    if candidates["tokens_per_second"].notna().any():
        fastest = _extreme(candidates["tokens_per_second"], lowest=False)
        candidates = candidates.loc[_as_good(m, candidates, fastest, "tokens_per_second")]
    return _extreme(candidates["memory"], lowest=True)


def _extreme(values: pandas.Series, *, lowest: bool) -> int:
    """The configuration with the lowest or highest value."""
    config: Any = values.idxmin() if lowest else values.idxmax()
    return int(config)


def _as_good(m: Measurements, figures: pandas.DataFrame, best: int, metric: str) -> list[int]:
    """The best, and those that are not worse at 95 %, or worse within the noise floor.

    Intervals are not adjusted over the comparisons: adjusted ones widen with every further candidate, until none of
    them could be ruled out.
    """
    others = [c for c in figures.index if c != best]
    effects = m.effects(pandas.DataFrame({"comparison": others, "config": others, "reference": best}), metric)
    lower = METRICS[metric].better == "lower"
    worse_by, at_least = (effects["effect"], effects["low"]) if lower else (-effects["effect"], -effects["high"])
    noise = (m.floor or 0.0) if METRICS[metric].group == "speed" else 0.0
    return [best, *effects.index[(at_least <= 0) | (worse_by <= noise)]]


def _sentences(
    m: Measurements, figures: pandas.DataFrame, within: pandas.DataFrame, best: int, memory: int | None
) -> list[str]:
    row: Any = within.loc[best]
    label = m.configs["label"]
    parts = [f"needs {show_bytes(row['memory'])}"]
    if memory is not None:
        parts[0] += f" of {show_bytes(memory)}"
    speed = METRICS["tokens_per_second"]
    if not math.isnan(row[speed.name]):
        parts.append(f"trains {speed.show(row[speed.name])} {speed.label}")
    if not math.isnan(row["eval_loss"]):
        parts.append(f"ends at {words.figure('eval_loss', row['eval_loss'])} nats")
    counts = f"{len(within)} of {len(figures)} configurations are within the limits"
    sentences = [f"Take {label[best]}: it {', '.join(parts)} ({counts})."]
    for metric, lowest, what in (
        ("eval_loss", True, "lower loss"),
        ("tokens_per_second", False, "more speed"),
        ("memory", True, "less memory"),
    ):
        if within[metric].isna().all():
            continue
        other = _extreme(within[metric], lowest=lowest)
        if other != best and within.at[other, metric] != row[metric]:
            sentences.append(f"For {what} take {label[other]}: {_trade_off(m, other, best)}.")
    return sentences


def _trade_off(m: Measurements, other: int, best: int) -> str:
    """Memory, speed and loss of another configuration against the recommended one."""
    pair = pandas.DataFrame({"comparison": [0], "config": [other], "reference": [best]})
    effects = []
    for metric in HEADLINE:
        estimate = m.compare(pair, metric).get(0)
        if estimate is not None:
            effects.append(f"{METRICS[metric].group} {words.effect_and_word(estimate)}")
    return ", ".join(effects)


def _nothing_fits(
    m: Measurements, figures: pandas.DataFrame, memory: int | None, max_loss: float | None, min_speed: float | None
) -> str:
    limits: list[str] = []
    nearest: list[Any] = []
    for name, limit, lowest, show in (
        ("memory", memory, True, show_bytes),
        ("eval_loss", max_loss, True, METRICS["eval_loss"].show),
        ("tokens_per_second", min_speed, False, METRICS["tokens_per_second"].show),
    ):
        if limit is None:
            continue
        limits.append(f"{name.replace('_', ' ')} {show(limit)}")
        if figures[name].notna().any():
            config = _extreme(figures[name], lowest=lowest)
            reached: Any = figures.at[config, name]
            nearest.append(f"{m.labels([config])[0]} has {show(reached)}")
    return f"{m.name}: nothing measured is within {' and '.join(limits)}; the best: {'; '.join(nearest) or 'unknown'}"
