"""Optuna objects for a search: storage, sampler, pruner, distributions."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from harness._util.messages import first_line
from harness.errors import InputError, is_disk_full
from harness.grids.search import Parameter, Search
from harness.results.store import Store

_WORST_LOSS = 12.0
"""Nats, more than a uniform guess over any vocabulary: the value of a loss that was never measured."""


def open_storage(url: str | None, store: Store) -> optuna.storages.BaseStorage:
    """The study's storage: an SQLite file in the results folder, or any URL that Optuna accepts.

    Raises:
        InputError: it cannot be opened.
        OSError: the results folder cannot be written, or the disk is full.
    """
    store.folder.mkdir(parents=True, exist_ok=True)
    wanted = url or f"sqlite:///{store.folder.absolute() / 'study.db'}"
    try:
        if wanted.startswith("sqlite"):  # several processes may write the file at the same time
            return optuna.storages.RDBStorage(wanted, engine_kwargs={"connect_args": {"timeout": 60}})
        return optuna.storages.get_storage(wanted)
    except Exception as error:  # of any database driver; the URL is not shown, as it may hold a password
        if _is_full(error, store.folder):
            raise _disk_full(store.folder) from None
        raise InputError(
            f"the study's storage cannot be opened: {first_line(error)}; "
            "give a URL as Optuna takes it, like sqlite:///study.db"
        ) from None


def open_study(
    name: str, search: Search, storage: optuna.storages.BaseStorage, sampler: optuna.samplers.BaseSampler
) -> optuna.Study:
    """The study of this name: a new one, or the one that was begun."""
    directions = [objective.direction for objective in search.objectives]
    shared: dict[str, Any] = {"study_name": name, "storage": storage, "sampler": sampler, "pruner": pruner(search)}
    try:
        study = optuna.create_study(directions=directions, **shared)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(**shared)
        sampler.reseed_rng()  # with the same seed it would propose the same trials again
    study.set_metric_names([objective.metric for objective in search.objectives])
    return study


STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, OSError)
"""What a study raises whose storage cannot be read or written."""


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Within, a study whose storage cannot be read or written raises an `OSError`, as any other file does.

    Args:
        folder: of the results, where the storage mostly is.

    Raises:
        OSError: one line; ENOSPC where the disk is full.
    """
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        cause = error.__cause__ or error  # the database's own words; Optuna's are advice
        if _is_full(cause, folder):
            raise _disk_full(folder) from None
        raise OSError(f"the study's storage cannot be read or written: {first_line(cause)}") from None


def _is_full(error: BaseException, folder: Path) -> bool:
    if is_disk_full(error) or "disk is full" in str(error):
        return True
    # Of a file that could not be made or lengthened, SQLite says no more than that.
    vague = any(text in str(error) for text in ("disk I/O error", "unable to open database file"))
    return vague and shutil.disk_usage(folder).free == 0


def _disk_full(folder: Path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


class _BruteForce(optuna.samplers.BruteForceSampler):
    """Records that the space is exhausted; Optuna's own way, stopping the study, works within `optimize` only."""

    exhausted = False

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Record whether the space is exhausted."""
        try:
            super().after_trial(study, trial, state, values)
        except RuntimeError:
            self.exhausted = True


class _GP(optuna.samplers.GPSampler):
    """Wants the same constraints of all trials; those of studies from before 2026-12 depend on how a trial ended."""

    def _sample_relative_impl(
        self, study: optuna.Study, completed_trials: list[FrozenTrial], *others: Any
    ) -> dict[str, Any]:
        names = dict.fromkeys(name for trial in completed_trials for name in trial.constraints)
        alike = [
            optuna.trial.create_trial(
                params=trial.params,
                distributions=trial.distributions,
                values=trial.values,
                constraints={name: trial.constraints.get(name, 0.0) for name in names},
            )
            for trial in completed_trials
        ]
        return super()._sample_relative_impl(study, alike, *others)


def sampler(search: Search) -> optuna.samplers.BaseSampler:
    """The search's sampler, seeded.

    Raises:
        InputError: brute force over a continuous parameter.
    """
    conditional = any(parameter.when for parameter in search.parameters)
    if search.sampler == "brute-force":
        continuous = [p.name for p in search.parameters if not p.choices and not p.whole and p.step is None]
        if continuous:
            raise InputError(f"{search.name}: brute-force needs a step for {continuous[0]}, or levels")
        return _BruteForce(seed=search.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "tpe":
            # The constant liar scores running trials as bad, so that concurrent workers propose other ones.
            return optuna.samplers.TPESampler(
                seed=search.seed, multivariate=True, group=conditional, constant_liar=True
            )
        if search.sampler == "gp":
            # Parameters under a condition are drawn at random, as docs/search.md says; Optuna would warn of each.
            return _GP(seed=search.seed, deterministic_objective=False, warn_independent_sampling=False)
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
    """A parameter's Optuna distribution."""
    if parameter.choices:
        return CategoricalDistribution(tuple(parameter.choices))
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high), parameter.log, int(parameter.step or 1))
    return FloatDistribution(parameter.low, parameter.high, parameter.log, parameter.step)


def suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    """A parameter's value in a trial."""
    if parameter.choices:
        return trial.suggest_categorical(parameter.name, tuple(parameter.choices))
    if parameter.whole:
        step = int(parameter.step or 1)
        return trial.suggest_int(parameter.name, int(parameter.low), int(parameter.high), step=step, log=parameter.log)
    return trial.suggest_float(parameter.name, parameter.low, parameter.high, step=parameter.step, log=parameter.log)


def fallback_value(study: optuna.Study, search: Search, objective: int) -> float:
    """The value of an objective for a trial that has none, like out of memory: the worst so far."""
    values = [t.values[objective] for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    if search.objectives[objective].direction == "maximize":
        return min(values, default=0.0)
    return max(values, default=_WORST_LOSS)
