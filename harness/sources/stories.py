"""Datasets as prompts and completions, chats and texts: from files, folders, bundled or from the hub. No torch, no
tokenizer.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import InputError
from harness.sources import parts, shapes
from harness.sources.chats import EmptyRow, PassedOver
from harness.sources.examples import Chat, Passage, Row, Story
from harness.sources.files import read_file
from harness.sources.parts import NumberedRow
from harness.sources.places import BUNDLED, absolute
from harness.sources.places import is_relative_path as is_relative_file
from harness.sources.shapes import Shape
from harness.spec.datasets import DatasetSpec
from harness.spec.trial import TrialSpec

__all__ = [
    "BUNDLED",
    "Chat",
    "Passage",
    "Row",
    "Rows",
    "Story",
    "absolute",
    "general",
    "held_out",
    "is_relative_file",
    "read",
    "read_all",
]

GENERAL = BUNDLED["storyteller"].with_name("general.jsonl")
"""The bundled general text: prose, code and dialogue unlike the stories."""


@dataclass(frozen=True)
class Rows:
    """What the datasets of a spec hold."""

    stories: tuple[Row, ...]
    """In the order of datasets and files."""
    skipped: int
    """Rows that were passed over: without text, or as their dataset's keys say."""
    held_out: tuple[Row, ...] = ()
    """Rows that the data hold out themselves, in a part of their own; empty where they do not."""


def read_all(spec: TrialSpec) -> Rows:
    """All rows of a spec's datasets; those of its `test_datasets`, where it has any, are held out alone.

    Raises:
        InputError: as `read`.
    """
    to_train = [read(dataset, spec.folder, skip_empty=spec.skip_empty_rows) for dataset in spec.datasets]
    tests = [read(dataset, spec.folder, skip_empty=spec.skip_empty_rows) for dataset in spec.test_datasets or ()]
    held_out = [(*rows.stories, *rows.held_out) for rows in tests] or [rows.held_out for rows in to_train]
    return Rows(
        tuple(story for rows in to_train for story in rows.stories),
        sum(rows.skipped for rows in (*to_train, *tests)),
        tuple(itertools.chain.from_iterable(held_out)),
    )


def read(dataset: DatasetSpec, folder: str | None = None, *, skip_empty: bool = False) -> Rows:
    """All rows of a dataset.

    Args:
        dataset: where it is and its prompt keys.
        folder: that a relative path begins at; null: the current one.
        skip_empty: pass over rows without an instruction or a completion, or without a turn that is trained on.

    Raises:
        InputError: no such file or column, no rows, a value that is not text, columns of data for other kinds of
            training, or the hub cannot be reached.
    """
    to_train, to_hold_out = parts.read(dataset, folder)
    shape = shapes.shape_of(dataset.path, dataset.type, [row.values for row in to_train])
    for of, rows in itertools.groupby((*to_train, *to_hold_out), key=lambda row: row.of):
        name = f"{dataset.path}, {of}," if of else dataset.path
        shapes.check_columns(name, shape, [row.values for row in rows])
    to_train = _sampled(to_train, dataset.num_samples)
    stories = _examples(dataset, shape, to_train, skip_empty)
    held = _examples(dataset, shape, to_hold_out, skip_empty)
    for part, kept in ((to_train, stories), (to_hold_out, held)):
        if part and not kept:
            which = " that are held out" if part is to_hold_out else ""
            what = f"an empty {' or '.join(shape.columns)}"
            what += ", or turns that do not alternate" if dataset.type.alternating_turns else ""
            raise InputError(f"dataset {dataset.path}: each of its {len(part)} rows{which} has {what}")
    skipped = len(to_train) - len(stories) + len(to_hold_out) - len(held)
    return Rows(tuple(stories), skipped, tuple(held))


def _sampled(rows: Sequence[NumberedRow], count: int | None) -> list[NumberedRow]:
    """So many of the rows, at random; beyond all of them, some again. Null: the rows."""
    if count is None:
        return list(rows)
    chance = random.Random(0)  # which rows are trained on is a part of the data, not of a trial's seed
    return chance.sample(rows, min(count, len(rows))) + chance.choices(rows, k=max(0, count - len(rows)))


def _examples(dataset: DatasetSpec, shape: Shape, rows: Sequence[NumberedRow], skip_empty: bool) -> list[Row]:
    """The rows as examples, without those that are passed over."""
    examples: list[Row] = []
    for row in rows:
        try:
            examples.append(shape.read(row.values, f"dataset {dataset.path}, {row.place}"))
        except EmptyRow as reason:
            if not skip_empty and not isinstance(reason, PassedOver):
                raise
    return examples


def general(samples: int | None = None) -> list[tuple[str, str]]:
    """Hash and text of each passage of the bundled general text.

    Args:
        samples: so many of them, at equal distances: their kinds stand one after another. Null: all.
    """
    texts = [row["text"] for row in read_file(GENERAL)]
    count = min(samples or len(texts), len(texts))
    chosen = [texts[number * len(texts) // count] for number in range(count)]
    return [(hashlib.sha256(text.encode()).hexdigest()[:16], text) for text in chosen]


def held_out(wanted: float, distinct: int) -> int:
    """Number of stories that are held out: at least one, unless none is wanted.

    Args:
        wanted: `val_set_size` of a spec.
        distinct: number of distinct stories.

    Raises:
        InputError: none is left to train on.
    """
    count = int(wanted) if wanted >= 1 else max(1, round(wanted * distinct)) if wanted else 0
    if count >= distinct:
        raise InputError(
            f"val_set_size {wanted:g} leaves nothing to train on: there are {distinct} distinct stories; hold out fewer"
        )
    return count
