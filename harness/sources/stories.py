"""Datasets as prompts and completions: from files, bundled or from the hub. No torch, no tokenizer."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness._util.messages import first_line, one_line
from harness.data_spec import DatasetSpec, PromptSpec
from harness.errors import InputError
from harness.sources.files import (
    SUFFIXES,
    UNREADABLE,
    brief,
    full_path,
    hint_of_current,
    is_relative,
    read_file,
)
from harness.sources.hub import HUB_ID, read_hub
from harness.spec import TrialSpec

_DATA = Path(__file__).parent / "data"
BUNDLED: dict[str, Path] = {
    "storyteller": _DATA / "storyteller.jsonl",
    "storyteller-openings": _DATA / "openings.jsonl",  # the first sentences of every fourth of them
}
GENERAL = _DATA / "general.jsonl"
"""The bundled general text: prose, code and dialogue unlike the stories."""


@dataclass(frozen=True)
class Story:
    """One example of a prompt and a completion, before tokenisation."""

    instruction: str
    completion: str
    system: str | None
    input: str | None
    prompt: PromptSpec

    @property
    def id(self) -> str:
        """16 hex digits of the hash of its texts, whatever its position in the file."""
        return _hash("\0".join((self.instruction, self.input or "", self.completion)))

    @property
    def texts(self) -> list[str | None]:
        """All that a trial reads of it."""
        return [self.instruction, self.input, self.completion, self.system]


@dataclass(frozen=True)
class Chat:
    """One example of several turns."""

    messages: tuple[dict[str, Any], ...]
    """As chat templates take them: `role` and `content` each, perhaps `tool_calls` and others."""
    prompt: PromptSpec
    tools: tuple[dict[str, Any], ...] = ()
    """What the assistant may call, as JSON schemas."""
    trained_from: int = 0
    """Number of the first message that may carry loss: those before it are a prompt."""

    @property
    def id(self) -> str:
        """As of a story."""
        return _hash(str(self.texts[0]))

    @property
    def texts(self) -> list[str | None]:
        """All that a trial reads of it."""
        return [json.dumps([self.messages, self.tools, self.trained_from], sort_keys=True, default=str)]

    @property
    def instruction(self) -> str:
        """What the last trained turn answers."""
        return self._last(self.messages[:-1], ("user",))

    @property
    def completion(self) -> str:
        """The last trained turn."""
        return self._last(self.messages, self.prompt.roles_to_train)

    @staticmethod
    def _last(messages: Sequence[dict[str, Any]], roles: Collection[str]) -> str:
        texts = [message.get("content") for message in messages if message["role"] in roles]
        return next((text for text in reversed(texts) if isinstance(text, str)), "")


@dataclass(frozen=True)
class Passage:
    """One example of a text without a prompt: all of it carries loss."""

    completion: str
    prompt: PromptSpec
    instruction: str = ""

    @property
    def id(self) -> str:
        """As of a story."""
        return _hash(self.completion)

    @property
    def texts(self) -> list[str | None]:
        """All that a trial reads of it."""
        return [self.completion]


Row = Story | Chat | Passage
"""One example before tokenisation."""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Rows:
    """What the datasets of a spec hold."""

    stories: tuple[Row, ...]
    """In the order of datasets and files."""
    skipped: int
    """Rows without text that were passed over."""
    held_out: tuple[Row, ...] = ()
    """Rows that the data themselves hold out; empty: some of the others are."""


def read_all(spec: TrialSpec) -> Rows:
    """All rows of a spec's datasets.

    Raises:
        InputError: as `read`.
    """
    read_rows = [read(dataset, spec.folder, skip_empty=spec.skip_empty_rows) for dataset in spec.datasets]
    return Rows(tuple(s for rows in read_rows for s in rows.stories), sum(rows.skipped for rows in read_rows))


def read(dataset: DatasetSpec, folder: str | None = None, *, skip_empty: bool = False) -> Rows:
    """All rows of a dataset.

    Args:
        dataset: its path and its prompt keys.
        folder: that a relative path begins at; null: the current one.
        skip_empty: pass over rows without an instruction or a completion.

    Raises:
        InputError: no such file or column, no rows, a value that is not text, or the hub cannot be reached.
    """
    columns, rows = _rows(dataset.path, folder)
    if not rows:
        raise InputError(f"dataset {dataset.path} has no rows; it needs at least one")
    prompt = dataset.type
    needed = [c for c in (prompt.field_instruction, prompt.field_input, prompt.field_output) if c is not None]
    for column in needed:
        if column not in columns:
            there = one_line(", ".join(map(repr, sorted(columns))))
            raise InputError(
                f"dataset {dataset.path} has no column {column!r}; it has {there} "
                "(set field_instruction, field_input and field_output under datasets: type:)"
            )
    numbered = list(enumerate(rows, start=1))
    if skip_empty:
        texts = (prompt.field_instruction, prompt.field_output)
        numbered = [(number, row) for number, row in numbered if not any(_is_empty(row.get(c)) for c in texts)]
        if not numbered:
            raise InputError(f"dataset {dataset.path}: each of its {len(rows)} rows has an empty {' or '.join(texts)}")
    return Rows(tuple(_story(dataset, number, row) for number, row in numbered), len(rows) - len(numbered))


def general() -> list[tuple[str, str]]:
    """Hash and text of each passage of the bundled general text."""
    texts = [row["text"] for row in read_file(GENERAL)]
    return [(hashlib.sha256(text.encode()).hexdigest()[:16], text) for text in texts]


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


def _story(dataset: DatasetSpec, number: int, row: dict[str, Any]) -> Story:
    prompt = dataset.type

    def text(column: str) -> str:
        value = row.get(column)
        if not isinstance(value, str) or not value.strip() or _SURROGATE.search(value):
            way = ", or skip_empty_rows: true passes over such rows" if _is_empty(value) else ""
            raise InputError(
                f"dataset {dataset.path}, row {number}: {column!r} is {brief(value)}; it must be text{way}"
            )
        return value

    def optional(column: str | None) -> str | None:
        return None if column is None or _is_empty(row.get(column)) else text(column)

    return Story(
        instruction=text(prompt.field_instruction),
        completion=text(prompt.field_output),
        system=optional(prompt.field_system) or prompt.system_prompt,
        input=optional(prompt.field_input),
        prompt=prompt,
    )


def _is_empty(value: Any) -> bool:
    """Whether a cell holds nothing; tables have NaN in empty ones."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


# A lone surrogate: JSON can hold it, tokenizers cannot.
_SURROGATE = re.compile("[\ud800-\udfff]")


def file_of(path: str, folder: str | None) -> Path | None:
    """The file that a dataset is read from; null: it is on the hub."""
    file = _path(path, folder)
    return file if file.suffix.lower() in SUFFIXES else None


def is_relative_file(path: str) -> bool:
    """Whether it is a file whose place depends on the folder that paths begin at."""
    return path not in BUNDLED and is_relative(path) and Path(path).suffix.lower() in SUFFIXES


def absolute(path: str, folder: str) -> str:
    """The path of a dataset that means the same from every folder; a relative one begins at `folder`."""
    return os.path.abspath(full_path(path, folder)) if is_relative_file(path) else path


def _path(name: str, folder: str | None) -> Path:
    return BUNDLED.get(name) or Path(full_path(name, folder))


def _rows(path: str, folder: str | None) -> tuple[set[str], list[dict[str, Any]]]:
    """Column names and rows of a bundled name, a file or a hub id."""
    file = _path(path, folder)
    if file.suffix.lower() in SUFFIXES:
        if not os.path.isfile(file):  # Path.is_file raises for a name that is too long
            looked_in = full_path("", folder) or Path.cwd()
            raise InputError(f"dataset {path}: no such file (looked in {looked_in}){hint_of_current(path, folder)}")
        try:
            rows = list(read_file(file))
        except UNREADABLE as error:
            raise InputError(f"dataset {path} cannot be read as {file.suffix}: {one_line(first_line(error))}") from None
    elif HUB_ID.fullmatch(path) and not os.path.exists(file):
        rows = read_hub(path)
    else:
        near = difflib.get_close_matches(path, BUNDLED, n=1)
        raise InputError(
            f"dataset {path!r} is unknown; "
            + (
                f"did you mean {near[0]}?"
                if near
                else f"give {', '.join(BUNDLED)}, a file ({', '.join(SUFFIXES)}) or a hub id (owner/name)"
            )
        )
    return {column for row in rows for column in row}, rows
