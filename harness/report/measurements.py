"""The rows that a report rests on: one results folder, one environment, one version of its grid."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy
import pandas
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from harness import stats
from harness.claims import CONDITIONS, DERIVED, WORDS, Claim, Contrast
from harness.environment import cards, current
from harness.errors import InputError
from harness.metrics import FIGURES, METRICS, show_bytes
from harness.results import AT_WORK, Store, Table, spec_of
from harness.spec import TrialSpec
from harness.stats import Verdict
from harness.terminal import printable
from harness.wording import explain, one_line

_KEYS = tuple(k for k in CONDITIONS if k not in DERIVED and k != "seed")
"""What makes two trials the same configuration: every key of the spec but the seed."""

_MOST_CANDIDATES = 64
"""Configurations on each side of a contrast among which the nearest pair is looked for."""

Basis = Literal["exact", "repeats", "steps", "stories", "passages", "rounds", "trials"]

_BY_TEXT: dict[str, Basis] = {"eval_loss": "stories", "forgetting": "passages"}
"""Figures that are compared text by text."""


@dataclass(frozen=True)
class Estimate:
    """One comparison of one figure, as people read it."""

    metric: str
    value: float
    """Ratio, or difference in nats: what is looked at, over or minus what it is compared with."""
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
    def said(self) -> str:
        """The verdict in words."""
        return f"same within {self.within}" if self.verdict == "same" else self.verdict


@dataclass(frozen=True)
class Measurements:
    """The trials of a results folder that may be compared, and what was left out of them."""

    name: str
    title: str
    claims: tuple[Claim, ...]
    """The grid's own."""
    trials: pandas.DataFrame
    """One row per trial, numbered from 0: the columns of the record, `config`, and `stands_for`: the same, but of a
    baseline's second run the baseline."""
    configs: pandas.DataFrame
    """One row per configuration (all repeats of it): its spec, label and status, `repeats`, `baseline`, `twin`."""
    rates: pandas.DataFrame
    """By trial number: mean, var and count of log(tokens ÷ seconds) over the timed steps."""
    stories: pandas.DataFrame
    """Loss of each held-out story after training: trial, story, loss, tokens."""
    changes: dict[str, pandas.DataFrame]
    """By figure, what training added to the loss of each text, a held-out story (`eval_loss`) or a general passage
    (`forgetting`): the same columns."""
    served: dict[str, pandas.DataFrame]
    """Trained models at work, by table (models, requests, answers), with the number of the trial."""
    environment: dict[str, Any]
    environment_id: str
    left_out: tuple[str, ...]
    """Rows that are not compared, in words."""
    _codes: pandas.DataFrame
    """By configuration, each condition as a small integer."""

    @cached_property
    def baseline(self) -> int | None:
        """The configuration that the others are compared with."""
        found = self.configs.index[self.configs["baseline"]]
        return int(found[0]) if len(found) else None

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
        """What equal trials differ by in the logarithm of each figure that varies; null where nothing was repeated."""
        ok = self.trials[self.trials["status"] == "ok"]
        noises: dict[str, stats.Noise | None] = {}
        for metric in METRICS.values():
            if metric.scale == "ratio" and not metric.exact:
                values = ok[metric.name].astype(float)
                logarithms: pandas.Series = values.where(values > 0).map(math.log, na_action="ignore")
                repeated = ok["repeat"].nunique() > 1
                noises[metric.name] = stats.noise(logarithms, ok["stands_for"], ok["repeat"]) if repeated else None
        return noises

    # -------------------------------------------------------------------------------- pairs

    def against_baseline(self) -> pandas.DataFrame:
        """Every other measured configuration beside the baseline, its second run apart."""
        others = self.configs.index[self.configs["measured"] & ~self.configs["baseline"] & ~self.configs["twin"]]
        if self.baseline is None:
            others = others[:0]
        return pandas.DataFrame({"comparison": others, "config": others, "reference": self.baseline}, dtype="int64")

    def selected(self, where: dict[str, Any]) -> pandas.DataFrame:
        """Configurations at these levels; a list of levels is any of them."""
        return self.configs[self._mask(where) & ~self.configs["twin"]]

    def pairs(self, contrast: Contrast) -> pandas.DataFrame:
        """Measured configurations that differ as the contrast says and in nothing else, `reference` and `config`.

        Where further keys are free, each group has one pair: the one that differs in the fewest keys.
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
        found = sides[0].merge(sides[1], on="rest")
        a, b = (self._codes.loc[found[name], list(_KEYS)].to_numpy() for name in ("reference", "config"))
        found["distance"] = (a != b).sum(axis=1)
        found["other"] = (found["reference"] != self.baseline) & (found["config"] != self.baseline)
        nearest = found.sort_values(["distance", "other"], kind="stable").drop_duplicates("rest")
        ordered: pandas.DataFrame = nearest[["reference", "config"]].sort_values(["reference", "config"])
        return ordered.reset_index(drop=True)

    def family(self, contrast: Contrast) -> pandas.DataFrame:
        """Measured configurations that differ from the baseline in nothing but the contrast's keys."""
        if self.baseline is None:
            return self.configs[:0]
        rest = self._rest(contrast)
        mask = (rest == rest[self.baseline]).reindex(self.configs.index)
        found: pandas.DataFrame = self.configs[mask & self.configs["measured"] & ~self.configs["twin"]]
        return found

    def _mask(self, where: dict[str, Any]) -> pandas.Series:
        mask = pandas.Series(True, self.configs.index)
        for key, level in where.items():
            mask &= _is_level(self.configs[key], level, None)
        return mask

    def _rest(self, contrast: Contrast) -> pandas.Series:
        """A number for each configuration that is equal where everything is equal that must be."""
        varied = {*contrast.compare, *contrast.free}
        columns = [key for key in (*_KEYS, *contrast.hold) if key not in varied or key in contrast.hold]
        # A sum of random multiples tells 10^5 configurations apart with a chance of error of 10^-9.
        weights = numpy.random.default_rng(0).integers(1, 2**63, len(columns), dtype=numpy.uint64)
        codes = self._codes[columns].to_numpy(numpy.uint64)
        return pandas.Series((codes * weights).sum(axis=1, dtype=numpy.uint64), self._codes.index)

    def with_served(self, served: dict[str, pandas.DataFrame]) -> Measurements:
        """The same with other models at work."""
        return replace(self, served=served)

    # -------------------------------------------------------------------------------- effects

    def effects(self, pairs: pandas.DataFrame, metric: str) -> pandas.DataFrame:
        """Effect of each comparison on a metric, as `stats` has them, and its `basis`.

        Args:
            pairs: columns comparison, reference, config; several pairs may belong to one comparison.
            metric: compared as logarithm of the ratio, or as difference.
        """
        matched = self._matched(pairs)
        if metric in _BY_TEXT:
            # A story's loss before training differs with the prompt and the precision; of a general passage the
            # change is the figure itself.
            losses = self.stories if metric == "eval_loss" else self.changes[metric]
            by_text = _text_differences(matched, losses)
            return stats.paired(by_text["difference"], by_text["comparison"]).assign(basis=_BY_TEXT[metric])
        matched["difference"] = self._differences(matched, metric)
        known = matched.dropna(subset=["difference"])
        # The two runs of a baseline are one figure, and so are the several pairs of a comparison within a repeat.
        by_repeat = known.groupby(["comparison", "repeat"], sort=False)["difference"].mean().reset_index()
        if METRICS[metric].exact:
            found = stats.exact(known["difference"], known["comparison"]).assign(basis="exact")
            return found.assign(n=by_repeat.groupby("comparison").size())
        found = stats.paired(by_repeat["difference"], by_repeat["comparison"]).assign(basis="repeats")
        noise = self._noises.get(metric)
        if noise is not None:
            return stats.in_blocks(found, _squared_weights(known), noise)
        return self._by_steps(found, known) if metric == "tokens_per_second" else found

    def _matched(self, pairs: pandas.DataFrame) -> pandas.DataFrame:
        """The trials of each pair, repeat by repeat; both runs of a baseline stand for it."""
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

    def _by_steps(self, found: pandas.DataFrame, matched: pandas.DataFrame) -> pandas.DataFrame:
        """With a single repeat, the doubt is over the timed steps of the two trials."""
        single = matched.drop_duplicates("comparison")
        ours, theirs = (self.rates.reindex(single[side]).set_axis(single["comparison"]) for side in ("trial", "other"))
        by_steps = stats.welch(ours, theirs).dropna(subset=["effect"]).assign(basis="steps")
        # The effect stays the ratio of the recorded figures; the steps give the width.
        effect = found.loc[by_steps.index, "effect"]
        return pandas.concat([found.drop(by_steps.index), stats.with_intervals(by_steps.assign(effect=effect))])

    def compare(self, pairs: pandas.DataFrame, metric: str, alpha: float = stats.ALPHA) -> dict[int, Estimate]:
        """Estimates by comparison; the comparisons are one family.

        Args:
            pairs: see `effects`.
            metric: what is compared.
            alpha: share of false differences over the family.
        """
        return self.estimates(self.effects(pairs, metric), metric, alpha)

    def estimates(self, effects: pandas.DataFrame, metric: str, alpha: float = stats.ALPHA) -> dict[int, Estimate]:
        """Effects on a metric, which are one family, with the words that follow from them."""
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
        """What training changed, by configuration: loss after minus loss before, over the texts.

        Args:
            metric: `eval_loss` or `forgetting`.
            configs: whose training.
        """
        ok = self.trials[(self.trials["status"] == "ok") & self.trials["stands_for"].isin(configs)]
        mine = self.changes[metric].join(ok["stands_for"], on="trial", how="inner")
        # A text counts once, however often the trial was repeated.
        means = mine.groupby(["stands_for", "story"], sort=False)["loss"].mean().reset_index()
        found = stats.paired(means["loss"], means["stands_for"])
        return self.estimates(found.assign(basis=_BY_TEXT[metric]), metric)

    def undecided(self, alpha: float = stats.ALPHA) -> set[str]:
        """Labels of the configurations whose speed or loss is neither told from the baseline's nor the same.

        Args:
            alpha: see `compare`; a share of it where one looks several times.
        """
        pairs = self.against_baseline()
        found: set[int] = set()
        for metric in ("tokens_per_second", "eval_loss"):
            estimates = self.compare(pairs, metric, alpha)
            found |= {config for config, e in estimates.items() if e.verdict == "not distinguishable"}
        return set(labels(self, sorted(found)))


def _text_differences(matched: pandas.DataFrame, losses: pandas.DataFrame) -> pandas.DataFrame:
    """A difference for each comparison and text, averaged over the pairs: a text counts once.

    Texts that were judged on other tokens (cut elsewhere) do not compare.
    """
    ours = matched.merge(losses, on="trial")
    theirs = losses.rename(columns={"trial": "other", "loss": "reference_loss"})
    both = ours.merge(theirs, on=["other", "story", "tokens"])
    both["difference"] = both["loss"] - both["reference_loss"]
    means: pandas.Series = both.groupby(["comparison", "story"], sort=False)["difference"].mean()
    return means.reset_index()


def _squared_weights(matched: pandas.DataFrame) -> pandas.Series:
    """By comparison, Σ w² over the trials: how the noise of single trials enters the mean of the differences."""
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
    """Which of a column's values are the level: one value, any of a list, null, or one of the words."""
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


# ------------------------------------------------------------------------------------ reading


def load(
    folder: Path, environment: str | None = None, baseline_ids: Collection[str | None] | None = None
) -> Measurements:
    """The rows of a results folder within one environment and one version of its grid.

    Args:
        folder: `results/<grid>`.
        environment: id of the environment; without it this machine's, or the only one that there is.
        baseline_ids: baselines of the grid's version; without it the newest of each repeat.

    Raises:
        InputError: nothing was recorded, or in several other environments: those are not comparable.
    """
    store = Store(folder)
    table = store.read("trials")
    if not len(table):
        raise InputError(f"{folder}: no trials are recorded; `harness run` fills it")
    there = table["environment_id"].unique().to_pylist()
    chosen = environment or _choose(folder, there)
    if chosen not in there:
        raise InputError(f"{folder}: no trials of environment {chosen!r}; there is {', '.join(sorted(there))}")
    here = table.filter(pc.field("environment_id") == chosen)
    described = json.loads(here["environment"][0].as_py())
    for name in ("label", "factor", "level"):  # harness's are such; what somebody has changed goes into every face
        said = [text and " ".join(printable(text).split()) for text in here[name].to_pylist()]
        here = here.set_column(here.schema.get_field_index(name), name, pa.array(said, pa.string()))
    trials = here.drop_columns(["environment"]).to_pandas()
    left_out = []
    if len(trials) < len(table):
        left_out.append(f"{len(table) - len(trials)} trials of other environments")
    kept = _newest_version(trials, baseline_ids)
    if len(kept) < len(trials):
        left_out.append(f"{len(trials) - len(kept)} trials of other versions of the grid")
    kept, configs, codes = _configurations(kept.reset_index(drop=True))
    about = store.description()
    losses = _losses(store, kept["trial_id"])
    return Measurements(
        name=folder.name,
        title=one_line(str(about.get("title", folder.name))),
        claims=_claims(about, store.folder / "grid.json"),
        trials=kept,
        configs=configs,
        rates=_rates(store, kept["trial_id"]),
        stories=losses[losses["kind"] == "held-out"].drop(columns=["kind", "before"]),
        changes={metric: _changes(losses, kind) for metric, kind in _KIND.items()},
        served={table: _at_work(store, table, kept[["trial_id", "adapter_id"]]) for table in AT_WORK},
        environment=described,
        environment_id=chosen,
        left_out=tuple(left_out),
        _codes=codes,
    )


def _claims(about: Mapping[str, Any], file: Path) -> tuple[Claim, ...]:
    try:
        return tuple(Claim.model_validate(claim) for claim in about.get("claims", []))
    except (ValidationError, TypeError) as error:
        said = explain(error, Claim) if isinstance(error, ValidationError) else "no list"
        raise InputError(one_line(f"{file}: says nothing readable of its claims ({said})")) from None


def _choose(folder: Path, there: Sequence[str]) -> str:
    """This machine's environment if it is among the rows, else the only one."""
    here = {current(device).id for device in ("cpu", "cuda") if device == "cpu" or cards()} & {*there}
    for choice in (here, {*there}):
        if len(choice) == 1:
            return choice.pop()
    raise InputError(
        f"{folder}: trials of {len(there)} environments ({', '.join(sorted(there))}) are not comparable; "
        "choose one with --environment"
    )


def _newest_version(trials: pandas.DataFrame, baseline_ids: Collection[str | None] | None) -> pandas.DataFrame:
    """An edited grid has another baseline: what was compared with the former one stays in the parquet."""
    if baseline_ids is None:
        baseline_ids = set(trials.sort_values("started_at").groupby("repeat")["baseline_id"].last(skipna=False))
    known = {i for i in baseline_ids if isinstance(i, str)}
    mask = trials["baseline_id"].isin(known)
    if len(known) < len(baseline_ids):
        mask |= trials["baseline_id"].isna()
    return trials[mask]


def _configurations(trials: pandas.DataFrame) -> tuple[pandas.DataFrame, pandas.DataFrame, pandas.DataFrame]:
    """The trials with the number of their configuration, the configurations, and their conditions as integers."""
    trials = trials.assign(
        # Lists cannot be compared as values of a column; as text they can.
        lora_target_modules=trials["lora_target_modules"].map(lambda v: json.dumps(list(v)), na_action="ignore"),
        system_prompt=trials["datasets"].map({d: _any_prompt(d, "system_prompt") for d in trials["datasets"].unique()}),
        own_format=trials["datasets"].map(
            {d: _any_prompt(d, "format") or _any_prompt(d, "no_input_format") for d in trials["datasets"].unique()}
        ),
        twin=trials["twin"].fillna(False).astype(bool),
    )
    codes = pandas.DataFrame(
        {key: pandas.factorize(trials[key], use_na_sentinel=False)[0] for key in CONDITIONS}, trials.index
    )
    key = codes[list(_KEYS)].assign(twin=trials["twin"])
    # The baseline first, then as they are read: the numbers of configurations are the report's order.
    baseline = (trials["spec_id"] == trials["baseline_id"]) & ~trials["twin"]
    order = numpy.lexsort((trials.index, ~baseline))
    numbers = pandas.factorize(_row_numbers(key)[order])[0]
    trials["config"] = pandas.Series(numbers, trials.index[order])
    ok = trials["status"] == "ok"
    by_time = trials.sort_values(["config", "started_at"], kind="stable")
    configs = by_time.groupby("config").last(skipna=False)
    configs["measured"] = ok.groupby(trials["config"]).any()
    configs["repeats"] = ok.groupby(trials["config"]).sum()
    configs["baseline"] = baseline.groupby(trials["config"]).any()
    of_baseline = configs.index[configs["baseline"]]
    trials["stands_for"] = (
        trials["config"].mask(trials["twin"], of_baseline[0]) if len(of_baseline) else trials["config"]
    )
    # A trial whose spec was edited away under the same name belongs to a former version of the grid.
    newest = configs.sort_values("started_at").drop_duplicates(["label", "twin"], keep="last").index
    trials = trials[trials["config"].isin(newest)]
    first_rows = codes.groupby(trials["config"]).first()
    return trials, configs.loc[sorted(newest)], first_rows


def _row_numbers(key: pandas.DataFrame) -> Any:
    return key.groupby(list(key.columns), sort=False).ngroup().to_numpy()


def _any_prompt(datasets: str, key: str) -> bool:
    return any(dataset["type"].get(key) for dataset in json.loads(datasets))


def _rates(store: Store, trial_ids: pandas.Series) -> pandas.DataFrame:
    """Spread of the speed over each trial's timed steps."""
    table = store.read("steps", columns=["trial_id", "tracked", "tokens", "seconds"])
    steps = table.filter(~pc.field("tracked")).drop_columns(["tracked"]).to_pandas()
    steps["trial"] = _number(steps.pop("trial_id"), trial_ids)
    steps = steps[(steps["trial"] >= 0) & (steps["tokens"] > 0) & (steps["seconds"] > 0)]
    rate = numpy.log(steps["tokens"] / steps["seconds"])
    grouped = rate.groupby(steps["trial"])
    return pandas.DataFrame({"mean": grouped.mean(), "var": grouped.var(ddof=1), "count": grouped.count()})


def _losses(store: Store, trial_ids: pandas.Series) -> pandas.DataFrame:
    """Loss of each text after training and before it: trial, story, kind, tokens, loss, before."""
    table = store.read("stories")
    sides = []
    for when in ("after", "before"):
        side = table.filter(pc.field("when") == when).drop_columns(["when"]).to_pandas()
        side["trial"] = _number(side.pop("trial_id"), trial_ids)
        side["story"] = pandas.util.hash_array(side.pop("story_id").to_numpy(object), categorize=True)
        sides.append(side[side["trial"] >= 0])
    after, before = sides
    keys = ["trial", "story", "kind", "tokens"]
    both: pandas.DataFrame = after.merge(before.rename(columns={"loss": "before"}), on=keys, how="left")
    return both


def _at_work(store: Store, table: Table, trials: pandas.DataFrame) -> pandas.DataFrame:
    """Rows of trained models; those of an adapter that the trial no longer has say nothing of it."""
    mine = trials.rename_axis("trial").reset_index()
    found: pandas.DataFrame = store.read(table).to_pandas().merge(mine, on=["trial_id", "adapter_id"])
    return found.drop(columns=["trial_id", "adapter_id"])


_KIND = {"eval_loss": "held-out", "forgetting": "general"}
"""The texts that a figure is taken from."""


def _changes(losses: pandas.DataFrame, kind: str) -> pandas.DataFrame:
    mine = losses[losses["kind"] == kind]
    changed = mine.assign(loss=mine["loss"] - mine["before"]).drop(columns=["kind", "before"])
    return changed.dropna(subset=["loss"])


def _number(ids: pandas.Series, known: pandas.Series) -> Any:
    """The row number of each trial id; -1 where the trial is not among those that are compared."""
    positions = pandas.Index(known).get_indexer(pandas.Index(ids))
    return numpy.where(positions >= 0, known.index.to_numpy()[positions], -1) if len(known) else positions


def describe(environment: dict[str, Any]) -> str:
    """Where trials ran, in one line."""
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    products = {"fp32-blocks": "in blocks of fp32", "amx": "by AMX", "avx512_bf16": "by AVX-512"}
    how = products.get(environment["half_matmul"])
    kernel = f", 16-bit products {how}" if how and environment["device_type"] == "cpu" else ""
    return (
        f"{environment['device_name']}, {show_bytes(environment['device_memory_bytes'])}, "
        f"{environment['cpu_cores']} CPU cores{kernel}; {versions}"
    )


def changes(m: Measurements, configs: Sequence[int]) -> list[dict[str, Any]]:
    """The keys in which each configuration differs from the baseline; all of its keys where there is none."""
    base = {} if m.baseline is None else _keys(m.configs, [m.baseline])[0]
    return [{k: v for k, v in row.items() if k not in base or v != base[k]} for row in _keys(m.configs, configs)]


def _keys(configs: pandas.DataFrame, numbers: Sequence[int]) -> list[dict[str, Any]]:
    rows = configs.loc[list(numbers), list(_KEYS)].to_dict("records")
    return [{str(key): None if _null(value) else value for key, value in row.items()} for row in rows]


def spec(configs: pandas.DataFrame, config: int) -> TrialSpec:
    """The spec of a configuration, under the seed of one of its repeats."""
    row: dict[str, Any] = {str(key): value for key, value in configs.loc[config].items()}
    targets = row["lora_target_modules"]
    return spec_of(row | {"lora_target_modules": None if _null(targets) else json.loads(targets)})


def _null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value is pandas.NA


def labels(measurements: Measurements, numbers: Iterable[int]) -> list[str]:
    """What configurations are called."""
    return [str(label) for label in measurements.configs.loc[list(numbers), "label"]]
