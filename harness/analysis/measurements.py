"""Recorded trials, paired and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy
import pandas

from harness.analysis import equal_work, stats, timed
from harness.analysis.crossed import NO_SEED_BETWEEN, SeedNoise, crossed, seed_noise
from harness.analysis.estimate import Basis, Estimate
from harness.analysis.family import NO_ERRORS, Effects, judge
from harness.analysis.pilot import PILOT
from harness.analysis.undecided import with_power
from harness.dialects.training_file import TrainingFile
from harness.environment import Environment
from harness.grids.claims import CONDITIONS, DERIVED, WORDS, Claim, Contrast, recorded_level
from harness.metrics import FIGURES, METRICS
from harness.record import Tuned
from harness.results.schema import spec_of
from harness.spec.datasets import Part
from harness.spec.trial import TrialSpec, has_key, part_of

SPEC_KEYS = tuple(k for k in CONDITIONS if k not in DERIVED and k != "seed")
"""What makes two trials the same configuration: every key of the spec but the seed."""
_MOST_CANDIDATES = 64
"""Configurations on each side of a contrast that are searched for the nearest pair."""
_BY_TEXT: dict[str, Basis] = {"eval_loss": "stories", "forgetting": "passages", "task_score": "questions"}
"""Figures that are compared text by text."""


@dataclass(frozen=True)
class Measurements:
    """The comparable trials of a results folder."""

    name: str
    title: str
    claims: tuple[Claim, ...]
    """The grid's own."""
    trials: pandas.DataFrame
    """One row per trial, numbered from 0: the columns of the record, `config`, and `stands_for`, which is `config` too,
    except that a baseline's second run stands for the baseline."""
    configs: pandas.DataFrame
    """One row per configuration (all repeats of it): its spec, label and status, `repeats`, `baseline`, `twin`,
    `watched`."""
    rates: pandas.DataFrame
    """By trial number: mean, var and count of log(tokens ÷ seconds) over the timed steps."""
    readings: pandas.DataFrame
    """Speeds by trial and block of timing visits: trial, block, whether it was a `visit`, `TIMED_FIGURES`, and those of
    `reference_seconds`. A trial from before there were visits has one reading, whose block is its repeat."""
    waits_unknown: bool
    """Whether there are timed steps of which is not known how long they waited for a processor."""
    stories: pandas.DataFrame
    """Loss of each held-out story after training: trial, story, loss, tokens."""
    changes: dict[str, pandas.DataFrame]
    """By figure, loss after minus loss before training of each text, a held-out story (`eval_loss`) or a general
    passage (`forgetting`): the same columns."""
    items: pandas.DataFrame
    """Score of each question after training (`loss`), and before it: trial, task, story (its number), tokens (1)."""
    inference_results: dict[str, pandas.DataFrame]
    """Inference benchmarks of trained models, by table (models, requests, answers), with the number of the trial."""
    environment: dict[str, Any]
    environment_id: str
    left_out: tuple[str, ...]
    """Excluded rows, in words."""
    training_file: TrainingFile | None
    """What the training file that the base comes from means; null: the base is harness's own."""
    price_per_hour: float | None
    """Of the machine, in whatever currency; null: not given."""
    match: str | None
    """The figure at which the grid made its adapters as large as the baseline's; null: none."""
    tuned: Tuned | None
    """The learning rates that were found before the comparison; null: each configuration had its own."""
    _codes: pandas.DataFrame
    """By configuration, each condition as a small integer."""
    alpha: float = stats.ALPHA
    """Error rate of each family: smaller for rows that were looked at several times."""
    not_run: Mapping[str, int] = field(default_factory=dict)
    """By label, how many trials the grid has that are not recorded yet."""

    @cached_property
    def baseline(self) -> int | None:
        """The configuration that the others are compared with."""
        baselines = self.configs.index[self.configs["baseline"]]
        return int(baselines[0]) if len(baselines) else None

    @cached_property
    def floor(self) -> float | None:
        """Logarithm of the speed ratio below which nothing is called a difference; null without an A/A."""
        twins = self.configs.index[self.configs["twin"]]
        if self.baseline is None or not len(twins):
            return None
        by = [self.readings["block"], self.readings["trial"].map(self.trials["config"])]
        speeds = timed.logarithms(self.readings, "tokens_per_second").groupby(by).mean().unstack()
        if self.baseline not in speeds or twins[0] not in speeds:
            return None
        return stats.noise_floor(speeds[twins[0]] - speeds[self.baseline])

    @cached_property
    def _noises(self) -> dict[str, stats.Noise | None]:
        """Noise between equal trials in the logarithm of each noisy figure; null where nothing was repeated."""
        ok = self.trials[self.trials["status"] == "ok"]
        noises: dict[str, stats.Noise | None] = {}
        for metric in METRICS.values():
            if metric.scale == "ratio" and not metric.exact:
                values = ok[metric.name].astype(float)
                logarithms: pandas.Series = values.where(values > 0).map(math.log, na_action="ignore")
                repeated = ok["repeat"].nunique() > 1
                noises[metric.name] = stats.noise(logarithms, ok["stands_for"], ok["repeat"]) if repeated else None
        return noises

    # -------------------------------------------------------------------------------- configurations

    @property
    def where(self) -> str:
        """Where the trials ran, in one line."""
        return f"{Environment.model_validate(self.environment).summary}; environment {self.environment_id}"

    def labels(self, configs: Iterable[int]) -> list[str]:
        """The names of configurations."""
        return [str(label) for label in self.configs.loc[list(configs), "label"]]

    def spec(self, config: int) -> TrialSpec:
        """The spec of a configuration, under the seed of one of its repeats."""
        row: dict[str, Any] = {str(key): value for key, value in self.configs.loc[config].items()}
        targets = row["lora_target_modules"]
        return spec_of(row | {"lora_target_modules": None if _null(targets) else json.loads(targets)})

    def differing_keys(self, configs: Sequence[int]) -> list[dict[str, Any]]:
        """The keys in which each configuration differs from the baseline, with its values; without one, all keys."""
        base = {} if self.baseline is None else self.keys_of([self.baseline])[0]
        differing = [{k: v for k, v in row.items() if k not in base or v != base[k]} for row in self.keys_of(configs)]
        watched = self.configs.loc[list(configs), "watched"]  # whose nulls are not known
        return [
            {k: v for k, v in row.items() if v is not None} if is_watched else row
            for row, is_watched in zip(differing, watched, strict=True)
        ]

    def keys_of(self, configs: Sequence[int]) -> list[dict[str, Any]]:
        """The spec of each configuration, by key; without the seed."""
        rows = self.configs.loc[list(configs), list(SPEC_KEYS)].to_dict("records")
        return [{str(key): None if _null(value) else value for key, value in row.items()} for row in rows]

    @cached_property
    def acts_on(self) -> dict[int, Part | None]:
        """The part of a training that the technique of each configuration acts on; null of the baseline and its second
        run, and of all without a baseline.
        """
        if self.baseline is None:
            return dict.fromkeys(self.configs.index)
        differs = self._codes[list(SPEC_KEYS)].ne(self._codes.loc[self.baseline, list(SPEC_KEYS)])
        keys = numpy.array(SPEC_KEYS)
        # A level of a key is a technique of that key, whatever is derived from it.
        return {
            int(config): part_of([factor] if factor in SPEC_KEYS else keys[row].tolist())
            for config, factor, row in zip(differs.index, self.configs["factor"], differs.to_numpy(), strict=True)
        }

    @property
    def unselected(self) -> Measurements:
        """Without the trials that a search chose its finalists by, where these were repeated under fresh seeds: the
        best of many are better than they will be again.
        """
        of_search = self.trials["study"].notna() & (self.trials["repeat"] == 0)
        repeated = self.trials.loc[self.trials["repeat"] > 0, "config"].unique()
        chosen = of_search & self.trials["config"].isin(repeated) & (self.trials["config"] != self.baseline)
        left = self.trials[~chosen & (self.trials["status"] == "ok")]
        counts = left["config"].value_counts().reindex(self.configs.index, fill_value=0)
        configs = self.configs.assign(repeats=counts, measured=counts > 0)
        return replace(self, trials=self.trials[~chosen], configs=configs) if chosen.any() else self

    def with_inference_results(self, trials: Iterable[int]) -> Measurements:
        """The same with the inference results of these trials only."""
        kept = set(trials)
        tables = {name: table[table["trial"].isin(kept)] for name, table in self.inference_results.items()}
        return replace(self, inference_results=tables)

    # -------------------------------------------------------------------------------- pairs

    def against_baseline(self) -> pandas.DataFrame:
        """Pairs of the baseline and every other measured configuration, without the baseline's second run."""
        others = self.configs.index[self.configs["measured"] & ~self.configs["baseline"] & ~self.configs["twin"]]
        if self.baseline is None:
            others = others[:0]
        return pandas.DataFrame({"comparison": others, "config": others, "reference": self.baseline}, dtype="int64")

    def selected(self, where: dict[str, Any]) -> pandas.DataFrame:
        """Configurations at these levels; a list of levels matches any of them."""
        return self.configs[self._mask(where) & self._of_grid]

    @property
    def _of_grid(self) -> pandas.Series:
        """Configurations that claims and tables of techniques are about: no second run, no watched loop."""
        of_grid: pandas.Series = ~self.configs["twin"] & ~self.configs["watched"]
        return of_grid

    def pairs(self, contrast: Contrast) -> pandas.DataFrame:
        """Measured configurations that differ in the contrast's keys only: columns `reference` and `config`.

        Where further keys are free, each group gives one pair, the one that differs in the fewest keys.
        """
        asked = repr((contrast.compare, contrast.free, contrast.hold, contrast.where))
        if asked not in self._pairs:  # rows of the lesson and claims ask for the same ones
            self._pairs[asked] = self._find_pairs(contrast)
        return self._pairs[asked]

    @cached_property
    def _pairs(self) -> dict[str, pandas.DataFrame]:
        return {}

    def _find_pairs(self, contrast: Contrast) -> pandas.DataFrame:
        eligible: pandas.DataFrame = self.configs[self._mask(contrast.where) & self.configs["measured"] & self._of_grid]
        rest = self._rest(contrast).reindex(eligible.index)
        before = after = pandas.Series(True, eligible.index)
        for key, (from_level, to_level) in contrast.compare.items():
            from_mask, to_mask = (_has_level(eligible, key, level, rest) for level in (from_level, to_level))
            before, after = before & from_mask, after & to_mask & ~from_mask
        if not before.any() or not after.any():
            return pandas.DataFrame({"reference": [], "config": []}, dtype="int64")
        sides = []
        for name, mask in (("reference", before), ("config", after)):
            side = pandas.DataFrame({name: eligible.index[mask], "rest": rest[mask].to_numpy()})
            first = side.assign(first=side[name] != self.baseline).sort_values("first", kind="stable")
            sides.append(first.groupby("rest", sort=False).head(_MOST_CANDIDATES).drop(columns="first"))
        candidates = sides[0].merge(sides[1], on="rest")
        a, b = (self._codes.loc[candidates[name], list(SPEC_KEYS)].to_numpy() for name in ("reference", "config"))
        candidates["distance"] = (a != b).sum(axis=1)
        candidates["other"] = (candidates["reference"] != self.baseline) & (candidates["config"] != self.baseline)
        nearest = candidates.sort_values(["distance", "other"], kind="stable").drop_duplicates("rest")
        ordered: pandas.DataFrame = nearest[["reference", "config"]].sort_values(["reference", "config"])
        return ordered.reset_index(drop=True)

    def family(self, contrast: Contrast) -> pandas.DataFrame:
        """Measured configurations that differ from the baseline in the contrast's keys only."""
        if self.baseline is None:
            return self.configs[:0]
        rest = self._rest(contrast)
        mask = (rest == rest[self.baseline]).reindex(self.configs.index)
        members: pandas.DataFrame = self.configs[mask & self.configs["measured"] & self._of_grid]
        return members

    def _mask(self, where: dict[str, Any]) -> pandas.Series:
        mask = pandas.Series(True, self.configs.index)
        for key, level in where.items():
            mask &= _has_level(self.configs, key, level, None)
        return mask

    def _rest(self, contrast: Contrast) -> pandas.Series:
        """A hash of each configuration's keys that must be equal within a pair."""
        varied = {*contrast.compare, *contrast.free}
        # Each configuration has its own, as its technique does.
        varied |= {"learning_rate"} if self.tuned is not None else set()
        varied |= {"lora_r", "lora_alpha", "adapter_options"} if self.match is not None else set()
        columns = [key for key in (*SPEC_KEYS, *contrast.hold) if key not in varied or key in contrast.hold]
        # A sum of random multiples: the chance of a collision among 10^5 configurations is 10^-9.
        weights = numpy.random.default_rng(0).integers(1, 2**63, len(columns), dtype=numpy.uint64)
        codes = self._codes[columns].to_numpy(numpy.uint64)
        return pandas.Series((codes * weights).sum(axis=1, dtype=numpy.uint64), self._codes.index)

    # -------------------------------------------------------------------------------- effects

    def effects(self, pairs: pandas.DataFrame, metric: str) -> Effects:
        """Effects of each comparison on a metric.

        Args:
            pairs: columns comparison, reference, config; a pair for each comparison.
            metric: compared as the logarithm of the ratio, or as a difference.
        """
        stands_for = self.trials["stands_for"]
        if metric in self.readings:
            return timed.effects(pairs, metric, self.readings, self.rates, stands_for)
        if metric in _BY_TEXT:
            return self.text_effects(pairs, metric, self._texts(metric))
        matched = self.matched(pairs)
        matched["difference"] = self._differences(matched, metric)
        known = matched.dropna(subset=["difference"])
        # Both runs of a baseline average to one figure per repeat.
        by_repeat = known.groupby(["comparison", "repeat"], sort=False)["difference"].mean().reset_index()
        if METRICS[metric].exact:
            highest = self._highest(known, metric) if METRICS[metric].group == "memory" else None
            table = stats.exact(known["difference"], known["comparison"], highest).assign(basis="exact")
            return Effects(table.assign(n=by_repeat.groupby("comparison").size()), NO_ERRORS)
        table = stats.paired(by_repeat["difference"], by_repeat["comparison"]).assign(basis="repeats")
        noise = self._noises.get(metric)
        return (
            Effects(table, NO_ERRORS) if noise is None else timed.in_blocks(table, known, "repeat", noise, stands_for)
        )

    def _texts(self, metric: str) -> pandas.DataFrame:
        """What is compared text by text: held-out losses as they are, as their start depends on prompt and precision;
        forgetting is itself a change; of several tasks each counts as much.
        """
        if metric == "task_score":
            by_task = self.items.groupby(["trial", "task"])["story"]
            texts = self.items["story"] + 2**32 * self.items.groupby("task").ngroup()
            return self.items.assign(story=texts, tokens=1.0 / by_task.transform("size"))
        return self.stories if metric == "eval_loss" else self.changes[metric]

    def text_effects(self, pairs: pandas.DataFrame, metric: str, losses: pandas.DataFrame) -> Effects:
        """Effects of each comparison on what is measured of each text.

        Args:
            pairs: as for `effects`.
            metric: whose texts they are.
            losses: trial, story, tokens (its weight) and loss, or another figure of the text.
        """
        differences = _text_differences(self.matched(pairs), losses)
        # Of one seed, the interval of a score is over questions alone: no pilot has it of seeds.
        pilot = NO_SEED_BETWEEN if metric == "task_score" else SeedNoise(PILOT.seeds, 0.0)
        of_seeds = self.between_seeds(losses, paired=True) or pilot
        once = differences.drop_duplicates(["comparison", "trial", "other"])
        equal = equal_work.comparisons(pairs, self._codes)
        effects = crossed(differences, of_seeds, timed.weights(once, ["reference", "config"]), equal)
        return Effects(effects.table.assign(basis=_BY_TEXT[metric]), effects.errors)

    def matched(self, pairs: pandas.DataFrame) -> pandas.DataFrame:
        """The trials of each pair, repeat by repeat; columns `trial` and `other` (the reference)."""
        ok = self.trials.loc[self.trials["status"] == "ok", ["stands_for", "repeat"]]
        ok = ok.rename_axis("trial").reset_index().rename(columns={"stands_for": "config"})
        others = ok.rename(columns={"config": "reference", "trial": "other"})
        return pairs.merge(ok, on="config").merge(others, on=["reference", "repeat"])

    def _differences(self, matched: pandas.DataFrame, metric: str) -> pandas.Series:
        values = self.trials[metric].astype(float)
        ours, theirs = (values.reindex(matched[side]).to_numpy() for side in ("trial", "other"))
        if METRICS[metric].scale == "difference":
            return pandas.Series(ours - theirs, matched.index)
        with numpy.errstate(divide="ignore", invalid="ignore"):
            ratio = numpy.log(ours / theirs)
        return pandas.Series(numpy.where(numpy.isfinite(ratio), ratio, numpy.nan), matched.index)

    def _highest(self, matched: pandas.DataFrame, metric: str) -> pandas.Series:
        """By comparison, the logarithm of the ratio of both highest values over the repeats; the mean over its pairs.

        The repeat that holds most must fit.
        """
        values = self.trials[metric].astype(float)
        sides = {side: values.reindex(matched[side]).to_numpy() for side in ("trial", "other")}
        highest = matched.assign(**sides).groupby(["comparison", "config", "reference"])[["trial", "other"]].max()
        ratios: pandas.Series = (highest["trial"] / highest["other"]).map(math.log)
        return ratios.groupby("comparison").mean()

    def between_seeds(self, losses: pandas.DataFrame, *, paired: bool) -> SeedNoise | None:
        """Noise between seeds in these losses (see `seed_noise`), from all configurations; null where none was
        repeated.
        """
        ok = self.trials.loc[self.trials["status"] == "ok", ["stands_for", "repeat"]]
        if ok["repeat"].nunique() < 2:
            return None
        # A second run of the baseline has the same seed, and is averaged with the first.
        of_configs = losses.join(ok.rename(columns={"stands_for": "config"}), on="trial", how="inner")
        return seed_noise(of_configs, paired=paired)

    def estimates(self, effects: Effects, metric: str, alpha: float | None = None) -> dict[int, Estimate]:
        """Estimates by comparison from effects on a metric, which are one family.

        Args:
            effects: on the metric.
            metric: what is compared.
            alpha: error rate of the family; null: that of these measurements.
        """
        declared = FIGURES[metric]
        ratio = declared.scale == "ratio"
        floor = self.floor if metric in METRICS and declared.group == "speed" else None
        negligible = math.log1p(declared.negligible) if ratio else declared.negligible
        judged = with_power(judge(effects, declared.better, negligible, floor, alpha or self.alpha), declared, floor)
        names = ("effect", "low", "high", "detectable", "n", "basis", "p_family", "verdict", "seeds", "needed", "unit")
        columns = {name: judged[name] for name in names}
        if ratio:
            columns |= {name: numpy.exp(judged[name]) for name in ("effect", "low", "high")}
            columns["detectable"] = numpy.expm1(judged["detectable"])
        return {
            int(comparison): Estimate(
                metric, value, _known(low), _known(high), int(n), basis, _known(p), verdict,
                _whole(seeds), _known(detectable), _whole(needed), None if _null(unit) else unit,
            )
            for comparison, value, low, high, detectable, n, basis, p, verdict, seeds, needed, unit in zip(
                judged.index, *(column.tolist() for column in columns.values()), strict=True
            )
        }  # fmt: skip

    def learnt(self, metric: str, configs: Sequence[int]) -> dict[int, Estimate]:
        """Change of the loss by training, by configuration: loss after minus loss before, over texts and seeds.

        Args:
            metric: `eval_loss` or `forgetting`.
            configs: configurations.
        """
        ok = self.trials[(self.trials["status"] == "ok") & self.trials["stands_for"].isin(configs)]
        of_trial = ok[["stands_for", "repeat"]].rename(columns={"stands_for": "comparison"})
        changes = self.changes[metric].join(of_trial, on="trial", how="inner")
        of_seeds = self.between_seeds(self.changes[metric], paired=False)
        of_seeds = of_seeds or SeedNoise(PILOT.seeds_alone, 0.0, paired=False)
        once = changes.drop_duplicates("trial")
        effects = crossed(changes, of_seeds, timed.weights(once.assign(trial=once["comparison"]), ["trial"]))
        return self.estimates(Effects(effects.table.assign(basis=_BY_TEXT[metric]), effects.errors), metric)


def _text_differences(matched: pandas.DataFrame, losses: pandas.DataFrame) -> pandas.DataFrame:
    """The difference of each pair and text, as `crossed` takes it.

    Texts that were truncated at different lengths are not compared.
    """
    ours = matched.merge(losses, on="trial")
    theirs = losses.rename(columns={"trial": "other", "loss": "reference_loss"})
    both = ours.merge(theirs, on=["other", "story", "tokens"])
    return both.assign(loss=both["loss"] - both["reference_loss"])


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _whole(value: float) -> int | None:
    return None if math.isnan(value) else int(value)


def _has_level(configs: pandas.DataFrame, key: str, level: Any, groups: pandas.Series | None) -> pandas.Series:
    """Which configurations have a level of a key: where the adapter has no such key (a rank, without one), none."""
    without = [adapter for adapter in configs["adapter"].unique() if not has_key(str(adapter), key)]
    levels = configs[key].where(~configs["adapter"].isin(without), None) if without else configs[key]
    return _is_level(levels, recorded_level(key, level), groups)


def _is_level(values: pandas.Series, level: Any, groups: pandas.Series | None) -> pandas.Series:
    """Which values of a column match the level: a value, any of a list, null, or one of `WORDS`."""
    if isinstance(level, list | tuple):
        return values.isin(list(level))
    if level is None:
        return values.isna()
    if isinstance(level, str) and level in WORDS and level != "any":
        numbers = pandas.to_numeric(values, errors="coerce")
        grouped = numbers.groupby(groups) if groups is not None else numbers.groupby(lambda _: 0)
        extreme = grouped.transform("min" if level == "lowest" else "max")
        return numbers == extreme
    return values.notna() if level == "any" else values == level


def _null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value is pandas.NA
