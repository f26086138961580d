"""The content of a report, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.compute as pc

from harness._util.redact import redact_home
from harness.analysis import cost, longer, recommend, task_scores, timed, verdicts, words
from harness.analysis.comparison import Comparison, compare, order
from harness.analysis.measurements import Measurements
from harness.metrics import METRICS
from harness.report import (
    adapter_tables,
    cost_tables,
    details,
    front,
    inference_tables,
    plots,
    summary,
    tables,
    task_tables,
    tuning,
)
from harness.report.front import Front
from harness.report.summary import MOST_ROWS
from harness.results.store import Store


@dataclass(frozen=True)
class Recommended:
    """The best configuration of a search, as YAML that `harness run` takes."""

    label: str
    yaml: str


@dataclass(frozen=True)
class Snippet:
    """Code that recomputes figures of the report from the parquet, and one of its results."""

    title: str
    code: str
    example: str


@dataclass(frozen=True)
class Document:
    """The content of a report."""

    name: str
    title: str
    where: str
    front: Front
    summary: tuple[str, ...]
    """Sentences; the last one counts the claims by verdict."""
    longer: tuple[str, ...]
    """Those of them that say what a longer run would decide."""
    comparison: Comparison
    tables: tuple[tables.Table, ...]
    verdicts: tuple[verdicts.ClaimVerdict, ...]
    charts: tuple[plots.Chart, ...]
    configurations: tuple[details.Configuration, ...]
    environment: dict[str, Any]
    caveats: tuple[str, ...]
    thresholds: tuple[str, ...]
    snippets: tuple[Snippet, ...]
    stories: tuple[inference_tables.GeneratedStory, ...] = ()
    recommended: Recommended | None = None
    parts: tuple[Document, ...] = ()
    """The reports of several grids that this one joins; empty: it is of one."""

    @property
    def ends(self) -> list[str]:
        """How trials ended, where some did not end well or are still to come, and why nothing is compared."""
        if self.parts:
            return [f"{part.title}: {line}" for part in self.parts for line in part.ends]
        m = self.comparison.measurements
        all_well = (m.trials["status"] == "ok").all()
        how = [] if all_well and not m.not_run else [summary.ends(self.comparison)]
        return how + self.uncompared

    @property
    def uncompared(self) -> list[str]:
        """Why nothing is compared; empty where something is."""
        if self.parts:
            return [f"{part.title}: {line}" for part in self.parts for line in part.uncompared]
        return summary.of_nothing_compared(self.comparison)


def document(measurements: Measurements, folder: Path, *, grids: int = 1) -> Document:
    """The report of these measurements.

    Args:
        measurements: of one environment and one version of the grid.
        folder: where they were read from.
        grids: how many are judged together in one report, each at its part of the error rate.
    """
    together = replace(measurements, alpha=measurements.alpha / grids)
    search = tuning.summarize(together, folder)
    comparison = search.comparison if search else compare(together.unselected)
    judged = tuple(verdicts.judge(comparison))
    stories = tuple(inference_tables.stories(measurements))
    first, *rest = tables.all_tables(comparison)
    steps = _steps(measurements, folder)
    charts = plots.all_charts(comparison, steps)
    of_tasks = task_scores.scores(comparison)
    would_decide = longer.sentences(comparison)
    whole = Document(
        name=measurements.name,
        title=measurements.title,
        where=measurements.where,
        front=front.front({"": comparison}, recommend.by_memory(measurements)),
        summary=(
            *(search.sentences if search else ()),
            *summary.sentences(comparison, steps),
            *would_decide,
            summary.tally(judged),
        ),
        longer=tuple(would_decide),
        comparison=comparison,
        tables=(
            first,
            *(search.tables if search else ()),
            *rest,
            *([] if (of := cost.costs(comparison, steps)) is None else [cost_tables.costs(of, measurements)]),
            *([task_tables.scores(of_tasks, measurements)] if of_tasks else []),
            *([adapter_tables.adapters(comparison)] if adapter_tables.compares_methods(comparison) else []),
            *([] if measurements.tuned is None else [adapter_tables.learning_rates(measurements.tuned)]),
            inference_tables.models(measurements, comparison),
            *([inference_tables.generated_stories(measurements)] if stories else []),
        ),
        stories=stories,
        verdicts=judged,
        charts=(*(search.charts if search else ()), *charts),
        recommended=Recommended(search.label, search.yaml) if search else None,
        configurations=tuple(details.configurations(comparison, folder, steps, MOST_ROWS)),
        environment=measurements.environment,
        caveats=tuple(summary.caveats(comparison, measurements.alpha)),
        thresholds=tuple(words.thresholds(scores=bool(of_tasks))),
        snippets=tuple(_snippets(comparison, folder)),
    )
    return _with_what_is_left_out(whole)


def _with_what_is_left_out(document: Document) -> Document:
    """Each table and chart names what of the training file was left out: it may be shown alone."""
    file = document.comparison.measurements.training_file
    if file is None or not file.without:
        return document
    shown = tuple(replace(table, title=table.title + file.suffix) for table in document.tables)
    charts = tuple(plots.titled(chart, chart.title + file.suffix) for chart in document.charts)
    return replace(document, tables=shown, charts=charts)


def _steps(measurements: Measurements, folder: Path) -> pandas.DataFrame:
    """Optimizer steps with their configuration and repeat: of its trials that ended well, if there are any."""
    trials = measurements.trials
    ok = trials["status"] == "ok"
    counting = ok | ~trials["config"].isin(trials.loc[ok, "config"])
    shown = trials[counting & trials["config"].isin(order(measurements)[:MOST_ROWS])]
    ids = shown.set_index("trial_id")[["config", "repeat"]]
    table = Store(folder).read("steps", columns=["trial_id", "block", "step", "loss", "tokens"])
    # Visits repeat a few steps; a watched loop times those that it trains.
    watched = pa.array(shown.loc[shown["watched"], "trial_id"].tolist(), pa.string())
    table = table.filter(pc.field("block").is_null() | pc.field("trial_id").isin(watched)).drop_columns(["block"])
    kept: pandas.DataFrame = table.filter(pc.field("trial_id").isin(ids.index.tolist())).to_pandas()
    return kept.join(ids, on="trial_id")


def _snippets(comparison: Comparison, folder: Path) -> list[Snippet]:
    """Three lines of pandas for each column of the technique comparison."""
    m = comparison.measurements
    if m.baseline is None:
        return []
    ids = sorted({i for i in m.trials["baseline_id"] if isinstance(i, str)})
    kept = f"environment_id == {m.environment_id!r} and status == 'ok' and baseline_id in {ids}"
    trials, texts = (redact_home(str(folder / table)) for table in ("trials", "stories"))
    unselected = (
        "fresh = t.label.isin(t[t.repeat > 0].label) & (t.spec_id != t.baseline_id)\n"
        "t = t[~(t.study.notna() & (t.repeat == 0) & fresh)]  # what the search chose its finalists by\n"
    )
    prepare = (
        f"t = pandas.read_parquet({trials!r}).query({kept!r})\n"
        + unselected * bool(m.trials["study"].notna().any())
        + 'b = t[~t.twin].merge(t, left_on=["baseline_id", "repeat"], right_on=["spec_id", "repeat"], '
        'suffixes=("", "_base"))\n'
    )
    highest = 'result = b.groupby("label").{0}.max() / b.groupby("label").{0}_base.max()'
    ratio = (
        'result = numpy.exp(numpy.log(b.{0} / b.{0}_base).groupby([b.label, b.repeat]).mean().groupby("label").mean())'
    )
    by_baseline = baseline_too = ""
    if timed.in_turn(m.readings):
        baseline_too = '.join(s.groupby(["trial_id", "block"]).reference_seconds.mean())'
        by_baseline = " * p.reference_seconds / p.reference_seconds_base"
    visits = (
        f"s = pandas.read_parquet({redact_home(str(folder / 'steps'))!r}).query('block == block and not disturbed')\n"
        's = s[s.groupby(["trial_id", "block"]).seconds.transform("size") >= 3]\n'
        'make = ["trial_id", "block", "tokens", "samples", "supervised_tokens", "padded_tokens"]\n'
        "v = s.groupby(make).seconds.mean().reset_index()\n"
        f'v = v.groupby(["trial_id", "block"])[["tokens", "seconds"]].sum(){baseline_too}.reset_index()\n'
        'p = b[["label", "trial_id", "trial_id_base"]].merge(v, on="trial_id").merge(v.rename(columns={"trial_id": '
        '"trial_id_base"}), on=["trial_id_base", "block"], suffixes=("", "_base"))\n'
        f"r = numpy.log(p.tokens / p.seconds / p.tokens_base * p.seconds_base{by_baseline})\n"
        'result = numpy.exp(r.groupby([p.label, p.block]).mean().groupby("label").mean())'
    )
    codes = {"peak_memory_bytes": highest.format("peak_memory_bytes"), "tokens_per_second": visits}
    if not m.readings["visit"].any():  # rows from before there were visits
        codes["tokens_per_second"] = ratio.format("tokens_per_second")
        if m.trials["study"].notna().any():  # whose trials were hours apart
            del codes["tokens_per_second"]
    snippets = [
        Snippet(f"{METRICS[metric].heading} against the baseline", prepare + code, _example(comparison, metric))
        for metric, code in codes.items()
    ]
    # Rows written before general text was measured have no kind; all of them are of held-out stories.
    which = "when == 'after'" + " and kind != 'general'" * (not m.changes["forgetting"].empty)
    stories = (
        f's = pandas.read_parquet({texts!r}).query("{which}")\n'
        'p = b[["label", "repeat", "trial_id", "trial_id_base"]].merge(s, on="trial_id").merge(s.rename(columns={'
        '"trial_id": "trial_id_base", "loss": "loss_base"}), on=["trial_id_base", "story_id", "tokens"])\n'
        'result = p.groupby(["label", "repeat"]).apply(lambda t: numpy.average(t.loss - t.loss_base, weights=t.tokens))'
        '.groupby("label").mean()'
    )
    loss = "Loss difference from the baseline; b is computed above"
    snippets.append(Snippet(loss, stories, _example(comparison, "eval_loss")))
    of_compared = [comparison.estimates[metric] for metric in (*codes, "eval_loss")]
    return [snippet for snippet, estimates in zip(snippets, of_compared, strict=True) if estimates]


def _example(comparison: Comparison, metric: str) -> str:
    for config, estimate in comparison.estimates[metric].items():
        return f"{comparison.measurements.labels([config])[0]}: {words.effect(estimate)}"
    return words.NOT_MEASURED
