"""Watches somebody's own training loop, and keeps what was measured as a record like those of a grid's trials."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from harness import environment
from harness._util.messages import first_line
from harness._util.redact import redact
from harness.errors import InputError
from harness.metrics import METRICS, SCORES
from harness.record import NO_CONTENTS, WATCHED, Contents, Job, Record, Step
from harness.results.store import Store
from harness.results.timing import row_figures
from harness.sources import fingerprints
from harness.spec.trial import TrialSpec
from harness.training import distributed, formats, sizes
from harness.training.out_of_memory import out_of_memory
from harness.training.processes import combine
from harness.training.step import Diverged
from harness.watching import configuration
from harness.watching.loop import Loop

TRACKED_STEPS = 2
"""The first has no state of the optimizer yet."""


class Watch:
    """A watched training loop, see `watch`.

    Attributes:
        record: what was measured; null until the loop has ended, and in all processes but the first.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        name: str,
        folder: Path,
        spec: TrialSpec | None,
        tracked_steps: int,
        repeat: int,
    ) -> None:
        self.record: Record | None = None
        self.name = name
        self._folder, self._spec, self._repeat = folder, spec, repeat
        self._arguments: Mapping[str, Any] = {}
        self._started_at = dt.datetime.now(dt.UTC)
        self._started = time.perf_counter()
        self._loop = Loop(model, tracked_steps, block=int(self._started_at.timestamp()))
        self.tracking = self._loop.tracking

    def __enter__(self) -> Watch:
        self._loop.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(error)

    def start(self, arguments: Mapping[str, Any]) -> None:
        """As entering it, with the arguments of transformers' Trainer."""
        self._arguments = arguments
        self._loop.start()

    def report(self, loss: float, grad_norm: float | None = None) -> None:
        """Say the loss of the step that has just ended, or is about to, where the model does not give it.

        Args:
            loss: nats per supervised token.
            grad_norm: before clipping.
        """
        self._loop.report(loss, grad_norm)

    def stop(self, error: BaseException | None = None) -> None:
        """Write what was measured.

        Args:
            error: that ended the loop; an interrupt ends it well.
        """
        self._loop.stop()
        failure = error if isinstance(error, Exception) else None
        if failure is None and not self._loop.steps:
            warnings.warn(
                "harness.watch: no optimizer step of this model was seen, and nothing is recorded. It counts forward "
                "passes of the model that it was given, in training mode, and steps of a torch.optim.Optimizer",
                stacklevel=3,
            )
            return
        record = self._combined(self._measured(failure), failure)
        if record is not None:
            store = Store(self._folder)
            if store.row(record.trial_id, ["status"]) is not None:
                warnings.warn(
                    f"harness.watch: {self.name} takes the place of an earlier row of this name in {self._folder}; "
                    "another name, or repeat=1, keeps both",
                    stacklevel=3,
                )
            store.write(record)
            if not store.description():
                store.describe({"title": f"{self._folder.name}: trainings that were watched"})
            self.record = record

    def abandon(self) -> None:
        """Leave the model alone, and write nothing."""
        self._loop.stop()

    def _measured(self, failure: Exception | None) -> Record:
        loop = self._loop
        spec, unseen = (self._spec, ()) if self._spec is not None else configuration.seen(loop, self._arguments)
        oom = None if failure is None else out_of_memory(failure, loop.meter)
        end: dict[str, Any] = {"status": "ok"}
        if failure is not None:
            text = redact(first_line(failure))[:500]
            end = {"status": "failed", "phase": loop.phase, "error_type": type(failure).__name__, "error": text}
            end["status"] = "failed" if oom is None else "oom"
        elif loop.diverged is not None:
            end = {"status": "diverged", "phase": "forward", "error_type": Diverged.__name__, "error": loop.diverged}
        metrics = {**_figures(loop), **(oom or {}), "trial_seconds": time.perf_counter() - self._started}
        if end["status"] != "ok":
            metrics = {name: value for name, value in metrics.items() if name not in SCORES}
        contents = NO_CONTENTS if self._spec is None else _contents(self._spec)
        label = f"{self.name}{WATCHED}"
        baseline = self._baseline(spec)
        job = Job(
            grid=self._folder.name, spec=spec, label=label, repeat=self._repeat, baseline_id=baseline, watched=True,
            unseen=unseen, **contents.columns,
        )  # fmt: skip
        return Record.of(
            job,
            environment=environment.current("cuda" if loop.device.type == "cuda" else "cpu"),
            started_at=self._started_at,
            metrics=metrics,
            steps=tuple(loop.steps),
            base_formats=formats.byte_fractions(loop.model),
            attention_kernel=getattr(getattr(loop.model, "config", None), "_attn_implementation", None),
            **end,
        )

    def _baseline(self, spec: TrialSpec) -> str:
        """That of the grid whose results the folder holds; else the first watched loop's, which may be this one."""
        rows = Store(self._folder).read("trials", ["trial_id", "baseline_id", "repeat", "started_at"]).to_pylist()
        known = [row for row in rows if row["baseline_id"] is not None]
        of_repeat = [row for row in known if row["repeat"] == self._repeat] or known
        return max(of_repeat, key=lambda row: row["started_at"])["baseline_id"] if of_repeat else spec.id

    def _combined(self, record: Record, failure: Exception | None) -> Record | None:
        """The record of all processes, in the first one; null in the others. One that failed may be alone."""
        if distributed.world_size() == 1:
            return _timed(record)
        if failure is not None:
            return record if distributed.rank() == 0 else None
        texts: list[Any] = [None] * distributed.world_size()
        torch.distributed.all_gather_object(texts, record.model_dump_json())
        if distributed.rank() > 0:
            return None
        records = [Record.model_validate_json(text) for text in texts]
        whole = combine(records)
        return _timed(whole.model_copy(update={"steps": tuple(_of_all_ranks(records))}))


def _figures(loop: Loop) -> dict[str, float | int | None]:
    tracked = [step for step in loop.steps if step.tracked]
    tokens = sum(step.tokens for step in tracked)
    return {
        **dict.fromkeys(METRICS),
        **sizes.of(loop.model),
        "peak_memory_bytes": loop.peak_memory_bytes or None,
        **loop.breakdown,
        "peak_reserved_bytes": loop.reserved,
        "peak_process_bytes": loop.meter.process(),
        "optimizer_steps": len(loop.steps),
        "trained_tokens": sum(step.tokens for step in loop.steps),
        "flops_per_token": loop.flops / tokens if tokens else None,
    }


def _timed(record: Record) -> Record:
    """With the figures of its timed steps."""
    figures = {name: value for name, value in row_figures(record.steps).items() if record.status == "ok"}
    disturbed = record.status == "ok" and not figures["timed_steps"] and any(s.disturbed for s in record.steps)
    return record.model_copy(update={"metrics": record.metrics | figures, "disturbed": disturbed})


def _of_all_ranks(records: Sequence[Record]) -> list[Step]:
    """Each step over all processes: sums of what they took, and the seconds of the slowest."""
    counted = ("samples", "tokens", "supervised_tokens", "padded_tokens")
    steps = []
    for same in zip(*(record.steps for record in records), strict=False):
        sums = {name: sum(getattr(step, name) for step in same) for name in counted}
        losses = [(step.loss, step.supervised_tokens) for step in same]
        known = [(loss, n) for loss, n in losses if loss is not None]
        loss = sum(x * n for x, n in known) / max(1, sum(n for _, n in known)) if len(known) == len(losses) else None
        ends = {"seconds": max(step.seconds for step in same), "disturbed": any(step.disturbed for step in same)}
        steps.append(same[0].model_copy(update={**sums, **ends, "loss": loss}))
    return steps


def _contents(spec: TrialSpec) -> Contents:
    """Fingerprints of what a spec names, so that its row stands with those of a grid; none where it cannot be read."""
    with contextlib.suppress(InputError, OSError):
        return fingerprints.of(spec)
    return NO_CONTENTS


def watch(
    model: torch.nn.Module,
    name: str = "training",
    *,
    results: str | os.PathLike[str] = "results/watched",
    spec: Mapping[str, Any] | TrialSpec | None = None,
    tracked_steps: int = TRACKED_STEPS,
    repeat: int = 0,
) -> Watch:
    """Measure a training loop of your own, with the same meanings as a grid's trials: peak memory and what it is of,
    tokens per second, operations per token, steps that the machine disturbed. The loop stays as it is.

    Steps are recognised by themselves: from a forward pass of the model in training mode to the end of an optimizer's
    step. The first are tracked, tensor by tensor, which takes up to half as long again; the others are timed. One row
    is written when the loop ends, with an error too, to parquet files that `harness report` and `harness compare` read.

    Args:
        model: what is trained, with its adapters; of transformers, or another that is called with `input_ids`.
        name: of the row, which says that it was watched.
        results: folder of a grid's results, to compare with its trials, or a new one.
        spec: keys of a grid that say the same training; null: what can be seen of it, and null in the row for the rest.
        tracked_steps: how many steps are tracked before the others are timed: 2 or more, since the first step has no
            state of an optimizer yet.
        repeat: of the same training under another seed.

    Returns:
        A context manager; its `record` is what was measured.

    Raises:
        InputError: the spec is none, an argument is out of range, or results cannot be written.

    Example:
        >>> with harness.watch(trainer.model, "SFTTrainer", results="results/mine") as watched:
        ...     trainer.train()
        >>> watched.record.metrics["peak_memory_bytes"]
    """
    if tracked_steps < 2:
        raise InputError(f"harness.watch: tracked_steps {tracked_steps}; give 2 or more")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("harness.watch: the model has no trainable parameter")
    label = " ".join(str(name).split())
    if not label:
        raise InputError("harness.watch: name is empty")
    folder = Path(results)
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise InputError(f"harness.watch: results {folder}: {existing} is no folder that can be written")
    known = None if spec is None else configuration.given(spec)
    return Watch(model, label, folder, known, tracked_steps, repeat)
