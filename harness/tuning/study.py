"""The search loop: Optuna proposes a trial, the launcher runs it, its score goes back to Optuna."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pyarrow.compute as pc
from filelock import FileLock
from optuna.trial import TrialState

from harness._util.units import counted, show_bytes
from harness.environment import Placement, resolve_device
from harness.errors import InputError, TrialsFailed
from harness.grids.grid import Grid, Trial
from harness.grids.search import Score, Search, Untrainable
from harness.launch.launcher import Launcher
from harness.metrics import METRICS
from harness.predict.prediction import NO_PREDICTIONS, Predictions
from harness.predict.predictor import Predictor
from harness.predict.roofline import Rates
from harness.record import Contents, Job, Visit, trial_id
from harness.results.schema import spec_of
from harness.results.store import Store
from harness.runner.display import Display
from harness.runner.execution import ExecutionContext, Policy, execute, visit
from harness.runner.grid_run import kept_apart, run_grid, unfinished
from harness.runner.interrupts import interrupts
from harness.runner.loss_before import RecordedLosses
from harness.runner.workers import run_workers
from harness.sources.fingerprints import Snapshot
from harness.spec.trial import TrialSpec
from harness.tuning.finalists import confirmation
from harness.tuning.ownership import (
    AGAIN,
    ROWS,
    claim,
    give_back,
    give_back_abandoned,
    give_back_lost,
    proposed_count,
    this_process,
)
from harness.tuning.samplers import (
    STORAGE_ERRORS,
    fallback_value,
    open_storage,
    open_study,
    sampler,
    storage_errors,
    suggest,
)
from harness.tuning.warm_start import WarmStart

_LEAST_INFEASIBLE = 12
"""Trials after which a search without any feasible one is given up."""
_MOST_VISITS = 3
"""Timing visits of a trial of the search, of which one should be undisturbed."""
_EXHAUSTED = "exhausted"
"""Attribute of a study whose space has nothing more to try."""
_MOST_KNOWN = 50
"""Proposals in a row that were already measured, after which the space counts as exhausted."""


@dataclass(frozen=True)
class Outcome:
    """The state of a study after a call of `tune`."""

    study: str
    """Name of the study."""
    tried: int
    """Trials of the study by all processes, without those of the warm start."""
    left: int
    """Trials of the search that were not reached; once it has ended, those of the confirmation."""
    warm: int
    """Trials of the warm start."""
    visits_left: int = 0
    """Timing visits of the confirmation that were not reached."""

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C stopped it before its end."""
        return bool(self.left or self.visits_left)


@dataclass(frozen=True)
class Options:
    """How a search is run, which is not part of the study's identity."""

    storage: optuna.storages.BaseStorage | None = None
    """Storage of the study; null: an SQLite file in the results folder."""
    sources: tuple[Path, ...] = ()
    """Results folders for a warm start."""
    policy: Policy = field(default_factory=lambda: Policy(skip_infeasible=True))
    """How each trial is run."""
    predictor: Predictor | None = None
    """Predicts each trial's peak; trials over the budget are not started. Null: no predictions."""
    rates: Rates | None = None
    """Measured rates of the device; null: unknown."""


def tune(
    search: Search,
    store: Store,
    launcher: Launcher,
    display: Display,
    options: Options = Options(),
    on_message: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Search until the trials or the time are used up, then confirm the winner in fresh repeats.

    Each trial is one row; a recorded spec is not run again. Several processes may work on one study. An interrupt
    lets the running trial finish; a second one stops it, and its proposal is queued again.

    Args:
        search: space, objectives and constraints.
        store: where rows are kept.
        launcher: runs each trial.
        display: shows each trial.
        options: storage, warm start and execution.
        on_message: called with each message for the user, one line.

    Raises:
        InputError: no trial is within the bounds, or the study cannot be opened.
        TrialsFailed: none ended well.
        OSError: a record or the study cannot be kept.
        KeyboardInterrupt: interrupted twice.
    """
    with warnings.catch_warnings(), storage_errors(store.folder):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        process = _StudyProcess(search, store, launcher, display, options, on_message)
        left, visits_left = process.optimize(), 0
        if not left:
            left, visits_left = process.confirm()
        return process.outcome(left, visits_left)


class _StudyProcess:
    """One process that works on a study."""

    def __init__(
        self,
        search: Search,
        store: Store,
        launcher: Launcher,
        display: Display,
        options: Options,
        on_message: Callable[[str], None],
    ) -> None:
        self.search, self.store, self.launcher, self.display = search, store, launcher, display
        self.options, self.on_message = options, on_message
        self.here = launcher.environments(resolve_device(search.base.device))[0]
        self.started = time.monotonic()
        self.numbers = itertools.count(1)
        self.losses_before = RecordedLosses()
        self.lock = threading.RLock()
        """Held by a worker while it uses the study or the predictor."""
        self.known_in_a_row = 0
        self.best: float | None = None
        self.snapshot = Snapshot()
        self.read = tuple(Trial(spec, "", None, None, contents=self.snapshot.of(spec)) for spec in search.reading)
        self.sampler = sampler(search)
        # One process at a time recovers abandoned trials and queues the first ones.
        with FileLock(store.folder / ".study.lock"):
            self.study = self._open()
            give_back_abandoned(self.study)
            if lost := give_back_lost(self.study, store):
                on_message(f"rows of the study that were lost are measured again: {counted(lost, 'trial')}")
            if "begun" not in self.study.user_attrs:
                self._begin()
                self.study.set_user_attr("begun", True)
            else:
                claim(self.study, store, search.base.id)
                if options.sources:
                    on_message("this study has begun: --from is read at the beginning of one; nothing is added to it")
        about = {**search.given, "study": self.study.study_name}
        self.described = Grid(
            search.name, search.title, "list", self.read, tune=about, training_file=search.training_file
        )
        store.describe(self.described.about)
        self.recorded = {row["trial_id"]: row for row in store.read("trials").to_pylist()}

    def _open(self) -> optuna.Study:
        name = study_name(self.search, self.here.id, [trial.contents for trial in self.read])
        storage = self.options.storage or open_storage(None, self.store)
        return open_study(name, self.search, storage, self.sampler)

    def _begin(self) -> None:
        """Queue the base as the first trial, then add the trials of the warm start."""
        place = self.search.place(self.search.base)
        if place is None:
            self.on_message("base is no point of the space; it is measured for the comparison, outside the study")
        else:
            self.study.enqueue_trial(place, user_attrs={"label": "baseline"})
        for line in kept_apart(self._recorded_in_space(), self.store, self.launcher):
            self.on_message(line)
        warm_start = WarmStart(self.study, self.search, self.store, self.here, self.snapshot.of)
        for source in self.options.sources:
            self.on_message(warm_start.add(source))

    def _recorded_in_space(self) -> list[Trial]:
        """The trials that are recorded of this space, as they would be measured now."""
        rows = self.store.read("trials").filter(~pc.field("twin")).to_pylist()
        specs = [spec_of(row).model_copy(update={"folder": self.search.base.folder}) for row in rows]
        in_space = {spec.id: spec for spec in specs if self.search.place(spec) is not None}
        return [Trial(spec, "", None, None, contents=self.snapshot.of(spec)) for spec in in_space.values()]

    # -------------------------------------------------------------------------------- loop

    def optimize(self) -> int:
        """Run proposals until the search ends; how many are left where it was interrupted before."""
        self.display.begin(self._left(), 0)
        with interrupts(self.display.interrupted) as self.interrupt:
            run_workers(self.launcher, self.here.device_type, self.display, self._run_worker)
            if self.interrupt.asked and self._continues():
                return self._left()
        self._check_feasible(least=1)
        return 0

    def _run_worker(self, display: Display, placement: Placement | None, has_failed: Callable[[], bool]) -> None:
        """Run one proposal after another."""
        while not (has_failed() or self.interrupt.asked):
            with self.lock:
                if not self._continues():
                    return
                trial = self.study.ask()
            context = ExecutionContext(
                self.store,
                self.launcher,
                display,
                self.options.policy,
                placement=placement,
                interrupt=self.interrupt,
                losses_before=self.losses_before,
            )
            self._run_proposal(trial, next(self.numbers), context)

    def _continues(self) -> bool:
        exhausted = self.known_in_a_row >= _MOST_KNOWN or getattr(self.sampler, "exhausted", False)
        if exhausted:
            self.study.set_user_attr(_EXHAUSTED, True)
        if self._left() == 0:
            return False
        if self.search.timeout is not None and time.monotonic() - self.started > self.search.timeout:
            self.on_message(f"the {self.search.timeout:g} s of the search are over")
            return False
        self._check_feasible(least=_LEAST_INFEASIBLE)
        return True

    def _left(self) -> int:
        queued = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))  # of a process that was stopped
        if self.study.user_attrs.get(_EXHAUSTED) and not queued:
            return 0
        return max(0, self.search.trials - proposed_count(self.study))

    def _check_feasible(self, least: int) -> None:
        """Raise where at least this number of trials has finished and none is within the bounds."""
        finished = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        scored = [t for t in finished if t.state is not TrialState.FAIL]
        if len(finished) < least or self._has_feasible():
            return
        if not scored:
            ends = ", ".join(sorted({t.user_attrs.get("status", "stopped") for t in finished}))
            raise TrialsFailed(
                f"{self.search.name}: none of {len(finished)} trials ended well ({ends}); "
                f"look at harness ls {self.search.name}"
            )
        nearest = min(scored, key=lambda t: sum(max(0.0, v) for v in t.constraints.values()))
        name, violation = max(nearest.constraints.items(), key=lambda item: item[1])
        bound = f"{show_bytes(self.search.memory)} of memory" if name == "memory" and self.search.memory else name
        raise InputError(
            f"{self.search.name}: none of {len(scored)} trials keeps within {bound}; the nearest is "
            f"{violation:.1%} beyond it ({nearest.user_attrs.get('label', f'#{nearest.number}')}); "
            "raise the bound, or widen the space towards less"
        )

    def _has_feasible(self) -> bool:
        """Whether a whole training is within the bounds."""
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return any(all(v <= 0 for v in t.constraints.values()) for t in complete)

    def _run_proposal(self, trial: optuna.Trial, number: int, context: ExecutionContext) -> None:
        """Run a proposal and report its score; if that fails, queue the proposal again."""
        try:
            trial.set_user_attr("owner", this_process())
            try:
                with self.lock:
                    chosen, spec = self.search.walk(lambda parameter: suggest(trial, parameter))
            except Untrainable as error:  # the space is too large to be checked in advance
                self.on_message(f"#{trial.number} cannot be trained: {error}")
                self.study.tell(trial, state=TrialState.FAIL)
                return
            label = trial.user_attrs.get("label") or self.search.label(trial.number, chosen)
            trial.set_user_attr("label", label)
            self._run_rungs(trial, label, spec, number, context)
        except BaseException:
            # Where the study cannot be written either, the next process recovers the trial; the first error is shown.
            with contextlib.suppress(*STORAGE_ERRORS):
                give_back(self.study, trial.number, trial.params, trial.user_attrs.get("label"))
            raise

    def _run_rungs(
        self, trial: optuna.Trial, label: str, spec: TrialSpec, number: int, context: ExecutionContext
    ) -> None:
        """Measure a spec at each rung, the whole training last, unless it is pruned before."""
        score: Score | None = None
        for rung in self.search.rungs:
            at_rung = self.search.at_rung(spec, rung)
            whole = rung == self.search.rungs[-1]
            row_label = label if whole else f"{label} (rung {rung})"
            row = self._measure(trial, row_label, at_rung, number, context)
            trial.set_user_attr("status", "disturbed" if row.get("disturbed") else row["status"])
            trial.set_user_attr("trial_id", row["trial_id"])
            trial.set_user_attr(ROWS, trial.user_attrs.get(ROWS, {}) | {row["trial_id"]: row_label})
            score = self.search.score(row["status"], {name: row.get(name) for name in METRICS})
            if score is None or not score.fits or whole:  # other bounds are of the whole training
                break
            value = score.values[0]
            if value is not None:
                trial.report(value, rung)
                if trial.should_prune() and self._has_feasible():  # by the objective alone, whatever the bounds
                    self.study.tell(trial, state=TrialState.PRUNED)
                    return
        self._report_to_study(trial, score, label)

    def _measure(
        self, trial: optuna.Trial, label: str, spec: TrialSpec, number: int, context: ExecutionContext
    ) -> Mapping[str, Any]:
        """The row of a spec: the recorded one, or a new measurement."""
        contents = self.snapshot.of(spec)
        job = Job(
            grid=self.search.name,
            spec=spec,
            label=label,
            baseline_id=self.search.base.id,
            study=self.study.study_name,
            study_trial=trial.number,
            **contents.columns,
        )
        identity = trial_id(spec, self.here, contents)
        if AGAIN in trial.user_attrs and identity not in self.store.completed():
            known = None  # this process may have read it before it was lost
        else:
            known = self.recorded.get(identity) or self.store.recent_row(identity)  # the second: by another process
        if known is not None:
            self.known_in_a_row += 1
            if known["study"] != self.study.study_name:
                place = {"study": self.study.study_name, "study_trial": trial.number, "label": label}
                self.store.rename({known["trial_id"]: place | {"baseline_id": self.search.base.id}})
            timed = known.get("timed_visits") or known.get("disturbed")
            if self.search.timing.visits and known["status"] == "ok" and not timed:
                known = {**known, **self._time(job, context)}  # it was stopped between its training and its visit
                self.recorded[identity] = known
            return known
        self.known_in_a_row = 0
        context.display.trial(number, job)
        context = dataclasses.replace(context, predictions=self._predictions([spec]))
        record = execute(job, context)
        row = {"trial_id": record.trial_id, "status": record.status, "study": record.study, **record.metrics}
        if record.status == "ok" and self.search.timing.visits:
            row |= self._time(job, context)
        self.recorded[record.trial_id] = row
        return row

    def _time(self, job: Job, context: ExecutionContext) -> Mapping[str, Any]:
        """The row of a trial after a timing visit; a disturbed one is repeated."""
        row: Mapping[str, Any] = {}
        for _ in range(_MOST_VISITS):
            timing = Visit(block=time.time_ns() // 1000, seconds=self.search.timing.seconds)
            record, changed = visit(job.model_copy(update={"visit": timing}), context, wanted=1)
            row = changed or row
            if not record.disturbed:
                break
        return row

    def _predictions(self, specs: Sequence[TrialSpec]) -> Predictions:
        if self.options.predictor is None:
            return NO_PREDICTIONS
        with self.lock:
            return Predictions.of(self.options.predictor.predict(specs), self.options.rates)

    def _report_to_study(self, trial: optuna.Trial, score: Score | None, label: str) -> None:
        with self.lock:
            if score is None:
                self.study.tell(trial, state=TrialState.FAIL)
                return
            for name, violation in score.violations.items():
                trial.set_constraint(name, violation)
            values = [
                fallback_value(self.study, self.search, k) if v is None else v for k, v in enumerate(score.values)
            ]
            self.study.tell(trial, values)
            if score.feasible and (self.best is None or self.search.better(values[0], self.best)):
                self.best = values[0]
                objective = METRICS[self.search.objectives[0].metric]
                self.on_message(f"best {objective.label} so far: {objective.show(values[0])} ({label})")

    def confirm(self) -> tuple[int, int]:
        """Run the winner, its rivals and the baseline in repeats under fresh seeds.

        The winner was chosen by its figures, which are therefore biased; those of fresh seeds are not.

        Returns:
            How many trials and timing visits are left where it was interrupted before the end.
        """
        rows = self.store.read("trials").to_pylist()
        grid = confirmation(self.search, rows, self.described, self.snapshot.of)
        if self.interrupt.asked:  # amid the last trial of the search
            return unfinished(grid, self.store, self.launcher)
        summary = run_grid(
            grid,
            self.store,
            self.launcher,
            self.display,
            dataclasses.replace(self.options.policy, skip_infeasible=False),  # they were measured before
            predictions=self._predictions([trial.spec for trial in grid.trials]),
        )
        return (summary.left, summary.visits_left) if summary.interrupted else (0, 0)

    def outcome(self, left: int, visits_left: int) -> Outcome:
        """The present state of the study."""
        trials = self.study.get_trials(deepcopy=False)
        running = any(t.state is TrialState.RUNNING for t in trials)
        if not running:  # other processes may be reading their parts
            self.store.compact()
        warm = sum("source" in t.user_attrs for t in trials)
        return Outcome(self.study.study_name, proposed_count(self.study), left, warm, visits_left)


def study_name(search: Search, environment_id: str, contents: Sequence[Contents] = ()) -> str:
    """The name of a study, which identifies its base, search space, environment and what its trials read."""
    kept = {key: value for key, value in search.given["tune"].items() if key not in ("trials", "timeout", "confirm")}
    about = {"base": search.base.canonical(), "tune": kept, "sampler": search.sampler, "environment": environment_id}
    if contents:
        about["contents"] = ",".join(each.key for each in contents)
    text = json.dumps(about, sort_keys=True, default=str)
    return f"{search.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
