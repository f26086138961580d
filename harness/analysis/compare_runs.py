"""Two runs compared: another machine, another version."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pandas

from harness._util.units import counted
from harness.analysis import stats
from harness.analysis.comparison import figures
from harness.analysis.estimate import Estimate
from harness.analysis.family import Effects
from harness.analysis.measurements import Measurements
from harness.errors import InputError
from harness.metrics import HEADLINE, METRICS

_SAME = ["spec_id", "data_fingerprint", "base_fingerprint"]
"""Columns in which trials that are compared agree."""
_MOST_NAMED = 8
"""Configurations of one run alone that are named."""


@dataclass(frozen=True)
class RunPair:
    """A configuration that both runs measured."""

    label: str
    first: dict[str, float]
    """Each headline figure in the first run (see `comparison.figures`); nan where it was not measured."""
    second: dict[str, float]
    estimates: dict[str, Estimate]
    """Second against first, by metric; without the metrics that are not compared."""


@dataclass(frozen=True)
class RunComparison:
    """The differences between two runs of a grid, in environment and in figures."""

    title: str
    environments: tuple[tuple[str, str, str], ...]
    """Field, value in the first, value in the second; where they differ."""
    pairs: tuple[RunPair, ...]
    warning: str | None
    """Caution about speeds of two environments."""
    unpaired: str | None
    """Which configurations are not compared, and why; null: none."""


def compare_runs(
    first: Measurements, second: Measurements, *, across_environments: bool = False, runs: int = 1
) -> RunComparison:
    """Compare the configurations that both runs measured, the second against the first.

    Args:
        first: the reference.
        second: compared with it.
        across_environments: compare speeds of different machines or versions too.
        runs: how many are compared with the first, each at its part of the error rate.

    Raises:
        InputError: they have no configuration in common.
    """
    differences = tuple(differing_fields(first.environment, second.environment))
    both, pairs, unpaired = _joined(first, second)
    if pairs.empty:
        reason = unpaired or f"{first.name} and {second.name} have no measured configuration in common"
        raise InputError(reason)
    with_speed = not differences or across_environments
    metrics = [metric for metric in HEADLINE if with_speed or metric != "tokens_per_second"]
    estimates = {metric: both.estimates(both.effects(pairs, metric), metric, both.alpha / runs) for metric in metrics}
    means = _means(both, pairs)
    return RunComparison(
        f"{second.title} against {first.title}",
        differences,
        tuple(
            RunPair(
                str(first.configs.at[reference, "label"]),
                _figures(means, reference),
                _figures(means, config),
                {metric: by[comparison] for metric, by in estimates.items() if comparison in by},
            )
            for reference, config, comparison in pairs.itertuples(index=False, name=None)
        ),
        _warning(with_speed) if differences else None,
        unpaired,
    )


def _warning(with_speed: bool) -> str:
    if with_speed:
        return "these speeds are of different environments: a difference may be the machine's or a version's"
    return "speeds of different environments are not compared; --across-environments compares them all the same"


def _means(both: Measurements, pairs: pandas.DataFrame) -> pandas.DataFrame:
    """Figures by configuration, of the trials that are compared; speeds are compared over all blocks of each run."""
    ok = both.trials[both.trials["status"] == "ok"]
    matched = both.matched(pairs)
    compared = figures(ok[ok.index.isin([*matched["trial"], *matched["other"]])], "config")
    timed = [name for name in HEADLINE if METRICS[name].group == "speed"]
    return compared.assign(**figures(ok, "stands_for")[timed])


def _figures(means: pandas.DataFrame, config: int) -> dict[str, float]:
    return {metric: float(means[metric].get(config, float("nan"))) for metric in HEADLINE}


def differing_fields(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The fields of two environments that differ, each with both values."""
    flat_a, flat_b = ({**e, **{f"version of {k}": v for k, v in e["versions"].items()}} for e in (a, b))
    names = [name for name in (*flat_a, *(n for n in flat_b if n not in flat_a)) if name != "versions"]
    pairs = ((n, flat_a.get(n), flat_b.get(n)) for n in names)
    return [(n, _known(a), _known(b)) for n, a, b in pairs if a != b]


def _known(field: Any) -> str:
    return "unknown" if field is None else str(field)


def _joined(first: Measurements, second: Measurements) -> tuple[Measurements, pandas.DataFrame, str | None]:
    """The rows of both runs, the second's renumbered after the first's, the pairs of equal specs and contents, and
    what is not paired for its contents.
    """
    trials, configs = 1 + int(first.trials.index.max()), 1 + int(first.configs.index.max())
    # A repeat has its seed in common with the one of the other run, whichever number it has there.
    seeds = sorted({*first.trials["seed"], *second.trials["seed"]})
    ours, theirs = (each.trials.assign(repeat=each.trials["seed"].map(seeds.index)) for each in (first, second))
    renumbered = theirs.set_axis(theirs.index + trials)
    renumbered[["config", "stands_for"]] += configs
    columns = [*_SAME, "config"]
    measured, also_measured = (each[~each["twin"] & (each["status"] == "ok")] for each in (first.trials, renumbered))
    references = measured[columns].rename(columns={"config": "reference"})
    compared = also_measured[columns]
    # Null fingerprints, of rows from before there were any, pair with null ones alone.
    pairs, by_name = (
        references.merge(compared, on=on)[["reference", "config"]].drop_duplicates().reset_index(drop=True)
        for on in (_SAME, ["spec_id"])
    )
    others = by_name.loc[~by_name["config"].isin(pairs["config"]), "config"].nunique()
    floors = [floor for floor in (first.floor, second.floor) if floor is not None]
    both = _Joined(
        **{
            **{name: getattr(first, name) for name in Measurements.__dataclass_fields__},
            "trials": pandas.concat([ours, renumbered]),
            "readings": pandas.concat(
                [
                    _numbered(first.readings, 0),
                    _numbered(second.readings.assign(trial=second.readings["trial"] + trials), 1),
                ]
            ),
            "rates": pandas.concat([first.rates, second.rates.set_axis(second.rates.index + trials)]),
            "stories": _both(first.stories, second.stories, trials),
            "items": _both(first.items, second.items, trials),
            "changes": {name: _both(first.changes[name], second.changes[name], trials) for name in first.changes},
            "alpha": min(first.alpha, second.alpha),
        }
    )
    names = (first.name, second.name) if first.name != second.name else ("the first", "the second")
    unpaired = []
    if others:
        which = f"{counted(others, 'configuration')} {'is' if others == 1 else 'are'} not compared"
        unpaired.append(
            f"{which}: {' and '.join(names)} were measured with different contents of their data or base model, or "
            "one of them before contents were fingerprinted"
        )
    tried = first.trials.loc[~first.trials["twin"], [*columns, "label"]].rename(columns={"config": "reference"})
    tried = tried.merge(renumbered.loc[~renumbered["twin"], columns], on=_SAME)
    failed = tried[~tried["config"].isin(pairs["config"])].drop_duplicates("label")
    if len(failed):
        well = ({*measured["config"]}, {*also_measured["config"]})
        shown = []
        for label, *its in failed[["label", "reference", "config"]].itertuples(index=False, name=None):
            of = " and ".join(name for name, one, ok in zip(names, its, well, strict=True) if one not in ok)
            shown.append(f"{label} (in {of})" if of else label)
        unpaired.append(f"not compared, as these did not end well: {', '.join(shown)}")
    compared_of = (pairs["reference"], pairs["config"] - configs)
    for name, run, other, of_run in zip(names, (first, second), (second, first), compared_of, strict=True):
        alone = run.trials[~run.trials["twin"] & ~run.trials["spec_id"].isin(other.trials["spec_id"])]
        labels = alone.loc[~alone["config"].isin(of_run), "label"].unique().tolist()
        if labels and not pairs.empty:
            more = f" and {len(labels) - _MOST_NAMED} more" if len(labels) > _MOST_NAMED else ""
            unpaired.append(f"in {name} alone: {', '.join(labels[:_MOST_NAMED])}{more}")
    noisy = replace(both, noise=max(floors, default=None))
    return noisy, pairs.assign(comparison=range(len(pairs))), "; ".join(unpaired) or None


def _numbered(readings: pandas.DataFrame, run: int) -> pandas.DataFrame:
    """Readings with their run, and with its blocks numbered. Ratios to each run's own baseline would hide what differs
    between the runs.
    """
    blocks = readings["block"].rank(method="dense").astype("int64")
    return readings.assign(run=run, block=blocks, reference_seconds=math.nan)


def _both(first: pandas.DataFrame, second: pandas.DataFrame, trials: int) -> pandas.DataFrame:
    return pandas.concat([first, second.assign(trial=second["trial"] + trials)])


def _between_runs(pairs: pandas.DataFrame, readings: pandas.DataFrame) -> Effects:
    """Differences between the means over the blocks of two runs.

    What differs from block to block is independent in the two runs and common to all configurations of a block. So the
    variance has a part of the blocks, with few degrees of freedom, that all comparisons err by together, and one of the
    noise within blocks: of the table's columns, `seed_share` and `seed_df` are about the blocks.
    """
    readings = readings.assign(of_run=readings["run"].astype(str) + " " + readings["block"].astype(str))
    weighted = pandas.concat([_weighted(pairs, readings, "config", 1.0), _weighted(pairs, readings, "reference", -1.0)])
    weighted = weighted[weighted.groupby("comparison")["run"].transform("nunique") == 2]
    by = weighted.groupby("comparison")
    counts = weighted.groupby(["comparison", "run"])["block"].nunique()
    blocks = _noise_of_blocks(readings)
    noise = stats.noise(readings["value"], readings["config"], readings["of_run"], layouts=2) or replace(
        blocks, sigma=0.0
    )
    of_blocks: pandas.Series = blocks.sigma * (1 / counts).groupby("comparison").sum() ** 0.5
    keyed = weighted.assign(source="trial in " + weighted["of_run"], unit=weighted["trial"].astype(str))
    keys = ["comparison", "source", "unit"]
    errors = noise.errors(keyed.set_index(keys)["weight"], keyed["config"])
    variance = (errors**2).groupby("comparison").sum() + of_blocks**2
    table = pandas.DataFrame({
        "effect": (weighted["weight"] * weighted["value"]).groupby(weighted["comparison"]).sum(),
        "n": counts.groupby("comparison").min(),
        "se": numpy.sqrt(variance),
        "df": float(noise.df),
        "seed_share": (of_blocks**2 / variance).fillna(0.0),
        "seed_df": float(blocks.df),
        "pooled": "seeds",
        "basis": by["visit"].all().map({True: "visits", False: "repeats"}),
    })  # fmt: skip
    together = of_blocks.rename("error").reset_index().assign(source="blocks", unit="all").set_index(keys)["error"]
    return Effects(stats.with_intervals(table), pandas.concat([errors, together]))


def _weighted(pairs: pandas.DataFrame, readings: pandas.DataFrame, side: str, sign: float) -> pandas.DataFrame:
    """The readings of one side of each pair, with their weights in its mean over blocks."""
    of_side = pairs[["comparison", side]].rename(columns={side: "config"}).merge(readings, on="config")
    blocks = of_side.groupby("comparison")["of_run"].transform("nunique")
    in_block = of_side.groupby(["comparison", "of_run"])["trial"].transform("size")
    return of_side.assign(weight=sign / (blocks * in_block))


def _noise_of_blocks(readings: pandas.DataFrame) -> stats.Noise:
    """Between the means of blocks, within each run."""
    rest = readings["value"] - readings.groupby("config")["value"].transform("mean")
    means = rest.groupby([readings["run"], readings["block"]]).mean()
    df = len(means) - means.index.unique("run").size
    deviations = means - means.groupby("run").transform("mean")
    return stats.Noise(math.sqrt(float((deviations**2).sum()) / df), df)


@dataclass(frozen=True)
class _Joined(Measurements):
    """Rows of two runs, whose trials of one repeat have their seed in common, and whose blocks nothing."""

    noise: float | None = None

    def effects(self, pairs: pandas.DataFrame, metric: str) -> Effects:
        """See `Measurements.effects`; speeds are compared over the blocks of each run, where one has several."""
        if metric not in self.readings or self.readings["block"].nunique() < 2:
            return super().effects(pairs, metric)
        configs = self.readings["trial"].map(self.trials["stands_for"])
        return _between_runs(pairs, self.readings.assign(config=configs, value=numpy.log(self.readings[metric])))

    @property
    def floor(self) -> float | None:
        """The larger of the two runs' noise floors."""
        return self.noise
