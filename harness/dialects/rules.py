"""What a key of another tool's training file is here, and the reader that applies a tool's table to a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness._util.messages import as_written, one_line

EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that say nothing."""

_LONGEST = 120
"""Characters of a value in a message."""


@dataclass(frozen=True)
class To:
    """The key is one of a spec."""

    key: str
    convert: Callable[[Any], Any] = lambda value: value
    """From the tool's value to that of the spec; it may raise `Unlike`."""


@dataclass(frozen=True)
class Together:
    """The key is read with others by the dialect's `combine`."""


@dataclass(frozen=True)
class NoEffect:
    """The key does not change what is measured."""

    why: str
    """What it is about: logging, saving, the hub, tracking, launching, …"""


@dataclass(frozen=True)
class Unsupported:
    """The key would change what is measured, and has no counterpart."""

    instead: str
    """What would do."""
    off: tuple[Any, ...] = ()
    """Values that ask for nothing, besides empty ones and false."""


@dataclass(frozen=True)
class OtherTask:
    """The key makes the training another one than supervised fine-tuning on text."""

    task: str
    off: tuple[Any, ...] = ()
    """Values that do not, besides empty ones and false."""


Rule = To | Together | NoEffect | Unsupported | OtherTask


class Unlike(Exception):
    """A value has no counterpart; the message says what would do."""


@dataclass(frozen=True)
class Dialect:
    """The training files of one tool."""

    tool: str
    table: Mapping[str, Rule]
    """Every key that the tool documents."""
    defaults: Mapping[str, Any]
    """Spec keys at the tool's own defaults, where these differ from a spec's."""
    combine: Callable[[Reader], None]
    """Reads the keys that the table marks `Together`."""
    prepare: Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, str]]] = lambda document: (
        document,
        {},
    )
    """The file before its keys are looked up, and keys that are left out with what they are about: for references."""
    families: Mapping[str, Rule] = field(default_factory=dict)
    """By what their names begin with, keys of the tool's plug-ins, which come and go."""

    def rule(self, name: str) -> Rule | None:
        """What a key is; null: the tool has none of this name."""
        of_family = next((rule for start, rule in self.families.items() if str(name).startswith(start)), None)
        return self.table.get(name, of_family)


@dataclass
class Reader:
    """What became of a file's keys so far."""

    given: dict[str, Any]
    """Its keys with a value, by their names in the file."""
    values: dict[str, Any]
    """Spec keys."""
    mapped: dict[str, str] = field(default_factory=dict)
    """For each key of the file that became something: what, in words or as `sequence_length: 1024`."""
    notes: dict[str, str] = field(default_factory=dict)
    """The same for those that became something else than their own."""
    no_effect: dict[str, str] = field(default_factory=dict)
    """For each key without effect on what is measured: what it is about."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """For each key that is not supported: its value, and what would do."""
    _advice: dict[str, tuple[str, str]] = field(default_factory=dict)
    other_tasks: dict[str, str] = field(default_factory=dict)
    """For each key that asks for another task: which."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the file; `default` where it says nothing."""
        return self.given.get(key, default)

    def set(self, key: str, value: Any, *names: str, note: str = "") -> None:
        """Give a spec key a value.

        Args:
            key: of the spec.
            value: as in a grid file.
            names: keys of the file that it comes from; those that are not in the file are passed over.
            note: what is other than in the file, in a few words.
        """
        self.values[key] = value
        if note:
            self.note(f"{key}: {as_written(value)} ({note})", *names)
        else:
            self._map(f"{key}: {as_written(value)}", *names)

    def note(self, text: str, *names: str) -> None:
        """Say of keys what they became, where that is not just a spec key; several texts are joined."""
        self._map(text, *names)
        for name in names:
            if name in self.given:
                self.notes[name] = _joined(self.notes.get(name), text)

    def _map(self, text: str, *names: str) -> None:
        for name in names:
            if name in self.given:
                self.mapped[name] = _joined(self.mapped.get(name), text)

    def ignore(self, why: str, *names: str) -> None:
        """Count keys as without effect."""
        self.no_effect |= {name: why for name in names if name in self.given}

    def refuse(self, name: str, instead: str, value: Any = ...) -> None:
        """Count a key, or a part of one like `datasets[0].type`, as not supported.

        Args:
            name: of the key.
            instead: what would do.
            value: of the key, if `name` is not one of the file.
        """
        shown = _brief(self.given.get(name) if value is ... else value)
        self.unsupported[name] = f"{name}: {shown} ({instead})"
        self._advice[name] = f"{name}: {shown}", instead

    @property
    def reasons(self) -> list[str]:
        """What is not supported, with the advice of several keys once."""
        by_advice: dict[str, list[str]] = {}
        for name in self.unsupported:
            what, instead = self._advice[name]
            by_advice.setdefault(instead, []).append(what)
        return [f"{', '.join(what)} ({instead})" for instead, what in by_advice.items()]

    def other_task(self, name: str, task: str) -> None:
        """Count a key as one of another task."""
        self.other_tasks[name] = f"{name}: {_brief(self.given.get(name))}: {task}"


def _joined(before: str | None, text: str) -> str:
    parts = before.split("; ") if before else []
    return "; ".join([*parts, *(part for part in text.split("; ") if part not in parts)])


def _brief(value: Any) -> str:
    """A value as it is written, of a component its name alone, cut where it is long."""
    named = value.get("_component_", value) if isinstance(value, Mapping) else value
    text = one_line(as_written(named))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


_WHOLE_NUMBER = re.compile(r"[-+]?[0-9]+")


def _unquoted(rule: Rule | None, value: Any) -> Any:
    """Text that says true, false or a whole number, as that, where the value decides something: tools with a schema
    read it so, and any text would count as true.
    """
    if not isinstance(value, str) or rule is None or isinstance(rule, NoEffect):
        return value
    text = value.strip().lower()
    if text in ("true", "false"):
        return text == "true"
    return int(text) if isinstance(rule, Together) and _WHOLE_NUMBER.fullmatch(text) else value


def read(dialect: Dialect, document: Mapping[str, Any], own_keys: Iterable[str]) -> tuple[Reader, list[str]]:
    """Apply a tool's table to a file.

    Args:
        dialect: of the tool.
        document: keys and values of the file.
        own_keys: spec keys, which a file may have too where the tool has none of the name.

    Returns:
        what became of the keys, and the names of those that are in no table.
    """
    known, own = dialect.table, {*own_keys}
    document, left_out = dialect.prepare(document)
    plain = {key: _unquoted(dialect.rule(key), value) for key, value in document.items()}
    given = {
        key: value
        for key, value in plain.items()
        if value not in EMPTY and not (value is False and dialect.rule(key) is None and key not in own)
    }
    reader = Reader(given, dict(dialect.defaults), no_effect=dict(left_out))
    unknown = []
    for name, value in given.items():
        rule = dialect.rule(name)
        if isinstance(rule, To):
            try:
                reader.set(rule.key, rule.convert(value), name)
            except Unlike as error:
                reader.refuse(name, str(error))
        elif isinstance(rule, NoEffect):
            reader.no_effect[name] = rule.why
        elif isinstance(rule, Unsupported | OtherTask):
            # 0 and 1 equal False and True in Python; here they are values of their own.
            off = value is False or any(type(value) is type(each) and value == each for each in rule.off)
            if off:
                reader.no_effect[name] = "off"
            elif isinstance(rule, Unsupported):
                reader.refuse(name, rule.instead)
            else:
                reader.other_task(name, rule.task)
        elif rule is None and name in own:
            reader.set(name, value, name)
        elif rule is None:
            unknown.append(str(name))
    try:
        dialect.combine(reader)
    except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        together = [name for name in given if isinstance(dialect.rule(name), Together)]
        raise ValueError(
            f"{dialect.tool}: a value of {', '.join(together)} is of another kind than {dialect.tool} takes "
            f"({type(error).__name__}: {one_line(str(error))}); compare them with its documentation"
        ) from error
    reader.values |= {name: value for name, value in given.items() if name in own and name not in known}
    return reader, unknown
