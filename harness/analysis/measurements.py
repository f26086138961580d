"""Recorded trials, paired and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy
import pandas

from harness.analysis import stats
from harness.analysis.stats import Verdict
from harness.grids.claims import CONDITIONS, DERIVED, WORDS, Claim, Contrast
from harness.metrics import FIGURES, METRICS, show_bytes
from harness.results.schema import spec_of
from harness.spec import TrialSpec

SPEC_KEYS = tuple(k for k in CONDITIONS if k not in DERIVED and k != "seed")
"""What makes two trials the same configuration: every key of the spec but the seed."""
_MOST_CANDIDATES = 64
"""Configurations on each side of a contrast that are searched for the nearest pair."""
Basis = Literal["exact", "repeats", "steps", "stories", "passages", "rounds", "trials"]
_BY_TEXT: dict[str, Basis] = {"eval_loss": "stories", "forgetting": "passages"}
"""Figures that are compared text by text."""


@dataclass(frozen=True)
class Estimate:
    """One comparison of one figure, on the scale that people read."""

    metric: str
    value: float
    """Ratio to the reference, or difference from it in nats."""
    low: float | None
    high: float | None
    """95 % interval; null where the pairs give none."""
    n: int
    """Pairs (repeats; stories for losses)."""
    basis: Basis
    """What the interval is over."""
    p: float | None
    """Adjusted over the family (Holm)."""
    verdict: Verdict

    @property
    def within(self) -> str:
        """What `same` means: within 1 %, within 0.01 nats."""
        metric = FIGURES[self.metric]
        return f"{metric.negligible:.0%}" if metric.scale == "ratio" else f"{metric.negligible:g} nats"

    @property
    def text(self) -> str:
        """The verdict in words."""
        return f"same within {self.within}" if self.verdict == "same" else self.verdict


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
    """One row per configuration (all repeats of it): its spec, label and status, `repeats`, `baseline`, `twin`."""
    rates: pandas.DataFrame
    """By trial number: mean, var and count of log(tokens ÷ seconds) over the timed steps."""
    stories: pandas.DataFrame
    """Loss of each held-out story after training: trial, story, loss, tokens."""
    changes: dict[str, pandas.DataFrame]
    """By figure, loss after minus loss before training of each text, a held-out story (`eval_loss`) or a general
    passage (`forgetting`): the same columns."""
    inference_results: dict[str, pandas.DataFrame]
    """Inference benchmarks of trained models, by table (models, requests, answers), with the number of the trial."""
    environment: dict[str, Any]
    environment_id: str
    left_out: tuple[str, ...]
    """Excluded rows, in words."""
    _codes: pandas.DataFrame
    """By configuration, each condition as a small integer."""

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
        ok = self.trials[self.trials["status"] == "ok"]
        speeds = numpy.log(ok.pivot_table(index="repeat", columns="config", values="tokens_per_second"))
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
        return f"{_describe(self.environment)}; environment {self.environment_id}"

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
        base = {} if self.baseline is None else self._keys([self.baseline])[0]
        return [{k: v for k, v in row.items() if k not in base or v != base[k]} for row in self._keys(configs)]

    def _keys(self, configs: Sequence[int]) -> list[dict[str, Any]]:
        rows = self.configs.loc[list(configs), list(SPEC_KEYS)].to_dict("records")
        return [{str(key): None if _null(value) else value for key, value in row.items()} for row in rows]

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
        return self.configs[self._mask(where) & ~self.configs["twin"]]

    def pairs(self, contrast: Contrast) -> pandas.DataFrame:
        """Measured configurations that differ in the contrast's keys only: columns `reference` and `config`.

        Where further keys are free, each group gives one pair, the one that differs in the fewest keys.
        """
        eligible: pandas.DataFrame = self.configs[
            self._mask(contrast.where) & self.configs["measured"] & ~self.configs["twin"]
        ]
        rest = self._rest(contrast).reindex(eligible.index)
        before = after = pandas.Series(True, eligible.index)
        for key, (from_level, to_level) in contrast.compare.items():
            values = eligible[key]
            from_mask, to_mask = (_is_level(values, level, rest) for level in (from_level, to_level))
            before, after = before & from_mask, after & to_mask & ~from_mask
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
        members: pandas.DataFrame = self.configs[mask & self.configs["measured"] & ~self.configs["twin"]]
        return members

    def _mask(self, where: dict[str, Any]) -> pandas.Series:
        mask = pandas.Series(True, self.configs.index)
        for key, level in where.items():
            mask &= _is_level(self.configs[key], level, None)
        return mask

    def _rest(self, contrast: Contrast) -> pandas.Series:
        """A hash of each configuration's keys that must be equal within a pair."""
        varied = {*contrast.compare, *contrast.free}
        columns = [key for key in (*SPEC_KEYS, *contrast.hold) if key not in varied or key in contrast.hold]
        # A sum of random multiples: the chance of a collision among 10^5 configurations is 10^-9.
        weights = numpy.random.default_rng(0).integers(1, 2**63, len(columns), dtype=numpy.uint64)
        codes = self._codes[columns].to_numpy(numpy.uint64)
        return pandas.Series((codes * weights).sum(axis=1, dtype=numpy.uint64), self._codes.index)

    # -------------------------------------------------------------------------------- effects

    def effects(self, pairs: pandas.DataFrame, metric: str) -> pandas.DataFrame:
        """Table of effects (see `stats`) of each comparison on a metric, with a column `basis`.

        Args:
            pairs: columns comparison, reference, config; several pairs may belong to one comparison.
            metric: compared as the logarithm of the ratio, or as a difference.
        """
        matched = self._matched(pairs)
        if metric in _BY_TEXT:
            # Held-out losses are compared as they are, as their start depends on prompt and precision; forgetting is
            # itself a change.
            losses = self.stories if metric == "eval_loss" else self.changes[metric]
            by_text = _text_differences(matched, losses)
            return stats.paired(by_text["difference"], by_text["comparison"]).assign(basis=_BY_TEXT[metric])
        matched["difference"] = self._differences(matched, metric)
        known = matched.dropna(subset=["difference"])
        # Both runs of a baseline, and several pairs of a comparison, average to one figure per repeat.
        by_repeat = known.groupby(["comparison", "repeat"], sort=False)["difference"].mean().reset_index()
        if METRICS[metric].exact:
            effects = stats.exact(known["difference"], known["comparison"]).assign(basis="exact")
            return effects.assign(n=by_repeat.groupby("comparison").size())
        effects = stats.paired(by_repeat["difference"], by_repeat["comparison"]).assign(basis="repeats")
        noise = self._noises.get(metric)
        if noise is not None:
            return stats.in_blocks(effects, _squared_weights(known), noise)
        return self._by_steps(effects, known) if metric == "tokens_per_second" else effects

    def _matched(self, pairs: pandas.DataFrame) -> pandas.DataFrame:
        """The trials of each pair, repeat by repeat; columns `trial` and `other` (the reference)."""
        ok = self.trials.loc[self.trials["status"] == "ok", ["stands_for", "repeat"]]
        ok = ok.rename_axis("trial").reset_index().rename(columns={"stands_for": "config"})
        one = pairs.merge(ok, on="config")
        return one.merge(ok.rename(columns={"config": "reference", "trial": "other"}), on=["reference", "repeat"])

    def _differences(self, matched: pandas.DataFrame, metric: str) -> pandas.Series:
        values = self.trials[metric].astype(float)
        ours, theirs = (values.reindex(matched[side]).to_numpy() for side in ("trial", "other"))
        if METRICS[metric].scale == "difference":
            return pandas.Series(ours - theirs, matched.index)
        with numpy.errstate(divide="ignore", invalid="ignore"):
            ratio = numpy.log(ours / theirs)
        return pandas.Series(numpy.where(numpy.isfinite(ratio), ratio, numpy.nan), matched.index)

    def _by_steps(self, effects: pandas.DataFrame, matched: pandas.DataFrame) -> pandas.DataFrame:
        """`effects` of a single repeat, with intervals over the timed steps of the two trials."""
        single = matched.drop_duplicates("comparison")
        ours, theirs = (self.rates.reindex(single[side]).set_axis(single["comparison"]) for side in ("trial", "other"))
        by_steps = stats.welch(ours, theirs).dropna(subset=["effect"]).assign(basis="steps")
        # The effect stays the ratio of the recorded figures; the steps give the width of the interval.
        effect = effects.loc[by_steps.index, "effect"]
        return pandas.concat([effects.drop(by_steps.index), stats.with_intervals(by_steps.assign(effect=effect))])

    def compare(self, pairs: pandas.DataFrame, metric: str, alpha: float = stats.ALPHA) -> dict[int, Estimate]:
        """Estimates by comparison; the comparisons are one family.

        Args:
            pairs: see `effects`.
            metric: what is compared.
            alpha: family-wise error rate.
        """
        return self.estimates(self.effects(pairs, metric), metric, alpha)

    def estimates(self, effects: pandas.DataFrame, metric: str, alpha: float = stats.ALPHA) -> dict[int, Estimate]:
        """Estimates from effects on a metric, which are one family."""
        declared = FIGURES[metric]
        ratio = declared.scale == "ratio"
        judged = stats.verdicts(
            effects,
            declared.better,
            math.log1p(declared.negligible) if ratio else declared.negligible,
            self.floor if metric in METRICS and declared.group == "speed" else None,
            alpha,
        )
        columns = judged[["effect", "low", "high"]]
        shown = numpy.exp(columns) if ratio else columns
        return {
            int(comparison): Estimate(metric, value, _known(low), _known(high), int(n), basis, _known(p), verdict)
            for comparison, value, low, high, n, basis, p, verdict in zip(
                judged.index,
                *(shown[name].tolist() for name in ("effect", "low", "high")),
                *(judged[name].tolist() for name in ("n", "basis", "p_holm", "verdict")),
                strict=True,
            )
        }

    def learnt(self, metric: str, configs: Sequence[int]) -> dict[int, Estimate]:
        """Change of the loss by training, by configuration: loss after minus loss before, over the texts.

        Args:
            metric: `eval_loss` or `forgetting`.
            configs: configurations.
        """
        ok = self.trials[(self.trials["status"] == "ok") & self.trials["stands_for"].isin(configs)]
        changes = self.changes[metric].join(ok["stands_for"], on="trial", how="inner")
        # A text counts once, whatever the number of repeats.
        means = changes.groupby(["stands_for", "story"], sort=False)["loss"].mean().reset_index()
        effects = stats.paired(means["loss"], means["stands_for"])
        return self.estimates(effects.assign(basis=_BY_TEXT[metric]), metric)

    def undecided(self, alpha: float = stats.ALPHA) -> set[str]:
        """Labels of the configurations whose speed or loss is not distinguishable from the baseline's.

        Args:
            alpha: see `compare`; divided by the number of looks where there are several.
        """
        pairs = self.against_baseline()
        configs: set[int] = set()
        for metric in ("tokens_per_second", "eval_loss"):
            estimates = self.compare(pairs, metric, alpha)
            configs |= {config for config, e in estimates.items() if e.verdict == "not distinguishable"}
        return set(self.labels(sorted(configs)))


def _text_differences(matched: pandas.DataFrame, losses: pandas.DataFrame) -> pandas.DataFrame:
    """A difference for each comparison and text, averaged over the pairs: a text counts once.

    Texts that were truncated at different lengths are not compared.
    """
    ours = matched.merge(losses, on="trial")
    theirs = losses.rename(columns={"trial": "other", "loss": "reference_loss"})
    both = ours.merge(theirs, on=["other", "story", "tokens"])
    both["difference"] = both["loss"] - both["reference_loss"]
    means: pandas.Series = both.groupby(["comparison", "story"], sort=False)["difference"].mean()
    return means.reset_index()


def _squared_weights(matched: pandas.DataFrame) -> pandas.Series:
    """By comparison, Σ w² over its trials, with w their weights in the mean difference."""
    repeats = matched.groupby("comparison")["repeat"].transform("nunique")
    weight = 1.0 / (repeats * matched.groupby(["comparison", "repeat"])["trial"].transform("size"))
    sides = [
        pandas.DataFrame({"comparison": matched["comparison"], "trial": matched[side], "weight": sign * weight})
        for side, sign in (("trial", 1.0), ("other", -1.0))
    ]
    by_trial = pandas.concat(sides).groupby(["comparison", "trial"])["weight"].sum() ** 2
    return by_trial.groupby("comparison").sum()


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


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


def _describe(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    products = {"fp32-blocks": "in blocks of fp32", "amx": "by AMX", "avx512_bf16": "by AVX-512"}
    how = products.get(environment["half_matmul"])
    kernel = f", 16-bit products {how}" if how and environment["device_type"] == "cpu" else ""
    return (
        f"{environment['device_name']}, {show_bytes(environment['device_memory_bytes'])}, "
        f"{environment['cpu_cores']} CPU cores{kernel}; {versions}"
    )


def _null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value is pandas.NA
