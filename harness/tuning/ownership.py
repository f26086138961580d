"""Ownership of the trials of a study by processes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import TrialState

from harness._util.processes import ProcessIdentity
from harness.results.store import Store

AGAIN = "again"
"""Attribute of a trial that is queued because its row was lost."""
ROWS = "rows"
"""Attribute of a trial: the labels of its rows, by trial id."""


def proposed_count(study: optuna.Study) -> int:
    """Number of trials proposed by the study, without those of the warm start, given back, or waiting."""
    given_back = study.user_attrs
    return sum(
        "source" not in t.user_attrs
        and t.state is not TrialState.WAITING
        and f"given back {t.number}" not in given_back
        for t in study.get_trials(deepcopy=False)
    )


def this_process() -> dict[str, Any]:
    """The attribute `owner` of the trials that this process runs."""
    return ProcessIdentity.current().model_dump()


def is_gone(owner: Mapping[str, Any] | None) -> bool:
    """Whether the process that owns a trial has ended; one on another machine counts as running."""
    if owner is None:
        return True  # it died between asking for the trial and marking it
    started = owner["started"] if "started" in owner else owner["since"]  # studies of the first versions
    return ProcessIdentity(host=owner["host"], pid=owner["pid"], started=started).is_alive() is False


def give_back_abandoned(study: optuna.Study) -> None:
    """Give back the trials of processes that have ended; a row that was recorded is used when it is proposed again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_gone(trial.user_attrs.get("owner")):
            give_back(study, trial.number, trial.params, trial.user_attrs.get("label"))


def give_back_lost(study: optuna.Study, store: Store) -> int:
    """Queue the parameters of finished trials whose rows are lost, as when their file was damaged; returns how many.

    A study that is kept apart may have rows in other folders too: there, what was set aside shows that some were lost.
    """
    if not any((store.folder / name).exists() for name in ("study.db", "set-aside")):
        return 0
    finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and "trial_id" in t.user_attrs]
    given_back = study.user_attrs
    recorded = store.completed()  # read last: a trial of another process has its row before it has finished
    lost = [
        t for t in finished if t.user_attrs["trial_id"] not in recorded and f"given back {t.number}" not in given_back
    ]
    for trial in lost:
        study.set_user_attr(f"given back {trial.number}", True)
        label = {"label": "baseline"} if trial.user_attrs.get("label") == "baseline" else {}
        study.enqueue_trial(dict(trial.params), user_attrs={AGAIN: True, **label})
    return len(lost)


def claim(study: optuna.Study, store: Store, baseline_id: str) -> None:
    """Make the rows of a study its own again, of which another one in the same folder has used some since.

    Args:
        study: whose trials are told apart by the row's number and label.
        store: of the rows.
        baseline_id: id of the search's base.
    """
    places: dict[str, dict[str, Any]] = {}
    for trial in study.get_trials(deepcopy=False):
        about = trial.user_attrs
        latest = {about["trial_id"]: about["label"]} if "trial_id" in about else {}  # all that older studies have
        for trial_id, label in about.get(ROWS, latest).items():
            place = {"study": study.study_name, "study_trial": trial.number, "label": label, "baseline_id": baseline_id}
            places.setdefault(trial_id, place)
    taken = [row for row in store.read("trials", ["trial_id", "study"]).to_pylist() if row["study"] != study.study_name]
    store.rename({row["trial_id"]: places[row["trial_id"]] for row in taken if row["trial_id"] in places})


def give_back(study: optuna.Study, number: int, params: Mapping[str, Any], label: str | None = None) -> None:
    """End a trial without a score, and queue its parameters to be proposed again."""
    with contextlib.suppress(ValueError):  # it has finished
        study.set_user_attr(f"given back {number}", True)
        study.tell(number, state=TrialState.FAIL)
        if params:
            study.enqueue_trial(dict(params), user_attrs={"label": label} if label == "baseline" else None)
