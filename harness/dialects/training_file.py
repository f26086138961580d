"""Which tool a training file is of, and what it means here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness._util.messages import unknown
from harness.dialects import axolotl, llama_factory, torchtune, trl
from harness.dialects.rules import Dialect, read

OWN = "harness"
"""The tool of files that have no keys but harness's own."""


@dataclass(frozen=True)
class TrainingFile:
    """What a training file means."""

    tool: str
    """Its name, like `Axolotl`."""
    values: dict[str, Any]
    """Spec keys, as in a grid file."""
    mapped: dict[str, str]
    """Keys of the file that became something: what, in words."""
    no_effect: dict[str, str]
    """Keys without effect on what is measured: what they are about."""
    without: dict[str, str]
    """Keys that would change what is measured and are left out, since they are not supported: with value and advice."""


def recognise(document: Mapping[str, Any], own_keys: Iterable[str]) -> Dialect | None:
    """The dialect of a training file; null: harness's own.

    Args:
        document: keys and values.
        own_keys: spec keys.
    """
    keys, own = {str(key) for key in document}, {*own_keys}
    if torchtune.is_one(document):
        return torchtune.DIALECT
    if "model_name_or_path" in keys:
        return llama_factory.DIALECT if llama_factory.is_one(document) else trl.DIALECT
    if keys <= own and keys - axolotl.DIALECT.table.keys():
        return None
    return axolotl.DIALECT


def interpret(
    document: Mapping[str, Any], own_keys: Iterable[str], *, without_unsupported: bool = False
) -> TrainingFile:
    """What a training file means.

    Args:
        document: keys and values.
        own_keys: spec keys, which a file may have too.
        without_unsupported: leave out what is not supported.

    Raises:
        ValueError: in one line: it is for another task, has keys that no table has, or asks for what is not supported.
    """
    own = tuple(own_keys)
    dialect = recognise(document, own)
    if dialect is None:
        return TrainingFile(OWN, dict(document), {}, {}, {})
    reader, strangers = read(dialect, document, own)
    if reader.other_tasks:
        raise ValueError(
            f"{dialect.tool}: {'; '.join(reader.other_tasks.values())}; harness measures supervised fine-tuning of "
            "language models on text"
        )
    known = (*dialect.table, *own)
    wrong = [unknown("key", name, known) for name in strangers]
    left_out = f"{len(reader.unsupported)} keys" if len(reader.unsupported) > 1 else "a key"
    if reader.unsupported and not without_unsupported:
        wrong.append(
            f"{left_out} would change what is measured and cannot be taken over: "
            f"{'; '.join(reader.unsupported.values())}; change the file, or go on without with --without-unsupported"
        )
    if wrong:
        raise ValueError(f"{dialect.tool}: {'; '.join(wrong)}")
    return TrainingFile(dialect.tool, reader.values, reader.mapped, reader.no_effect, reader.unsupported)
