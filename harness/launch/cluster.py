"""Trials as tasks of a Ray cluster. The one module that imports Ray.

On its node a trial is what it is here: a process forked from a server that has imported everything once, watched over
by a `LocalLauncher`. What it says, its record, its log and its adapter come back through Ray: nodes share no disk.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import platform
import queue
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness import environment
from harness.errors import InputError
from harness.launch.attempt import Attempt, OnEvent
from harness.launch.endings import WORKER_LOST
from harness.launch.local import LocalLauncher, measure
from harness.private import withheld
from harness.results import Job, Phase, Record

_TELL_SECONDS = 0.5
"""Between two signs of life that travel; what a step does in detail stays on its node."""

_KNOCK_SECONDS = 10.0

Child = Callable[[str, dict[str, Any], Any], None]


class Sent(NamedTuple):
    """What comes back from a node at the end of a trial."""

    record: str
    """JSON."""
    node: str
    """Name of the machine."""
    log: bytes
    files: dict[str, bytes]
    """Of the adapter, by the path within `adapters/`."""


class RayLauncher:
    """One task for each trial, with the resources that it takes. Use as a context manager.

    Args:
        address: of a cluster (`auto`: the one that this machine belongs to); null: one on this machine alone.
        device: of the trials: `cuda` asks for a card each.
        cpus: cores of a trial; null: those of the smallest node, by the cards of it where trials have cards.
        accelerator: kind of card that nodes must have, by Ray's name for it (`H100`, `A100`, …).
        processes: how many a trial has, each number that there is; they stay on a node, each with a card and the cores
            of a trial with one, or without cards with a share of the trial's cores.
        child, preload: as a `LocalLauncher` takes them.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        device: str = "auto",
        cpus: int | None = None,
        accelerator: str | None = None,
        processes: Iterable[int] = (1,),
        child: Child = measure,
        preload: str = "harness.launch.preload",
    ) -> None:
        self._address, self._device = address, device
        self._cpus, self._accelerator, self._processes = cpus, accelerator, sorted(set(processes))
        self._how = {"child": child, "preload": preload}
        self._running: set[Any] = set()

    def __enter__(self) -> RayLauncher:
        # Its page would be open to the network else; what it says of itself is for logs.
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if self._address is None:
            options |= {"include_dashboard": False, "dashboard_host": "127.0.0.1"}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            _knock(self._address)
            ray.init(address=self._address or "local", **options)  # else it looks for one that is running
        except (ConnectionError, OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"--address {self._address}: {first}; start a cluster with: ray start --head") from None
        nodes = self._nodes()
        self._gpus = 1 if self._device == "cuda" or (self._device == "auto" and any(_gpus(n) for n in nodes)) else 0
        able = [node for node in nodes if _gpus(node) >= self._gpus]
        if not able:
            self._refuse("no node of the cluster has a card; give --device cpu, or start nodes with cards")
        if self._accelerator is not None:
            able = [node for node in able if f"accelerator_type:{self._accelerator}" in node["Resources"]]
            if not able:
                self._refuse(f"no node of the cluster has an {self._accelerator}; --accelerator takes Ray's names")
        shares = [int(_cpus(node) // max(1, _gpus(node) if self._gpus else 1)) for node in able]
        self._cpus = self._cpus or max(1, min(shares))
        self._refuse_what_has_no_room(able)
        self.workers = sum(self._seats(node, self._processes[0]) for node in able)
        """So many trials at the same time, of those that take least."""
        self.nodes = self._look(able)
        """Environments of the nodes, each kind once."""
        return self

    def __exit__(self, *error: object) -> None:
        ray.shutdown()

    def _refuse(self, reason: str) -> NoReturn:
        self.__exit__()
        raise InputError(reason)

    def _refuse_what_has_no_room(self, nodes: list[dict[str, Any]]) -> None:
        for processes in self._processes:
            wanted = f"num_processes {processes}: " if processes > 1 else ""
            if not self._gpus and (self._cpus or 1) < processes:
                self._refuse(f"{wanted}a trial has {self._cpus} cores here; give --cpus {processes} or more")
            if not any(self._seats(node, processes) for node in nodes):
                cores, cards = self._taken(processes)
                said = f"{cores} cores" + (f" and {cards} card{'s' * (cards > 1)}" if cards else "")
                self._refuse(f"{wanted}no node of the cluster has {said}; give fewer with --cpus")

    def run(self, attempt: Attempt, on_event: OnEvent) -> Record:
        """As `LocalLauncher.run`, on a node of the cluster. A node that is lost ends as `killed`.

        Raises:
            KeyboardInterrupt: passed on from `on_event`; the task is cancelled first.
        """
        started_at = dt.datetime.now(dt.UTC)
        processes = attempt.job.spec.num_processes
        task: Any = _trial.options(**self._resources(processes), num_returns="streaming")
        how = (self._how, self._cpus, self._taken(processes), attempt.timeout, attempt.stall)
        said = task.remote(attempt.job.model_dump_json(), attempt.options, *how)
        self._running.add(said)
        phase: Phase = "start"
        sent: Sent | None = None
        error: Exception = RuntimeError("it ended without a record")
        try:
            for reference in said:  # to its end: Ray uses the worker again
                kind, value = ray.get(reference)
                if kind == "sent":
                    sent = Sent(*value)
                    continue
                if kind == "phase":
                    phase = value
                on_event(kind, value)
        except ray.exceptions.RayError as lost:
            error = lost
        except BaseException:
            _cancel(said)
            raise
        finally:
            self._running.discard(said)
        if sent is not None:
            return self._arrived(sent, attempt.options, attempt.log)
        return Record.of(
            attempt.job,
            environment=environment.current(environment.resolve_device(attempt.job.spec.device)),
            phase=phase,
            started_at=started_at,
            metrics={"trial_seconds": (dt.datetime.now(dt.UTC) - started_at).total_seconds()},
            **_silent_end(error),
        )

    def seats(self, count: int, device_type: str) -> list[None]:
        """Nodes divide themselves."""
        return [None] * count

    def stop(self) -> None:
        """End what is running now."""
        for said in [*self._running]:
            _cancel(said)

    def _arrived(self, sent: Sent, options: dict[str, Any], log: Path) -> Record:
        """Put into place what a node has sent."""
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(sent.log)
        record = Record.model_validate_json(sent.record).model_copy(update={"node": sent.node})
        if record.adapter_id is not None and options.get("folder"):
            target = Path(options["folder"]) / record.adapter_id
            aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.aside")
            try:
                own = {n: c for n, c in sent.files.items() if Path(n).parts[0] == record.adapter_id}
                for name, content in own.items():
                    file = aside / Path(name).relative_to(record.adapter_id)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content)
                if not target.is_dir():
                    aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return record

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in _all_nodes() if node["Alive"] and _cpus(node)]

    def _taken(self, processes: int) -> tuple[int, int]:
        """Cores and cards of a trial: without cards its processes divide the cores of a trial with one."""
        times = processes if self._gpus else 1
        return (self._cpus or 1) * times, self._gpus * times

    def _seats(self, node: dict[str, Any], processes: int) -> int:
        """So many trials of such a number at the same time on a node."""
        return _room_for(node["Resources"], *self._taken(processes))

    def _resources(self, processes: int) -> dict[str, Any]:
        cores, cards = self._taken(processes)
        found: dict[str, Any] = {"num_cpus": cores, "num_gpus": cards, "max_retries": 0}
        return found | ({"accelerator_type": self._accelerator} if self._accelerator else {})

    def _look(self, nodes: list[dict[str, Any]]) -> tuple[environment.Environment, ...]:
        """What trials will run on, asked of each node."""
        asked = [
            _environment.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(self._device, dataclasses.asdict(_seat(self._cpus or 1, self._seats(node, processes))))
            for node in nodes
            for processes in self._processes
            if self._seats(node, processes)
        ]
        found = [environment.Environment.model_validate_json(text) for text in ray.get(asked)]
        return tuple({each.id: each for each in found}.values())


def _knock(address: str | None) -> None:
    """Ray waits for minutes where nobody answers.

    Raises:
        OSError: nobody does.
        ValueError: it is no address.
    """
    if address is not None and address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        if not (host and port.isascii() and port.isdigit()):
            raise ValueError("it is none; give host:port, or auto")
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _all_nodes() -> list[dict[str, Any]]:
    return list(ray.nodes())  # type: ignore[no-untyped-call]  # Ray's


def _cpus(node: dict[str, Any]) -> float:
    return float(node["Resources"].get("CPU", 0))


def _room_for(resources: Mapping[str, float], cores: int, cards: int) -> int:
    """So many trials have room in a node's resources."""
    by_cores = int(resources.get("CPU", 0) // cores)
    return min(by_cores, int(resources.get("GPU", 0) // cards)) if cards else by_cores


def _gpus(node: dict[str, Any]) -> float:
    return float(node["Resources"].get("GPU", 0))


def _silent_end(error: Exception) -> dict[str, Any]:
    """Fields of a record, of a task that sent none."""
    if isinstance(error, ray.exceptions.RayTaskError):  # it could not even begin there: what it lacks it lacks again
        cause = error.cause if isinstance(error.cause, Exception) else error
        return {"status": "failed", "error_type": type(cause).__name__, "error": _first_line(cause)}
    said = f"the node or its worker was lost ({type(error).__name__}: {_first_line(error)})"
    return {"status": "killed", "error_type": WORKER_LOST, "error": said}


def _first_line(error: Exception) -> str:
    return withheld(next(iter(str(error).strip().splitlines()), type(error).__name__))[:400]


def _cancel(said: Any) -> None:
    try:
        ray.cancel(said, force=True)
    except (ray.exceptions.RayError, ValueError, TypeError):  # it has ended
        return


# ------------------------------------------------------------------------------------ on a node

_server: LocalLauncher | None = None
"""Of this Ray worker, which Ray uses for one task after another."""


def _seat(cpus: int, seats: int) -> environment.Seat:
    """What a task has of its node; Ray binds it to no cores of its own."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return environment.Seat(cores, os.environ.get("CUDA_VISIBLE_DEVICES"), seats - 1, threads=cpus)


@ray.remote
def _environment(device: str, seat: dict[str, Any]) -> str:
    """The environment of a trial on this node, as JSON."""
    taken = environment.Seat(**seat)
    return environment.current(environment.resolve_device(device)).at(taken).model_dump_json()


@ray.remote
def _trial(
    job: str,
    options: dict[str, Any],
    how: dict[str, Any],
    cpus: int,
    taken: tuple[int, int],
    timeout: float | None,
    stall: float | None,
) -> Iterator[tuple[str, Any]]:
    """One trial on this node: signs of life, and last what is to be kept."""
    global _server
    if _server is None:
        _server = LocalLauncher(**how)
        _server.__enter__()
    server = _server
    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in _all_nodes() if node["NodeID"] == here)
    seats = max(1, _room_for(resources, *taken))
    heard: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name) / "adapters", Path(name) / "log"
        asked = options | {"folder": str(folder), "seat": dataclasses.asdict(_seat(cpus, seats))}

        def run() -> None:
            try:
                attempt = Attempt(Job.model_validate_json(job), asked, log, timeout, stall)
                record = server.run(attempt, lambda kind, value: heard.put((kind, value)))
                heard.put(("record", record))
            except BaseException as error:  # told to whoever waits for it
                heard.put(("error", error))

        threading.Thread(target=run, daemon=True).start()
        told = 0.0
        while True:
            kind, value = heard.get()
            if kind == "error":
                raise value
            if kind == "record":
                files = {
                    str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
                }
                text = log.read_bytes() if log.exists() else b""
                yield "sent", tuple(Sent(value.model_dump_json(), platform.node(), text, files))
                return
            if time.monotonic() - told >= _TELL_SECONDS or (kind == "phase" and value in ("load", "evaluate", "save")):
                told = time.monotonic()
                yield kind, value
