"""Recorded losses of untrained models, so that they are measured once for each base, format and data."""

from __future__ import annotations

import threading
from typing import Any

import pyarrow.compute as pc

from harness.environment import resolve_device
from harness.launch.launcher import Launcher
from harness.record import NO_CONTENTS, Contents, ItemScore, Job, LossesBefore, Record, StoryLoss
from harness.results.schema import parse_spec
from harness.results.store import Store
from harness.spec.trial import TrialSpec

_Key = tuple[str, str, Contents]
"""Environment id, `untrained_key` and what is behind its names."""
_LOSSES = ("eval_loss_before", "general_loss_before", "task_score_before")
_FINGERPRINTS = ("data_fingerprint", "base_fingerprint")
_COLUMNS = [
    "trial_id", "environment_id", "status", "started_at", *_FINGERPRINTS, *_LOSSES, *TrialSpec.model_fields
]  # fmt: skip


class RecordedLosses:
    """Losses before training of trials that ended well: the latest of each untrained model in each environment.

    The store is read once, when first asked; `add` what is recorded after that. Workers may share it.
    """

    def __init__(self) -> None:
        self._latest: dict[_Key, LossesBefore] | None = None
        self._lock = threading.Lock()

    def of(self, job: Job, store: Store, launcher: Launcher) -> dict[str, dict[str, Any]]:
        """Those of the job's untrained model as `launch.launcher.WorkerOptions` holds them: plain JSON, by the id of
        each environment that the launcher may run it in. None where nobody knows what is behind the job's names.
        """
        if job.contents == NO_CONTENTS:
            return {}
        environments = launcher.environments(resolve_device(job.spec.device))
        with self._lock:
            if self._latest is None:
                self._latest = _read(store)
            keys = {each.id: (each.id, job.spec.untrained_key, job.contents) for each in environments}
            known = {name: self._latest.get(key) for name, key in keys.items()}
        return {name: losses.model_dump(mode="json") for name, losses in known.items() if losses is not None}

    def add(self, record: Record) -> None:
        """Take over the losses of a trial that was recorded just now."""
        before = tuple(story for story in record.stories if story.when == "before")
        scores = tuple(item for item in record.tasks if item.when == "before")
        with self._lock:
            if self._latest is not None and record.status == "ok" and (before or scores):
                key = (record.environment.id, record.spec.untrained_key, record.contents)
                self._latest[key] = LossesBefore(stories=before, tasks=scores)


def _read(store: Store) -> dict[_Key, LossesBefore]:
    measured = pc.field(_LOSSES[0]).is_valid() | pc.field(_LOSSES[1]).is_valid() | pc.field(_LOSSES[2]).is_valid()
    rows = store.read("trials", _COLUMNS).filter((pc.field("status") == "ok") & measured).to_pylist()
    trials: dict[_Key, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["started_at"]):
        spec = parse_spec({name: row[name] for name in TrialSpec.model_fields})
        contents = Contents.of_row(row)
        trials[row["environment_id"], spec.untrained_key, contents] = row
    if not trials:
        return {}
    stories: dict[str, list[StoryLoss]] = {row["trial_id"]: [] for row in trials.values()}
    scores: dict[str, list[ItemScore]] = {trial: [] for trial in stories}
    wanted = pc.field("trial_id").isin([*stories]) & (pc.field("when") == "before")
    for story in store.read("stories").filter(wanted).to_pylist():
        stories[story.pop("trial_id")].append(StoryLoss(**story))
    for item in store.read("tasks").filter(wanted).to_pylist():
        scores[item.pop("trial_id")].append(ItemScore(**item))
    by_trial = {name: LossesBefore(stories=tuple(stories[name]), tasks=tuple(scores[name])) for name in stories}
    return {key: by_trial[row["trial_id"]] for key, row in trials.items()}
