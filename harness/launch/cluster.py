"""Trials as tasks of a Ray cluster. The one module that imports Ray.

On its node a trial is what it is here: a process forked from a server that has imported everything once, watched by a
`LocalLauncher`. Its progress, record, log and adapter come back through Ray: nodes share no disk.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import platform
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness import environment
from harness._util.files import folder_aside
from harness._util.messages import first_line
from harness._util.redact import redact
from harness.environment import DeviceType, Environment, Placement
from harness.errors import InputError
from harness.launch import fork_server
from harness.launch.exit_status import WORKER_LOST, Outcome
from harness.launch.launcher import Attempt, OnEvent, WorkerOptions
from harness.launch.local import Child, LocalLauncher, measure
from harness.record import Job, Phase, Record

_REPORT_SECONDS = 0.5
"""Least seconds between two events that travel; further ones stay on their node."""

_CONNECT_SECONDS = 10.0


class TrialOutput(NamedTuple):
    """What comes back from a node at the end of a trial."""

    record: str
    """JSON."""
    node: str
    """Name of the machine."""
    log: bytes
    files: dict[str, bytes]
    """Of the adapter, by the path within `adapters/`."""


class RayLauncher:
    """One task for each trial, with the resources that it takes.

    Args:
        address: of a cluster (`auto`: the one that this machine belongs to); null: one on this machine alone.
        device: of the trials: `cuda` asks for a card each.
        most_workers: most trials at the same time; null: as many as the nodes have capacity for.
        cpus: cores of a trial; null: those of the smallest node, by its cards where trials have cards.
        accelerator: kind of card that nodes must have, by Ray's name for it (`H100`, `A100`, …).
        processes: the numbers of processes that trials have. Those of a trial stay on one node, each with a card and
            the cores of a trial with one process; without cards they divide the cores of a trial.
        child, preload: as for `LocalLauncher`.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        device: str = "auto",
        most_workers: int | None = None,
        cpus: int | None = None,
        accelerator: str | None = None,
        processes: Iterable[int] = (1,),
        child: Child = measure,
        preload: str = fork_server.PRELOAD,
    ) -> None:
        self.workers = most_workers or 1
        self._address, self._device, self._most_workers = address, device, most_workers
        self._cpus, self._accelerator, self._processes = cpus, accelerator, sorted(set(processes))
        self._local = {"child": child, "preload": preload}
        self._environments: tuple[Environment, ...] = ()
        self._running: set[Any] = set()

    def __enter__(self) -> Self:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if self._address is None:  # its dashboard would be open to the network
            options |= {"include_dashboard": False, "dashboard_host": "127.0.0.1"}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            _try_connection(self._address)
            ray.init(address=self._address or "local", **options)  # without one it looks for a running cluster
        except (ConnectionError, OSError, ValueError) as error:
            text = first_line(error)
            raise InputError(f"--address {self._address}: {text}; start a cluster with: ray start --head") from None
        nodes = [node for node in _all_nodes() if node["Alive"] and _cpus(node)]
        self._gpus = 1 if self._device == "cuda" or (self._device == "auto" and any(_gpus(n) for n in nodes)) else 0
        able = [node for node in nodes if _gpus(node) >= self._gpus]
        if not able:
            self._refuse("no node of the cluster has a card; give --device cpu, or start nodes with cards")
        if self._accelerator is not None:
            able = [node for node in able if f"accelerator_type:{self._accelerator}" in node["Resources"]]
            if not able:
                self._refuse(f"no node of the cluster has an {self._accelerator}; --accelerator takes Ray's names")
        cores = [int(_cpus(node) // max(1, _gpus(node) if self._gpus else 1)) for node in able]
        self._cpus = self._cpus or max(1, min(cores))
        self._refuse_too_large_trials(able)
        capacity = sum(self._capacity(node, self._processes[0]) for node in able)
        self.workers = min(capacity, self._most_workers or capacity)
        self._environments = self._ask_environments(able)
        return self

    def __exit__(self, *error: object) -> None:
        ray.shutdown()

    def _refuse(self, reason: str) -> NoReturn:
        self.__exit__()
        raise InputError(reason)

    def _refuse_too_large_trials(self, nodes: list[dict[str, Any]]) -> None:
        for processes in self._processes:
            wanted = f"num_processes {processes}: " if processes > 1 else ""
            if not self._gpus and (self._cpus or 1) < processes:
                self._refuse(f"{wanted}a trial has {self._cpus} cores here; give --cpus {processes} or more")
            if not any(self._capacity(node, processes) for node in nodes):
                cores, cards = self._needs(processes)
                needs = f"{cores} cores" + (f" and {cards} card{'s' * (cards > 1)}" if cards else "")
                self._refuse(f"{wanted}no node of the cluster has {needs}; give fewer with --cpus")

    def environments(self, device_type: DeviceType) -> tuple[Environment, ...]:
        """Those of the nodes, each kind once."""
        return self._environments

    def placements(self, device_type: DeviceType) -> Sequence[Placement | None]:
        """Each node places its own trials."""
        return [None] * self.workers

    def run(self, attempt: Attempt, on_event: OnEvent) -> Record:
        """As `LocalLauncher.run`, on a node of the cluster. A trial whose node is lost ends as `killed`.

        Raises:
            KeyboardInterrupt: passed on from `on_event`; the task is cancelled first.
        """
        started_at = dt.datetime.now(dt.UTC)
        processes = attempt.job.spec.num_processes
        task: Any = _trial.options(**self._resources(processes), num_returns="streaming")
        limits = (self._local, self._cpus, self._needs(processes), attempt.timeout, attempt.stall)
        events = task.remote(attempt.job.model_dump_json(), attempt.options, *limits)
        self._running.add(events)
        phase: Phase = "start"
        output: TrialOutput | None = None
        error: Exception = RuntimeError("it ended without a record")
        try:
            for reference in events:  # to its end: Ray uses the worker again
                kind, value = ray.get(reference)
                if kind == "output":
                    output = TrialOutput(*value)
                    continue
                if kind == "phase":
                    phase = value
                on_event(kind, value)
        except ray.exceptions.RayError as lost:
            error = lost
        except BaseException:
            _cancel(events)
            raise
        finally:
            self._running.discard(events)
        if output is not None:
            return _keep(output, Path(attempt.options["folder"]), attempt.log)
        return Record.of(
            attempt.job,
            environment=self._environments[0],
            phase=phase,
            started_at=started_at,
            metrics={"trial_seconds": (dt.datetime.now(dt.UTC) - started_at).total_seconds()},
            **_classify(error)._asdict(),
        )

    def stop(self) -> None:
        """Stop every trial that is running."""
        for events in [*self._running]:
            _cancel(events)

    def _needs(self, processes: int) -> tuple[int, int]:
        """Cores and cards of a trial: without cards its processes divide the cores of a trial with one."""
        times = processes if self._gpus else 1
        return (self._cpus or 1) * times, self._gpus * times

    def _capacity(self, node: dict[str, Any], processes: int) -> int:
        """How many trials of so many processes a node runs at the same time."""
        return _capacity_of(node["Resources"], *self._needs(processes))

    def _resources(self, processes: int) -> dict[str, Any]:
        cores, cards = self._needs(processes)
        resources: dict[str, Any] = {"num_cpus": cores, "num_gpus": cards, "max_retries": 0}
        return resources | ({"accelerator_type": self._accelerator} if self._accelerator else {})

    def _ask_environments(self, nodes: list[dict[str, Any]]) -> tuple[Environment, ...]:
        """What trials will run on, as each node describes it."""
        asked = [
            _environment.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(self._device, dataclasses.asdict(_placement(self._cpus or 1, self._capacity(node, processes))))
            for node in nodes
            for processes in self._processes
            if self._capacity(node, processes)
        ]
        environments = [Environment.model_validate_json(text) for text in ray.get(asked)]
        return tuple({each.id: each for each in environments}.values())


def _keep(output: TrialOutput, adapters: Path, log: Path) -> Record:
    """Write what a node has sent to where it belongs."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(output.log)
    record = Record.model_validate_json(output.record).model_copy(update={"node": output.node})
    if record.adapter_id is not None:
        with folder_aside(adapters, record.adapter_id, exist_ok=True) as aside:
            for name, content in output.files.items():
                path = Path(name)
                if path.parts[0] == record.adapter_id:
                    file = aside / path.relative_to(record.adapter_id)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content)
    return record


def _try_connection(address: str | None) -> None:
    """Connect once, since Ray waits for minutes where nothing answers.

    Raises:
        OSError: nothing answers.
        ValueError: it is no address.
    """
    if address is not None and address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        if not (host and port.isascii() and port.isdigit()):
            raise ValueError("it is none; give host:port, or auto")
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


def _all_nodes() -> list[dict[str, Any]]:
    return list(ray.nodes())  # type: ignore[no-untyped-call]  # Ray's


def _cpus(node: dict[str, Any]) -> float:
    return float(node["Resources"].get("CPU", 0))


def _capacity_of(resources: Mapping[str, float], cores: int, cards: int) -> int:
    """How many trials of so many cores and cards a node's resources allow."""
    by_cores = int(resources.get("CPU", 0) // cores)
    return min(by_cores, int(resources.get("GPU", 0) // cards)) if cards else by_cores


def _gpus(node: dict[str, Any]) -> float:
    return float(node["Resources"].get("GPU", 0))


def _classify(error: Exception) -> Outcome:
    """How a task ended that sent no record."""
    if isinstance(
        error, ray.exceptions.RayTaskError
    ):  # it could not even begin: what the node lacks it will lack again
        cause = error.cause if isinstance(error.cause, Exception) else error
        return Outcome("failed", type(cause).__name__, redact(first_line(cause))[:400])
    reason = f"{type(error).__name__}: {redact(first_line(error))[:400]}"
    return Outcome("killed", WORKER_LOST, f"the node or its worker was lost ({reason})")


def _cancel(events: Any) -> None:
    try:
        ray.cancel(events, force=True)
    except (ray.exceptions.RayError, ValueError, TypeError):  # it has ended
        return


# ------------------------------------------------------------------------------------ on a node

_launcher: LocalLauncher | None = None
"""Of this Ray worker, which Ray uses for one task after another."""


def _placement(cpus: int, capacity: int) -> Placement:
    """What a task has of its node; Ray binds it to no cores of its own."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Placement(cores, os.environ.get("CUDA_VISIBLE_DEVICES"), capacity - 1, threads=cpus)


@ray.remote
def _environment(device: str, placement: dict[str, Any]) -> str:
    """The environment of a trial on this node, as JSON."""
    here = environment.current(environment.resolve_device(device))
    return here.placed(Placement(**placement)).model_dump_json()


@ray.remote
def _trial(
    job: str,
    options: WorkerOptions,
    local: dict[str, Any],
    cpus: int,
    needs: tuple[int, int],
    timeout: float | None,
    stall: float | None,
) -> Iterator[tuple[str, Any]]:
    """One trial on this node: events as they come, and its output last."""
    global _launcher
    if _launcher is None:
        _launcher = LocalLauncher(**local).__enter__()
    launcher = _launcher
    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in _all_nodes() if node["NodeID"] == here)
    placement = _placement(cpus, max(1, _capacity_of(resources, *needs)))
    events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name) / "adapters", Path(name) / "log"
        own = options | {"folder": str(folder), "placement": dataclasses.asdict(placement)}

        def run() -> None:
            try:
                attempt = Attempt(Job.model_validate_json(job), own, log, timeout, stall)
                events.put(("record", launcher.run(attempt, lambda kind, value: events.put((kind, value)))))
            except BaseException as error:  # raised where the events are read
                events.put(("error", error))

        threading.Thread(target=run, daemon=True).start()
        reported = 0.0
        while True:
            kind, value = events.get()
            if kind == "error":
                raise value
            if kind == "record":
                files = {
                    str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
                }
                text = log.read_bytes() if log.exists() else b""
                yield "output", tuple(TrialOutput(value.model_dump_json(), platform.node(), text, files))
                return
            now = time.monotonic()
            if now - reported >= _REPORT_SECONDS or (kind == "phase" and value in ("load", "evaluate", "save")):
                reported = now
                yield kind, value
