"""Predictions in processes of their own, as many at a time as there are cores: the runner imports no torch."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

from harness.launch.local import main_module_hidden
from harness.spec import TrialSpec


@dataclass(frozen=True)
class Planned:
    """A spec's prediction, or why there is none."""

    spec: TrialSpec
    peak_memory_bytes: int | None
    shares: dict[str, int]
    """That peak by component, `memory_<component>_bytes`."""
    error: str | None = None


def _ignore_interrupts() -> None:
    """An interrupt is for the runner."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _predict(text: str, trust_remote_code: bool) -> dict[str, Any]:
    """In the child: what `plan.predict` says, or the one line of its refusal."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        from harness import plan

        try:
            found = plan.predict(TrialSpec.model_validate_json(text), trust_remote_code=trust_remote_code)
        except Exception as error:  # a model's own code may raise anything; the grid goes on
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            return {"error": first if isinstance(error, plan.Unpredictable) else f"{type(error).__name__}: {first}"}
    return {"peak": found.peak_memory_bytes, "shares": found.shares}


def plan_all(specs: Iterable[TrialSpec], *, trust_remote_code: bool = False) -> Iterator[Planned]:
    """Predict each spec; those that differ in nothing that takes memory are predicted once.

    Args:
        specs: in any order; the answers come as they are ready.
        trust_remote_code: let models from the hub run their own code.
    """
    groups: dict[str, list[TrialSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.memory_key, []).append(spec)
    if not groups:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.launch.preload"])
    forkserver.ensure_running()
    workers = min(len(groups), os.cpu_count() or 1)
    with main_module_hidden(), ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts) as pool:
        running: dict[Future[dict[str, Any]], list[TrialSpec]] = {
            pool.submit(_predict, group[0].model_dump_json(), trust_remote_code): group for group in groups.values()
        }
        try:
            for future in as_completed(running):
                try:
                    said = future.result()
                except BrokenProcessPool:
                    said = {"error": "the process that predicted it was ended"}
                for spec in running[future]:
                    yield Planned(spec, said.get("peak"), said.get("shares", {}), said.get("error"))
        except BaseException:  # interrupted: what has not begun is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
