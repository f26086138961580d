"""The content of a report, whatever its format."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pandas
import pyarrow as pa
import pyarrow.compute as pc

from harness._util.redact import redact_home
from harness._util.units import show_share
from harness.analysis import cost, task_scores, verdicts, words
from harness.analysis.comparison import Comparison, compare
from harness.analysis.measurements import Measurements
from harness.analysis.pilot import PILOT_MODEL
from harness.dialects.training_file import TrainingFile
from harness.grids.yaml_file import spec_to_yaml
from harness.metrics import HEADLINE, METRICS, MOSTLY_IN_FORMAT
from harness.report import adapter_tables, cost_tables, inference_tables, plots, tables, task_tables, tuning
from harness.results.store import Store

MOST_ROWS = 500
"""Configurations that a page or a Markdown table shows; the CSV has them all."""


@dataclass(frozen=True)
class Configuration:
    """One configuration as YAML that `harness run` takes."""

    number: int
    label: str
    status: str
    yaml: str


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
    summary: tuple[str, ...]
    comparison: Comparison
    tables: tuple[tables.Table, ...]
    verdicts: tuple[verdicts.ClaimVerdict, ...]
    charts: tuple[plots.Chart, ...]
    configurations: tuple[Configuration, ...]
    environment: dict[str, Any]
    caveats: tuple[str, ...]
    thresholds: tuple[str, ...]
    snippets: tuple[Snippet, ...]
    stories: tuple[inference_tables.GeneratedStory, ...] = ()
    recommended: Recommended | None = None


def document(measurements: Measurements, folder: Path) -> Document:
    """The report of these measurements.

    Args:
        measurements: of one environment and one version of the grid.
        folder: where they were read from.
    """
    search = tuning.summarize(measurements, folder)
    comparison = search.comparison if search else compare(measurements.unselected)
    judged = tuple(verdicts.judge(comparison))
    stories = tuple(inference_tables.stories(measurements))
    first, *rest = tables.all_tables(comparison)
    steps = _steps(measurements, folder)
    charts = plots.all_charts(comparison, steps)
    of_tasks = task_scores.scores(comparison)
    whole = Document(
        name=measurements.name,
        title=measurements.title,
        where=measurements.where,
        summary=(*(search.sentences if search else ()), *_summary(comparison, steps, judged)),
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
        configurations=tuple(_configurations(measurements)),
        environment=measurements.environment,
        caveats=tuple(_caveats(comparison)),
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


def _of_training_file(file: TrainingFile | None) -> list[str]:
    if file is None:
        return []
    lines = [f"The base is a training file of {file.tool}, read with its defaults."]
    if file.without:
        lines.append(f"Left out of it, so another training than the file's: {'; '.join(file.without.values())}.")
    if file.notes:
        listed = "; ".join(f"{key}: {text}" for key, text in file.notes.items())
        lines.append(f"Other than there: {listed}.")
    return lines


def _steps(measurements: Measurements, folder: Path) -> pandas.DataFrame:
    """Optimizer steps with their configuration and repeat."""
    shown = measurements.trials[measurements.trials["config"].isin(measurements.configs.index[:MOST_ROWS])]
    ids = shown.set_index("trial_id")[["config", "repeat"]]
    table = Store(folder).read("steps", columns=["trial_id", "block", "step", "loss", "tokens"])
    # Visits repeat a few steps; a watched loop times those that it trains.
    watched = pa.array(shown.loc[shown["watched"], "trial_id"].tolist(), pa.string())
    table = table.filter(pc.field("block").is_null() | pc.field("trial_id").isin(watched)).drop_columns(["block"])
    kept: pandas.DataFrame = table.filter(pc.field("trial_id").isin(ids.index.tolist())).to_pandas()
    return kept.join(ids, on="trial_id")


def _summary(comparison: Comparison, steps: pandas.DataFrame, judged: tuple[verdicts.ClaimVerdict, ...]) -> list[str]:
    m = comparison.measurements
    configs = m.configs[~m.configs["twin"]]
    counts = Counter(m.trials["status"])
    ends = ", ".join(f"{count:,} {status}" for status, count in counts.most_common())
    repeats = sorted({int(r) for r in configs.loc[configs["measured"], "repeats"]})
    repeated = f" with {_span(repeats)} repeats" if repeats and repeats != [1] else ""
    lines = [f"{len(configs):,} configurations{repeated} were tried on this machine; their trials ended as {ends}."]
    if m.baseline is not None and m.baseline in comparison.means.index:
        means = comparison.mean(m.baseline)
        figures = ", ".join(
            f"{words.figure(metric, means[metric])} {unit}"
            for metric, unit in zip(HEADLINE, ("at the peak", "tokens/s", "nats"), strict=True)
            if not math.isnan(means[metric])
        )
        lines.append(f"The baseline ({_baseline(m)}) takes {figures}.")
        lines += [
            sentence
            for metric, what in zip(HEADLINE, ("Least memory", "Fastest", "Lowest loss"), strict=True)
            if (sentence := _best(comparison, metric, what))
        ]
    if m.floor is not None:
        lines.append(
            f"Speed differences below {math.expm1(m.floor):.1%} are within the noise of the two runs of the baseline; "
            "none of them is called a difference."
        )
    lines += _reproducibility(m, steps)
    lines += _prediction_errors(m)
    tally = Counter(verdict.word for verdict in judged)
    tallied = ", ".join(f"{tally[word]} {word}" for word in get_args(verdicts.Word) if tally[word])
    lines.append(f"Of {len(judged)} claims: {tallied}.")
    return lines


def _reproducibility(m: Measurements, steps: pandas.DataFrame) -> list[str]:
    """Whether losses are bitwise reproducible, from the two runs of the baseline."""
    twins = m.configs.index[m.configs["twin"]]
    once, again = (
        steps[steps["config"].isin(run)].set_index(["repeat", "step"])["loss"] for run in ([m.baseline], twins[:1])
    )
    both = pandas.concat([once, again], axis=1, keys=["once", "again"]).dropna()
    if both.empty:
        return []
    largest = (both["once"] - both["again"]).abs().max()
    if largest == 0:
        return [f"Losses are bitwise reproducible: two runs of the baseline agree in each of {len(both)} steps."]
    why = (
        "CUDA kernels add in no fixed order"
        if m.environment["device_type"] == "cuda"
        else "the CPU libraries split sums among threads in no fixed order"
    )
    return [
        f"Losses are not bitwise reproducible: two runs of the baseline differ by up to {largest:.2g} nats in a step, "
        f"as {why}. The same grid run again gives slightly different losses."
    ]


def _prediction_errors(m: Measurements) -> list[str]:
    """How well peaks and speeds were predicted, where they were."""
    ok = m.trials[m.trials["status"] == "ok"].drop_duplicates("config")
    known = ok[["predicted_peak_memory_bytes", "peak_memory_bytes"]].dropna()
    if known.empty:
        return []
    roofline = ok["roofline_share"].dropna()
    reached = (
        f" Timed steps ran at ×{roofline.min():.2f} to ×{roofline.max():.2f} of their speed at measured rates, which "
        "are no limit."
        if len(roofline)
        else ""
    )
    error = known["predicted_peak_memory_bytes"] / known["peak_memory_bytes"] - 1
    return [
        f"Peaks were predicted before the trials ran: {error.abs().median():.2%} off in the median and "
        f"{error.abs().max():.2%} at most, over {len(error)} configurations; {int((error < -0.005).sum())} of them "
        f"needed over 0.5% more than predicted.{reached}"
    ]


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _baseline(m: Measurements) -> str:
    base = m.configs.loc[m.baseline]
    names = {"lora": f"LoRA r {base['lora_r']}", "none": "full fine-tuning"}
    adapter = names.get(str(base["adapter"]), base["adapter"])
    return (
        f"{base['base_model']}, {adapter}, {base['precision']}, micro-batch {base['micro_batch_size']} × "
        f"{base['gradient_accumulation_steps']}, {base['sequence_length']} tokens"
    )


def _best(comparison: Comparison, metric: str, what: str) -> str | None:
    """The best configuration by one figure, if it is by more than negligible, with its effect on the two others."""
    m, wanted = comparison.measurements, METRICS[metric].better
    estimates = comparison.estimates[metric]
    better = {c: e for c, e in estimates.items() if e.verdict == "better" and not words.is_negligible(e)}
    if not better:
        return None
    best = min(better, key=lambda c: better[c].value * (1 if wanted == "lower" else -1))
    others = ((other, comparison.of(other, best)) for other in HEADLINE if other != metric)
    effects = "; ".join(f"{METRICS[x].group} {words.effect_and_word(e)}" for x, e in others if e is not None)
    return f"{what}: {m.labels([best])[0]}, {words.effect(better[best])}" + (f" ({effects})." if effects else ".")


_THROTTLED = 0.05
"""Trials throttled for a larger fraction of their timed steps are named."""


def _caveats(comparison: Comparison) -> list[str]:
    m = comparison.measurements
    lines = _of_training_file(m.training_file) + [f"Left out: {what}." for what in m.left_out]
    if m.baseline is None:
        lines.append("The grid has no baseline: figures are shown, and nothing is compared.")
    elif m.baseline not in comparison.means.index:
        lines.append("No trial of the baseline ended well: figures are shown, and nothing is compared.")
    elif m.floor is None:
        lines.append("The baseline was not run twice: the noise floor of speeds is unknown.")
    lines += [words.looks(m.alpha)] if words.looks(m.alpha) else []
    repeats = m.configs.loc[m.configs["measured"], "repeats"]
    lines += _timing_caveats(m)
    lines += _of_watched(m)
    if len(repeats) and int(repeats.min()) == 1 and not m.readings["visit"].any():
        lines.append(
            "With one repeat, the interval of a speed is over the timed steps of one trial; it does not cover "
            "differences between trials."
        )
    if not m.trials["eval_loss"].notna().any():
        lines.append("No loss is compared: the weights are random, or there are no held-out stories.")
    else:
        lines.append(
            f"Intervals of losses are over held-out stories and seeds; {_of_seeds(m)}. Stories truncated at different "
            "lengths are not compared."
        )
    throttled = m.trials[m.trials["throttled_share"] > _THROTTLED]
    if len(throttled):
        lines.append(
            f"The GPU was throttled by heat or power for over {_THROTTLED:.0%} of the time in {len(throttled)} "
            f"trials ({_names(throttled)}): their speeds may be too low."
        )
    lines += _format_caveats(m)
    if m.environment["half_matmul"] == "fp32-blocks":
        lines.append("This CPU has no 16-bit matrix products; they are computed in blocks of fp32, at fp32 speed.")
    if len(m.configs) > MOST_ROWS:
        lines.append(f"The first {MOST_ROWS} of {len(m.configs):,} configurations are shown; the CSV has them all.")
    return lines


def _format_caveats(m: Measurements) -> list[str]:
    """Where a quantiser skipped layers: the label says more than was done."""
    partly = m.trials[m.trials["weights_in_format"] < MOSTLY_IN_FORMAT].drop_duplicates("label")
    lines = []
    for _, row in partly.sort_values("label").iterrows():
        of_bytes = ", ".join(f"{name} {show_share(part)}" for name, part in json.loads(row["base_formats"]).items())
        lines.append(
            f"{row['label']}: {show_share(row['weights_in_format'])} of the linear weights are in the format of its "
            f"precision; the bytes of the base are {of_bytes}."
        )
    return lines


def _timing_caveats(m: Measurements) -> list[str]:
    """What disturbed the timing, and what held more memory than the training."""
    lines = []
    disturbed = m.trials[m.trials["disturbed"].fillna(False).astype(bool)]
    if len(disturbed):
        lines.append(
            f"The machine worked for others while these were timed, so their speeds enter no comparison: "
            f"{_names(disturbed)}. `harness run` times them again."
        )
    steps = int(m.trials["disturbed_steps"].fillna(0).sum())
    if steps:
        timed = int(m.trials["timed_steps"].fillna(0).sum())
        lines.append(f"{steps:,} timed steps were disturbed and do not count; {timed:,} do.")
    if m.waits_unknown:
        lines.append(
            "The kernel did not say how long steps waited for a processor: the machine may have worked for others "
            "while they were timed."
        )
    higher = m.trials[m.trials["peak_timed_bytes"] > m.trials["peak_memory_bytes"]]
    if len(higher):
        lines.append(f"The timed steps of these held more memory than any step of their training: {_names(higher)}.")
    return lines


def _of_watched(m: Measurements) -> list[str]:
    watched = m.trials[m.trials["watched"]]
    if watched.empty:
        return []
    return [
        f"Not trials of a grid but loops of other programs, that were watched: {_names(watched)}. Their speeds are of "
        "all that they trained on, and are compared with none; what could not be seen of their configuration is empty."
    ]


def _of_seeds(m: Measurements) -> str:
    """Where it is known from how much seeds vary."""
    if m.between_seeds(m.stories, paired=True) is not None:
        return "the part of one seed is the noise between trials that were repeated"
    return (
        f"nothing was repeated under another seed, so the seeds' part is that of pilot measurements of {PILOT_MODEL}, "
        "which other models and settings may exceed"
    )


def _names(trials: pandas.DataFrame) -> str:
    return ", ".join(sorted(set(trials["label"])))


def _configurations(m: Measurements) -> list[Configuration]:
    configurations = []
    for number in m.configs.index[:MOST_ROWS]:
        row = m.configs.loc[number]
        if row["twin"]:
            continue
        text = spec_to_yaml(m.spec(int(number)))
        configurations.append(Configuration(int(number), str(row["label"]), str(row["status"]), text))
    return configurations


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
    visits = (
        f"s = pandas.read_parquet({redact_home(str(folder / 'steps'))!r}).query('block == block and not disturbed')\n"
        's = s[s.groupby(["trial_id", "block"]).seconds.transform("size") >= 3]\n'
        'make = ["trial_id", "block", "tokens", "samples", "supervised_tokens", "padded_tokens"]\n'
        "v = s.groupby(make).seconds.mean().reset_index()\n"
        'v = v.groupby(["trial_id", "block"])[["tokens", "seconds"]].sum().reset_index()\n'
        'p = b[["label", "trial_id", "trial_id_base"]].merge(v, on="trial_id").merge(v.rename(columns={"trial_id": '
        '"trial_id_base"}), on=["trial_id_base", "block"], suffixes=("", "_base"))\n'
        "r = numpy.log(p.tokens / p.seconds / p.tokens_base * p.seconds_base)\n"
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
    return snippets


def _example(comparison: Comparison, metric: str) -> str:
    for config, estimate in comparison.estimates[metric].items():
        return f"{comparison.measurements.labels([config])[0]}: {words.effect(estimate)}"
    return words.NOT_MEASURED
