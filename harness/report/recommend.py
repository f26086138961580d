"""The best measured configuration within limits, and what it costs to take it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas
import yaml

from harness.errors import InputError
from harness.metrics import FITS, METRICS, show_bytes
from harness.report import words
from harness.report.measurements import Measurements, labels, spec
from harness.report.plots import pareto_front


@dataclass(frozen=True)
class Recommendation:
    """A configuration, in words and as a file."""

    config: int
    label: str
    sentences: tuple[str, ...]
    yaml: str
    choices: pandas.DataFrame
    """Configurations within the limits that no other one beats: label and figures, the recommended one first."""


def recommend(
    m: Measurements, *, memory: int | None = None, max_loss: float | None = None, min_speed: float | None = None
) -> Recommendation:
    """The configuration to take: of those with the lowest loss the fastest, and of these the smallest.

    Differences that are noise decide nothing: a configuration whose loss cannot be told from the lowest is as good.

    Args:
        m: what was measured.
        memory: bytes that loading, training and evaluating may take.
        max_loss: highest eval loss, in nats.
        min_speed: least tokens per second.

    Raises:
        InputError: nothing measured lies within the limits.
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
    values = {k: v for k, v in spec(m.configs, best).canonical().items() if v is not None}
    return Recommendation(
        best,
        str(m.configs.at[best, "label"]),
        tuple(_sentences(m, figures, within, best, memory)),
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        choices.assign(label=m.configs["label"].reindex(choices.index)),
    )


def _figures(m: Measurements) -> pandas.DataFrame:
    ok = m.trials[(m.trials["status"] == "ok") & ~m.trials["twin"]]
    if ok.empty:
        raise InputError(f"{m.name}: no trial ended well; there is nothing to recommend")
    means = ok.groupby("config")[["tokens_per_second", "eval_loss"]].mean()
    # Each repeat must fit.
    return means.assign(memory=ok.groupby("config")[list(FITS)].max().max(axis=1)).dropna(subset=["memory"])


def _to_minimise(figures: pandas.DataFrame) -> pandas.DataFrame:
    found = pandas.DataFrame({"memory": figures["memory"], "slowness": -figures["tokens_per_second"].fillna(0.0)})
    return found if figures["eval_loss"].isna().all() else found.assign(loss=figures["eval_loss"])


def _choose(m: Measurements, within: pandas.DataFrame) -> int:
    candidates = within
    if within["eval_loss"].notna().any():
        lowest = _where(within["eval_loss"], lowest=True)
        candidates = within.loc[_as_good(m, within, lowest, "eval_loss")]
    if candidates["tokens_per_second"].notna().any():
        fastest = _where(candidates["tokens_per_second"], lowest=False)
        candidates = candidates.loc[_as_good(m, candidates, fastest, "tokens_per_second")]
    return _where(candidates["memory"], lowest=True)


def _where(values: pandas.Series, *, lowest: bool) -> int:
    """The configuration of the extreme value."""
    found: Any = values.idxmin() if lowest else values.idxmax()
    return int(found)


def _as_good(m: Measurements, figures: pandas.DataFrame, best: int, metric: str) -> list[int]:
    """The best, and those whose interval holds "as good", or which are worse by no more than noise.

    The intervals are those of each comparison for itself: adjusted over all of them they grow with every
    configuration that was tried, and a choice would care less and less for what was measured.
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
    said = [f"needs {show_bytes(row['memory'])}"]
    if memory is not None:
        said[0] += f" of {show_bytes(memory)}"
    if not math.isnan(row["tokens_per_second"]):
        said.append(f"trains {words.figure('tokens_per_second', row['tokens_per_second'])} tokens/s")
    if not math.isnan(row["eval_loss"]):
        said.append(f"ends at {words.figure('eval_loss', row['eval_loss'])} nats")
    share = f"{len(within)} of {len(figures)} configurations are within the limits"
    found = [f"Take {label[best]}: it {', '.join(said)} ({share})."]
    for metric, lowest, what in (
        ("eval_loss", True, "lower loss"),
        ("tokens_per_second", False, "more speed"),
        ("memory", True, "less memory"),
    ):
        if within[metric].isna().all():
            continue
        other = _where(within[metric], lowest=lowest)
        if other != best and within.at[other, metric] != row[metric]:
            found.append(f"For {what} take {label[other]}: {_trade(m, other, best)}.")
    return found


def _trade(m: Measurements, other: int, best: int) -> str:
    """What another configuration gives and takes against the recommended one."""
    pair = pandas.DataFrame({"comparison": [0], "config": [other], "reference": [best]})
    said = []
    for metric, name in (("peak_memory_bytes", "memory"), ("tokens_per_second", "speed"), ("eval_loss", "loss")):
        estimate = m.compare(pair, metric).get(0)
        if estimate is not None:
            said.append(f"{name} {words.effect_and_word(estimate)}")
    return ", ".join(said)


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
            config = _where(figures[name], lowest=lowest)
            reached: Any = figures.at[config, name]
            nearest.append(f"{labels(m, [config])[0]} has {show(reached)}")
    return f"{m.name}: nothing measured is within {' and '.join(limits)}; the best: {'; '.join(nearest) or 'unknown'}"
