"""Rows of a dataset as prompts and completions: files, the bundled stories, the hub. No torch, no tokenizer."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.spec import DatasetSpec, PromptSpec
from harness.wording import one_line

_DATA = Path(__file__).parent / "data"
BUNDLED: dict[str, Path] = {
    "storyteller": _DATA / "storyteller.jsonl",
    "storyteller-openings": _DATA / "openings.jsonl",  # the first sentences of every fourth of them
}
GENERAL = _DATA / "general.jsonl"
"""Passages of plain prose, code and dialogue, which no story of a dataset resembles."""
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Story:
    """One example before tokenisation."""

    instruction: str
    completion: str
    system: str | None
    input: str | None
    prompt: PromptSpec

    @property
    def id(self) -> str:
        """Sixteen hex digits of the hash of the texts: equal wherever the row stands in its file."""
        text = "\0".join((self.instruction, self.input or "", self.completion))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read(dataset: DatasetSpec) -> list[Story]:
    """All rows of a dataset, in file order.

    Raises:
        InputError: no such file, no such column, no rows, a row that is not text, or a hub out of reach.
    """
    columns, rows = _rows(dataset.path)
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
    return [_story(dataset, number, row) for number, row in enumerate(rows, start=1)]


def general() -> list[tuple[str, str]]:
    """The bundled general text: the hash and the text of each passage."""
    texts = [row["text"] for row in _read_file(GENERAL)]
    return [(hashlib.sha256(text.encode()).hexdigest()[:16], text) for text in texts]


def held_out(wanted: float, distinct: int) -> int:
    """How many of so many distinct stories `val_set_size` holds out.

    Raises:
        InputError: none is left to train on.
    """
    count = round(wanted * distinct) if wanted < 1 else int(wanted)
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
            raise InputError(f"dataset {dataset.path}, row {number}: {column!r} is {_brief(value)}; it must be text")
        return value

    def optional(column: str | None) -> str | None:
        value = row.get(column) if column else None
        # A table has NaN where a cell is empty.
        missing = value is None or value != value or (isinstance(value, str) and not value.strip())
        return None if column is None or missing else text(column)

    return Story(
        instruction=text(prompt.field_instruction),
        completion=text(prompt.field_output),
        system=optional(prompt.field_system) or prompt.system_prompt,
        input=optional(prompt.field_input),
        prompt=prompt,
    )


# Half of a character: JSON can escape it, no tokenizer reads it.
_SURROGATE = re.compile("[\ud800-\udfff]")


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= 40 else text[:37] + "..."


def _rows(path: str) -> tuple[set[str], list[dict[str, Any]]]:
    """Column names and rows of a bundled name, a file or a hub id."""
    file = BUNDLED.get(path) or Path(os.path.expanduser(path))  # Path's raises for ~nobody
    if file.suffix.lower() in SUFFIXES:
        if not os.path.isfile(file):  # Path's raises for a name that is too long
            raise InputError(f"dataset {path}: no such file (looked in {Path.cwd()})")
        try:
            rows = list(_read_file(file))
        except _UNREADABLE as error:
            raise InputError(f"dataset {path} cannot be read as {file.suffix}: {_first_line(error)}") from None
    elif HUB_ID.fullmatch(path) and not os.path.exists(file):
        rows = _read_hub(path)
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


# OverflowError: a time that parquet can hold and Python cannot.
_UNREADABLE = (
    ValueError, OSError, KeyError, TypeError, NotImplementedError, RecursionError, OverflowError, csv.Error,
)  # fmt: skip


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return one_line(lines[0]) if lines else type(error).__name__


def _read_file(file: Path) -> Iterator[dict[str, Any]]:
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        # Split at newlines alone: U+2028 and its kin may stand inside a JSON string.
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
                yield _as_row(row, f"line {number}")
    elif suffix == ".json":
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(rows, list):
            raise ValueError(f"it holds {_brief(rows)}, not a list of rows")
        yield from (_as_row(row, f"row {n}") for n, row in enumerate(rows, start=1))
    elif suffix == ".csv":
        # Not with pandas: it takes the first of too many fields for an index, and shifts the others.
        csv.field_size_limit(2**31 - 1)
        with file.open(encoding="utf-8-sig", newline="") as text:
            for number, row in enumerate(csv.DictReader(text, strict=True), start=1):
                if None in row:
                    raise ValueError(f"row {number} has more fields than the header; quote texts with commas")
                yield row
    else:
        from pyarrow import parquet

        yield from parquet.ParquetFile(file).read().to_pylist()


def _as_row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {_brief(row)}, not an object with columns")
    return row


def _read_hub(path: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    hub_or_cache(path, "dataset")
    try:
        return [dict(row) for row in load_dataset(path, split="train")]
    except Exception as error:  # whatever a stranger's dataset and four libraries can raise
        raise InputError(
            f"dataset {path} cannot be had from the hub ({_first_line(error)}); "
            "check the name, or give a local file or storyteller (bundled)"
        ) from None


def hub_or_cache(name: str, kind: str) -> None:
    """Return if `name` may be had: the hub answers, or something of it is in the local cache.

    The hub's client retries for half a minute before it says that there is no network.

    Raises:
        InputError: no connection and nothing in the cache.
    """
    from urllib.parse import urlparse
    from urllib.request import getproxies, proxy_bypass

    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    if folder.is_dir() or (kind == "dataset" and _in_datasets_cache(name)):
        return
    local = "a local file or storyteller (bundled)" if kind == "dataset" else "a local folder, a bundled model"
    if kind == "model":
        local += " (smollm2-135m-instruct) or random:<architecture>"
    endpoint = urlparse(constants.ENDPOINT)
    host = endpoint.hostname or ""
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        if not getproxies().keys() & {endpoint.scheme, "all"} or proxy_bypass(host):
            port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
            socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise InputError(
            f"{kind} {name} is on the hub, which cannot be reached ({_first_line(error)}), "
            f"and it is not in the local cache; give {local}"
        ) from None


def _in_datasets_cache(name: str) -> bool:
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
