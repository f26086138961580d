"""What a report says, before it has a face: Markdown, a page, LaTeX or CSV."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pyarrow.compute as pc
import yaml

from harness.metrics import METRICS
from harness.private import without_home
from harness.report import plots, served, tables, tuning, verdicts, words
from harness.report.measurements import Measurements, describe, labels, spec
from harness.results import Store

MOST_ROWS = 500
"""Configurations that a page or a Markdown table shows; the CSV has them all."""


_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast, where it is there


@dataclass(frozen=True)
class Configuration:
    """One configuration, ready to be run again."""

    number: int
    label: str
    status: str
    yaml: str


@dataclass(frozen=True)
class Recommended:
    """What a search found best, ready to be run."""

    label: str
    yaml: str


@dataclass(frozen=True)
class Snippet:
    """Code that recomputes figures of the report from the parquet, and what one of them is."""

    title: str
    code: str
    example: str


@dataclass(frozen=True)
class Document:
    """All of a report."""

    name: str
    title: str
    where: str
    summary: tuple[str, ...]
    comparison: tables.Comparison
    tables: tuple[tables.Table, ...]
    verdicts: tuple[verdicts.ClaimVerdict, ...]
    charts: tuple[plots.Chart, ...]
    configurations: tuple[Configuration, ...]
    environment: dict[str, Any]
    caveats: tuple[str, ...]
    thresholds: tuple[str, ...]
    snippets: tuple[Snippet, ...]
    stories: tuple[served.Told, ...] = ()
    recommended: Recommended | None = None


def document(measurements: Measurements, folder: Path) -> Document:
    """Everything that the measurements have to say.

    Args:
        measurements: of one environment and one version of the grid.
        folder: where they were read from.
    """
    comparison = tables.compare(measurements)
    judged = tuple(verdicts.judge(measurements))
    searched = tuning.findings(measurements, folder)
    heard = tuple(served.stories(measurements))
    first, *rest = tables.all_tables(comparison)
    steps = _steps(measurements, folder)
    charts = plots.all_charts(comparison, steps)
    return Document(
        name=measurements.name,
        title=measurements.title,
        where=f"{describe(measurements.environment)}; environment {measurements.environment_id}",
        summary=(*(searched.sentences if searched else ()), *_summary(comparison, steps, judged)),
        comparison=comparison,
        tables=(
            first,
            *(searched.tables if searched else ()),
            *rest,
            served.models(measurements),
            *([served.told(measurements)] if heard else []),
        ),
        stories=heard,
        verdicts=judged,
        charts=(*(searched.charts if searched else ()), *charts),
        recommended=Recommended(searched.label, searched.yaml) if searched else None,
        configurations=tuple(_configurations(measurements)),
        environment=measurements.environment,
        caveats=tuple(_caveats(comparison)),
        thresholds=tuple(words.thresholds()),
        snippets=tuple(_snippets(comparison, folder)),
    )


def _steps(measurements: Measurements, folder: Path) -> pandas.DataFrame:
    """Optimizer steps with their configuration and repeat."""
    shown = measurements.trials[measurements.trials["config"].isin(measurements.configs.index[:MOST_ROWS])]
    ids = shown.set_index("trial_id")[["config", "repeat"]]
    table = Store(folder).read("steps", columns=["trial_id", "step", "loss", "tokens"])
    kept: pandas.DataFrame = table.filter(pc.field("trial_id").isin(ids.index.tolist())).to_pandas()
    return kept.join(ids, on="trial_id")


# ------------------------------------------------------------------------------------ summary


def _summary(
    comparison: tables.Comparison, steps: pandas.DataFrame, judged: tuple[verdicts.ClaimVerdict, ...]
) -> list[str]:
    m = comparison.measurements
    configs = m.configs[~m.configs["twin"]]
    counts = Counter(m.trials["status"])
    ends = ", ".join(f"{count:,} {status}" for status, count in counts.most_common())
    repeats = sorted({int(r) for r in configs.loc[configs["measured"], "repeats"]})
    said = f" with {_span(repeats)} repeats" if repeats and repeats != [1] else ""
    found = [f"{len(configs):,} configurations{said} were tried on this machine; their trials ended as {ends}."]
    if m.baseline is not None and m.baseline in comparison.means.index:
        means = comparison.mean(m.baseline)
        figures = ", ".join(
            f"{words.figure(metric, means[metric])} {unit}"
            for metric, unit in zip(tables.HEADLINE, ("at the peak", "tokens/s", "nats"), strict=True)
            if not math.isnan(means[metric])
        )
        found.append(f"The baseline ({_in_short(m)}) takes {figures}.")
        found += [
            sentence
            for metric, what in zip(tables.HEADLINE, ("Least memory", "Fastest", "Lowest loss"), strict=True)
            if (sentence := _best(comparison, metric, what))
        ]
    if m.floor is not None:
        found.append(
            f"Two runs of the baseline differ in speed so much that effects below {math.expm1(m.floor):.1%} "
            "are noise here; none of them is called a difference."
        )
    found += _repeated(m, steps)
    found += _foreseen(m)
    tally = Counter(verdict.word for verdict in judged)
    order: tuple[verdicts.Word, ...] = ("supported", "contradicted", "not distinguishable", "not measured here")
    found.append(f"Of {len(judged)} claims: " + ", ".join(f"{tally[w]} {w}" for w in order if tally[w]) + ".")
    return found


def _repeated(m: Measurements, steps: pandas.DataFrame) -> list[str]:
    """Whether losses come out the same to the last bit when a trial is run again, as the baseline was."""
    twins = m.configs.index[m.configs["twin"]]
    once, again = (
        steps[steps["config"].isin(found)].set_index(["repeat", "step"])["loss"] for found in ([m.baseline], twins[:1])
    )
    both = pandas.concat([once, again], axis=1, keys=["once", "again"]).dropna()
    if both.empty:
        return []
    largest = (both["once"] - both["again"]).abs().max()
    if largest == 0:
        return [
            f"Losses repeat to the last bit: two runs of the baseline have the same loss in each of {len(both)} steps."
        ]
    why = (
        "kernels of the card add in an order that is not fixed"
        if m.environment["device_type"] == "cuda"
        else "the machine's libraries share sums among threads in an order that is not fixed"
    )
    return [
        f"Losses do not repeat to the last bit: two runs of the baseline differ by up to {largest:.2g} nats in a step, "
        f"as {why}. The same grid run again gives slightly other losses."
    ]


def _foreseen(m: Measurements) -> list[str]:
    """How well peaks were predicted, where they were."""
    ok = m.trials[m.trials["status"] == "ok"].drop_duplicates("config")
    known = ok[["predicted_peak_memory_bytes", "peak_memory_bytes"]].dropna()
    if known.empty:
        return []
    share = ok["roofline_share"].dropna()
    reached = (
        f" Timed steps reach {share.min():.0%} to {share.max():.0%} of what the device's measured rates would allow."
        if len(share)
        else ""
    )
    error = known["predicted_peak_memory_bytes"] / known["peak_memory_bytes"] - 1
    return [
        f"Peaks were predicted before the trials ran: {error.abs().median():.2%} off in the median and "
        f"{error.abs().max():.2%} at most, over {len(error)} configurations; {int((error < -0.005).sum())} of them "
        f"needed over 0.5% more than was predicted.{reached}"
    ]


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _in_short(m: Measurements) -> str:
    base = m.configs.loc[m.baseline]
    adapter = f"LoRA r {base['lora_r']}" if base["adapter"] == "lora" else "full fine-tuning"
    return (
        f"{base['base_model']}, {adapter}, {base['precision']}, micro-batch {base['micro_batch_size']} × "
        f"{base['gradient_accumulation_steps']}, {base['sequence_length']} tokens"
    )


def _best(comparison: tables.Comparison, metric: str, what: str) -> str | None:
    """The best configuration by one figure, with its price in the two others."""
    m, wanted = comparison.measurements, METRICS[metric].better
    better = {c: e for c, e in comparison.estimates[metric].items() if e.verdict == "better"}
    if not better:
        return None
    best = min(better, key=lambda c: better[c].value * (1 if wanted == "lower" else -1))
    others = ((other, comparison.of(other, best)) for other in tables.HEADLINE if other != metric)
    names = {"peak_memory_bytes": "memory", "tokens_per_second": "speed", "eval_loss": "loss"}
    price = "; ".join(f"{names[other]} {words.effect_and_word(e)}" for other, e in others if e is not None)
    return f"{what}: {labels(m, [best])[0]}, {words.effect(better[best])}" + (f" ({price})." if price else ".")


# ------------------------------------------------------------------------------------ small print


_THROTTLED = 0.05
"""A trial that was held down for more of its time is named."""


def _caveats(comparison: tables.Comparison) -> list[str]:
    m = comparison.measurements
    found = [f"Left out: {what}." for what in m.left_out]
    if m.baseline is None:
        found.append("The grid has no baseline: there are figures, and nothing is compared.")
    elif m.baseline not in comparison.means.index:
        found.append("No trial of the baseline ended well: there are figures, and nothing is compared.")
    elif m.floor is None:
        found.append("The baseline was not run twice: how much of a difference in speed is noise is not known.")
    repeats = m.configs.loc[m.configs["measured"], "repeats"]
    if len(repeats) and int(repeats.min()) == 1:
        found.append(
            "Where there is one repeat, the interval of a speed is over its timed steps, which share whatever "
            "disturbed that trial."
        )
    if not m.trials["eval_loss"].notna().any():
        found.append("No loss is compared: the weights are random, or there are no held-out stories.")
    else:
        found.append(
            "Intervals of losses are over the held-out stories, for the seeds that were run; stories that were cut "
            "elsewhere are not compared."
        )
    held_down = m.trials[m.trials["throttled_share"] > _THROTTLED]
    if len(held_down):
        names = ", ".join(sorted(set(held_down["label"])))
        found.append(
            f"Heat or power held the card's clock down for over {_THROTTLED:.0%} of the time in {len(held_down)} "
            f"trials ({names}): their speeds may be lower than the card's."
        )
    if m.environment["half_matmul"] == "fp32-blocks":
        found.append("This CPU has no 16-bit products; they are done in blocks of fp32, at its speed.")
    if len(m.configs) > MOST_ROWS:
        found.append(f"The first {MOST_ROWS} of {len(m.configs):,} configurations are shown; the CSV has them all.")
    return found


def _configurations(m: Measurements) -> list[Configuration]:
    found = []
    for number in m.configs.index[:MOST_ROWS]:
        row = m.configs.loc[number]
        if row["twin"]:
            continue
        values = {k: v for k, v in spec(m.configs, number).canonical().items() if v is not None}
        text = yaml.dump(values, Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
        found.append(Configuration(int(number), str(row["label"]), str(row["status"]), text))
    return found


def _snippets(comparison: tables.Comparison, folder: Path) -> list[Snippet]:
    """Three lines of pandas for each column of the technique comparison."""
    m = comparison.measurements
    if m.baseline is None:
        return []
    ids = sorted({i for i in m.trials["baseline_id"] if isinstance(i, str)})
    kept = f"environment_id == {m.environment_id!r} and status == 'ok' and baseline_id in {ids}"
    trials, texts = (without_home(str(folder / table)) for table in ("trials", "stories"))
    prepare = (
        f"t = pandas.read_parquet({trials!r}).query({kept!r})\n"
        'b = t[~t.twin].merge(t, left_on=["baseline_id", "repeat"], right_on=["spec_id", "repeat"], '
        'suffixes=("", "_base"))\n'
    )
    ratio = (
        'result = numpy.exp(numpy.log(b.{0} / b.{0}_base).groupby([b.label, b.repeat]).mean().groupby("label").mean())'
    )
    found = [
        Snippet(f"{what} against the baseline", prepare + ratio.format(metric), _example(comparison, metric))
        for metric, what in (("peak_memory_bytes", "Peak memory"), ("tokens_per_second", "Tokens/s"))
    ]
    # Rows from before there was general text do not say that they are of held-out stories.
    which = "when == 'after'" + " and kind != 'general'" * (not m.changes["forgetting"].empty)
    stories = (
        f's = pandas.read_parquet({texts!r}).query("{which}")\n'
        'p = b[["label", "trial_id", "trial_id_base"]].merge(s, on="trial_id").merge(s.rename(columns={"trial_id": '
        '"trial_id_base", "loss": "loss_base"}), on=["trial_id_base", "story_id", "tokens"])\n'
        'result = (p.loss - p.loss_base).groupby([p.label, p.story_id]).mean().groupby("label").mean()'
    )
    loss = "Loss difference from the baseline; b is made above"
    found.append(Snippet(loss, stories, _example(comparison, "eval_loss")))
    return found


def _example(comparison: tables.Comparison, metric: str) -> str:
    for config, estimate in comparison.estimates[metric].items():
        return f"{labels(comparison.measurements, [config])[0]}: {words.effect(estimate)}"
    return words.NOT_MEASURED
