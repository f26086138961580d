"""A callback of transformers' Trainer, and of those built on it like TRL's, that watches its training."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from harness.spec.trial import TrialSpec
from harness.watching import watch

_running: dict[int, tuple[str, weakref.ref[watch.Watch], contextlib.ExitStack]] = {}
"""By thread the training that began last and has not ended: its name, its watch, and what tracks it, for its model may
be gone. No callback hears of an error or an interrupt.
"""


def _abandon_unfinished() -> None:
    name, watched, tracking = _running.pop(threading.get_ident(), ("", None, None))
    if tracking is None:
        return
    tracking.close()
    if watched is not None and (alive := watched()) is not None:
        alive.abandon()
    warnings.warn(
        f"harness.watch: {name} did not end, and nothing is recorded of it; harness.watch as a context manager records "
        "errors and interrupts too",
        stacklevel=3,
    )


class WatchCallback(TrainerCallback):
    """Watches a training from its first step to its end, see `harness.watch`. What the Trainer's arguments say of the
    configuration is recorded with what can be seen. A training that ends with an error is recorded only by
    `harness.watch` as a context manager.

    Args:
        name: of the row.
        results: folder of results.
        spec: keys of a grid that say the same training.
        options: of `harness.watch`.

    Example:
        >>> trainer = SFTTrainer(model, callbacks=[harness.WatchCallback("SFT", results="results/mine")])
        >>> trainer.train()
    """

    def __init__(
        self,
        name: str = "training",
        *,
        results: str | os.PathLike[str] = "results/watched",
        spec: Mapping[str, Any] | TrialSpec | None = None,
        **options: Any,
    ) -> None:
        self.watched: watch.Watch | None = None
        self._options: dict[str, Any] = {"name": name, "results": results, "spec": spec, **options}
        self._logged = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        _abandon_unfinished()
        self.watched = watch.watch(kwargs["model"], **self._options)
        _running[threading.get_ident()] = (self.watched.name, weakref.ref(self.watched), self.watched.tracking)
        self.watched.start(args.to_dict())
        self._logged = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over a loss that is of one step (`logging_steps=1`)."""
        logs: Mapping[str, Any] = kwargs.get("logs") or {}
        if self.watched is None or "loss" not in logs:
            return
        if state.global_step == self._logged + 1:
            self.watched.report(float(logs["loss"]), logs.get("grad_norm"))
        self._logged = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was measured."""
        if self.watched is not None:
            _running.pop(threading.get_ident(), None)
            self.watched.stop()
