"""Shared by the tests: small specs, what makes them cheap, and one cache for made and converted weights."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.cli import app, console
from harness.grids import document
from harness.launch import fork_server
from harness.record import Job, Record
from harness.runner import execution
from harness.spec.trial import TrialSpec

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads of tiny matrices wait for one another longer than they compute; so in the workers too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

FEW = "storyteller-openings"
"""The bundled dataset of 60 short texts: to tokenise 240 whole stories takes longer than to train on some of them."""

SMALL: dict[str, Any] = {
    "base_model": "random:tiny",
    "datasets": [{"path": FEW}],
    "precision": "fp32",
    "sequence_length": 256,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_samples": 16,
    "val_set_size": 2.0,
    "lora_r": 4,
}


@pytest.fixture
def small() -> Callable[..., TrialSpec]:
    """Makes a spec that trains in a second; keywords override."""

    def make(**overrides: Any) -> TrialSpec:
        return TrialSpec.model_validate(SMALL | overrides)

    return make


@pytest.fixture(autouse=True)
def _nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Visits take seconds each: tests of speeds ask for them, with `visits` in their grids."""
    monkeypatch.setattr(document, "DEFAULT_TIMING", document.NO_TIMING)


Quiet = Callable[..., None]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Quiet:
    """Visits as on a machine that works for nobody else, but for those that a function of their record names."""
    attempt = execution._last_attempt

    def install(disturbed: Callable[[Record], bool] = lambda record: False) -> None:
        def quiet_attempt(job: Job, context: Any) -> Record:
            record = attempt(job, context)
            if record.visit is None:
                return record
            waited = disturbed(record)
            # A busy machine may have ended the visit early: what it timed stands for all of its steps.
            steps = (*record.steps, *record.steps[: max(0, 3 - len(record.steps))])
            numbered = tuple(
                step.model_copy(update={"disturbed": waited, "step": n}) for n, step in enumerate(steps, start=1)
            )
            return record.model_copy(update={"steps": numbered, "disturbed": waited})

        monkeypatch.setattr(execution, "_last_attempt", quiet_attempt)

    install()
    return install


_seen = 0


@pytest.fixture(autouse=True)
def _settled() -> None:
    """What was imported stays for good, as in the server that trials are forked from: no collector looks at it again.

    Every trial and every prediction collects; among all that tests import, that would be half of what they take.
    """
    global _seen
    if len(sys.modules) != _seen:
        _seen = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_server() -> Iterator[None]:
    """The fork server outlives the commands that start it: a new one would import torch and transformers anew."""
    stop = fork_server.stop
    fork_server.stop = lambda: None
    yield
    fork_server.stop = stop
    stop()


Answer = tuple[int, str, str]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Answer]:
    """Runs a command in this process through its own entry point, in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    # The consoles kept the width of the test that first imported them.
    monkeypatch.setattr(console.out, "_width", None)
    monkeypatch.setattr(console.err, "_width", None)

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["harness", *arguments])
        code: Any = 0
        try:
            app.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run
