"""Rows of a file: JSON, CSV, Parquet, Arrow and lines of text, each perhaps compressed."""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from harness.sources import json_rows

_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
SUFFIXES = tuple(_FORMATS)
"""Ends of names that say a format."""
_LINES = (".jsonl", ".ndjson")
"""Ends of names that say that each line is a row."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""Ends of names that may follow, and what they say: Arrow's names, but for xz, which it lacks."""
LOADERS = ("json", "csv", "parquet", "arrow", "text")
"""Formats, as `ds_type` names them."""
_TEXT_SUFFIX = ".txt"


def full_path(path: str, folder: str | None) -> str:
    """Where a path leads: `~` is the home folder, and a relative path begins at `folder`; null: at the current one."""
    # Unlike Path, os.path raises neither for ~nobody nor for names that are too long.
    return os.path.join(os.path.expanduser(folder or ""), os.path.expanduser(path))


def is_relative(path: str) -> bool:
    """Whether it depends on the folder that a path begins at where it leads."""
    return not os.path.isabs(os.path.expanduser(path))


def hint_of_current(path: str, folder: str | None) -> str:
    """For a path that leads nowhere from `folder`: what to write instead, if it leads somewhere from here."""
    if folder is None or not is_relative(path) or not os.path.exists(path):
        return ""
    return f"; it is in the current folder, so write {os.path.relpath(path, full_path('', folder))}"


def suffix_of(name: str) -> str:
    """The end of a name that says its format, in lower case: `.jsonl` of `a.JSONL.gz`."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def format_of(name: str, ds_type: str | None = None) -> str | None:
    """The format of a file, one of `LOADERS`; null: neither `ds_type` nor its name says it."""
    return ds_type or _FORMATS.get(suffix_of(name))


def is_data(name: str, ds_type: str | None = None) -> bool:
    """Whether a name is that of a data file: by `SUFFIXES`, or by `ds_type` where that is given."""
    own = "text" if suffix_of(name) == _TEXT_SUFFIX else _FORMATS.get(suffix_of(name))
    return own == ds_type if ds_type else own in _FORMATS.values()


UNREADABLE = (
    ValueError, OSError, KeyError, TypeError, NotImplementedError, RecursionError, OverflowError, MemoryError,
    csv.Error,
)  # fmt: skip
"""What `read_file` raises for a malformed file. OverflowError: a time that parquet can hold and Python cannot.
MemoryError: a damaged length."""


def read_file(file: Path, ds_type: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file.

    Args:
        file: whose name ends as one of `SUFFIXES`, or in any way where `ds_type` is given.
        ds_type: its format, one of `LOADERS`; null: by its name.

    Raises:
        One of `UNREADABLE`: it is malformed.
    """
    suffix, kind = suffix_of(file.name), format_of(file.name, ds_type)
    content = _content(file)
    if content.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS; fetch the file itself with git lfs pull")
    if kind == "json":
        yield from json_rows.read(_text(content), as_lines=suffix in _LINES)
    elif kind == "csv":
        yield from _csv_rows(_text(content), "\t" if suffix == ".tsv" else None)
    elif kind == "text":
        lines = io.StringIO(_text(content), newline=None)  # U+2028 and the like end no line
        yield from ({"text": line.rstrip("\n")} for line in lines if line.strip())
    elif kind == "arrow":
        yield from _arrow_rows(content)
    else:
        import pyarrow
        from pyarrow import parquet

        yield from parquet.ParquetFile(pyarrow.BufferReader(content)).read().to_pylist()


# ------------------------------------------------------------------------------------ text


def _content(file: Path) -> bytes:
    """The bytes of a file, decompressed."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return file.read_bytes()
    if compression == "xz":
        import lzma

        try:
            return lzma.decompress(file.read_bytes())
        except lzma.LZMAError as error:
            raise ValueError(error) from None
    import pyarrow

    with pyarrow.input_stream(str(file), compression=compression) as stream:
        return bytes(stream.read())


_BEGINNINGS = {
    b"PAR1": "it holds Parquet; let its name end in .parquet, or set ds_type: parquet",
    b"ARROW1": "it holds Arrow; let its name end in .arrow, or set ds_type: arrow",
    b"\x1f\x8b": "it is compressed; let its name end in .gz",
    b"BZh": "it is compressed; let its name end in .bz2",
    b"\xfd7zXZ\0": "it is compressed; let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "it is compressed; let its name end in .zst",
    b"PK\x03\x04": "it is an archive or a spreadsheet; unpack it, or save its table as .csv",
}
"""First bytes of files that hold no text, and what would do."""


def _text(content: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with its byte order mark.

    Raises:
        ValueError: it is neither.
    """
    for beginning, what in _BEGINNINGS.items():
        if content.startswith(beginning):
            raise ValueError(what)
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{error}, in line {line}; save it as UTF-8") from None


_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}


def _csv_rows(text: str, separator: str | None) -> Iterator[dict[str, Any]]:
    """Rows of a table, whose header says the separator where none is given."""
    # pandas would take the first of too many fields for an index and shift the others.
    csv.field_size_limit(2**31 - 1)
    separator = separator or _separator_of(text)
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    for number, row in enumerate(table, start=1):
        if None in row:
            what = _SEPARATORS[separator]
            raise ValueError(f"row {number} has more fields than the header; quote texts with {what}")
        yield row


def _separator_of(text: str) -> str:
    """What stands most often between the names of the header, outside of quotes; a comma where nothing does."""
    counts, quoted = dict.fromkeys(_SEPARATORS, 0), False
    for character in text:
        if character == '"':
            quoted = not quoted
        elif not quoted and character in "\r\n":
            break
        elif not quoted and character in counts:
            counts[character] += 1
    return max(counts, key=lambda separator: counts[separator])


# ------------------------------------------------------------------------------------ Arrow

_ARROW_FILE = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def _arrow_rows(content: bytes) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow file or stream.

    Raises:
        ValueError: it is neither, or a part of one: Arrow itself takes a stream that breaks off between two batches.
    """
    import pyarrow

    if content.startswith(_ARROW_FILE):
        table = pyarrow.ipc.open_file(content).read_all()
    else:
        table = pyarrow.ipc.open_stream(content).read_all()
        if not content.endswith(_END_OF_STREAM):
            raise ValueError("its end is missing")
    table.validate(full=True)  # lengths within a damaged one may lead anywhere
    yield from table.to_pylist()
