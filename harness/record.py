"""Job and record of a trial: what a worker is asked, and how it ended, with steps and losses. Frozen."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from harness import metrics
from harness.environment import Environment
from harness.spec.datasets import Facts
from harness.spec.trial import TrialSpec

Status = Literal["ok", "oom", "diverged", "did_not_train", "timeout", "killed", "failed", "skipped"]
Phase = Literal["start", "load", "evaluate", "forward", "backward", "optimizer", "save"]
Model = Literal["base", "unmerged", "merged"]
"""Models of the inference benchmark: the base, the base with its adapter, and the two merged."""
TIMED_FIGURES = (
    "tokens_per_second",
    "supervised_tokens_per_second",
    "padded_tokens_per_second",
    "samples_per_second",
    "step_seconds_median",
    "step_seconds_p95",
)
"""Figures of timed steps alone."""
DISK_FULL = "DiskFull"
"""Error type of a trial whose disk was full: not its own fault, so it may be run again."""


@dataclass(frozen=True)
class Contents:
    """What the names of a spec stand for: fingerprints of its data and its base, 12 hex digits each; null: unknown."""

    data: str | None = None
    base: str | None = None

    @property
    def key(self) -> str:
        """8 hex digits of both, empty where both are unknown."""
        if self == NO_CONTENTS:
            return ""
        return hashlib.sha256(f"{self.data}-{self.base}".encode()).hexdigest()[:8]

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Contents:
        """Those of a row of the trials table."""
        return cls(row["data_fingerprint"], row["base_fingerprint"])

    @property
    def columns(self) -> dict[str, str | None]:
        """The fields of a job that hold them."""
        return {"data_fingerprint": self.data, "base_fingerprint": self.base}

    def changed(self, before: Contents, spec: TrialSpec) -> list[str]:
        """Names of a spec behind which something else was before."""
        names = [spec.dataset_paths] if self.data != before.data else []
        return names + [spec.base_model] * (self.base != before.base)


WATCHED = " (watched)"
"""What the label of a watched loop ends with, after the name that it was given."""
NO_CONTENTS = Contents()
"""Of trials from before contents were fingerprinted."""


class Row(BaseModel):
    """A frozen model of which a table holds the fields as columns."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Step(Row):
    """One optimizer step."""

    step: int
    """From 1."""
    tracked: bool
    """Whether memory was tracked. Tracked steps are not timed, and timed steps are not tracked."""
    seconds: float
    """Wall time, including the tracker's overhead in tracked steps."""
    loss: float | None
    """Nats per supervised token before this step's update; null where a watched loop computes its own."""
    auxiliary_loss: float | None = None
    """Of the model's own, at its weight, which is added to the loss; null where it has none."""
    grad_norm: float | None
    """Before clipping; null where no scale of the loss made it finite in fp16, and there was no update."""
    learning_rate: float
    """During this step."""
    samples: int
    """Examples."""
    tokens: int
    """Non-padding tokens."""
    supervised_tokens: int
    """Tokens that carry loss."""
    padded_tokens: int
    """All positions."""
    peak_memory_bytes: int | None
    """Highest live memory of the step, where it was tracked."""
    block: int | None = None
    """Block of timing visits in which it was timed, see `Visit`; null: a step of training."""
    waited_seconds: float | None = None
    """How long its threads waited for a processor, added up, and the machine for its host; null: not known."""
    reference_seconds: float | None = None
    """Seconds of the baseline's step that was taken in turn with it, see `Visit`; null: none was."""
    disturbed: Annotated[bool, Facts(absent=False)] = False
    """Whether the machine worked for others meanwhile, or in the baseline's step: a timed step that does not count for
    speed."""


class StoryLoss(Row):
    """Loss of one held-out story or general passage."""

    story_id: str
    """Hash of its texts."""
    when: Literal["before", "after"]
    """Before or after training."""
    loss: float
    """Nats per completion token."""
    tokens: int
    """Completion tokens."""
    kind: Annotated[Literal["held-out", "general"], Facts(absent="held-out")] = "held-out"
    """A story of the dataset, or a passage of the bundled general text."""


class ItemScore(Row):
    """One question of a task."""

    task: str
    """Name of the task."""
    item: int
    """Number of the question in the task's file, from 0."""
    when: Literal["before", "after"]
    """Before or after training."""
    metric: str
    """What the score is, by lm-evaluation-harness's name, like acc."""
    score: float
    """1 for a right answer, 0 for a wrong one."""


class LossesBefore(Row):
    """Losses of an untrained model that another trial of the same contents has measured."""

    stories: tuple[StoryLoss, ...]
    """Its losses before training."""
    tasks: tuple[ItemScore, ...] = ()
    """Its scores before training."""


class ModelFootprint(Row):
    """Memory of a model in the inference benchmark, and its deviation from the unmerged one."""

    model: Model
    """Which of the three."""
    precision: str
    """Of its base weights; a base quantised for training is merged in 16 bit."""
    model_bytes: int
    """See `metrics.INFERENCE`."""
    peak_inference_bytes: int
    """As above."""
    logit_difference: float | None = None
    """As above; null but for the merged model."""


class Request(Row):
    """One timed request of the inference benchmark."""

    model: Model
    """Which of the three."""
    round: int
    """From 0. Each round loads every model again and sends the same requests."""
    story_id: str
    """Story whose prompt was sent."""
    prompt_tokens: int
    """Tokens in the prompt."""
    prefill_seconds: float
    """Seconds until the first new token."""
    token_seconds: tuple[float, ...]
    """Seconds of each new token after the first."""


class Answer(Row):
    """Loss of a model on a held-out story, and the story that it generated for the same prompt."""

    model: Model
    """Which of the three."""
    story_id: str
    """Hash of the story's texts."""
    loss: float
    """Nats per completion token."""
    tokens: int
    """Completion tokens."""
    synopsis: str | None = None
    """The prompt, where a story was generated."""
    reference: str | None = None
    """The held-out story."""
    story: str | None = None
    """The generated story."""
    rouge_l: float | None = None
    """See `metrics.INFERENCE`."""
    distinct_2: float | None = None
    """As above."""
    repetition: float | None = None
    """As above."""
    words: float | None = None
    """As above."""


class InferenceRecord(Row):
    """Results of the inference benchmark of one trained adapter."""

    environment: Environment
    """Where it ran."""
    models: tuple[ModelFootprint, ...]
    """One row per model."""
    requests: tuple[Request, ...]
    """Timed requests."""
    answers: tuple[Answer, ...]
    """One row per model and held-out story; none for random weights."""


class Visit(Row):
    """A short visit to time steps of a trial's configuration: load, warm up, time; no training, no evaluation."""

    block: int
    """Unix time at which its block began: the visits of a block follow each other in random order."""
    seconds: Annotated[float, Field(gt=0)] = 4.0
    """Least seconds of undisturbed steps; with a reference, of half of both's."""
    reference: TrialSpec | None = None
    """The baseline, whose steps are taken in turn with the trial's: what slows the machine for a while slows both, and
    their ratio is left. Null: the trial's alone."""


class Job(Row):
    """What a worker executes: a spec, and the trial's place in its grid."""

    grid: str
    """Name of the grid."""
    spec: TrialSpec
    """Spec to execute."""
    label: str
    """The trial's name in its grid."""
    factor: str | None = None
    """Factor that sets it apart from the baseline."""
    level: str | None = None
    """That factor's level."""
    repeat: int = 0
    """Repeat number."""
    baseline_id: str | None = None
    """Id of the spec that it is compared with; its own for a baseline."""
    twin: bool = False
    """Whether it is the second run of the baseline (A/A)."""
    study: str | None = None
    """Name of the search that proposed it."""
    study_trial: int | None = None
    """Its number there."""
    visit: Visit | None = None
    """Time steps in a visit instead of training."""
    data_fingerprint: Annotated[str | None, Facts(absent=None)] = None
    """Of the rows that it reads, see `sources.fingerprints`; null: they are read as they are."""
    base_fingerprint: Annotated[str | None, Facts(absent=None)] = None
    """Of its base model."""
    watched: Annotated[bool, Facts(absent=False)] = False
    """Whether it is somebody's own training loop that was watched, see `harness.watch`; its label ends with
    `WATCHED`."""
    unseen: tuple[str, ...] = ()
    """Keys of a watched loop's spec that nobody gave and that could not be seen: null in its row."""

    @property
    def contents(self) -> Contents:
        """Both fingerprints."""
        return Contents(self.data_fingerprint, self.base_fingerprint)


class Record(Job):
    """How one trial ended and what was measured: exactly one per trial."""

    environment: Environment
    """Where it ran."""
    status: Status
    """How it ended."""
    phase: Phase | None = None
    """Where it failed."""
    error_type: str | None = None
    """Class of the error."""
    error: str | None = None
    """Its first line."""
    started_at: dt.datetime
    """UTC."""
    metrics: dict[str, float | int | None] = {}
    """Figures by metric name; missing ones are null."""
    steps: tuple[Step, ...] = ()
    """Optimizer steps."""
    stories: tuple[StoryLoss, ...] = ()
    """Losses of held-out stories and general passages."""
    tasks: tuple[ItemScore, ...] = ()
    """Scores of questions."""
    adapter_id: str | None = None
    """Hash of the saved adapter's weights and configuration: the name of its folder under `adapters/`."""
    attention_kernel: str | None = None
    """Attention kernel that the model used."""
    base_formats: dict[str, float] | None = None
    """Part of the base weights' bytes in each format: a quantiser skips layers."""
    attempt: Annotated[int, Facts(absent=1)] = 1
    """From 1. The workers of earlier attempts were lost."""
    node: str | None = None
    """Machine of a cluster on which it ran; null: the runner's own."""
    disturbed: Annotated[bool, Facts(absent=False)] = False
    """Whether too few of its timed steps, or of its visits, were undisturbed: it has no speeds then."""
    log: str | None = None
    """File of its output within the results folder; null where it ended well."""

    @field_validator("metrics")
    @classmethod
    def _known_and_finite(cls, values: dict[str, float | int | None]) -> dict[str, float | int | None]:
        return {name: metrics.check(name, value) for name, value in values.items()}

    @model_validator(mode="after")
    def _status_agrees(self) -> Record:
        if self.status == "ok" and (self.phase or self.error or self.error_type):
            raise ValueError("an ok record has no phase and no error")
        if self.status != "ok":
            scores = [n for n, v in self.metrics.items() if n in metrics.SCORES and v is not None]
            if scores:
                raise ValueError(f"a {self.status} record carries no scores, and has {', '.join(scores)}")
        return self

    @classmethod
    def of(cls, job: Job, **outcome: Any) -> Record:
        """The record of a job."""
        return cls(**{name: getattr(job, name) for name in Job.model_fields}, **outcome)

    @property
    def trial_id(self) -> str:
        """Id of spec, environment and contents: the same trial on the same machine has the same id."""
        name = trial_id(self.spec, self.environment, self.contents, twin=self.twin)
        if not self.watched:
            return name
        which = f"{self.label}#{self.repeat}" if self.repeat else self.label  # its seed is not seen
        return f"{name}-watched-{hashlib.sha256(which.encode()).hexdigest()[:8]}"


def trial_id(spec: TrialSpec, environment: Environment, contents: Contents = NO_CONTENTS, *, twin: bool = False) -> str:
    """Identity of a trial: `<spec id>-<environment id>`, `-<key>` of its contents where they are known, and `-twin`
    where it is the baseline's second run.
    """
    return "-".join(filter(None, (spec.id, environment.id, contents.key, "twin" * twin)))


class TunedRate(BaseModel):
    """What was found for one configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    label: str
    """Of the configuration."""
    key: str
    """Id of its spec before, with seed 0."""
    losses: dict[str, float | None]
    """Loss on the stories to tune on, by rate as text; null: that training did not end well."""
    rate: float
    """The one with the lowest loss; its own where none ended well."""
    trials: int
    """Trainings that it took."""
    seconds: float
    """Seconds of these."""

    @property
    def at_edge(self) -> bool:
        """Whether it is the lowest or the highest that was tried: a better one may lie beyond."""
        rates = [float(rate) for rate in self.losses]
        return self.rate in (min(rates), max(rates))


class Tuned(BaseModel):
    """What was found for all, and what it took."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rates: tuple[TunedRate, ...]
    """By configuration."""
    results: str
    """Name of the grid whose results they are."""

    @property
    def trials(self) -> int:
        """Trainings that it took."""
        return sum(each.trials for each in self.rates)

    @property
    def seconds(self) -> float:
        """Seconds of all of them."""
        return sum(each.seconds for each in self.rates)

    def joined(self, before: Tuned | None, labels: Collection[str]) -> Tuned:
        """With the configurations of an earlier run that this one leaves out.

        Args:
            before: what that found; null: there was none.
            labels: of the configurations that there are.
        """
        left = {*labels} - {each.label for each in self.rates}
        others = [each for each in (() if before is None else before.rates) if each.label in left]
        return self.model_copy(update={"rates": (*self.rates, *others)})
