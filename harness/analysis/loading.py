"""Reads the rows of a results folder: one environment, one version of its grid."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from harness._util.messages import explain, one_line
from harness._util.terminal import printable
from harness._util.units import counted
from harness.analysis import stats
from harness.analysis.measurements import SPEC_KEYS, Measurements
from harness.dialects.training_file import TrainingFile
from harness.environment import Environment, cards, current
from harness.errors import InputError
from harness.grids.claims import CONDITIONS, Claim
from harness.metrics import METRICS
from harness.record import TIMED_FIGURES, Tuned
from harness.results.schema import INFERENCE_TABLES, Table
from harness.results.store import Store, looks_of
from harness.results.timing import STEP_COLUMNS, counting_steps, reference_seconds, speeds
from harness.results.versions import Version, versions_of


def load(
    folder: Path,
    environment: str | None = None,
    version: Version | None = None,
    here: Sequence[Environment] = (),
) -> Measurements:
    """The rows of a results folder within one environment and one version of its grid.

    Args:
        folder: `results/<grid>`.
        environment: id of the environment; null: one of `here`, or the only one recorded.
        version: of the grid; null: that of its latest run in the environment, of rows from before it was kept that of
            the newest.
        here: environments that this runner's trials may be recorded under; empty: those of this machine.

    Raises:
        InputError: nothing is recorded, or several environments are and none of them is this machine's.
    """
    store = Store(folder)
    table = store.read("trials")
    if not len(table):
        grids = sorted(each.parent.name for each in folder.glob("*/trials"))
        of = f"it has the results of {' '.join(grids)}, each a folder of its own" if grids else "`harness run` fills it"
        raise InputError(f"{folder}: no trials are recorded; {of}")
    recorded = table["environment_id"].unique().to_pylist()
    chosen = environment or _choose(folder, recorded, here)
    if chosen not in recorded:
        raise InputError(f"{folder}: no trials of environment {chosen!r}; there is {', '.join(sorted(recorded))}")
    rows = table.filter(pc.field("environment_id") == chosen)
    described = Environment.model_validate_json(rows["environment"][0].as_py()).model_dump(mode="json")
    for name in ("label", "factor", "level"):  # a file edited by hand may hold anything, and every output shows them
        cleaned = [text and " ".join(printable(text).split()) for text in rows[name].to_pylist()]
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(cleaned, pa.string()))
    trials = rows.drop_columns(["environment"]).to_pandas()
    left_out = []
    if len(trials) < len(table):
        left_out.append(f"{counted(len(table) - len(trials), 'trial')} of other environments")
    about = store.description()
    same, others = _of_one_content(trials, about)
    left_out += others
    if same["watched"].all():
        same = _with_baselines(same)
    version = version or versions_of(about).get(chosen)
    if version is not None and not _is_listed(same, version).any():
        left_out.append("the grid as it is now, of which nothing is recorded")
        version = None
    of_version = _of_version(same, version)
    there = of_version[~_is_gone(of_version, version)]
    kept, configs, codes = _configurations(there.reset_index(drop=True), version)
    gone = len(of_version) - len(there)
    if edited := len(same) - gone - len(kept):
        left_out.append(f"{counted(edited, 'trial')} of other versions of the grid")
    if gone:
        left_out.append(f"{counted(gone, 'trial')} of levels that the grid no longer has")
    losses = _losses(store, kept["trial_id"])
    visited = _visited_steps(store, kept["trial_id"])
    return Measurements(
        name=folder.resolve().name,
        title=one_line(str(about.get("title", folder.resolve().name))),
        claims=_claims(about, store.folder / "grid.json"),
        trials=kept,
        configs=configs,
        rates=_rates(store, kept["trial_id"]),
        readings=_readings(visited, kept),
        waits_unknown=bool(visited["waited_seconds"].isna().any()),
        stories=losses[losses["kind"] == "held-out"].drop(columns=["kind", "before"]),
        changes={metric: _changes(losses, kind) for metric, kind in _KIND.items()},
        items=_items(store, kept["trial_id"]),
        inference_results={
            table: _inference_rows(store, table, kept[["trial_id", "adapter_id", "config"]])
            for table in INFERENCE_TABLES
        },
        environment=described,
        environment_id=chosen,
        left_out=tuple(left_out),
        training_file=TrainingFile.recorded(about.get("training_file")),
        price_per_hour=_price(about),
        match=about["match"] if about.get("match") in METRICS else None,
        tuned=tuned_of(about, store.folder / "grid.json"),
        _codes=codes,
        alpha=stats.ALPHA / looks_of(about, chosen),
        not_run=_not_run(table, chosen, version),
    )


def _claims(about: Mapping[str, Any], file: Path) -> tuple[Claim, ...]:
    try:
        return tuple(Claim.model_validate(claim) for claim in about.get("claims", []))
    except (ValidationError, TypeError) as error:
        reason = explain(error, Claim) if isinstance(error, ValidationError) else "no list"
        raise InputError(one_line(f"{file}: its claims are not readable ({reason})")) from None


def _price(about: Mapping[str, Any]) -> float | None:
    """The machine's price; a file edited by hand may hold anything."""
    price = about.get("price_per_hour")
    if not isinstance(price, int | float) or isinstance(price, bool):
        return None
    return float(price) if 0 < price < float("inf") else None


def tuned_of(about: Mapping[str, Any], file: Path) -> Tuned | None:
    """The learning rates that were found before a comparison, of what its store is described by; null: none were.

    Raises:
        InputError: they are not readable.
    """
    if about.get("tuned") is None:
        return None
    try:
        return Tuned.model_validate(about["tuned"])
    except ValidationError as error:
        raise InputError(one_line(f"{file}: its learning rates are not readable ({explain(error, Tuned)})")) from None


def _choose(folder: Path, recorded: Sequence[str], here: Sequence[Environment]) -> str:
    """The runner's environment if it is among the recorded ones, else the only one."""
    here = here or [current(device) for device in ("cpu", "cuda") if device == "cpu" or cards()]
    for choice in ({environment.id for environment in here} & {*recorded}, {*recorded}):
        if len(choice) == 1:
            return choice.pop()
    raise InputError(
        f"{folder}: trials of {len(recorded)} environments ({', '.join(sorted(recorded))}) are not comparable; "
        "choose one with --environment"
    )


def _of_one_content(trials: pandas.DataFrame, about: Mapping[str, Any]) -> tuple[pandas.DataFrame, list[str]]:
    """The trials of one content of each dataset and base model, and what is left out: the contents of the grid's latest
    run, else of the newest row. Those of rows from before there were fingerprints are a content of their own; watched
    loops whose contents are not known are kept with any.
    """
    by_time = trials.sort_values("started_at", kind="stable")
    same = pandas.Series(True, trials.index)
    names: dict[str, None] = {}
    for kind, column, name in (("data", "data_fingerprint", "datasets"), ("base", "base_fingerprint", "base_model")):
        latest = _latest_contents(about, kind)
        unseen = trials["watched"] & trials[column].isna()
        # The files of tasks are part of the fingerprint.
        names_of = trials[name] + (trials["evaluate_tasks"].fillna("") if kind == "data" else "")
        newest = by_time[~unseen.reindex(by_time.index)].groupby(names_of)[column].last(skipna=False)
        there = set(zip(names_of, trials[column], strict=True))
        chosen = {each: latest[each] if (each, latest.get(each)) in there else newest[each] for each in newest.index}
        wanted = names_of.map(chosen)
        as_wanted = (trials[column] == wanted) | (trials[column].isna() & wanted.isna()) | unseen
        for other in trials.loc[~as_wanted & trials[column].notna(), name].unique():
            names |= dict.fromkeys([d["path"] for d in json.loads(other)] if kind == "data" else [other])
        same &= as_wanted
    unknown = int((~same & trials["data_fingerprint"].isna()).sum())
    others = int((~same).sum()) - unknown
    left_out = [f"{counted(others, 'trial')} with other content of {' and '.join(names)}"] if others else []
    left_out += [f"{counted(unknown, 'trial')} from before contents were fingerprinted"] if unknown else []
    return trials[same], left_out


def _latest_contents(about: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Fingerprints of the grid's latest run, by name. A file edited by hand may hold anything."""
    contents = about.get("contents")
    of_kind = contents.get(kind) if isinstance(contents, dict) else None
    return {name: str(each) for name, each in of_kind.items()} if isinstance(of_kind, dict) else {}


def _with_baselines(watched: pandas.DataFrame) -> pandas.DataFrame:
    """Watched loops, each with the first that ended well as its baseline: of the same repeat, where it has one. Rows
    name the baseline of their day, which may have failed, or been watched again with other arguments.
    """
    by_time = watched.sort_values("started_at", kind="stable")
    first = by_time.groupby("label")["started_at"].first()
    newest = by_time.drop_duplicates(["label", "repeat"], keep="last")
    ended_well = newest[newest["status"] == "ok"].sort_values("label", key=lambda labels: labels.map(first))
    if ended_well.empty:
        return watched
    of_label = ended_well[ended_well["label"] == ended_well["label"].iloc[0]]
    of_repeat = of_label.drop_duplicates("repeat").set_index("repeat")["spec_id"]
    return watched.assign(baseline_id=watched["repeat"].map(of_repeat).fillna(of_label["spec_id"].iloc[0]))


def _is_listed(trials: pandas.DataFrame, version: Version | None) -> pandas.Series:
    """Whether a version of the grid has each trial; all of them are in it where none is known."""
    if version is None:
        return pandas.Series(True, trials.index)
    specs = {spec for of_label in version.specs.values() for spec in of_label}
    return trials["spec_id"].isin(specs) & _is_one_of(trials["baseline_id"], version.baselines)


def _not_run(table: pa.Table, environment_id: str, version: Version | None) -> dict[str, int]:
    """By label, how many trials of a version neither this environment has nor a device of another type: a grid may have
    trials for both.
    """
    if version is None:
        return {}
    here = table.filter(pc.field("environment_id") == environment_id)
    of_others = table.filter(~pc.field("device_type").isin(here["device_type"].unique()))
    done = {
        (label, spec)
        for rows in (here, of_others)
        for label, spec in zip(rows["label"].to_pylist(), rows["spec_id"].to_pylist(), strict=True)
    }
    missing = {label: sum((label, spec) not in done for spec in specs) for label, specs in version.specs.items()}
    return {label: count for label, count in missing.items() if count}


def _is_one_of(column: pandas.Series, ids: Collection[str | None]) -> pandas.Series:
    known = {i for i in ids if isinstance(i, str)}
    return column.isin(known) | (column.isna() & (len(known) < len(ids)))


def _of_version(trials: pandas.DataFrame, version: Version | None) -> pandas.DataFrame:
    """The trials that are compared with the baselines of a version, of the newest one where none is known: an edited
    grid has another baseline.
    """
    by_time = trials.sort_values("started_at")
    return trials[_is_one_of(trials["baseline_id"], _baselines(by_time, by_time[_is_listed(by_time, version)]))]


def _baselines(by_time: pandas.DataFrame, listed: pandas.DataFrame) -> set[str | None]:
    """Ids of the newest baseline of each repeat: of the listed trials, and of repeats that none of them is of where it
    is the same configuration. Repeats that only another version had have none.
    """
    newest = listed["baseline_id"].iloc[-1]
    is_one = by_time["spec_id"].isin(by_time["baseline_id"]) & ~by_time["twin"].fillna(False).astype(bool)
    keys = by_time[is_one].drop_duplicates("spec_id").set_index("spec_id")[list(SPEC_KEYS)].map(str)
    if newest not in keys.index:
        return {*listed.groupby("repeat")["baseline_id"].last(skipna=False)}
    others = keys.index[(keys != keys.loc[newest]).any(axis=1)]
    ranked = pandas.concat([each[["repeat", "baseline_id"]] for each in (by_time, listed)])
    alike = ranked[~ranked["baseline_id"].isin(others)]
    return {*alike.groupby("repeat")["baseline_id"].last(skipna=False)}


def _is_gone(trials: pandas.DataFrame, version: Version | None) -> pandas.Series:
    """Whether each trial is of a level that the grid no longer has. Watched loops are of no level."""
    if version is None or not version.whole:
        return pandas.Series(False, trials.index)
    is_watched = trials["watched"].fillna(False).astype(bool)
    return ~(trials["label"].isin(version.specs) | _is_listed(trials, version) | is_watched)


def _configurations(
    trials: pandas.DataFrame, version: Version | None
) -> tuple[pandas.DataFrame, pandas.DataFrame, pandas.DataFrame]:
    """The trials with the number of their configuration, the configurations, and their conditions as integers."""
    trials = trials.assign(
        # Lists in a column cannot be compared; their JSON can.
        lora_target_modules=trials["lora_target_modules"].map(lambda v: json.dumps(list(v)), na_action="ignore"),
        system_prompt=trials["datasets"].map({d: _any_prompt(d, "system_prompt") for d in trials["datasets"].unique()}),
        own_format=trials["datasets"].map(
            {d: _any_prompt(d, "format") or _any_prompt(d, "no_input_format") for d in trials["datasets"].unique()}
        ),
        twin=trials["twin"].fillna(False).astype(bool),
        watched=trials["watched"].fillna(False).astype(bool),
    )
    codes = pandas.DataFrame(
        {key: pandas.factorize(trials[key], use_na_sentinel=False)[0] for key in CONDITIONS}, trials.index
    )
    # Watched loops of one spec are other programs.
    program = pandas.factorize(trials["label"].where(trials["watched"], ""))[0]
    key = codes[list(SPEC_KEYS)].assign(twin=trials["twin"], program=program)
    # The baseline first, then in the order of the rows; reports show configurations by number.
    baseline = (trials["spec_id"] == trials["baseline_id"]) & ~trials["twin"]
    if trials["watched"].all():
        first = trials.loc[baseline].sort_values("started_at").index[:1]
        baseline &= numpy.isin(program, program[first])
    else:
        baseline &= ~trials["watched"]
    order = numpy.lexsort((trials.index, ~baseline))
    numbers = pandas.factorize(_row_numbers(key)[order])[0]
    trials["config"] = pandas.Series(numbers, trials.index[order])
    ok = trials["status"] == "ok"
    # A configuration of which one repeat failed is shown as failed, whatever its other repeats measured.
    failed = ~ok & (trials["status"] != "skipped")
    by_end = trials.assign(failed=failed).sort_values(["config", "failed", "started_at"], kind="stable")
    configs = by_end.groupby("config").last(skipna=False).drop(columns="failed")
    configs["started_at"] = trials.groupby("config")["started_at"].max()
    configs["measured"] = ok.groupby(trials["config"]).any()
    configs["repeats"] = ok.groupby(trials["config"]).sum()
    configs["baseline"] = baseline.groupby(trials["config"]).any()
    of_baseline = configs.index[configs["baseline"]]
    trials["stands_for"] = (
        trials["config"].mask(trials["twin"], of_baseline[0]) if len(of_baseline) else trials["config"]
    )
    chosen = _of_labels(configs.assign(listed=_is_listed(trials, version).groupby(trials["config"]).any()), version)
    trials = trials[trials["config"].isin(chosen)]
    first_rows = codes.groupby(trials["config"]).first()
    return trials, configs.loc[sorted(chosen)], first_rows


def _of_labels(configs: pandas.DataFrame, version: Version | None) -> pandas.Index:
    """One configuration of each label whose spec was edited: the one that the version has, of several the newest."""
    newest = configs.sort_values(["listed", "started_at"]).drop_duplicates(["label", "twin"], keep="last")
    is_other = newest["label"].isin(version.specs if version is not None else ()) & ~newest["listed"]
    return newest.index[~is_other]


def _row_numbers(key: pandas.DataFrame) -> Any:
    return key.groupby(list(key.columns), sort=False).ngroup().to_numpy()


def _any_prompt(datasets: str, key: str) -> bool:
    return any(dataset["type"].get(key) for dataset in json.loads(datasets))


def _rates(store: Store, trial_ids: pandas.Series) -> pandas.DataFrame:
    """Mean, variance and count of log(tokens ÷ seconds) over each trial's timed steps."""
    table = store.read("steps", columns=["trial_id", "tracked", "tokens", "seconds"])
    steps = table.filter(~pc.field("tracked")).drop_columns(["tracked"]).to_pandas()
    steps["trial"] = _number(steps.pop("trial_id"), trial_ids)
    steps = steps[(steps["trial"] >= 0) & (steps["tokens"] > 0) & (steps["seconds"] > 0)]
    rate = numpy.log(steps["tokens"] / steps["seconds"])
    grouped = rate.groupby(steps["trial"])
    return pandas.DataFrame({"mean": grouped.mean(), "var": grouped.var(ddof=1), "count": grouped.count()})


def _visited_steps(store: Store, trial_ids: pandas.Series) -> pandas.DataFrame:
    """The steps that timing visits recorded, with the number of their trial."""
    table = store.read("steps", columns=["trial_id", "waited_seconds", *STEP_COLUMNS])
    steps = table.filter(pc.field("block").is_valid()).to_pandas()
    steps["trial"] = _number(steps.pop("trial_id"), trial_ids)
    of_known: pandas.DataFrame = steps[steps["trial"] >= 0]
    return of_known


def _readings(visited: pandas.DataFrame, trials: pandas.DataFrame) -> pandas.DataFrame:
    """Speeds of each trial in each block of timing visits; of rows from before there were visits, those of the trial,
    whose block is its repeat. The trials of a search ran one after another over hours: each is a block of its own.
    """
    keys = ["trial", "block"]
    counting = counting_steps(visited, keys)
    of_visits = speeds(counting, keys).join(reference_seconds(counting, keys)).reset_index()
    of_visits["flops_per_second"] = of_visits["tokens_per_second"] * of_visits["trial"].map(trials["flops_per_token"])
    of_visits = of_visits[~of_visits["trial"].map(trials["disturbed"].fillna(False).astype(bool))]
    before = trials[~trials.index.isin(visited["trial"]) & (trials["status"] == "ok")]
    columns = [*TIMED_FIGURES, "flops_per_second"]
    blocks = before["repeat"].where(before["study"].isna(), -1 - before.index.to_series())
    of_rows = before[columns].assign(trial=before.index, block=blocks)
    both: pandas.DataFrame = pandas.concat(
        [of_visits.assign(visit=True), of_rows.assign(visit=False)], ignore_index=True
    )
    return both.dropna(subset=["tokens_per_second"]).astype({"trial": "int64", "block": "int64"})


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


def _items(store: Store, trial_ids: pandas.Series) -> pandas.DataFrame:
    """Score of each question after training and before it."""
    table = store.read("tasks").to_pandas()
    table["trial"] = _number(table.pop("trial_id"), trial_ids)
    known = table[table["trial"] >= 0].rename(columns={"item": "story"})
    keys = ["trial", "task", "story", "metric"]
    after, before = (known[known["when"] == when].drop(columns=["when"]) for when in ("after", "before"))
    both: pandas.DataFrame = after.rename(columns={"score": "loss"}).merge(
        before.rename(columns={"score": "before"}), on=keys, how="left"
    )
    return both.assign(tokens=1)


def _inference_rows(store: Store, table: Table, trials: pandas.DataFrame) -> pandas.DataFrame:
    """Inference results of the trials' present adapters; an adapter that was trained again has other results."""
    numbered = trials.rename_axis("trial").reset_index()
    rows: pandas.DataFrame = store.read(table).to_pandas().merge(numbered, on=["trial_id", "adapter_id"])
    return rows.drop(columns=["trial_id", "adapter_id"])


_KIND = {"eval_loss": "held-out", "forgetting": "general"}
"""Kind of the texts behind each figure."""


def _changes(losses: pandas.DataFrame, kind: str) -> pandas.DataFrame:
    of_kind = losses[losses["kind"] == kind]
    changed = of_kind.assign(loss=of_kind["loss"] - of_kind["before"]).drop(columns=["kind", "before"])
    return changed.dropna(subset=["loss"])


def _number(ids: pandas.Series, known: pandas.Series) -> Any:
    """The row number of each trial id; -1 where the trial is excluded."""
    positions = pandas.Index(known).get_indexer(pandas.Index(ids))
    return numpy.where(positions >= 0, known.index.to_numpy()[positions], -1) if len(known) else positions
