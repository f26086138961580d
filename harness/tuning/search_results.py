"""The results of a search, from its rows: the trials of the newest study, ranked, and parameter importances."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas

from harness.analysis.comparison import Comparison, compare, figures
from harness.analysis.estimate import Estimate
from harness.analysis.measurements import Measurements
from harness.analysis.pareto import pareto_front
from harness.analysis.recommend import largest_regret
from harness.errors import InputError
from harness.grids.search import BEFORE, Search
from harness.grids.search_file import parse
from harness.metrics import FITS, HEADLINE, METRICS
from harness.record import TIMED_FIGURES
from harness.results.store import Store
from harness.spec.trial import FACTS, TrialSpec

_LEAST_FOR_IMPORTANCE = 8
"""Trials without which importances are not estimated."""
_ABSENT = {name: facts.absent for name, facts in FACTS.items() if facts.absent is not ...}
"""Keys of a base that was recorded before they existed."""
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

    @cached_property
    def confirmed(self) -> pandas.DataFrame:
        """The ranked configurations with figures that had no part in the choice, within the bounds by these too: each
        objective as `fresh_figures` has it. The best by the first objective first; empty where nothing was confirmed.
        """
        first = self.search.objectives[0]
        fresh = pandas.DataFrame({o.metric: self.fresh_figures(o.metric) for o in self.search.objectives})
        known = fresh[fresh.index.isin(self.ranked.index)].dropna(subset=[first.metric])
        feasible = [config for config in known.index if self._is_feasible(int(config))]
        return known.loc[feasible].sort_values(first.metric, ascending=first.direction == "minimize", kind="stable")

    def fresh_figures(self, metric: str) -> pandas.Series:
        """A figure by configuration, over the repeats under fresh seeds that all finalists have; of speeds, over the
        blocks of visits in which all of them were timed. Exact memory is the highest.
        """
        if metric in TIMED_FIGURES:
            return self._of_shared_blocks(metric)
        ok = self.fresh.trials[self.fresh.trials["status"] == "ok"]
        shared = ok[ok["repeat"].isin(_shared(ok["repeat"], ok["stands_for"]))]
        return figures(shared, "stands_for")[metric] if len(shared) else pandas.Series(dtype=float)

    def _of_shared_blocks(self, metric: str) -> pandas.Series:
        readings = self.measurements.readings
        readings = readings.assign(config=readings["trial"].map(self.measurements.trials["stands_for"]))
        together = readings[readings.groupby("block")["config"].transform("nunique") > 1]
        shared = together[together["block"].isin(_shared(together["block"], together["config"]))]
        means: pandas.Series = shared.groupby("config")[metric].mean()
        return means

    def _is_feasible(self, config: int) -> bool:
        """Whether the fresh repeats all ended well, within the bounds."""
        trials = self.measurements.trials
        fresh = self.fresh.trials
        if (fresh.loc[fresh["config"] == config, "status"] != "ok").any():
            return False
        of_search = trials[(trials["config"] == config) & (trials["repeat"] == 0)].iloc[0]
        bounded = [FITS, (o.metric for o in self.search.objectives), (c.metric for c in self.search.constraints)]
        names = dict.fromkeys(itertools.chain(*bounded))
        values = {name: self.fresh_figures(name).get(config, of_search[name]) for name in names}
        score = self.search.score("ok", {name: None if pandas.isna(v) else v for name, v in values.items()})
        return score is not None and score.feasible

    @property
    def winner(self) -> int:
        """The configuration that is best by the first objective in fresh figures; without any, in the search."""
        return int((self.ranked if self.confirmed.empty else self.confirmed).index[0])

    @property
    def rivals(self) -> dict[str, int]:
        """The configurations that the winner is compared with, by their role."""
        m, ranked = self.measurements, self.ranked if self.confirmed.empty else self.confirmed
        rivals = {} if m.baseline in (None, self.winner) else {"the baseline": int(m.baseline or 0)}
        others = [config for config in ranked.index if config not in (self.winner, m.baseline)]
        if others:
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

    @cached_property
    def repeats(self) -> int:
        """Fresh repeats that the winner shares with all its rivals."""
        ok = self.fresh.trials[self.fresh.trials["status"] == "ok"]
        compared = ok[ok["stands_for"].isin([self.winner, *self.rivals.values()])]
        return len(_shared(compared["repeat"], compared["stands_for"]))

    @cached_property
    def comparison(self) -> Comparison:
        """All comparisons of the report, and among them each of two finalists, as any could have won: over fresh
        repeats if there are any, speeds over shared blocks of visits.
        """
        finalists = dict.fromkeys([self.winner, *self.rivals.values(), *map(int, self.confirmed.index)])
        metrics = tuple(dict.fromkeys((self.search.objectives[0].metric, *HEADLINE)))
        further = {
            f"finalist {config} against {reference}": (
                pandas.DataFrame({"reference": [reference], "config": [config]}, dtype="int64"),
                metrics,
            )
            for config, reference in itertools.combinations(finalists, 2)
        }
        return compare(self.measurements.unselected, further=further)

    def estimate(self, metric: str, rival: int) -> Estimate | None:
        """The winner against a rival; null where they are not comparable."""
        return self.comparison.judgement.pair(metric, rival, self.winner)

    @cached_property
    def regret(self) -> float:
        """See `recommend.largest_regret`, among the finalists; 0 without a second one. The held-out stories are those
        that chose the finalists among all.
        """
        metric = self.search.objectives[0].metric
        m = self.measurements if metric in TIMED_FIGURES else self.fresh
        return largest_regret(m, self.confirmed, self.winner, metric, candidates=len(self.ranked))


def _shared(values: pandas.Series, configs: pandas.Series) -> list[int]:
    """The repeats or blocks that every configuration has."""
    counts = configs.groupby(values).nunique()
    shared: list[int] = counts.index[counts == configs.nunique()].tolist()
    return shared


def read(m: Measurements, folder: Path) -> SearchResults | None:
    """The study of a results folder that ran last; null where there is none.

    Raises:
        InputError: the recorded search is not readable.
    """
    about = Store(folder).description().get("tune")
    proposed = m.trials[m.trials["study"].notna() & (m.trials["repeat"] == 0) & ~m.trials["twin"]]
    if about is None or proposed.empty:
        return None
    try:
        search = parse(m.name, m.title, {**_ABSENT, **about["base"]}, about["tune"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'grid.json'}: its search is not readable ({error})") from None
    last = about.get("study")
    if not (proposed["study"] == last).any():  # rows of before it was kept
        last = proposed.sort_values("started_at")["study"].iloc[-1]
    study = proposed[proposed["study"] == last].drop_duplicates("config", keep="last")
    rows = []
    for row in study.to_dict("records"):
        params = search.place(m.spec(row["config"]).model_copy(update={"seed": search.base.seed}))
        known = {name: None if pandas.isna(row[name]) else row[name] for name in METRICS}
        score = search.score(row["status"], known)
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
