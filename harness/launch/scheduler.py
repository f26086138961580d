"""Trials in jobs of a scheduler like SLURM, by submitit. The one module that imports submitit.

A job is a worker that takes one trial after another, since a place in a queue is waited for once and everything is
imported once. Runner and jobs speak through files in a folder that all machines see, as those of SLURM's clusters do;
there a trial is what it is here, a process that a `LocalLauncher` watches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import submitit

from harness import environment
from harness._util.files import write_whole
from harness._util.messages import first_line
from harness._util.redact import redact
from harness.environment import DeviceType, Environment, Placement
from harness.errors import InputError
from harness.launch import fork_server
from harness.launch.exit_status import WORKER_LOST, is_transient
from harness.launch.launcher import Attempt, OnEvent
from harness.launch.local import Child, LocalLauncher, measure
from harness.record import Job, Phase, Record

LOCAL = "local"
"""In place of a partition: jobs are processes of this machine, to try it without a scheduler."""
MINUTES = 240
"""Time limit of a job that the scheduler is asked for."""
_LOOK_SECONDS = {LOCAL: 0.05, "slurm": 0.5}
_IDLE_SECONDS = 300.0
"""A job without a trial ends by itself: its runner may be gone."""
_END_SECONDS = 5.0
"""How long a job may take to see that there is no further trial, or that it is cancelled."""


class SubmititLauncher:
    """Workers that are jobs of a scheduler, each with the resources of a trial.

    Args:
        partition: of SLURM; null: its default. `local` makes them processes of this machine.
        device: of the trials: `cuda` asks for a card for each of a trial's processes.
        workers: most jobs at the same time.
        cpus: cores of a job; null: what the scheduler gives.
        minutes: time limit of a job.
        array: ask for all workers at once, as one job array; else for each when a trial needs it.
        processes: the numbers of processes that trials have.
        folder: where runner and jobs speak to each other; all machines see it.
        child, preload: as for `LocalLauncher`.
    """

    def __init__(
        self,
        partition: str | None = None,
        *,
        device: str = "auto",
        workers: int = 1,
        cpus: int | None = None,
        minutes: int = MINUTES,
        array: bool = False,
        processes: Iterable[int] = (1,),
        folder: Path | None = None,
        child: Child = measure,
        preload: str = fork_server.PRELOAD,
    ) -> None:
        self.workers = workers
        self._cluster = LOCAL if partition == LOCAL else "slurm"
        self._device, self._cpus, self._array = device, cpus, array
        self._folder = (folder or Path(".harness-jobs")).absolute() / uuid.uuid4().hex[:12]
        self._parameters: dict[str, Any] = {
            "name": "harness",
            "timeout_min": minutes,
            "cpus_per_task": cpus,
            "gpus_per_node": max(processes) if device == "cuda" else None,
        }
        if self._cluster != LOCAL:
            # The runner tries again; a job that came back under its old number would not know which trial it had.
            self._parameters |= {"slurm_partition": partition, "slurm_additional_parameters": {"no-requeue": True}}
        self._local = {"child": child, "preload": preload}
        self._lock = threading.Lock()
        self._started: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._environment: Environment | None = None

    def __enter__(self) -> Self:
        if self._cluster != LOCAL and shutil.which("sbatch") is None:
            raise InputError("--engine submitit: there is no sbatch here; use --engine local, or --partition local")
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._executor = submitit.AutoExecutor(folder=self._folder / "submitit", cluster=self._cluster)
            self._executor.update_parameters(**self._parameters)
            with self._executor.batch() if self._array else contextlib.nullcontext():
                workers = [self._asked_for() for _ in range(self.workers if self._array else 1)]
            self._started += workers
            self._busy.update(workers)  # an interrupt while they are in the queue cancels them
            self._environment = workers[0].environment()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, Exception):
                raise InputError(f"--engine submitit: {redact(first_line(error))}") from None
            raise
        self._busy.clear()
        self._idle += workers
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        for worker in self._idle:
            worker.dismiss()
        for worker in self._started:
            worker.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another run's are there
            self._folder.parent.rmdir()
        self._idle, self._started, self._busy = [], [], set()

    def environments(self, device_type: DeviceType) -> tuple[Environment, ...]:
        """That of the first job; nodes of a partition are taken to be alike."""
        return () if self._environment is None else (self._environment,)

    def placements(self, device_type: DeviceType) -> Sequence[Placement | None]:
        """Each job places its own trials."""
        return [None] * self.workers

    def run(self, attempt: Attempt, on_event: OnEvent) -> Record:
        """As `LocalLauncher.run`, in a job. A trial whose job is lost, pre-empted or out of time ends as `killed`.

        Raises:
            KeyboardInterrupt: passed on from `on_event`; the job is cancelled first.
        """
        started_at = dt.datetime.now(dt.UTC)
        phase: Phase = "start"
        worker = self._take()
        try:
            for kind, value in worker.run(attempt):
                if kind == "record":
                    record = Record.model_validate(value["record"]).model_copy(update={"node": value["node"]})
                    self._release(worker, record)
                    return record
                if kind == "phase":
                    phase = value
                on_event(kind, value)
        except BaseException:
            worker.cancel()
            raise
        finally:
            self._busy.discard(worker)
        return Record.of(
            attempt.job,
            environment=self.environments("cpu")[0],
            status="killed",
            phase=phase,
            error_type=WORKER_LOST,
            error=f"the job was lost ({worker.end()})",
            started_at=started_at,
            metrics={"trial_seconds": (dt.datetime.now(dt.UTC) - started_at).total_seconds()},
        )

    def _take(self) -> _Worker:
        """An idle job that is still there, one that has begun before others, else a new one."""
        with self._lock:
            self._idle = sorted((worker for worker in self._idle if not worker.done()), key=_Worker.has_begun)
            worker = self._idle.pop() if self._idle else self._start()
            self._busy.add(worker)
            return worker

    def _release(self, worker: _Worker, record: Record) -> None:
        """Keep a job for the next trial, unless something has ended a process of it: what pre-empts it does."""
        if is_transient(record, timeouts=False):
            worker.cancel()
            return
        with self._lock:
            self._idle.append(worker)

    def stop(self) -> None:
        """Cancel every job that runs a trial."""
        for worker in [*self._busy]:
            worker.cancel()

    def _start(self) -> _Worker:
        worker = self._asked_for()
        self._started.append(worker)
        return worker

    def _asked_for(self) -> _Worker:
        folder = self._folder / uuid.uuid4().hex[:12]
        folder.mkdir()
        job = self._executor.submit(serve, str(folder), self._device, self._cpus, self._local, self._look)
        return _Worker(job, folder, self._look)

    @property
    def _look(self) -> float:
        return _LOOK_SECONDS[self._cluster]


class _Worker:
    """A job, as the runner sees it."""

    def __init__(self, job: Any, folder: Path, look_seconds: float) -> None:
        self.job = job
        self._folder, self._look = folder, look_seconds
        self._trials = 0
        self._cancelled_at: float | None = None

    def done(self, *, ask: bool = False) -> bool:
        """Whether it has ended. submitit (1.5) waits for one that was pre-empted to come back, and none does.

        Args:
            ask: the scheduler now, and not once a minute.
        """
        return bool(self.job.done(force_check=ask)) or self.job.state == "PREEMPTED"

    def has_begun(self) -> bool:
        """Whether it is out of the queue."""
        return (self._folder / "environment.json").exists()

    def environment(self) -> Environment:
        """Where it runs, once the scheduler has begun it.

        Raises:
            RuntimeError: it has ended.
        """
        file = self._folder / "environment.json"
        while not file.exists():
            if self.done() and not file.exists():
                raise RuntimeError(f"the first job was lost ({self.end()})")
            time.sleep(self._look)
        return Environment.model_validate_json(file.read_bytes())

    def run(self, attempt: Attempt) -> Iterator[tuple[str, Any]]:
        """Events of an attempt; the last is its record, unless the job is lost."""
        number = self._trials
        self._trials += 1
        asked = {
            "job": attempt.job.model_dump_json(),
            "options": {**attempt.options, "folder": str(Path(attempt.options["folder"]).absolute())},
            "log": str(attempt.log.absolute()),
            "timeout": attempt.timeout,
            "stall": attempt.stall,
        }
        write_whole(self._folder / f"trial-{number}.json", json.dumps(asked).encode())
        events, rest, at = self._folder / f"events-{number}.jsonl", b"", 0
        while True:
            lost = self.done()  # before the file is read: what it wrote last is there
            if events.exists():
                with events.open("rb") as file:
                    file.seek(at)
                    new = file.read()
                at += len(new)
                *lines, rest = (rest + new).split(b"\n")
                for line in lines:
                    yield tuple(json.loads(line))
                    if line.startswith(b'["record"'):
                        return
            if lost:
                return
            time.sleep(self._look)

    def dismiss(self) -> None:
        """Let it end, since there is no further trial."""
        with contextlib.suppress(OSError):
            (self._folder / "stop").touch()

    def cancel(self) -> None:
        """End it now. Asked once; a process of this machine that goes on, as one that ignores interrupts, is killed."""
        if self._cancelled_at is None:
            self._cancelled_at = time.monotonic()
            with contextlib.suppress(Exception):  # it has ended, or the scheduler does not answer
                self.job.cancel()
        elif time.monotonic() - self._cancelled_at > _END_SECONDS and isinstance(self.job, submitit.LocalJob):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(int(self.job.job_id))
                for each in (*process.children(recursive=True), process):
                    each.kill()

    def wait(self) -> None:
        """Until it has ended, which is cancelled where it does not."""
        for _ in range(2):
            end = time.monotonic() + _END_SECONDS
            while not self.done(ask=True):
                if time.monotonic() > end:
                    self.cancel()
                    break
                time.sleep(self._look)

    def end(self) -> str:
        """How it ended, in a line."""
        with contextlib.suppress(Exception):  # submitit waits for files that a lost node never wrote
            stderr = (self.job.stderr() or "").strip().splitlines()
            return f"job {self.job.job_id}, {self.job.state}" + (f": {redact(stderr[-1])[:300]}" if stderr else "")
        return f"job {self.job.job_id}"


# ------------------------------------------------------------------------------------ in a job


def serve(folder: str, device: str, cpus: int | None, local: dict[str, Any], look_seconds: float) -> None:
    """Take the trials that are asked for in a folder, one after another, until there are no more.

    Args:
        folder: of this job.
        device: of the trials.
        cpus: cores of a trial; null: all that the job may use.
        local: options of the `LocalLauncher`.
        look_seconds: how often to look for a trial.
    """
    here = Path(folder)
    if (here / "environment.json").exists():  # requeued by the cluster: the trial that it had is lost
        return
    cores = tuple(sorted(os.sched_getaffinity(0)))
    placement = None
    if cpus is not None:
        placement = Placement(cores, os.environ.get("CUDA_VISIBLE_DEVICES") or None, 0, threads=min(cpus, len(cores)))
    described = environment.current(environment.resolve_device(device))
    described = described if placement is None else described.placed(placement)
    write_whole(here / "environment.json", described.model_dump_json().encode())
    number, idle_since = 0, time.monotonic()
    with LocalLauncher(**local) as launcher:
        # The folder is gone when its runner is.
        while here.exists() and not (here / "stop").exists() and time.monotonic() - idle_since < _IDLE_SECONDS:
            asked = here / f"trial-{number}.json"
            if not asked.exists():
                time.sleep(look_seconds)
                continue
            _run(launcher, json.loads(asked.read_bytes()), placement, here / f"events-{number}.jsonl")
            number, idle_since = number + 1, time.monotonic()


def _run(launcher: LocalLauncher, asked: dict[str, Any], placement: Placement | None, events: Path) -> None:
    fields = None if placement is None else dataclasses.asdict(placement)
    attempt = Attempt(
        Job.model_validate_json(asked["job"]),
        asked["options"] | {"placement": fields},
        Path(asked["log"]),
        asked["timeout"],
        asked["stall"],
    )
    with events.open("w") as file:

        def report(kind: str, value: object) -> None:
            file.write(json.dumps([kind, value]) + "\n")
            file.flush()

        record = launcher.run(attempt, report)
        report("record", {"record": record.model_dump(mode="json"), "node": platform.node()})
