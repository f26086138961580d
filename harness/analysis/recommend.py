"""The best measured configuration within limits, and its trade-offs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import pandas

from harness._util.units import counted, show_bytes
from harness.analysis import stats, words
from harness.analysis.estimate import Estimate
from harness.analysis.measurements import Measurements
from harness.analysis.pareto import pareto_front
from harness.errors import InputError
from harness.grids.yaml_file import spec_to_yaml
from harness.metrics import FITS, HEADLINE, METRICS


@dataclass(frozen=True)
class Recommendation:
    """A configuration, its trade-offs in sentences, and its YAML."""

    config: int
    label: str
    sentences: tuple[str, ...]
    yaml: str
    choices: pandas.DataFrame
    """The Pareto front within the limits: label and figures, the recommended configuration first."""


@dataclass(frozen=True)
class Choice:
    """What `recommend` names from some amount of memory on."""

    memory: int
    """Bytes from which it is the choice, until those of the next."""
    config: int
    label: str
    """With how it failed under some seeds, where each configuration did."""
    figures: str
    """In a sentence: needs 269.08 MiB, trains 152 tokens/s, ends at 3.8945 nats."""


_MOST_BY_MEMORY = 100
"""Configurations whose choice is looked for at each amount of memory that one of them needs."""


def by_memory(m: Measurements) -> list[Choice]:
    """The recommended configuration for each amount of memory, in its order: what `recommend` names within it.

    Args:
        m: the candidates; of more than a hundred none is named, as each is held against others for each amount.
    """
    m = m.unselected
    if m.configs["measured"].sum() > _MOST_BY_MEMORY:
        return []
    try:
        figures = _figures(m)
    except InputError:
        return []
    choices: list[Choice] = []
    failed = failed_repeats(m)
    for memory in sorted({*figures["memory"].astype(int)}):
        candidates = _confirmed(m, figures[figures["memory"] <= memory])
        best = _choose(m, candidates)
        if not choices or choices[-1].config != best:
            (label,) = m.labels([best])
            label += f" ({failed[best]})" if best in failed else ""
            choices.append(Choice(memory, best, label, _described(candidates, best, None)))
    return choices


def needed_bytes(m: Measurements) -> dict[int, int]:
    """By configuration that was measured, the memory that loading, training and evaluating took at most: the repeat
    with the highest peak must fit, and so must one that ran out of memory, which needs what it asked for at least.
    """
    ok = m.trials["status"] == "ok"
    asked = (m.trials["oom_reached_bytes"] + m.trials["oom_requested_bytes"]).where(m.trials["status"] == "oom")
    highest = m.trials[list(FITS)].where(ok).assign(asked=asked).max(axis=1).groupby(m.trials["config"]).max()
    measured = highest[ok.groupby(m.trials["config"]).any()].dropna()
    return {int(config): int(size) for config, size in measured.items()}  # type: ignore[call-overload]  # of configurations


_OWN_FAILURES = {"diverged": "diverged", "did_not_train": "did not train"}
"""Ends of a trial that are its configuration's doing, whatever the memory and the machine."""


def failed_repeats(m: Measurements) -> dict[int, str]:
    """By configuration that ended well under some seeds and failed by itself under others, how: its figures are those
    of the seeds that were lucky.
    """
    tried = m.trials[~m.trials["twin"] & ~m.trials["watched"]]
    failed: dict[int, str] = {}
    config: Any
    for config, statuses in tried.groupby("config")["status"]:
        counts = statuses.value_counts()
        ends = [f"{words_of} under {counts[status]} of {len(statuses)} seeds"
                for status, words_of in _OWN_FAILURES.items() if status in counts]  # fmt: skip
        if ends and "ok" in counts:
            failed[int(config)] = " and ".join(ends)
    return failed


def recommend(
    m: Measurements, *, memory: int | None = None, max_loss: float | None = None, min_speed: float | None = None
) -> Recommendation:
    """The configuration with the lowest loss; among those as good the fastest, and among these the smallest.

    The lowest measured loss is taken, whatever its interval, in the repeats that it shares with the baseline: means
    over different seeds, or speeds of different hours, are shown and never compared. Another one is as good where it is
    worse by no more than the negligible difference of the figure at 95 % (non-inferiority): not knowing is not being
    equal. How sure the choice is, is said: by how much another one may be better, at 95 % over all of them.

    Args:
        m: the candidates.
        memory: most bytes that loading, training and evaluating may take.
        max_loss: highest eval loss, in nats.
        min_speed: least tokens per second.

    Raises:
        InputError: no measured configuration lies within the limits.
    """
    m = m.unselected
    figures = _figures(m)
    # What was not measured is within no limit.
    within = figures[figures["memory"] <= (memory or math.inf)]
    if max_loss is not None:
        within = within[within["eval_loss"] <= max_loss]
    if min_speed is not None:
        within = within[within["tokens_per_second"] >= min_speed]
    if within.empty:
        raise InputError(_nothing_fits(m, figures, memory, max_loss, min_speed))
    candidates = _confirmed(m, within)
    best = _choose(m, candidates)
    front = candidates[pareto_front(_to_minimise(candidates))]
    choices = pandas.concat([within.loc[[best]], front.drop(index=best, errors="ignore").sort_values("memory")])
    verb = "is" if len(within) == 1 else "are"
    counts = f"{len(within)} of {counted(len(figures), 'configuration')} {verb} within the limits"
    counts += "".join(f"; {m.labels([config])[0]} {how}" for config, how in failed_repeats(m).items())
    if len(candidates) < len(within):
        counts += f"; {len(candidates)} of them were measured again after a search had chosen, and are compared"
    (label,) = m.labels([best])
    return Recommendation(
        best,
        label,
        (
            f"Take {label}: it {_described(candidates, best, memory)} ({counts}).",
            *_trade_offs(m, candidates, best),
            *_how_sure(m, candidates, best, len(within)),
        ),
        spec_to_yaml(m.spec(best), full_paths=True),
        choices.assign(label=m.configs["label"].reindex(choices.index)),
    )


def _figures(m: Measurements) -> pandas.DataFrame:
    ended_well = m.trials[(m.trials["status"] == "ok") & ~m.trials["twin"]]
    ok = ended_well[~ended_well["watched"]]
    if ok.empty:
        ends = "no trial ended well" if ended_well.empty else "only watched loops ended well, which are not recommended"
        raise InputError(f"{m.name}: {ends}; there is nothing to recommend")
    means = ok.groupby("config")[["tokens_per_second", "eval_loss"]].mean()
    figures = means.assign(memory=pandas.Series(needed_bytes(m), dtype="float64")).dropna(subset=["memory"])
    if figures.empty:
        raise InputError(f"{m.name}: of no trial that ended well is the memory known; there is nothing to recommend")
    # What fails under some seeds is taken only where everything does.
    steady = figures.drop(index=figures.index.intersection([*failed_repeats(m)]))
    figures = figures if steady.empty else steady
    ranks = {rank: _against_one(m, figures, metric) for rank, metric in _RANKS.items()}
    return figures.assign(**ranks)


_RANKS = {"loss": "eval_loss", "speed": "tokens_per_second"}
"""Columns by which configurations are ranked: their effects on these figures."""


def _against_one(m: Measurements, figures: pandas.DataFrame, metric: str) -> pandas.Series:
    """The effect of each configuration against one of them, the baseline if its figure is known; null where none is."""
    known = figures.index[figures[metric].notna()]
    if known.empty:
        return pandas.Series(numpy.nan, figures.index)
    repeats = m.configs.loc[known, "repeats"]
    reference = int(m.baseline or 0) if m.baseline in known else _extreme(repeats, lowest=False)
    effects = m.effects(_pairs([int(c) for c in known if c != reference], reference), metric).table["effect"]
    of_itself = pandas.Series(0.0, figures.index[figures[metric].notna() & (figures.index == reference)])
    ranks: pandas.Series = pandas.concat([of_itself, effects]).reindex(figures.index)
    return ranks


def _pairs(others: list[int], reference: int) -> pandas.DataFrame:
    return pandas.DataFrame({"comparison": others, "config": others, "reference": reference}, dtype="int64")


def _confirmed(m: Measurements, within: pandas.DataFrame) -> pandas.DataFrame:
    """Without the trials that a search chose by, where something within the limits was measured again: the best of many
    are better than they will be again.
    """
    others = m.trials.loc[m.trials["study"].isna() | (m.trials["repeat"] > 0), "config"]
    again = within[within.index.isin(others)]
    return again if {*again.index} - {m.baseline} else within


def _to_minimise(figures: pandas.DataFrame) -> pandas.DataFrame:
    costs = pandas.DataFrame({"memory": figures["memory"], "slowness": -figures["speed"].fillna(-math.inf)})
    return costs if figures["loss"].isna().all() else costs.assign(loss=figures["loss"])


def _choose(m: Measurements, candidates: pandas.DataFrame) -> int:
    if candidates["loss"].notna().any():
        lowest = _extreme(candidates["loss"], lowest=True)
        candidates = candidates.loc[_as_good(m, candidates, lowest, "eval_loss")]
    if candidates["speed"].notna().any():
        fastest = _extreme(candidates["speed"], lowest=False)
        candidates = candidates.loc[_as_good(m, candidates, fastest, "tokens_per_second")]
    return _extreme(candidates["memory"], lowest=True)


def _extreme(values: pandas.Series, *, lowest: bool) -> int:
    """The configuration with the lowest or highest value."""
    config: Any = values.idxmin() if lowest else values.idxmax()
    return int(config)


def _as_good(m: Measurements, figures: pandas.DataFrame, best: int, metric: str) -> list[int]:
    """The best, and those that are worse by no more than is negligible, at 95 % each."""
    worse = _worse(m, [c for c in figures.index if c != best], best, metric, m.alpha)
    return [best, *worse.index[worse["most"] <= _negligible(metric)]]


def _worse(m: Measurements, others: list[int], reference: int, metric: str, alpha: float) -> pandas.DataFrame:
    """By configuration, by how much it is worse than a reference (`estimate`) and at most (`most`, one-sided).

    On the scale of the effects. The noise floor is the least half width, as everywhere. Without an interval the most is
    infinite.
    """
    table = m.effects(_pairs(others, reference), metric).table
    half = numpy.maximum(stats.critical(table, 2 * alpha) * table["se"], _floor(m, metric))
    worse = table["effect"] if METRICS[metric].better == "lower" else -table["effect"]
    return pandas.DataFrame({"estimate": worse, "most": (worse + half).fillna(math.inf)})


def _floor(m: Measurements, metric: str) -> float:
    return (m.floor or 0.0) if METRICS[metric].group == "speed" else 0.0


def _negligible(metric: str) -> float:
    negligible = METRICS[metric].negligible
    return math.log1p(negligible) if METRICS[metric].scale == "ratio" else negligible


def largest_regret(
    m: Measurements, within: pandas.DataFrame, best: int, metric: str, candidates: int | None = None
) -> float:
    """By how much the best of the configurations may be better than the chosen one at most, at 95 % over all of them.

    The chosen one is worse than each other by no more than this: the truly best is among them, whichever it is
    (Bonferroni over what might have been chosen; Hsu 1984, Ann. Statist. 12:1136, has the idea). On the scale of the
    effects.

    Args:
        m: the measurements.
        within: the configurations, with the metric as a column.
        best: the chosen one.
        metric: by which it was chosen.
        candidates: how many might have been chosen, where `within` are the best of more by the same texts; null: those.
    """
    others = [int(config) for config in within[metric].dropna().index if config != best]
    if not others:
        return 0.0
    worse = _worse(m, others, best, metric, m.alpha / max(len(others), (candidates or 1) - 1))
    half = worse["most"] - worse["estimate"]
    return max(0.0, float((half - worse["estimate"]).max())) if len(worse) == len(others) else math.inf


def _how_sure(m: Measurements, candidates: pandas.DataFrame, best: int, chosen_from: int) -> list[str]:
    """By how much another one may be better, and what passes as as good."""
    metric = "eval_loss" if candidates["loss"].notna().any() else "tokens_per_second"
    count = int(candidates[metric].notna().sum())
    if count < 2:
        return []
    declared = METRICS[metric]
    ratio = declared.scale == "ratio"
    margin = f"{declared.negligible:.0%}" if ratio else f"{declared.negligible:g} nats"
    regret = largest_regret(m, candidates, best, metric, chosen_from)
    shown = f"{math.expm1(regret):.1%}" if ratio else f"{regret:.2g} nats"
    sure = f"none is better in {declared.group} by more than {shown}, at 95% over all {count}"
    if math.isinf(regret):
        sure = f"not known, as the {declared.group} of some has no interval"
    return [f"How sure: {sure}. As good counts what is worse by no more than {margin}, at 95%."]


def _described(candidates: pandas.DataFrame, best: int, memory: int | None) -> str:
    """The figures of the recommended configuration."""
    row: Any = candidates.loc[best]
    parts = [f"needs {show_bytes(row['memory'])}" + (f" of {show_bytes(memory)}" if memory is not None else "")]
    speed = METRICS["tokens_per_second"]
    if not math.isnan(row[speed.name]):
        parts.append(f"trains {speed.show(row[speed.name])} {speed.label}")
    if not math.isnan(row["eval_loss"]):
        parts.append(f"ends at {words.figure('eval_loss', row['eval_loss'])} nats")
    return ", ".join(parts)


def _trade_offs(m: Measurements, candidates: pandas.DataFrame, best: int) -> list[str]:
    """What to take for less of each cost, among those that are comparable with the recommended one."""
    pairs = _pairs([int(config) for config in candidates.index if config != best], best)
    estimates = {metric: m.estimates(m.effects(pairs, metric), metric) for metric in HEADLINE} if len(pairs) else {}
    sentences = []
    for metric, what, sign in (
        ("eval_loss", "lower loss", 1),
        ("tokens_per_second", "more speed", -1),
        ("peak_memory_bytes", "less memory", 1),
    ):
        better = {c: sign * e.value for c, e in estimates.get(metric, {}).items() if words.is_better(e)}
        if better:
            other = min(better, key=better.__getitem__)
            sentences.append(f"For {what} take {m.labels([other])[0]}: {_trade_off(estimates, other)}.")
    return sentences


def _trade_off(estimates: dict[str, dict[int, Estimate]], other: int) -> str:
    """Memory, speed and loss of another configuration against the recommended one."""
    known = ((METRICS[metric].group, of_metric.get(other)) for metric, of_metric in estimates.items())
    return ", ".join(f"{group} {words.effect_and_word(estimate)}" for group, estimate in known if estimate is not None)


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
