"""Sentences of a report: what is to be said of a comparison, and what a reader has to know of how it was measured."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import pandas

from harness._util.units import counted, show_share
from harness.analysis import verdicts, words
from harness.analysis.comparison import Comparison
from harness.analysis.measurements import Measurements
from harness.analysis.pilot import PILOT_MODEL
from harness.dialects.training_file import TrainingFile
from harness.metrics import HEADLINE, MOSTLY_IN_FORMAT
from harness.report import front

MOST_ROWS = 500
"""Configurations that a page or a Markdown table shows; the CSV has them all."""
_FEW = 4
"""Labels that a sentence names."""


def sentences(comparison: Comparison, steps: pandas.DataFrame) -> list[str]:
    """What is to be said of a comparison: the baseline, the answers, noise, and predictions.

    Args:
        comparison: of the report.
        steps: optimizer steps with the columns config, repeat, step, loss and tokens.
    """
    m = comparison.measurements
    lines = [ends(comparison)]
    if m.baseline is not None and m.baseline in comparison.means.index:
        means = comparison.mean(m.baseline)
        figures = ", ".join(
            f"{words.figure(metric, means[metric])} {unit}"
            for metric, unit in zip(HEADLINE, ("at the peak", "tokens/s", "nats"), strict=True)
            if not math.isnan(means[metric])
        )
        lines.append(f"The baseline ({_baseline(m)}) takes {figures}.")
    lines += [card.sentence for card in front.cards(comparison)]
    if m.floor is not None:
        lines.append(
            f"Speed differences below {math.expm1(m.floor):.1%} are within the noise of the two runs of the baseline; "
            "none of them is called a difference."
        )
    lines += _reproducibility(m, steps)
    lines += _prediction_errors(m)
    return lines


def ends(comparison: Comparison) -> str:
    """How many configurations were tried, and how their trials ended."""
    m = comparison.measurements
    configs = m.configs[~m.configs["twin"]]
    counts = Counter(m.trials["status"])
    statuses = ", ".join(f"{count:,} {status}" for status, count in counts.most_common())
    whose = "its trial" if len(m.trials) == 1 else "its trials" if len(configs) == 1 else "their trials"
    repeats = sorted({int(r) for r in configs.loc[configs["measured"], "repeats"]})
    repeated = f" with {_span(repeats)} repeats" if repeats and repeats != [1] else ""
    tried = "1 configuration was" if len(configs) == 1 else f"{len(configs):,} configurations{repeated} were"
    return f"{tried} tried on this machine; {whose} ended as {statuses}.{_not_run(m)}"


def _not_run(m: Measurements) -> str:
    """What of the grid is still to come, in a sentence; empty: nothing."""
    left = sum(m.not_run.values())
    if not left:
        return ""
    labels = [*m.not_run]
    more = f" and {len(labels) - _FEW} more" if len(labels) > _FEW else ""
    verb = "has" if left == 1 else "have"
    return f" {counted(left, 'trial')} {verb} not run in this environment yet: {', '.join(labels[:_FEW])}{more}."


def tally(judged: Sequence[verdicts.ClaimVerdict]) -> str:
    """How many claims have each verdict, in a sentence."""
    counts = Counter(verdict.word for verdict in judged)
    counted = ", ".join(f"{counts[word]} {word}" for word in get_args(verdicts.Word) if counts[word])
    return f"Of {len(judged)} claims: {counted}."


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
    ok = m.trials[(m.trials["status"] == "ok") & ~m.trials["twin"]].drop_duplicates("config")
    known = ok[["predicted_peak_memory_bytes", "peak_memory_bytes"]].dropna()
    if known.empty:
        return []
    roofline = ok["roofline_share"].dropna()
    ends = dict.fromkeys(f"×{end:.2f}" for end in (roofline.min(), roofline.max()))
    reached = (
        f" Timed steps ran at {' to '.join(ends)} of their speed at measured rates, which are no limit."
        if len(roofline)
        else ""
    )
    error = known["predicted_peak_memory_bytes"] / known["peak_memory_bytes"] - 1
    return [
        f"Peaks were predicted before the trials ran: {error.abs().median():.2%} off in the median and "
        f"{error.abs().max():.2%} at most, over {counted(len(error), 'configuration')}; "
        f"{int((error < -0.005).sum())} of them needed over 0.5% more than predicted.{reached}"
    ]


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _baseline(m: Measurements) -> str:
    base = m.configs.loc[m.baseline]
    keys = ["lora_r", "micro_batch_size", "gradient_accumulation_steps", "sequence_length"]
    known = {key: words.MISSING if pandas.isna(base[key]) else words.level(key, base[key]) for key in keys}
    names = {"lora": f"LoRA r {known['lora_r']}", "none": "full fine-tuning"}
    adapter = names.get(str(base["adapter"]), base["adapter"])
    return (
        f"{base['base_model']}, {adapter}, {base['precision']}, micro-batch {known['micro_batch_size']} × "
        f"{known['gradient_accumulation_steps']}, {known['sequence_length']} tokens"
    )


_THROTTLED = 0.05
"""Trials throttled for a larger fraction of their timed steps are named."""


def caveats(comparison: Comparison, alpha: float) -> list[str]:
    """What a reader has to know of how it was measured.

    Args:
        comparison: of the report.
        alpha: error rate of each of its families, where the grid has a report of its own.
    """
    m = comparison.measurements
    lines = _of_training_file(m.training_file) + [f"Left out: {what}." for what in m.left_out]
    if of_nothing_compared(comparison):
        lines += of_nothing_compared(comparison)
    elif m.floor is None and comparison.means["tokens_per_second"].notna().any():
        twice = "has no speed of both its runs" if m.configs["twin"].any() else "was not run twice"
        lines.append(f"The baseline {twice}: the noise floor of speeds is unknown.")
    lines += [words.looks(alpha)] if words.looks(alpha) else []
    repeats = m.configs.loc[m.configs["measured"] & ~m.configs["twin"], "repeats"]
    lines += _timing_caveats(m)
    lines += _of_watched(m)
    if len(repeats) and int(repeats.min()) == 1 and len(m.readings) and not m.readings["visit"].any():
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


def of_nothing_compared(comparison: Comparison) -> list[str]:
    """Why nothing is compared; empty where something may be."""
    m = comparison.measurements
    if m.baseline is None:
        return ["The grid has no baseline: figures are shown, and no technique is compared with one."]
    if m.baseline not in comparison.means.index:
        return ["No trial of the baseline ended well: figures are shown, and no technique is compared with it."]
    return []


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


def _timed_alone(m: Measurements) -> pandas.DataFrame:
    """Trials of a grid without a visit in any block that the baseline was timed in, though it ended well."""
    if m.baseline is None or not m.configs.loc[m.baseline, "measured"]:
        return m.trials[:0]
    visits = m.readings[m.readings["visit"]]
    of_baseline = visits["trial"].map(m.trials["stands_for"]) == m.baseline
    together = visits["block"].isin(visits.loc[of_baseline, "block"])
    alone = {*visits["trial"]} - {*visits.loc[together, "trial"]}
    # Those of a search are compared where it is confirmed; watched loops have no blocks in common.
    return m.trials[m.trials.index.isin(alone) & m.trials["study"].isna() & ~m.trials["watched"]]


def _timing_caveats(m: Measurements) -> list[str]:
    """What disturbed the timing, and what held more memory than the training."""
    lines = []
    all_disturbed = m.trials[m.trials["disturbed"].fillna(False).astype(bool)]
    watched = all_disturbed["watched"]
    disturbed = all_disturbed[~watched]
    if len(disturbed):
        lines.append(
            f"The machine worked for others while these were timed, so their speeds enter no comparison: "
            f"{_names(disturbed)}. harness run times them again."
        )
    if watched.any():
        lines.append(
            f"The machine worked for others in every timed step of these loops, which have no speed: "
            f"{_names(all_disturbed[watched])}. Watch them again while it is idle."
        )
    alone = _timed_alone(m)
    if len(alone):
        lines.append(
            f"These were timed in no block of visits with the baseline, so their speeds are not compared: "
            f"{_names(alone)}. harness run times them again."
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
