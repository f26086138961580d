"""Whether recorded losses of an untrained model are those that a trial would measure."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.record import LossesBefore
from harness.sources import models, stories
from harness.spec import TrialSpec
from harness.training import checkpoints
from harness.training.batches import Example


def reusable(
    recorded: LossesBefore | None, spec: TrialSpec, texts: Sequence[Example], kind: str
) -> list[tuple[str, float, int]] | None:
    """Recorded losses of the texts as `evaluation.story_losses` gives them; null where they are to be measured anew.

    The recorded trial had the same `untrained_key`. Here what stands behind names is compared: the texts one by one,
    and whether a file of the base or of the data has changed since that trial began. Call after the model is loaded.

    Args:
        recorded: losses of both kinds; null: none.
        spec: of this trial.
        texts: of this trial.
        kind: which of the recorded losses they are: `held-out` or `general`.
    """
    if recorded is None:
        return None
    losses = {s.story_id: (s.story_id, s.loss, s.tokens) for s in recorded.stories if s.kind == kind}
    if {(name, tokens) for name, _, tokens in losses.values()} != {(e.story_id, e.completion_tokens) for e in texts}:
        return None
    if _changed_since(recorded.started_at, spec):
        return None
    return [losses[example.story_id] for example in texts]


def _changed_since(moment: dt.datetime, spec: TrialSpec) -> bool:
    """Whether what the losses depend on may have changed."""
    files = [*_base_files(spec.base_model)]
    for dataset in spec.datasets:
        file = stories.file_of(dataset.path)
        if file is not None:
            files.append(file)
        elif dataset.type.field_system is not None:  # a text that story ids do not cover, on the hub
            return True
    return not files or max(map(_changed_at, files)) >= moment.timestamp()


def _base_files(base_model: str) -> Iterator[Path]:
    """Everything that a base model is read from."""
    source = models.resolve(base_model)
    folder = models.downloads(source.name) if source.kind == "hub" else Path(checkpoints.checkpoint_folder(base_model))
    yield folder
    for place, folders, files in os.walk(folder):
        yield from (Path(place) / name for name in (*folders, *files))


def _changed_at(path: Path) -> float:
    """When a file, or the link to it, was last changed or replaced. A copied file keeps its mtime, and gets a ctime."""
    times = [path.lstat()]
    if path.exists():
        times.append(path.stat())
    return max(max(each.st_mtime, each.st_ctime) for each in times)
