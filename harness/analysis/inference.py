"""Inference results: effects between base, unmerged and merged model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy
import pandas

from harness.analysis import stats
from harness.analysis.crossed import NO_SEED_BETWEEN, crossed
from harness.analysis.estimate import Estimate
from harness.analysis.family import NO_ERRORS, Effects
from harness.analysis.measurements import Measurements
from harness.grids.claims import MODEL, Claim
from harness.metrics import INFERENCE
from harness.record import Model

_SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "token_seconds_p50", "token_seconds_p95")
"""Figures with one value per round."""
COMPARED = ("model_bytes", "decode_tokens_per_second", "story_loss")
"""Figures in which the models of each trial are compared with the unmerged one."""


@dataclass(frozen=True)
class ModelPair:
    """Two models of the same trials, the second compared with the first."""

    reference: Model
    model: Model
    trials: tuple[int, ...]
    """By number."""

    @property
    def reversed(self) -> Self:
        """The other way round."""
        return replace(self, reference=self.model, model=self.reference)


def judge(m: Measurements, claims: Iterable[Claim]) -> dict[tuple[str, ModelPair], Estimate]:
    """The estimate of each comparison of trained models that a page shows, in both directions.

    All of a figure are one family, those of each trial and those of claims: each pair is judged once.
    """
    trials: list[int] = m.inference_results["models"]["trial"].unique().tolist()
    others: tuple[Model, ...] = ("base", "merged")
    of_trials = [ModelPair("unmerged", other, (trial,)) for trial in trials for other in others]
    asked = {metric: dict.fromkeys(of_trials) for metric in COMPARED}
    for claim in claims:
        if claim.is_about_inference:
            asked.setdefault(claim.metric, {})[of_claim(m, claim)] = None
    estimates = {}
    for metric, pairs in asked.items():
        once = [pair for number, pair in enumerate(pairs) if pair.reversed not in [*pairs][:number]]
        rows = {number: _effects_of(m, pair, metric) for number, pair in enumerate(once)}
        for number, estimate in _estimates(m, rows, metric).items():
            estimates[metric, once[number]] = estimate
            estimates[metric, once[number].reversed] = estimate.reversed
    return estimates


def of_claim(m: Measurements, claim: Claim) -> ModelPair:
    """The models that a claim is about, of all trials whose two store their weights in the same format.

    A model quantised for training is merged in 16 bit, which is a change of its own.
    """
    reference, model = claim.compare[MODEL]
    models = m.inference_results["models"]
    formats = models.pivot_table(index="trial", columns="model", values="precision", aggfunc="first")
    formats = formats.reindex(columns=list(dict.fromkeys((reference, model)))).dropna()
    return ModelPair(reference, model, tuple(formats.index[formats[reference] == formats[model]].tolist()))


def _effects_of(m: Measurements, pair: ModelPair, metric: str) -> pandas.DataFrame:
    return effects(m.with_inference_results(pair.trials), pair.reference, pair.model, metric)


def effects(m: Measurements, reference: Model, model: Model, metric: str) -> pandas.DataFrame:
    """The effect of one model against another on a figure, as a table of one row (see `stats`) or none.

    Sizes are exact. Speeds are paired by round, in which all models had the same prompts, or by trial where there are
    several; losses and figures of stories are paired by story. The loss is weighted by tokens, and its interval is over
    the trials too, where there are several.
    """
    wide = values(m, metric).pivot_table(index=["trial", "unit"], columns="model", values=["value", "tokens"])
    if ("value", reference) not in wide or ("value", model) not in wide:
        return pandas.DataFrame()
    theirs, ours = wide["value", reference], wide["value", model]
    change = ours - theirs if INFERENCE[metric].scale == "difference" else numpy.log(ours / theirs)
    differences = pandas.Series(change, wide.index).replace([numpy.inf, -numpy.inf], numpy.nan).dropna()
    if INFERENCE[metric].exact:
        return stats.exact(differences, _one_comparison(differences)).assign(basis="exact")
    if metric == "story_loss":
        tokens = wide["tokens", reference].reindex(differences.index)
        # Models of the same trial are compared: no seed is between an adapter and its merged self.
        effect = crossed(_losses(differences, tokens), NO_SEED_BETWEEN).table
        return effect.assign(basis="stories", seeds=numpy.nan)
    basis = "rounds"
    if metric not in _SPEEDS:  # a story counts once, whatever the number of trials
        basis, differences = "stories", differences.groupby("unit").mean()
    elif differences.index.get_level_values("trial").nunique() > 1:  # rounds of one trial are not independent
        basis, differences = "trials", differences.groupby("trial").mean()
    return stats.paired(differences, _one_comparison(differences)).assign(basis=basis)


def _estimates(m: Measurements, rows: Mapping[int, pandas.DataFrame], metric: str) -> dict[int, Estimate]:
    """Estimates from the effects of several comparisons on a figure, which are one family, by their numbers."""
    known = [row.set_axis([number]) for number, row in rows.items() if len(row)]
    return m.estimates(Effects(pandas.concat(known), NO_ERRORS), metric) if known else {}


def _losses(differences: pandas.Series, tokens: pandas.Series) -> pandas.DataFrame:
    """Differences by trial and story, in the columns of `crossed`."""
    table = pandas.DataFrame({"loss": differences, "tokens": tokens}).reset_index()
    return table.rename(columns={"trial": "repeat", "unit": "story"}).assign(comparison=0)


def _one_comparison(differences: pandas.Series) -> pandas.Series:
    return pandas.Series(0, differences.index)


def means_by_trial(m: Measurements, model: Model, metric: str) -> list[float]:
    """A model's figure in each benchmarked trial; of the loss, weighted by tokens."""
    of_all = values(m, metric)
    of_model = of_all[of_all["model"] == model]
    weighted = (of_model["value"] * of_model["tokens"]).groupby(of_model["trial"]).sum()
    means: list[float] = (weighted / of_model.groupby("trial")["tokens"].sum()).tolist()
    return means


def benchmarked_configs(m: Measurements, trials: Iterable[int]) -> list[int]:
    """The configurations of trials whose trained models were benchmarked."""
    models = m.inference_results["models"]
    configs: list[int] = models.loc[models["trial"].isin(list(trials)), "config"].unique().tolist()
    return configs


def values(m: Measurements, metric: str) -> pandas.DataFrame:
    """A figure as trial, model, unit (a round, a story, or 0 for the whole), value, and tokens, its weight in a mean.

    Losses are weighted by the tokens that were judged; everything else counts once.
    """
    columns = ["trial", "model", "unit", "value", "tokens"]
    tables = m.inference_results
    if metric in _SPEEDS:
        return rounds(tables["requests"]).rename(columns={"round": "unit", metric: "value"}).assign(tokens=1)[columns]
    if metric in tables["models"]:
        return tables["models"].rename(columns={metric: "value"}).assign(unit=0, tokens=1)[columns]
    if metric == "story_loss":
        return tables["answers"].rename(columns={"story_id": "unit", "loss": "value"})[columns].dropna()
    answers = tables["answers"].assign(tokens=1)
    return answers.rename(columns={"story_id": "unit", metric: "value"})[columns].dropna()


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


def mean_losses(losses: Mapping[str, Sequence[float]], tokens: Sequence[int]) -> dict[str, float]:
    """The loss of each model in nats per token, from that of each held-out story and its tokens."""
    return {name: float(numpy.average(of_model, weights=tokens)) for name, of_model in losses.items()}


def merging_effect(losses: Mapping[str, Sequence[float]], tokens: Sequence[int]) -> str:
    """What merging does to the loss, with its interval over stories, in a sentence.

    Args:
        losses: of each held-out story in nats per token, of the `merged` and the `unmerged` model.
        tokens: of each story.
    """
    differences = pandas.Series(losses["merged"]) - pandas.Series(losses["unmerged"])
    table = pandas.DataFrame({"loss": differences, "tokens": tokens, "story": differences.index})
    effect = crossed(table.assign(comparison=0, repeat=0), NO_SEED_BETWEEN).table.loc[0]
    return (
        f"merged − unmerged: {effect['effect']:+.5f} nats ({effect['low']:+.5f} to {effect['high']:+.5f}) "
        f"over {len(differences)} held-out stories, weighted by tokens"
    )
