"""Optuna asks, the launcher runs, Optuna is told; parquet remembers what was measured."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from harness import environment
from harness.errors import InputError
from harness.grid import Grid, Trial, interleave, repeat
from harness.launch import Display, Launcher, Policy, Situation, execute, interrupts, run_grid, side_by_side
from harness.launch.planner import Planner
from harness.metrics import FITS, METRICS, show_bytes
from harness.prediction import NOTHING_EXPECTED, Expected
from harness.results import Job, Store, spec_of, trial_id
from harness.roofline import Rates
from harness.search import BEFORE, Parameter, Score, Search
from harness.spec import TrialSpec
from harness.wording import one_line

PATIENCE = 12
"""So many trials that all violate a bound, and none that keeps it: nothing here fits."""

_STALE = 50
"""So many proposals in a row that were measured already: the space holds nothing new."""

_WORST_LOSS = 12.0
"""Nats, more than a uniform guess over any vocabulary: stands for a loss that was never reached."""


@dataclass(frozen=True)
class Outcome:
    """What a call of `tune` did."""

    study: str
    """Name of the study."""
    tried: int
    """Trials of the study, whoever ran them, without those that were measured before it."""
    left: int
    """Trials that were not reached."""
    warm: int
    """Trials that were measured before."""


@dataclass(frozen=True)
class Options:
    """How a search is run; none of it changes what is found."""

    storage: optuna.storages.BaseStorage | None = None
    """The study's memory; null: an SQLite file beside the rows."""
    sources: tuple[Path, ...] = ()
    """Results folders whose rows the search starts from."""
    policy: Policy = field(default_factory=lambda: Policy(skip_infeasible=True))
    """How each trial is run."""
    planner: Planner | None = None
    """Predicts each trial's peak: what is over the budget is not started. Null: nothing is predicted."""
    rates: Rates | None = None
    """Of the device, where they were measured."""


def tune(
    search: Search,
    store: Store,
    launcher: Launcher,
    display: Display,
    options: Options = Options(),
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Search until the trials or the time are used up, then let the winner meet the others in fresh repeats.

    Each trial is one row; a spec that is recorded already is not run again. Several processes may work on one
    study. An interrupt lets the running trial finish; a second one stops it and gives its place back.

    Args:
        search: what is looked for.
        store: where rows are kept.
        launcher: runs each trial.
        display: shows it.
        options: where the study is kept, and what it starts from.
        say: told what is worth a line.

    Raises:
        InputError: nothing fits within the bounds, or the study cannot be opened.
        KeyboardInterrupt: interrupted twice.
    """
    with warnings.catch_warnings(), environment.divided(options.policy.workers):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        running = _Tuning(search, store, launcher, display, options, say)
        finished = running.search_on() and running.confirm()
        return running.outcome(finished)


# ------------------------------------------------------------------------------------ the search


class _Tuning:
    """One process at work on a study."""

    def __init__(
        self,
        search: Search,
        store: Store,
        launcher: Launcher,
        display: Display,
        options: Options,
        say: Callable[[str], None],
    ) -> None:
        self.search, self.store, self.launcher, self.display = search, store, launcher, display
        self.options, self.say = options, say
        self.here = environment.current(environment.resolve_device(search.base.device))
        self.started = time.monotonic()
        self.numbers = itertools.count(1)
        self.lock = threading.RLock()
        """Workers ask, tell and predict one after another."""
        self.stale = 0
        self.best: float | None = None
        store.describe(_about(search))
        self.sampler = sampler(search)
        # One process at a time looks after what others left behind, and after the beginning.
        with FileLock(store.folder / ".study.lock"):
            self.study = self._open()
            _give_back_abandoned(self.study)
            if "begun" not in self.study.user_attrs:
                self._begin()
                self.study.set_user_attr("begun", True)
        self.recorded = {row["trial_id"]: row for row in store.read("trials").to_pylist()}

    def _open(self) -> optuna.Study:
        name = study_name(self.search, self.here.id)
        storage = self.options.storage or open_storage(None, self.store)
        directions = [objective.direction for objective in self.search.objectives]
        shared: dict[str, Any] = {
            "study_name": name,
            "storage": storage,
            "sampler": self.sampler,
            "pruner": pruner(self.search),
        }
        try:
            study = optuna.create_study(directions=directions, **shared)
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(**shared)
            self.sampler.reseed_rng()  # the same numbers again would be the same proposals again
        study.set_metric_names([objective.metric for objective in self.search.objectives])
        return study

    def _begin(self) -> None:
        """The configuration that one would take anyway comes first, then what is known already."""
        place = self.search.place(self.search.base)
        if place is None:
            self.say("base is no point of the space; it is measured for the comparison, outside the study")
        else:
            self.study.enqueue_trial(place, user_attrs={"label": "baseline"})
        for source in self.options.sources:
            _start_from(self.study, self.search, self.store, source, self.here, self.say)

    # -------------------------------------------------------------------------------- loop

    def search_on(self) -> bool:
        """Ask, run and tell. False: interrupted before the end."""
        self.display.begin(self._left(), 0)
        with interrupts(self.display.interrupted) as self.interrupt:
            side_by_side(self.options.policy.workers, self.launcher, self.here.device_type, self.display, self._work)
            if self.interrupt.asked and self._goes_on():
                return False
        self._refuse_hopeless(least=1)
        return True

    def _work(self, display: Display, seat: environment.Seat | None, has_failed: Callable[[], bool]) -> None:
        """What one worker does: one proposal after another."""
        while not (has_failed() or self.interrupt.asked):
            with self.lock:
                if not self._goes_on():
                    return
                trial = self.study.ask()
            at = Situation(self.store, self.launcher, display, self.options.policy, seat=seat, interrupt=self.interrupt)
            self._one(trial, next(self.numbers), at)

    def _goes_on(self) -> bool:
        if self._left() == 0 or self.stale >= _STALE or getattr(self.sampler, "exhausted", False):
            return False
        if self.search.timeout is not None and time.monotonic() - self.started > self.search.timeout:
            self.say(f"the {self.search.timeout:g} s of the search are over")
            return False
        self._refuse_hopeless(least=PATIENCE)
        return True

    def _left(self) -> int:
        return max(0, self.search.trials - _asked_for(self.study))

    def _refuse_hopeless(self, least: int) -> None:
        """Nothing is found where nothing fits, or nothing trains."""
        tried = [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]
        trials = [t for t in tried if t.state is not TrialState.FAIL]
        if len(tried) < least or any(all(v <= 0 for v in t.constraints.values()) for t in trials):
            return
        if not trials:
            ends = ", ".join(sorted({t.user_attrs.get("status", "stopped") for t in tried}))
            raise InputError(
                f"{self.search.name}: none of {len(tried)} trials ended well ({ends}); "
                f"look at harness ls {self.search.name}"
            )
        nearest = min(trials, key=lambda t: sum(max(0.0, v) for v in t.constraints.values()))
        broken = max(nearest.constraints.items(), key=lambda item: item[1])
        bound = (
            f"{show_bytes(self.search.memory)} of memory" if broken[0] == "memory" and self.search.memory else broken[0]
        )
        raise InputError(
            f"{self.search.name}: none of {len(trials)} trials keeps within {bound}; the nearest is "
            f"{broken[1]:.1%} beyond it ({nearest.user_attrs.get('label', f'#{nearest.number}')}); "
            "raise the bound, or widen the space towards less"
        )

    def _one(self, trial: optuna.Trial, number: int, at: Situation) -> None:
        """One proposal to its telling."""
        try:
            trial.set_user_attr("owner", _me())
            try:
                with self.lock:
                    chosen, spec = self.search.walk(lambda parameter: _suggest(trial, parameter))
            except ValueError as error:  # a space too large to be looked through beforehand
                self.say(f"#{trial.number} cannot be trained: {error}")
                self.study.tell(trial, state=TrialState.FAIL)
                return
            label = trial.user_attrs.get("label") or self.search.label(trial.number, chosen)
            trial.set_user_attr("label", label)
            self._run(trial, label, spec, number, at)
        except BaseException:
            _give_back(self.study, trial.number, trial.params, trial.user_attrs.get("label"))
            raise

    def _run(self, trial: optuna.Trial, label: str, spec: TrialSpec, number: int, at: Situation) -> None:
        score: Score | None = None
        for rung in self.search.rungs:
            at_rung = self.search.at_rung(spec, rung)
            whole = rung == self.search.rungs[-1]
            row = self._measure(trial, label if whole else f"{label} (rung {rung})", at_rung, number, at)
            trial.set_user_attr("status", row["status"])
            trial.set_user_attr("trial_id", row["trial_id"])
            score = self.search.score(row["status"], {name: row.get(name) for name in METRICS})
            if score is None or not score.feasible or whole:
                break
            value = score.values[0]
            if value is not None:
                trial.report(value, rung)
                if trial.should_prune():
                    self.study.tell(trial, state=TrialState.PRUNED)
                    return
        self._tell(trial, score, label)

    def _measure(
        self, trial: optuna.Trial, label: str, spec: TrialSpec, number: int, at: Situation
    ) -> Mapping[str, Any]:
        """The row of a spec, recorded before or measured now."""
        identity = trial_id(spec, self.here)
        known = self.recorded.get(identity) or self.store.part(identity)  # the latter: by another process
        if known is not None:
            self.stale += 1
            if known["study"] != self.study.study_name:
                place = {"study": self.study.study_name, "study_trial": trial.number, "label": label}
                self.store.rename({known["trial_id"]: place | {"baseline_id": self.search.base.id}})
            return known
        self.stale = 0
        job = Job(
            grid=self.search.name,
            spec=spec,
            label=label,
            baseline_id=self.search.base.id,
            study=self.study.study_name,
            study_trial=trial.number,
        )
        at.display.trial(number, job)
        record = execute(job, dataclasses.replace(at, expected=self._expected([spec])))
        row = {"trial_id": record.trial_id, "status": record.status, "study": record.study, **record.metrics}
        self.recorded[record.trial_id] = row
        return row

    def _expected(self, specs: Sequence[TrialSpec]) -> Expected:
        if self.options.planner is None:
            return NOTHING_EXPECTED
        with self.lock:
            planned = {p.spec.id: p.prediction for p in self.options.planner.plan(specs) if p.prediction is not None}
        return Expected(planned, self.options.rates)

    def _tell(self, trial: optuna.Trial, score: Score | None, label: str) -> None:
        with self.lock:
            self._told(trial, score, label)

    def _told(self, trial: optuna.Trial, score: Score | None, label: str) -> None:
        if score is None:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        for name, violation in score.violations.items():
            trial.set_constraint(name, violation)
        values = [stand_in(self.study, self.search, k) if v is None else v for k, v in enumerate(score.values)]
        self.study.tell(trial, values)
        if score.feasible and (self.best is None or self.search.better(values[0], self.best)):
            self.best = values[0]
            objective = METRICS[self.search.objectives[0].metric]
            self.say(f"best {objective.name} so far: {objective.show(values[0])} ({label})")

    def confirm(self) -> bool:
        """Run the winner, the runner-up, the best known before and the baseline in repeats under fresh seeds.

        The winner was chosen for its figures: only seeds that had no part in the choice say whether it is better.

        Returns:
            False: interrupted before the end.
        """
        search = self.search
        chosen = {search.base.id: Trial(search.base, "baseline", None, None)}
        for row in finalists(search, self.store.read("trials").to_pylist(), self.study.study_name):
            spec = spec_of(row)
            chosen.setdefault(spec.id, Trial(spec, row["label"], None, row["level"]))
        # Repeat 0 is the search's own, and recorded but for the baseline's second run.
        trials = [t for k in range(search.confirm + 1) for t in repeat(tuple(chosen.values()), search.base, k)]
        grid = Grid(search.name, search.title, "list", tuple(interleave(trials, search.name)), tune=search.given)
        summary = run_grid(
            grid,
            self.store,
            self.launcher,
            self.display,
            dataclasses.replace(self.options.policy, skip_infeasible=False),  # the search has measured them
            expected=self._expected([trial.spec for trial in trials]),
        )
        return summary.left == 0

    def outcome(self, finished: bool) -> Outcome:
        """Where the study stands."""
        trials = self.study.get_trials(deepcopy=False)
        running = any(t.state is TrialState.RUNNING for t in trials)
        if not running:  # others would find their parts gone
            self.store.compact()
        warm = sum("source" in t.user_attrs for t in trials)
        left = 0 if finished else self._left()
        return Outcome(self.study.study_name, _asked_for(self.study), left, warm)


def _about(search: Search) -> dict[str, Any]:
    return Grid(search.name, search.title, "list", (), tune=search.given).about


def study_name(search: Search, environment_id: str) -> str:
    """A study is about one base, one space and one machine: what differs in them is another study."""
    kept = {key: value for key, value in search.given["tune"].items() if key not in ("trials", "timeout", "confirm")}
    about = {"base": search.base.canonical(), "tune": kept, "sampler": search.sampler, "environment": environment_id}
    text = json.dumps(about, sort_keys=True, default=str)
    return f"{search.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def open_storage(url: str | None, store: Store) -> optuna.storages.BaseStorage:
    """The study's own memory: an SQLite file in the results folder, or whatever Optuna takes.

    Raises:
        InputError: it cannot be opened.
    """
    wanted = url or f"sqlite:///{store.folder.absolute() / 'study.db'}"
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        if wanted.startswith("sqlite"):  # several processes write one file: they wait for each other
            return optuna.storages.RDBStorage(wanted, engine_kwargs={"connect_args": {"timeout": 60}})
        return optuna.storages.get_storage(wanted)
    except Exception as error:  # whatever the driver of a database says; the URL may hold a password
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"the study's storage cannot be opened: {first}; give a URL as Optuna takes it, like sqlite:///study.db"
        ) from None


# ------------------------------------------------------------------------------------ Optuna's parts


class _BruteForce(optuna.samplers.BruteForceSampler):
    """Says that it is through; its own way, stopping the study, works within `optimize` alone."""

    exhausted = False

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Note the end of the space."""
        try:
            super().after_trial(study, trial, state, values)
        except RuntimeError:
            self.exhausted = True


def sampler(search: Search) -> optuna.samplers.BaseSampler:
    """The one that the search names, seeded."""
    conditional = any(parameter.when for parameter in search.parameters)
    if search.sampler == "brute-force":
        endless = [p.name for p in search.parameters if not p.choices and not p.whole and p.step is None]
        if endless:
            raise InputError(f"{search.name}: brute-force needs a step for {endless[0]}, or levels")
        return _BruteForce(seed=search.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "tpe":
            # A liar takes what is running for bad: others at work look elsewhere.
            return optuna.samplers.TPESampler(
                seed=search.seed, multivariate=True, group=conditional, constant_liar=True
            )
        if search.sampler == "gp":
            return optuna.samplers.GPSampler(seed=search.seed, deterministic_objective=False)
        if search.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=search.seed, population_size=min(50, max(4, search.trials // 4)))
        return optuna.samplers.RandomSampler(seed=search.seed)


def pruner(search: Search) -> optuna.pruners.BasePruner:
    """Successive halving over the rungs, or none."""
    if search.pruner is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=1, reduction_factor=search.pruner.factor, min_early_stopping_rate=0
    )


def distribution(parameter: Parameter) -> BaseDistribution:
    """A parameter as Optuna has it."""
    if parameter.choices:
        return CategoricalDistribution(tuple(parameter.choices))
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high), parameter.log, int(parameter.step or 1))
    return FloatDistribution(parameter.low, parameter.high, parameter.log, parameter.step)


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    if parameter.choices:
        return trial.suggest_categorical(parameter.name, tuple(parameter.choices))
    if parameter.whole:
        step = int(parameter.step or 1)
        return trial.suggest_int(parameter.name, int(parameter.low), int(parameter.high), step=step, log=parameter.log)
    return trial.suggest_float(parameter.name, parameter.low, parameter.high, step=parameter.step, log=parameter.log)


def stand_in(study: optuna.Study, search: Search, objective: int) -> float:
    """A value for a trial that never had one: the worst so far. What violates a bound is never a score."""
    seen = [t.values[objective] for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    if search.objectives[objective].direction == "maximize":
        return min(seen, default=0.0)
    return max(seen, default=_WORST_LOSS)


# ------------------------------------------------------------------------------------ who works on what


def _asked_for(study: optuna.Study) -> int:
    """Trials that the study proposed: those known before, given back and waiting do not count."""
    given_back = study.user_attrs
    return sum(
        "source" not in t.user_attrs
        and t.state is not TrialState.WAITING
        and f"given back {t.number}" not in given_back
        for t in study.get_trials(deepcopy=False)
    )


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": psutil.Process().create_time()}


def _is_gone(owner: Mapping[str, Any] | None) -> bool:
    """Whether the process that asked for a trial has ended; of another machine's nothing is known."""
    if owner is None:
        return True  # it died between asking and saying who it is
    if owner["host"] != socket.gethostname():
        return False
    try:
        return bool(psutil.Process(owner["pid"]).create_time() != owner["since"])
    except psutil.NoSuchProcess:
        return True


def _give_back_abandoned(study: optuna.Study) -> None:
    """Trials of processes that are gone: each is proposed again, and its row used if it got that far."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_gone(trial.user_attrs.get("owner")):
            _give_back(study, trial.number, trial.params, trial.user_attrs.get("label"))


def _give_back(study: optuna.Study, number: int, params: Mapping[str, Any], label: str | None = None) -> None:
    with contextlib.suppress(ValueError):  # told already: there is nothing to give back
        study.set_user_attr(f"given back {number}", True)
        study.tell(number, state=TrialState.FAIL)
        if params:
            study.enqueue_trial(dict(params), user_attrs={"label": label} if label == "baseline" else None)


# ------------------------------------------------------------------------------------ a warm start


def _start_from(
    study: optuna.Study,
    search: Search,
    store: Store,
    source: Path,
    here: environment.Environment,
    say: Callable[[str], None],
) -> None:
    """Tell the study what was measured before, and keep those rows beside its own.

    A trial that stayed within the memory bound is the same with the bound as without: it is kept under the spec that
    has the bound. One that did not is told as a violation and stays where it is.
    """
    rows = Store(source).read("trials").to_pylist()
    counts = dict.fromkeys(("used", "of another environment", "outside the space", "without a score"), 0)
    for row in sorted(rows, key=lambda r: r["started_at"]):
        if row["environment_id"] != here.id:
            counts["of another environment"] += 1
            continue
        if row["twin"] or row["seed"] != search.base.seed:
            continue
        spec = spec_of(row).model_copy(update={"memory_budget": search.memory, "device": search.base.device})
        place = search.place(spec)
        score = search.score(row["status"], {name: row[name] for name in METRICS})
        if place is None:
            counts["outside the space"] += 1
        elif score is None:
            counts["without a score"] += 1
        else:
            counts["used"] += 1
            _know(study, search, store, Store(source), row, spec, place, score, here)
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing there"
    say(f"rows of {source}: {said}")


def _know(
    study: optuna.Study,
    search: Search,
    store: Store,
    source: Store,
    row: Mapping[str, Any],
    spec: TrialSpec,
    place: Mapping[str, Any],
    score: Score,
    here: environment.Environment,
) -> None:
    number = len(study.get_trials(deepcopy=False))
    label = "baseline" if spec.id == search.base.id else one_line(f"#{number} {row['label']}, measured before")
    by_name = {parameter.name: parameter for parameter in search.parameters}
    values = [stand_in(study, search, k) if v is None else v for k, v in enumerate(score.values)]
    study.add_trial(
        optuna.trial.create_trial(
            params=dict(place),
            distributions={name: distribution(by_name[name]) for name in place},
            values=values,
            constraints=dict(score.violations),
            user_attrs={"source": source.folder.name, "label": label, "status": row["status"]},
        )
    )
    within = search.memory is None or max(row[name] or 0 for name in FITS) <= search.memory
    if row["status"] == "ok" and within:
        place_here = {
            "grid": search.name, "label": label, "factor": None, "level": BEFORE, "baseline_id": search.base.id,
            "study": study.study_name, "study_trial": number, "memory_budget": search.memory,
            "device": search.base.device, "spec_id": spec.id, "trial_id": trial_id(spec, here),
        }  # fmt: skip
        store.adopt(source, row["trial_id"], {**row, **place_here})


# ------------------------------------------------------------------------------------ the winner


def finalists(search: Search, rows: Sequence[Mapping[str, Any]], study: str) -> list[Mapping[str, Any]]:
    """By the first objective and within the bounds: the winner, the runner-up, the best of those measured before."""
    ranked = []
    for row in rows:
        if row["study"] != study or row["seed"] != search.base.seed or row["twin"]:
            continue
        if search.place(spec_of(row)) is None:
            continue  # a shorter rung
        score = search.score(row["status"], {name: row[name] for name in METRICS})
        if score is not None and score.feasible and score.values[0] is not None:
            ranked.append((score.values[0], row))
    lower = search.objectives[0].direction == "minimize"
    ranked.sort(key=lambda item: item[0] if lower else -item[0])
    ordered = [row for _, row in ranked]
    before = [row for row in ordered if row["level"] == BEFORE]
    return ordered[:2] + [row for row in before[:1] if row not in ordered[:2]]
