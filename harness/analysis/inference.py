"""Inference results: effects between base, unmerged and merged model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import pandas

from harness.analysis import stats
from harness.analysis.measurements import Measurements
from harness.metrics import INFERENCE
from harness.record import Model

_SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "token_seconds_p50", "token_seconds_p95")
"""Figures with one value per round."""


def effects(m: Measurements, reference: Model, model: Model, metric: str) -> pandas.DataFrame:
    """The effect of one model against another on a figure, as a table of one row (see `stats`) or none.

    Sizes are exact. Speeds are paired by round, in which all models had the same prompts, or by trial where there are
    several; losses and figures of stories are paired by story.
    """
    wide = values(m, metric).pivot_table(index=["trial", "unit"], columns="model", values="value")
    if reference not in wide or model not in wide:
        return pandas.DataFrame()
    change = (
        wide[model] - wide[reference]
        if INFERENCE[metric].scale == "difference"
        else numpy.log(wide[model] / wide[reference])
    )
    differences = pandas.Series(change, wide.index).replace([numpy.inf, -numpy.inf], numpy.nan).dropna()
    if INFERENCE[metric].exact:
        return stats.exact(differences, _one_comparison(differences)).assign(basis="exact")
    basis = "rounds"
    if metric not in _SPEEDS:  # a story counts once, whatever the number of trials
        basis, differences = "stories", differences.groupby("unit").mean()
    elif differences.index.get_level_values("trial").nunique() > 1:  # rounds of one trial are not independent
        basis, differences = "trials", differences.groupby("trial").mean()
    return stats.paired(differences, _one_comparison(differences)).assign(basis=basis)


def _one_comparison(differences: pandas.Series) -> pandas.Series:
    return pandas.Series(0, differences.index)


def of_equal_precision(m: Measurements, reference: Model, model: Model) -> Measurements:
    """The trials whose two models store their weights in the same format.

    A model quantised for training is merged in 16 bit, which is a change of its own.
    """
    models = m.inference_results["models"]
    formats = models.pivot_table(index="trial", columns="model", values="precision", aggfunc="first")
    if reference not in formats or model not in formats:
        return m
    return m.with_inference_results(formats.index[formats[reference] == formats[model]])


def means_by_trial(m: Measurements, model: Model, metric: str) -> list[float]:
    """A model's figure in each benchmarked trial."""
    of_all = values(m, metric)
    means: list[float] = of_all[of_all["model"] == model].groupby("trial")["value"].mean().tolist()
    return means


def benchmarked_configs(m: Measurements) -> tuple[int, ...]:
    """Configurations whose trained models were benchmarked."""
    benchmarked = m.inference_results["models"]["trial"].unique()
    return tuple(int(c) for c in pandas.unique(m.trials.loc[benchmarked, "config"]))


def values(m: Measurements, metric: str) -> pandas.DataFrame:
    """A figure as trial, model, unit (a round, a story, or 0 for the whole) and value."""
    columns = ["trial", "model", "unit", "value"]
    tables = m.inference_results
    if metric in _SPEEDS:
        return rounds(tables["requests"]).rename(columns={"round": "unit", metric: "value"})[columns]
    if metric in tables["models"]:
        return tables["models"].rename(columns={metric: "value"}).assign(unit=0)[columns]
    column = "loss" if metric == "story_loss" else metric
    return tables["answers"].rename(columns={"story_id": "unit", column: "value"})[columns].dropna()


def rounds(requests: pandas.DataFrame) -> pandas.DataFrame:
    """Speeds of each round, over its requests."""
    rows = []
    for (trial, model, number), group in requests.groupby(["trial", "model", "round"], sort=False):
        seconds = numpy.concatenate([numpy.empty(0), *group["token_seconds"]])
        known = bool(len(seconds))
        rows.append(
            {
                "trial": trial,
                "model": model,
                "round": number,
                "prefill_tokens_per_second": group["prompt_tokens"].sum() / group["prefill_seconds"].sum(),
                "decode_tokens_per_second": len(seconds) / seconds.sum() if known else numpy.nan,
                "token_seconds_p50": numpy.percentile(seconds, 50) if known else numpy.nan,
                "token_seconds_p95": numpy.percentile(seconds, 95) if known else numpy.nan,
            }
        )
    return pandas.DataFrame(rows, columns=["trial", "model", "round", *_SPEEDS])


def merging_effect(losses: Mapping[str, Sequence[float]]) -> str:
    """What merging does to the loss, with its interval over stories, in a sentence.

    Args:
        losses: of each held-out story in nats per token, of the `merged` and the `unmerged` model.
    """
    differences = pandas.Series(losses["merged"]) - pandas.Series(losses["unmerged"])
    effect = stats.paired(differences, _one_comparison(differences)).loc[0]
    return (
        f"merged − unmerged: {effect['effect']:+.5f} nats ({effect['low']:+.5f} to {effect['high']:+.5f}) "
        f"over {len(differences)} held-out stories"
    )
