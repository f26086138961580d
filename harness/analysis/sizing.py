"""How much of a grid to run in a given time: the visits, repeats and held-out stories that decide most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import pandas
import pyarrow.compute as pc

from harness.analysis import forecast, pilot, words
from harness.analysis.forecast import Plan
from harness.analysis.measurements import Measurements
from harness.analysis.pilot import Variances
from harness.grids.grid import Trial
from harness.predict.prediction import Predictions
from harness.predict.roofline import predicted_seconds
from harness.results.store import Store
from harness.spec import length
from harness.spec.keys import FULL
from harness.spec.trial import TrialSpec

LEAST_VISITS, LEAST_STORIES = 3, 32
_MOST_VISITS, _MOST_REPEATS = 100, 50
_STEPS_OF_VISIT = 3
"""Different steps that a visit repeats."""


@dataclass(frozen=True)
class Cost:
    """What a trial takes, in seconds."""

    start: float
    """Its process, its stories and the base model."""
    step: float
    """An optimizer step."""
    steps: float
    """How many of them are trained."""
    story: float
    """One held-out story, evaluated once."""
    general: float = 0.0
    """What is evaluated whatever the number of stories, once: general passages, questions of tasks."""

    def of_visit(self, seconds: float, reference: Cost | None = None) -> float:
        """A visit: a warm-up step, and whole rounds of its steps for at least so many seconds.

        Args:
            seconds: least seconds of its steps; with a reference, of half of both's.
            reference: of the baseline, if a step of it is taken in turn with each; null: none is.
        """
        step = self.step if reference is None else (self.step + reference.step) / 2
        steps = 1 + _STEPS_OF_VISIT * (max(1, math.ceil(seconds / (_STEPS_OF_VISIT * step))) if step else 1)
        return sum(each.start + each.step * steps for each in (self, reference) if each is not None)


@dataclass(frozen=True)
class Work:
    """What the trials of one repeat take, and how they depend on the size.

    The baseline's second run is apart: only the first repeat has it.
    """

    each_repeat: float
    """Seconds of a repeat without its held-out stories."""
    each_story: float
    """Seconds of a held-out story in all trials of a repeat."""
    each_story_before: float
    """The same before training, once for each untrained model."""
    each_visit: float
    """Seconds of a block of visits."""
    once: float = 0.0
    """Seconds of `Cost.general` before training, once for each untrained model."""
    each_baseline: float = 0.0
    """Seconds of a repeat of the baseline alone, and of its stories."""
    each_baseline_story: float = 0.0
    baseline_repeats: int = 1
    second_runs: int = 0
    """Of the baseline: one or none."""

    def seconds(self, visits: float, repeats: float, stories: float) -> float:
        """How long a grid of this size takes. Numbers or arrays."""
        alone = self.second_runs + numpy.maximum(self.baseline_repeats - numpy.asarray(repeats), 0)
        seconds: float = (
            self.once
            + repeats * (self.each_repeat + stories * self.each_story)
            + stories * self.each_story_before
            + alone * (self.each_baseline + stories * self.each_baseline_story)
            + visits * self.each_visit
        )
        return seconds


def work_of(trials: Sequence[Trial], costs: Mapping[str, Cost], visit_seconds: float, *, in_turn: bool) -> Work:
    """The work of a grid.

    Args:
        trials: of the grid.
        costs: by `cost_key`.
        visit_seconds: least undisturbed seconds of a visit.
        in_turn: whether visits take steps of the baseline too.
    """
    timed = [trial for trial in trials if trial.repeat == 0]
    repeated = [trial for trial in timed if not trial.twin]
    of = [costs[cost_key(trial.spec)] for trial in repeated]
    untrained = {trial.spec.untrained_key: cost for trial, cost in zip(repeated, of, strict=True)}
    baselines = [trial for trial in trials if trial.baseline]
    alone = costs[cost_key(baselines[0].spec)] if baselines else Cost(0, 0, 0, 0)
    reference = alone if in_turn else None

    def training(cost: Cost) -> float:
        return cost.start + cost.steps * cost.step + cost.general

    return Work(
        each_repeat=sum(training(cost) for cost in of),
        each_story=sum(cost.story for cost in of),
        each_story_before=sum(cost.story for cost in untrained.values()),
        each_visit=sum(costs[cost_key(trial.spec)].of_visit(visit_seconds, reference) for trial in timed),
        once=sum(cost.general for cost in untrained.values()),
        each_baseline=training(alone),
        each_baseline_story=alone.story,
        baseline_repeats=1 + max((trial.repeat for trial in baselines), default=0),
        second_runs=len(timed) - len(repeated),
    )


# ------------------------------------------------------------------------------------ costs


def cost_key(spec: TrialSpec) -> str:
    """Equal for specs that take equally long but for the number of held-out stories."""
    return spec.model_copy(update={"seed": 0, "val_set_size": 0.0}).id


def trained_seconds(store: Store) -> pandas.Series:
    """By trial id, the median seconds of the steps that it trained, as it took them itself: no visit's."""
    steps = store.read("steps", columns=["trial_id", "block", "seconds"])
    trained = steps.filter(pc.field("block").is_null()).to_pandas()
    medians: pandas.Series = trained.groupby("trial_id")["seconds"].median()
    return medians


def of_evaluation(m: Measurements, step: pandas.Series) -> pandas.DataFrame:
    """By trial, seconds of what is evaluated: of all of it (`whole`), and of one of its texts (`text`; nan: none).

    What loading and steps leave of a trial's time is taken for its texts, evaluated once: held-out stories, general
    passages and questions, each as long as another.

    Args:
        m: of the recorded trials.
        step: seconds of an optimizer step, by trial.
    """
    trials = m.trials
    whole = (trials["trial_seconds"] - trials["load_seconds"] - trials["optimizer_steps"] * step).clip(lower=0)
    passages = trials["general_samples"].where(trials["measure_forgetting"].eq(True), 0)
    questions = m.items.groupby("trial").size().reindex(trials.index, fill_value=0)
    texts = trials["evaluated_stories"].fillna(0) + passages.fillna(0) + questions
    return pandas.DataFrame({"whole": whole, "text": whole / texts.where(texts > 0)})


def recorded_costs(m: Measurements, trained: pandas.Series) -> dict[str, Cost]:
    """Costs of the recorded trials that ended well, by `cost_key`: of each the latest that was timed, else the latest,
    by the steps that it trained. Evaluation is `of_evaluation`.

    Args:
        m: of the recorded trials.
        trained: `trained_seconds` of their store.
    """
    costs: dict[str, Cost] = {}
    timed = m.trials["step_seconds_median"]
    step = timed.fillna(m.trials["trial_id"].map(trained))
    evaluation = of_evaluation(m, step)
    story = evaluation["text"].where(m.trials["evaluated_stories"] > 0).fillna(0.0)
    general = evaluation["whole"] - story * m.trials["evaluated_stories"].fillna(0)
    of_trial = m.trials.assign(timed=timed.notna(), step=step, story=story, general=general)
    ended = of_trial[(of_trial["status"] == "ok") & of_trial["step"].notna()]
    for row in ended.sort_values(["timed", "started_at"]).to_dict("records"):
        load, *rest = (float(row[name]) for name in ("load_seconds", "step", "optimizer_steps", "story", "general"))
        costs[cost_key(m.spec(int(row["config"])))] = Cost(pilot.START_SECONDS + load, *rest)
    return costs


def predicted_costs(specs: Iterable[TrialSpec], predictions: Predictions, stories: int) -> dict[str, Cost]:
    """Costs from predicted steps, by `cost_key`, where there is a prediction.

    A story is evaluated by a forward pass, which costs this share of a step: of full fine-tuning a third (forward 2,
    backward 4 operations for each weight and token); of LoRA, whose frozen weights have no gradients, a half (2 and 2);
    with checkpointing, which repeats the forward pass, a quarter and a third.

    Args:
        specs: of the trials.
        predictions: with the device's rates.
        stories: distinct ones that can be trained on.
    """
    costs: dict[str, Cost] = {}
    for spec in specs:
        prediction = predictions.by_spec.get(spec.id)
        if prediction is None or predictions.rates is None:
            continue
        step = predicted_seconds(prediction.work, predictions.rates)
        passes = 2 + (4 if spec.adapter == FULL else 2) + 2 * spec.gradient_checkpointing
        position = step / prediction.positions
        story = 2 / passes * position * (spec.eval_sequence_length or spec.sequence_length)
        steps = len(length.step_sizes(spec, stories))
        general = spec.general_samples * story if spec.measure_forgetting else 0.0
        costs[cost_key(spec)] = Cost(pilot.START_SECONDS + pilot.LOAD_SECONDS, step, steps, story, general)
    return costs


def completed(costs: Mapping[str, Cost], specs: Iterable[TrialSpec]) -> dict[str, Cost] | None:
    """Costs of all specs: where one is unknown, the mean of the others; null where none is known."""
    keys = {cost_key(spec) for spec in specs}
    known = [costs[key] for key in keys & costs.keys()]
    if not known:
        return None
    names = ("start", "step", "steps", "story", "general")
    mean = Cost(*(sum(getattr(cost, name) for cost in known) / len(known) for name in names))
    return {key: costs.get(key, mean) for key in keys}


# ------------------------------------------------------------------------------------ choice


@dataclass(frozen=True)
class Size:
    """A size of a grid."""

    visits: int
    repeats: int
    stories: int
    seconds: float
    """That it takes."""
    speed: float
    """Smallest detectable difference, as a share; nan: no speed is measured."""
    loss: float
    """The same in nats; nan: no loss is measured."""

    def describe(self, budget: float) -> str:
        """30 min: 4 visits, 2 repeats, 64 stories: speed 2.1%, loss 0.03 nats; about 27 min."""
        counts = [(self.visits, "visit", "visits"), (self.repeats, "repeat", "repeats")]
        counts.append((self.stories, "story", "stories"))
        amounts = ", ".join(f"{n} {one if n == 1 else several}" for n, one, several in counts if n)
        speed = [] if math.isnan(self.speed) else [f"speed {words.percent(self.speed)}"]
        loss = [] if math.isnan(self.loss) else [f"loss {forecast.show_nats(self.loss)}"]
        return f"{show_time(budget)}: {amounts}: {', '.join(speed + loss)}; about {show_time(self.seconds)}"


@dataclass(frozen=True)
class Choices:
    """Sizes to choose from."""

    stories: Sequence[int]
    """Numbers of held-out stories; 0 where no losses are measured."""
    visits: Sequence[int] = field(default_factory=lambda: range(LEAST_VISITS, _MOST_VISITS + 1))
    repeats: Sequence[int] = field(default_factory=lambda: range(1, _MOST_REPEATS + 1))


def story_counts(least: int, most: int) -> list[int]:
    """Numbers of held-out stories to choose from, about a half apart; the least alone where no more are left."""
    counts = sorted(n << shift for shift in range(20) for n in (32, 48))
    return [least, *(n for n in counts if least < n < most), *([most] if most > least else [])]


def choose(budget: float, plan: Plan, variances: Variances, work: Work, choices: Choices) -> tuple[Size, bool]:
    """The size that shows most within a time, and whether it fits: if none does, the smallest.

    Most is shown where the larger of the smallest detectable differences, each divided by its negligible size, is
    least; among those that show as much, the cheapest.

    Args:
        budget: seconds.
        plan: what the grid measures.
        variances: of its measurements.
        work: what it takes.
        choices: sizes.
    """
    visits, repeats, stories = numpy.meshgrid(
        *(numpy.asarray(each, float) for each in (choices.visits, choices.repeats, choices.stories)), indexing="ij"
    )
    seconds = numpy.asarray(work.seconds(visits, repeats, stories))
    unknown = numpy.full(seconds.shape, numpy.nan)
    compared = plan.configurations > 1
    speed = loss = unknown
    if plan.visits and compared:
        of_visits = forecast.smallest_speed_difference(plan, variances.reading, visits[:, :1, :1])
        speed = numpy.broadcast_to(of_visits, seconds.shape)
    if plan.stories and compared:
        of_losses = forecast.smallest_loss_difference(plan, variances, stories[:1], repeats[:1])
        loss = numpy.broadcast_to(of_losses, seconds.shape)
    score = forecast.ratio_to_negligible(speed, loss)
    fits = seconds <= budget
    score = numpy.where(fits, score, numpy.inf)
    best = numpy.lexsort((seconds.ravel(), score.ravel().round(9)))[0]
    index = numpy.unravel_index(best, seconds.shape)
    size = Size(
        visits=int(visits[index]),
        repeats=int(repeats[index]),
        stories=int(stories[index]),
        seconds=float(seconds[index]),
        speed=float(speed[index]),
        loss=float(loss[index]),
    )
    return size, bool(fits[index])


def show_time(seconds: float) -> str:
    """90 s, 27 min, 1.5 h: rounded up, as it takes at least so long."""
    if seconds <= 99:
        return f"{math.ceil(seconds)} s"
    if seconds <= 99 * 60:
        return f"{math.ceil(seconds / 60)} min"
    return f"{math.ceil(seconds / 360) / 10:g} h"
