"""Tables of inference results: what merging changes, and the generated stories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from harness.analysis.comparison import Comparison
from harness.analysis.inference import COMPARED, ModelPair, means_by_trial
from harness.analysis.measurements import Measurements
from harness.metrics import INFERENCE
from harness.record import Model
from harness.report.tables import Cell, Table, effect_cell, figure_cell

_FIGURES = ("model_bytes", "peak_inference_bytes", "prefill_tokens_per_second", "decode_tokens_per_second",
            "token_seconds_p50", "token_seconds_p95", "story_loss", "logit_difference")  # fmt: skip
_STORY_FIGURES = ("rouge_l", "distinct_2", "repetition", "words")
_COMPARED_HEADINGS = ("Size, of unmerged", "Decode, of unmerged", "Loss, minus unmerged")
"""Of `COMPARED`."""


@dataclass(frozen=True)
class GeneratedStory:
    """A held-out synopsis with its held-out story and those that the models generated."""

    trial: str
    synopsis: str
    reference: str
    stories: dict[str, str]
    """By model."""


def models(m: Measurements, comparison: Comparison) -> Table:
    """Size, speed and loss of base, unmerged and merged model."""
    rows = []
    for label, trial, of_trial in _by_trial(m):
        benchmarked = set(of_trial.inference_results["models"]["model"])
        for name in get_args(Model):
            if name in benchmarked:
                pair = ModelPair("unmerged", name, (trial,))
                against = [effect_cell(comparison.of_models.get((metric, pair))) for metric in COMPARED]
                rows.append((*_model_cells(of_trial, label, name), *against))
    headings = ("Trial", "Model", "Weights in", *(INFERENCE[x].heading for x in _FIGURES), *_COMPARED_HEADINGS)
    note = (
        "One request at a time, without autocast, as the saved model would answer. In each round every model is "
        "loaded again and gets the same prompts; intervals are over rounds (speeds) and held-out stories (loss, at the "
        "precision of training)."
        if rows
        else "No trained model was benchmarked; harness evaluate TRIAL does it, for a trial with save_adapter: true."
    )
    return Table("merged", "Merged adapter", headings, tuple(rows), note)


def _model_cells(m: Measurements, label: str, model: Model) -> tuple[Cell, ...]:
    precision = m.inference_results["models"].set_index("model").at[model, "precision"]
    return (
        Cell(label),
        Cell(model),
        Cell(str(precision)),
        *(figure_cell(metric, next(iter(means_by_trial(m, model, metric)), None)) for metric in _FIGURES),
    )


def generated_stories(m: Measurements) -> Table:
    """Figures of the generated stories, by model."""
    rows = []
    for label, _, of_trial in _by_trial(m):
        answers = of_trial.inference_results["answers"].dropna(subset=["story"])
        for model, of_model in answers.groupby("model"):
            means = of_model[list(_STORY_FIGURES)].mean()
            count = Cell(str(len(of_model)), float(len(of_model)))
            cells = (figure_cell(metric, means[metric]) for metric in _STORY_FIGURES)
            rows.append((Cell(label), Cell(str(model)), count, *cells))
    headings = ("Trial", "Model", "Stories", *(INFERENCE[x].heading for x in _STORY_FIGURES))
    note = "Means over the generated stories, which are shown below with the held-out ones." if rows else ""
    return Table("generated-stories", "Generated stories", headings, tuple(rows), note)


def stories(m: Measurements) -> list[GeneratedStory]:
    """Held-out synopses with the generated stories."""
    generated = []
    for label, _, of_trial in _by_trial(m):
        answers = of_trial.inference_results["answers"].dropna(subset=["story", "synopsis", "reference"])
        for _, of_story in answers.groupby("story_id", sort=False):
            first = of_story.iloc[0]
            by_model = dict(zip(of_story["model"], of_story["story"], strict=True))
            generated.append(GeneratedStory(label, first["synopsis"], first["reference"], by_model))
    return generated


def _by_trial(m: Measurements) -> Iterator[tuple[str, int, Measurements]]:
    """The label and number of each benchmarked trial, and the measurements with its inference results only."""
    for trial in m.inference_results["models"]["trial"].unique():
        row = m.trials.loc[trial]
        label = str(row["label"]) + (f" (repeat {row['repeat']})" if row["repeat"] else "")
        yield label, int(trial), m.with_inference_results([trial])
