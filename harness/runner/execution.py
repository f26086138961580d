"""One job, run through a launcher with its retries, and kept."""

from __future__ import annotations

import dataclasses
import datetime as dt
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.environment import Placement, resolve_device
from harness.launch.exit_status import is_transient
from harness.launch.launcher import Attempt, Launcher, WorkerOptions
from harness.predict.prediction import NO_PREDICTIONS, Predictions
from harness.record import DISK_FULL, Job, Record
from harness.results.store import Store
from harness.runner import visits
from harness.runner.display import Display
from harness.runner.identity import lease_id
from harness.runner.interrupts import Interrupt
from harness.runner.loss_before import RecordedLosses

STALL_SECONDS = 1800.0
"""A worker that reports nothing for this long within a step hangs."""


@dataclass(frozen=True)
class Policy:
    """How trials are run."""

    timeout: float | None = None
    """Seconds that a trial may take; null: any."""
    stall: float | None = STALL_SECONDS
    """Seconds without a sign of life within a step; null: any."""
    retries: int = 0
    """Further attempts where the worker was killed or lost."""
    retry_timeouts: bool = False
    """Whether a trial that took too long is retried too."""
    trust_remote_code: bool = False
    """Let models from the hub run their own code."""
    skip_infeasible: bool = False
    """Record what is predicted not to fit without starting it."""


@dataclass(frozen=True)
class ExecutionContext:
    """What a job is executed with."""

    store: Store
    launcher: Launcher
    display: Display
    policy: Policy = Policy()
    predictions: Predictions = NO_PREDICTIONS
    placement: Placement | None = None
    """What the job may use of the machine; null: what the launcher gives it."""
    interrupt: Interrupt = field(default_factory=Interrupt)
    losses_before: RecordedLosses = field(default_factory=RecordedLosses)
    """Of untrained models, which need not be measured again."""


def log_path(store: Store, job: Job, launcher: Launcher, attempt: int = 1) -> Path:
    """Where an attempt's output is kept."""
    name = lease_id(job, launcher) + ("" if job.visit is None else f"-visit-{job.visit.block}")
    return store.folder / "logs" / (f"{name}.log" if attempt == 1 else f"{name}.attempt-{attempt}.log")


def execute(job: Job, context: ExecutionContext) -> Record:
    """Train by one job and keep its record, with what was predicted for it.

    Raises:
        KeyboardInterrupt: interrupted twice.
        OSError: the record cannot be kept, or the disk was full for the trial.
    """
    predictions = context.predictions
    here = context.launcher.environments(resolve_device(job.spec.device))[0]
    reason = predictions.infeasible_reason(job.spec, here) if context.policy.skip_infeasible else None
    if reason is not None:
        record = predictions.skipped_record(job, reason, environment=here, started_at=dt.datetime.now(dt.UTC))
    else:
        record = predictions.with_predictions(_last_attempt(job, context))
    context.store.write(record)
    context.losses_before.add(record)
    context.display.finished(record)
    return record


def visit(job: Job, context: ExecutionContext, wanted: int) -> tuple[Record, dict[str, Any] | None]:
    """Time steps of a recorded trial by a job with a visit, and add them to it.

    Args:
        job: the visit.
        context: what it is executed with.
        wanted: visits of a trial that should count.

    Returns:
        The visit's record, and the trial's row; null where the visit failed.

    Raises:
        KeyboardInterrupt: interrupted twice.
        OSError: the steps cannot be kept, or the disk was full for the visit.
    """
    record = _last_attempt(job, context)
    row = visits.keep(record, context.store, context.predictions, wanted)
    context.display.finished(record)
    return record, row


def _last_attempt(job: Job, context: ExecutionContext) -> Record:
    """The record of the first attempt that is not worth repeating, or of the last one allowed."""
    store, policy = context.store, context.policy
    options: WorkerOptions = {
        "folder": str(store.folder / "adapters"),
        "trust_remote_code": policy.trust_remote_code,
        "placement": None if context.placement is None else dataclasses.asdict(context.placement),
        "losses_before": {} if job.visit is not None else context.losses_before.of(job, store, context.launcher),
    }
    number = 1
    while True:
        log = log_path(store, job, context.launcher, number)
        attempt = Attempt(job, options, log, policy.timeout, policy.stall)
        record = context.launcher.run(attempt, context.display.event)
        if context.interrupt.at_once:  # the record says only that it was stopped
            raise KeyboardInterrupt
        if record.error_type == DISK_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.folder))
        log_name = str(log.relative_to(store.folder)) if record.status != "ok" and log.exists() else None
        record = record.model_copy(update={"attempt": number, "log": log_name})
        last = number > policy.retries or context.interrupt.asked
        if last or not is_transient(record, timeouts=policy.retry_timeouts):
            return record
        context.display.retried(record)
        number += 1
