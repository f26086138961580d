"""The results of a search, from its rows: the trials of the newest study, ranked, and parameter importances."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas

from harness.analysis.measurements import Estimate, Measurements
from harness.analysis.pareto import pareto_front
from harness.errors import InputError
from harness.grids.search import BEFORE, Search
from harness.grids.search_file import parse
from harness.metrics import METRICS
from harness.results.store import Store
from harness.spec import TrialSpec

_LEAST_FOR_IMPORTANCE = 8
"""Trials without which importances are not estimated."""
_LEAST_BEST = 10
"""Trials that importances take for the best, where there are enough."""


@dataclass(frozen=True)
class SearchResults:
    """The trials of a study, and its search."""

    search: Search
    measurements: Measurements
    points: pandas.DataFrame
    """One row per trial of the study, by configuration: number, label, status, before (of the warm start), whole (not
    a shorter rung), feasible, seconds, the objectives by metric, and `params`."""

    @cached_property
    def ranked(self) -> pandas.DataFrame:
        """Whole trials within the bounds, the best by the first objective first."""
        first = self.search.objectives[0]
        good = self.points[self.points["whole"] & self.points["feasible"]].dropna(subset=[first.metric])
        return good.sort_values(
            [first.metric, "number"], ascending=[first.direction == "minimize", True], kind="stable"
        )

    @cached_property
    def front(self) -> pandas.DataFrame:
        """The Pareto front of the objectives, in the order of the first."""
        to_minimise = pandas.DataFrame(
            {o.metric: self.ranked[o.metric] * (1 if o.direction == "minimize" else -1) for o in self.search.objectives}
        )
        return self.ranked[pareto_front(to_minimise)]

    @property
    def winner(self) -> int:
        """The configuration that is best by the first objective."""
        return int(self.ranked.index[0])

    @property
    def rivals(self) -> dict[str, int]:
        """The configurations that the winner is compared with, by their role."""
        m, others = self.measurements, self.ranked.index[1:]
        rivals = {} if m.baseline in (None, self.winner) else {"the baseline": int(m.baseline or 0)}
        if len(others):
            rivals["the runner-up"] = int(others[0])
        before = self.ranked.index[self.ranked["before"]]
        if len(before) and before[0] != self.winner:
            rivals["the best that was measured before"] = int(before[0])
        return rivals

    def label(self, config: int) -> str:
        """The label of a configuration."""
        return str(self.measurements.configs.at[config, "label"])

    def spec(self, config: int) -> TrialSpec:
        """The spec of a configuration, under the seed of the search."""
        return self.measurements.spec(config).model_copy(update={"seed": self.search.base.seed})

    @cached_property
    def fresh(self) -> Measurements:
        """The repeats that had no part in the choice of the winner."""
        trials = self.measurements.trials
        return replace(self.measurements, trials=trials[trials["repeat"] > 0])

    def against(self, rival: int, metric: str) -> tuple[Estimate | None, int]:
        """The winner against a rival, over fresh repeats if there are any, and their number."""
        pair = pandas.DataFrame({"comparison": [0], "config": [self.winner], "reference": [rival]})
        ok = self.fresh.trials[self.fresh.trials["status"] == "ok"]
        repeats = [set(ok.loc[ok["stands_for"] == config, "repeat"]) for config in (self.winner, rival)]
        shared = len(repeats[0] & repeats[1])
        return (self.fresh if shared else self.measurements).compare(pair, metric).get(0), shared


def read(m: Measurements, folder: Path) -> SearchResults | None:
    """The newest study of a results folder; null where there is none.

    Raises:
        InputError: the recorded search is not readable.
    """
    about = Store(folder).description().get("tune")
    proposed = m.trials[m.trials["study"].notna() & (m.trials["repeat"] == 0) & ~m.trials["twin"]]
    if about is None or proposed.empty:
        return None
    try:
        search = parse(m.name, m.title, about["base"], about["tune"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'grid.json'}: its search is not readable ({error})") from None
    newest = proposed.sort_values("started_at")["study"].iloc[-1]
    study = proposed[proposed["study"] == newest].drop_duplicates("config", keep="last")
    rows = []
    for row in study.to_dict("records"):
        params = search.place(m.spec(row["config"]).model_copy(update={"seed": search.base.seed}))
        figures = {name: None if pandas.isna(row[name]) else row[name] for name in METRICS}
        score = search.score(row["status"], figures)
        values = score.values if score else (None,) * len(search.objectives)
        rows.append(
            {
                "config": row["config"],
                "number": int(row["study_trial"]),
                "label": row["label"],
                "status": row["status"],
                "before": row["level"] == BEFORE,
                "whole": params is not None,
                "feasible": score is not None and score.feasible,
                "seconds": row["trial_seconds"],
                "params": params,
                **{o.metric: v for o, v in zip(search.objectives, values, strict=True)},
            }
        )
    points = pandas.DataFrame(rows).set_index("config").sort_values("number")
    for objective in search.objectives:
        points[objective.metric] = points[objective.metric].astype(float)
    return SearchResults(search, m, points)


def importances(results: SearchResults, metric: str) -> dict[str, float]:
    """Importance of each parameter for an objective (PED-ANOVA, Watanabe et al. 2023); they sum to 1.

    The study is rebuilt from the rows, as parquet is the only record. Empty where there are too few trials.
    """
    import optuna

    from harness.tuning.samplers import distribution

    objective = next(o for o in results.search.objectives if o.metric == metric)
    parameters = {p.name: p for p in results.search.parameters}
    known = results.points[results.points["whole"]].dropna(subset=[metric])
    if len(known) < _LEAST_FOR_IMPORTANCE:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction=objective.direction)
        study.add_trials([
            optuna.trial.create_trial(
                params=params, distributions={name: distribution(parameters[name]) for name in params}, value=value
            )
            for params, value in zip(known["params"], known[metric], strict=True)
        ])  # fmt: skip
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=target_quantile(results.points))
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
        except (ValueError, RuntimeError):
            return {}  # all trials are equal


def target_quantile(points: pandas.DataFrame) -> float:
    """Fraction of the trials that counts as the best: a tenth, or as many as it takes for ten, up to half."""
    return max(0.1, min(0.5, _LEAST_BEST / max(1, int(points["whole"].sum()))))
