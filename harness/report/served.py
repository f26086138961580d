"""Trained models at work, as they were measured: what merging changes, and what stories they tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy
import pandas

from harness import stats
from harness.metrics import INFERENCE
from harness.report import words
from harness.report.measurements import Estimate, Measurements
from harness.report.tables import Cell, Table
from harness.report.words import MISSING, figure
from harness.results import Model

_SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "token_seconds_p50", "token_seconds_p95")
"""Figures of a round."""
_TOLD = ("rouge_l", "distinct_2", "repetition", "words")


@dataclass(frozen=True)
class Told:
    """A held-out synopsis, the story that was held out, and those that the models tell."""

    trial: str
    synopsis: str
    reference: str
    stories: dict[str, str]


def effects(m: Measurements, reference: Model, model: Model, metric: str) -> pandas.DataFrame:
    """The effect of one model against another on a figure, in one row, as `stats` has them; empty without any.

    Sizes are exact. Speeds are paired by round, in which all models were asked the same, and over several trials by
    trial; losses and figures of stories by the story.
    """
    wide = _values(m, metric).pivot_table(index=["trial", "unit"], columns="model", values="value")
    if reference not in wide or model not in wide:
        return pandas.DataFrame()
    compared = (
        wide[model] - wide[reference]
        if INFERENCE[metric].scale == "difference"
        else numpy.log(wide[model] / wide[reference])
    )
    differences = pandas.Series(compared, wide.index).replace([numpy.inf, -numpy.inf], numpy.nan).dropna()
    if INFERENCE[metric].exact:
        return stats.exact(differences, _one_comparison(differences)).assign(basis="exact")
    basis = "rounds"
    if metric not in _SPEEDS:  # a story counts once, however many trials were asked about it
        basis, differences = "stories", differences.groupby("unit").mean()
    elif differences.index.get_level_values("trial").nunique() > 1:  # rounds of a trial have its ratio in common
        basis, differences = "trials", differences.groupby("trial").mean()
    return stats.paired(differences, _one_comparison(differences)).assign(basis=basis)


def _one_comparison(differences: pandas.Series) -> pandas.Series:
    return pandas.Series(0, differences.index)


def of_equal_precision(m: Measurements, reference: Model, model: Model) -> Measurements:
    """The trials whose two models hold their weights alike: what was quantised for training is merged in 16 bit, which
    is a change of its own.
    """
    formats = m.served["models"].pivot_table(index="trial", columns="model", values="precision", aggfunc="first")
    if reference not in formats or model not in formats:
        return m
    alike = formats.index[formats[reference] == formats[model]]
    return m.with_served({name: frame[frame["trial"].isin(alike)] for name, frame in m.served.items()})


def levels(m: Measurements, model: Model, metric: str) -> list[float]:
    """The figure of a model in each trial that was looked at."""
    values = _values(m, metric)
    found: list[float] = values[values["model"] == model].groupby("trial")["value"].mean().tolist()
    return found


def trials(m: Measurements) -> tuple[int, ...]:
    """Configurations whose trained models were looked at."""
    return tuple(int(c) for c in pandas.unique(m.trials.loc[m.served["models"]["trial"].unique(), "config"]))


def _values(m: Measurements, metric: str) -> pandas.DataFrame:
    """A figure as trial, model, unit (a round, a story, or the whole) and value."""
    columns = ["trial", "model", "unit", "value"]
    if metric in _SPEEDS:
        return _rounds(m.served["requests"]).rename(columns={"round": "unit", metric: "value"})[columns]
    if metric in m.served["models"]:
        return m.served["models"].rename(columns={metric: "value"}).assign(unit=0)[columns]
    column = "loss" if metric == "story_loss" else metric
    return m.served["answers"].rename(columns={"story_id": "unit", column: "value"})[columns].dropna()


def _rounds(requests: pandas.DataFrame) -> pandas.DataFrame:
    """Speeds of each round, over its requests."""
    rows = []
    for (trial, model, number), mine in requests.groupby(["trial", "model", "round"], sort=False):
        seconds = numpy.concatenate([numpy.empty(0), *mine["token_seconds"]])
        known = bool(len(seconds))
        rows.append(
            {
                "trial": trial,
                "model": model,
                "round": number,
                "prefill_tokens_per_second": mine["prompt_tokens"].sum() / mine["prefill_seconds"].sum(),
                "decode_tokens_per_second": len(seconds) / seconds.sum() if known else numpy.nan,
                "token_seconds_p50": numpy.percentile(seconds, 50) if known else numpy.nan,
                "token_seconds_p95": numpy.percentile(seconds, 95) if known else numpy.nan,
            }
        )
    return pandas.DataFrame(rows, columns=["trial", "model", "round", *_SPEEDS])


# ------------------------------------------------------------------------------------ tables

_COLUMNS = ("model_bytes", "peak_inference_bytes", "prefill_tokens_per_second", "decode_tokens_per_second",
            "token_seconds_p50", "token_seconds_p95", "story_loss", "logit_difference")  # fmt: skip
_COMPARED = ("model_bytes", "decode_tokens_per_second", "story_loss")


def models(m: Measurements) -> Table:
    """Base, unmerged and merged model: what each takes, how fast it answers, how well it knows the stories."""
    rows = []
    for _, label, only in _by_trial(m):
        estimates = _against_unmerged(only)
        there = [name for name in get_args(Model) if name in set(only.served["models"]["model"])]
        rows += [_model_row(only, label, name, estimates) for name in there]
    headings = ("Trial", "Model", "Weights in", "Model size", "Peak at work", "Prefill tokens/s", "Decode tokens/s",
                "Median token", "95th percentile", "Loss per story", "Logits differ by", "Size, of unmerged",
                "Decode, of unmerged", "Loss, minus unmerged")  # fmt: skip
    note = (
        "One request at a time, without autocast, as the model in a folder would answer. In each round every model is "
        "loaded anew and asked the same; intervals are over rounds (speeds) and held-out stories (loss, at the "
        "precision of training)."
        if rows
        else "No trained model was looked at; harness evaluate TRIAL does it, for a trial with save_adapter: true."
    )
    return Table("merged", "Merged adapter", headings, tuple(rows), note)


def _model_row(m: Measurements, label: str, name: Model, estimates: dict[tuple[str, Model], Estimate]) -> Any:
    precision = m.served["models"].set_index("model").at[name, "precision"]
    cells = [Cell(label), Cell(name), Cell(str(precision))]
    for metric in _COLUMNS:
        known = levels(m, name, metric)
        value = known[0] if known else None
        cells.append(Cell(figure(metric, value), value))
    for metric in _COMPARED:
        estimate = estimates.get((metric, name))
        cells.append(Cell(words.effect_and_word(estimate), estimate.value) if estimate else Cell(MISSING))
    return tuple(cells)


def _against_unmerged(m: Measurements) -> dict[tuple[str, Model], Estimate]:
    """Base and merged beside unmerged; each figure is one family."""
    found: dict[tuple[str, Model], Estimate] = {}
    for metric in _COMPARED:
        others: list[Model] = ["base", "merged"]
        rows = [effects(m, "unmerged", name, metric) for name in others]
        numbered = [row.set_axis([i]) for i, row in enumerate(rows) if len(row)]
        if numbered:
            estimates = m.estimates(pandas.concat(numbered), metric)
            found |= {(metric, others[i]): estimate for i, estimate in estimates.items()}
    return found


def told(m: Measurements) -> Table:
    """Figures of the generated stories, base and merged."""
    rows = []
    for _, label, only in _by_trial(m):
        answers = only.served["answers"].dropna(subset=["story"])
        for name, mine in answers.groupby("model"):
            means = mine[list(_TOLD)].mean()
            figures = (Cell(figure(metric, means[metric]), means[metric]) for metric in _TOLD)
            rows.append((Cell(label), Cell(str(name)), Cell(str(len(mine)), float(len(mine))), *figures))
    headings = ("Trial", "Model", "Stories", "ROUGE-L", "Distinct pairs", "Repetition", "Words")
    note = "Means over the generated stories; each stands below beside the one that was held out." if rows else ""
    return Table("told", "Generated stories", headings, tuple(rows), note)


def stories(m: Measurements) -> list[Told]:
    """Held-out synopses with the stories that the models tell."""
    found = []
    for _, label, only in _by_trial(m):
        answers = only.served["answers"].dropna(subset=["story", "synopsis", "reference"])
        for _, mine in answers.groupby("story_id", sort=False):
            first = mine.iloc[0]
            said = dict(zip(mine["model"], mine["story"], strict=True))
            found.append(Told(label, first["synopsis"], first["reference"], said))
    return found


def _by_trial(m: Measurements) -> Iterator[tuple[int, str, Measurements]]:
    """Each trial that was looked at, and the measurements with nothing else at work in them."""
    for trial in m.served["models"]["trial"].unique():
        row = m.trials.loc[trial]
        label = str(row["label"]) + (f" (repeat {row['repeat']})" if row["repeat"] else "")
        only = {name: frame[frame["trial"] == trial] for name, frame in m.served.items()}
        yield int(trial), label, m.with_served(only)
