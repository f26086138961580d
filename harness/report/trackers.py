"""Recorded trials in the stores of experiment trackers: MLflow, TensorBoard, trackio, Weights & Biases.

A grid is a project, a trial a run in it: its configuration as parameters, its figures and their effects against the
baseline with both ends of the interval, its losses step by step, and the page of the report. Sent again, a trial takes
the place of what was sent of it before; in W&B it is gone on with, so that its figures are new and its steps the old.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness._util.messages import first_line, pip_install, unknown
from harness.errors import InputError
from harness.metrics import METRICS
from harness.report import notebook
from harness.results.schema import spec_of
from harness.results.store import Store

_OF_STEPS = ("loss", "grad_norm", "learning_rate", "seconds", "tokens", "peak_memory_bytes")
_TAGS = ("trial_id", "spec_id", "environment_id", "label", "status", "error", "device_name")
_NO_LINES: dict[str, Any] = {"silent": True}
"""wandb prints nothing of itself."""
_BATCH = 90
"""MLflow takes no more than 100 parameters and 1,000 metrics at once."""


class TrackerFailed(UserWarning):
    """A tracker did not take the results, which are kept all the same."""


@dataclass(frozen=True)
class TrackedRun:
    """One trial, as trackers show it."""

    id: str
    """Of the trial."""
    name: str
    """Its label, and its repeat."""
    parameters: dict[str, Any]
    """Its configuration: plain values, others as JSON."""
    figures: dict[str, float]
    """By metric; `effect/<metric>`, `…/low` and `…/high` against the baseline: a ratio, or a difference in nats."""
    steps: tuple[tuple[int, dict[str, float]], ...]
    """Training steps by number."""
    tags: dict[str, str]
    """What else is known of it."""
    started_at: dt.datetime
    """UTC."""
    seconds: float
    """That it took."""

    @property
    def ended_well(self) -> bool:
        """Whether its figures count."""
        return self.tags["status"] == "ok"


def runs_of(folder: Path) -> list[TrackedRun]:
    """Every recorded trial of a grid, of all environments.

    Raises:
        InputError: nothing is recorded there.
    """
    store = Store(folder)
    rows = store.read("trials").to_pylist()
    if not rows:
        raise InputError(f"{folder}: no trials are recorded; `harness run` fills it")
    effects = _effects(folder, {row["environment_id"] for row in rows})
    steps: dict[str, list[Mapping[str, Any]]] = {}
    for row in store.read("steps").to_pylist():
        steps.setdefault(row["trial_id"], []).append(row)
    return [_run(row, steps.get(row["trial_id"], []), effects) for row in rows]


def _effects(folder: Path, environments: Iterable[str]) -> dict[str, dict[str, float]]:
    """Effects by the ids of the trials that they rest on, those of each environment for itself; none where nothing can
    be compared.
    """
    effects: dict[str, dict[str, float]] = {}
    for environment in environments:
        with contextlib.suppress(InputError):
            effects |= _effects_in(notebook.load(folder, environment))
    return effects


def _effects_in(results: notebook.Results) -> dict[str, dict[str, float]]:
    """By trial."""
    effects: dict[str, dict[str, float]] = {}
    for row in results.comparisons.to_dict("records"):
        name = f"effect/{row['metric']}"
        ends = {name: row["value"], f"{name}/low": row["low"], f"{name}/high": row["high"]}
        effects.setdefault(row["technique"], {}).update(_finite(ends))
    m = results.document.comparison.measurements
    ok = m.trials[(m.trials["status"] == "ok") & ~m.trials["twin"]]
    labels = m.labels(ok["config"])
    return {trial: effects[label] for trial, label in zip(ok["trial_id"], labels, strict=True) if label in effects}


def _run(
    row: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], effects: Mapping[str, Mapping[str, float]]
) -> TrackedRun:
    keys = spec_of(row).canonical()
    parameters = {key: value if isinstance(value, str | int | float | bool) else json.dumps(value)
                  for key, value in keys.items() if row[key] is not None}  # fmt: skip
    trained = [step for step in steps if step["block"] is None or row["watched"]]
    figures = _finite({name: row[name] for name in METRICS})
    return TrackedRun(
        id=row["trial_id"],
        name=row["label"] + (f" (repeat {row['repeat']})" if row["repeat"] else ""),
        parameters=parameters,
        figures=figures | dict(effects.get(row["trial_id"], {})),
        steps=tuple((step["step"], _finite({name: step[name] for name in _OF_STEPS})) for step in trained),
        tags={name: str(row[name]) for name in _TAGS if row[name] is not None},
        started_at=row["started_at"],
        seconds=float(row["trial_seconds"] or 0.0),
    )


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(x) for name, x in values.items() if x is not None and math.isfinite(x)}


def send(folder: Path, tracker: str, *, place: str | None = None, page: Path | None = None) -> tuple[int, str]:
    """Send a grid's trials to a tracker.

    Args:
        folder: results/<grid>.
        tracker: mlflow, tensorboard, trackio or wandb.
        place: where it keeps them: an address or a database (MLflow), a folder (the others); null: its own default.
        page: the report, as an artifact where the tracker has them; null: none.

    Returns:
        How many trials were sent, and where they are.

    Raises:
        InputError: there is no such tracker, it is not installed, or nothing is recorded.
        Exception: whatever the tracker raises.
    """
    check(tracker)
    runs = runs_of(folder)
    return len(runs), _SENDERS[tracker](runs, folder.resolve().name, place, page)


def check(tracker: str) -> None:
    """Check that there is such a tracker, and that it is installed.

    Raises:
        InputError: there is none, or it is not.
    """
    if tracker not in _SENDERS:
        raise InputError(unknown("tracker", tracker, list(_SENDERS)))
    if importlib.util.find_spec(tracker) is None:
        raise InputError(f"{tracker} is not installed; {pip_install(tracker)}")


def send_or_warn(folder: Path, tracker: str, page: Path | None = None) -> str | None:
    """As `send`, after a run: what goes wrong is a warning. Returns where they are; null: nowhere."""
    try:
        return send(folder, tracker, page=page)[1]
    except Exception as error:  # a tracker costs no trial
        warnings.warn(
            TrackerFailed(f"--report-to {tracker}: {first_line(error)}; harness export sends the results again"),
            stacklevel=2,
        )
        return None


# ------------------------------------------------------------------------------------ each tracker


def _mlflow(runs: Sequence[TrackedRun], project: str, place: str | None, page: Path | None) -> str:
    import mlflow
    from mlflow.entities import Metric, Param

    uri = place or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:"):
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it prints each step of making a database
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
    for run in runs:
        for old in client.search_runs([experiment_id], filter_string=f"tags.trial_id = '{run.id}'"):
            client.delete_run(old.info.run_id)
        began = int(run.started_at.timestamp() * 1000)
        made = client.create_run(experiment_id, start_time=began, run_name=run.name, tags=run.tags).info.run_id
        parameters = [Param(key, str(value)[:6000]) for key, value in run.parameters.items()]
        metrics = [Metric(name, value, began, 0) for name, value in run.figures.items()]
        metrics += [Metric(f"train/{name}", value, began, n) for n, step in run.steps for name, value in step.items()]
        for part in _batches(parameters):
            client.log_batch(made, params=part)
        for part in _batches(metrics):
            client.log_batch(made, metrics=part)
        if page is not None and run is runs[0]:
            client.log_artifact(made, str(page))
        status = "FINISHED" if run.ended_well else "FAILED"
        client.set_terminated(made, status=status, end_time=began + int(run.seconds * 1000))
    return uri


def _batches(values: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(values), _BATCH):
        yield values[start : start + _BATCH]


def _tensorboard(runs: Sequence[TrackedRun], project: str, place: str | None, page: Path | None) -> str:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    root = Path(place or "runs") / project
    for run in runs:
        folder = root / f"{_file_name(run.name)}-{run.id}"
        shutil.rmtree(folder, ignore_errors=True)
        with SummaryWriter(str(folder)) as writer:
            parameters = {key: value for key, value in run.parameters.items() if not isinstance(value, list)}
            for summary in hparams(parameters, dict.fromkeys(run.figures, 0.0)):
                writer.file_writer.add_summary(summary)
            for name, value in run.figures.items():
                writer.add_scalar(name, value, 0)
            for number, step in run.steps:
                for name, value in step.items():
                    writer.add_scalar(f"train/{name}", value, number)
            text = "\n".join(f"    {name}: {value}" for name, value in run.tags.items())
            writer.add_text("trial", text)
            if page is not None:
                writer.add_text("report", str(page))
    return str(root)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60] or "trial"


def _trackio(runs: Sequence[TrackedRun], project: str, place: str | None, page: Path | None) -> str:
    if place is not None:
        os.environ["TRACKIO_DIR"] = str(Path(place).absolute())  # read when it is imported
    import trackio
    from trackio.utils import TRACKIO_DIR

    old = {each.name: each for each in _trackio_runs(trackio, project)}
    for run in runs:
        name = f"{run.name} {run.id}"  # whole: the same configuration may have run in several environments
        if name in old:
            old[name].delete()
        with _no_output():
            trackio.init(
                project=project, name=name, group=project, config=run.parameters | run.tags, embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
            for number, step in run.steps:
                trackio.log({f"train/{each}": value for each, value in step.items()}, step=number)
            last = run.steps[-1][0] if run.steps else 0
            trackio.log(run.figures, step=last + 1)
            trackio.finish()  # type: ignore[no-untyped-call]  # trackio's
    return str(TRACKIO_DIR)


def _trackio_runs(trackio: Any, project: str) -> list[Any]:
    try:
        return list(trackio.Api().runs(project))
    except ValueError:  # there is no such project yet
        return []


def _wandb(runs: Sequence[TrackedRun], project: str, place: str | None, page: Path | None) -> str:
    import wandb

    folder = Path(place or ".")
    folder.mkdir(parents=True, exist_ok=True)
    offline = not (os.environ.get("WANDB_MODE") or wandb.api.api_key)  # the key of the environment, or of a login
    for run in runs:
        made = wandb.init(
            project=project, group=project, name=run.name, id=run.id, config=run.parameters, dir=str(folder),
            tags=[run.tags["status"]], resume="allow", reinit="finish_previous",
            mode="offline" if offline else None,
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, **_NO_LINES),
        )  # fmt: skip
        for number, step in run.steps:
            made.log({f"train/{name}": value for name, value in step.items()}, step=number)
        made.summary.update(run.figures | run.tags)
        if page is not None and run is runs[0]:
            made.save(str(page), base_path=str(page.parent), policy="now")
        made.finish(exit_code=0 if run.ended_well else 1)
    return str(folder / "wandb")


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Within, what a library prints of itself is dropped."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


_SENDERS: dict[str, Callable[[Sequence[TrackedRun], str, str | None, Path | None], str]] = {
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}
TRACKERS = tuple(_SENDERS)
"""Names of the trackers."""
