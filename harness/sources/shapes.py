"""Shapes of data: by the prompt keys, or else by its columns, each row becomes a story, a chat or a text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness.errors import InputError
from harness.sources import cells, chats, other_data
from harness.sources.cells import brief
from harness.sources.chats import OR_SKIP, EmptyRow
from harness.sources.examples import Passage, Row, Story
from harness.sources.json_rows import CHAT_COLUMNS
from harness.spec.datasets import PromptSpec

_DEFAULTS: tuple[str, str] = (PromptSpec().field_instruction, PromptSpec().field_output)
_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
"""Columns of a prompt and its completion, the first that are there."""
_WITH_INPUT = ("instruction", "question")
"""Columns of prompts that may have further input, and a system text, in columns of their own."""
_INPUTS = ("input", "context")
_SYSTEM = "system"
_ALPACA_INPUT = "input"
_TOOLS = ("tools", "functions")
"""Columns of a chat's tools, the first that is there; the second is of OpenAI's older format."""
_TEXT = "text"


class Shape(Protocol):
    """How a row is read."""

    @property
    def columns(self) -> Sequence[str]:
        """Those of which none may be empty."""
        ...

    @property
    def needed(self) -> Sequence[str]:
        """Those that must be there."""
        ...

    def read(self, row: dict[str, Any], where: str) -> Row:
        """The row as an example.

        Args:
            row: values by columns.
            where: the dataset and the row, for messages.

        Raises:
            EmptyRow: there is nothing to train on.
            InputError: a value is not what it must be.
        """
        ...


def shape_of(path: str, prompt: PromptSpec, rows: Sequence[dict[str, Any]]) -> Shape:
    """The shape of a dataset.

    Args:
        path: of the dataset, for messages.
        prompt: its prompt keys.
        rows: all of its rows.

    Raises:
        InputError: a column that the keys name is not there, or the columns are those of no shape.
    """
    columns = {column for row in rows for column in row}
    kind = prompt.kind if prompt.kind != "auto" else _kind_of_keys(path, prompt)
    if kind is None and not {*_DEFAULTS} <= columns and (what := other_data.what(columns, rows)):
        raise InputError(f"dataset {path} {what}")
    shape = _BY_KIND[kind](prompt, columns)
    if shape is None:
        raise _no_column(path, columns, CHAT_COLUMNS[0] if kind == "chat" else _missing_default(columns))
    return shape


def check_columns(path: str, shape: Shape, rows: Sequence[dict[str, Any]]) -> None:
    """Check that rows have the columns of a shape, each in some row.

    Args:
        path: of the dataset and the file, for messages.
        shape: as which they will be read.
        rows: of one file or part; without any, nothing is wrong.

    Raises:
        InputError: a column is not there.
    """
    columns = {column for row in rows for column in row}
    for column in shape.needed if rows else ():
        if column not in columns:
            raise _no_column(path, columns, column)


def _kind_of_keys(path: str, prompt: PromptSpec) -> str | None:
    """The kind whose columns the keys name; null: they name none."""
    given = {
        "instruction": (prompt.field_instruction, prompt.field_output) != _DEFAULTS,
        "chat": prompt.field_messages is not None,
        "text": prompt.field_text is not None,
    }
    kinds = [kind for kind, named in given.items() if named]
    if len(kinds) > 1:
        raise InputError(f"dataset {path}: its keys name columns of several kinds; set kind to {' or '.join(kinds)}")
    return kinds[0] if kinds else None


def _recognised(prompt: PromptSpec, columns: Collection[str]) -> Shape | None:
    if {*_DEFAULTS} <= {*columns}:
        return _pair(prompt, columns)
    by_columns = _chat(prompt, columns) or _pair(prompt, columns)
    if by_columns is not None or {*_DEFAULTS} & {*columns}:
        return by_columns
    return _text(prompt, columns) if _TEXT in columns else None


def _pair(prompt: PromptSpec, columns: Collection[str]) -> Shape | None:
    """A prompt and a completion: by the columns that are given, by the default ones, or by usual ones."""
    given = (prompt.field_instruction, prompt.field_output)
    if given != _DEFAULTS or {*given} <= {*columns}:
        named = prompt.format or ""  # what it names is read from the usual columns, where the keys give none
        usual_input = _usual(_INPUTS, columns) if "{input}" in named else None
        usual_system = _usual((_SYSTEM,), columns) if "{system}" in named else None
        # Alpaca's own column is absent from many files of its shape.
        absent = prompt.field_input == _ALPACA_INPUT and _ALPACA_INPUT not in columns
        return _Pair(
            prompt,
            *given,
            input=None if absent else prompt.field_input or usual_input,
            system=prompt.field_system or usual_system,
        )
    usual = next((pair for pair in _PAIRS if {*pair} <= {*columns}), None)
    if usual is None:
        return None
    further = columns if usual[0] in _WITH_INPUT else ()
    return _Pair(
        prompt,
        *usual,
        input=prompt.field_input or _usual(_INPUTS, further),
        system=prompt.field_system or _usual((_SYSTEM,), further),
    )


def _usual(names: Sequence[str], columns: Collection[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _chat(prompt: PromptSpec, columns: Collection[str]) -> Shape | None:
    turns = prompt.field_messages or next((column for column in CHAT_COLUMNS if column in columns), None)
    return None if turns is None else _Turns(prompt, turns, prompt.field_tools or _usual(_TOOLS, columns) or _TOOLS[0])


def _text(prompt: PromptSpec, columns: Collection[str]) -> Shape | None:
    return _Text(prompt, prompt.field_text or _TEXT)


_BY_KIND: dict[str | None, Callable[[PromptSpec, Collection[str]], Shape | None]] = {
    "instruction": _pair,
    "chat": _chat,
    "text": _text,
    None: _recognised,
}


# ------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class _Pair:
    prompt: PromptSpec
    instruction: str
    output: str
    input: str | None
    system: str | None

    @property
    def columns(self) -> Sequence[str]:
        return self.instruction, self.output

    @property
    def needed(self) -> Sequence[str]:
        given = self.input if self.prompt.field_input is not None else None
        return tuple(column for column in (self.instruction, given, self.output) if column is not None)

    def read(self, row: dict[str, Any], where: str) -> Row:
        question, answer = row.get(self.instruction), row.get(self.output)
        asked_in_input = self.input is not None and cells.is_empty(question) and not cells.is_empty(row.get(self.input))
        instruction = str(self.input) if asked_in_input else self.instruction
        for column in (instruction, self.output):
            if cells.is_empty(row.get(column)):
                raise EmptyRow(f"{where}: {column!r} is {brief(row.get(column))}; it must be text{OR_SKIP}")
        system = _optional(row, self.system, where) or self.prompt.system_prompt
        if isinstance(question, list) and isinstance(answer, list):
            tools = row.get(self.prompt.field_tools or _TOOLS[0])
            columns = f"{where}: {self.instruction!r} and {self.output!r}"
            return chats.chat(question, self.prompt, columns, answer=answer, system=system, tools=tools)
        return Story(
            instruction=_checked(row, instruction, where),
            completion=_checked(row, self.output, where),
            system=system,
            input=None if asked_in_input else _optional(row, self.input, where),
            prompt=self.prompt,
        )


@dataclass(frozen=True)
class _Turns:
    prompt: PromptSpec
    turns: str
    tools: str

    @property
    def columns(self) -> Sequence[str]:
        return (self.turns,)

    @property
    def needed(self) -> Sequence[str]:
        return (self.turns, *filter(None, (self.prompt.field_tools,)))

    def read(self, row: dict[str, Any], where: str) -> Row:
        system = _optional(row, self.prompt.field_system, where) or self.prompt.system_prompt
        column = f"{where}: {self.turns!r}"
        return chats.chat(row.get(self.turns), self.prompt, column, system=system, tools=row.get(self.tools))


@dataclass(frozen=True)
class _Text:
    prompt: PromptSpec
    text: str

    @property
    def columns(self) -> Sequence[str]:
        return (self.text,)

    @property
    def needed(self) -> Sequence[str]:
        return self.columns

    def read(self, row: dict[str, Any], where: str) -> Row:
        if cells.is_empty(row.get(self.text)):
            raise EmptyRow(f"{where}: {self.text!r} is {brief(row.get(self.text))}; it must be text{OR_SKIP}")
        return Passage(_checked(row, self.text, where), self.prompt)


def _checked(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not cells.is_text(value):
        quoted = ", written in quotes" if isinstance(value, int | float) else ""
        raise InputError(f"{where}: {column!r} is {brief(value)}; it must be text{quoted}")
    return str(value)


def _optional(row: dict[str, Any], column: str | None, where: str) -> str | None:
    return None if column is None or cells.is_empty(row.get(column)) else _checked(row, column, where)


# ------------------------------------------------------------------------------------ columns that are not there


def _missing_default(columns: Collection[str]) -> str:
    return next(column for column in _DEFAULTS if column not in columns)


def _no_column(path: str, columns: Collection[str], column: str) -> InputError:
    return InputError(
        f"dataset {path} has no column {column!r}; it has {cells.names(columns)} (set field_instruction, field_input "
        "and field_output under datasets: type:, field_messages for chats, or field_text for texts)"
    )
