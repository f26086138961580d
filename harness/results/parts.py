"""One parquet part: written, read and validated, and combined with others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harness._util.files import write_all_whole
from harness._util.messages import one_line
from harness.errors import InputError
from harness.results.schema import SCHEMA_VERSION, SCHEMAS, Table, absent_value
from harness.results.validation import Damaged, validate_rows


class DamagedPart(UserWarning):
    """A part of the results is damaged or foreign; its rows are left out."""


def write_parts(parts: Mapping[Path, pa.Table]) -> None:
    """Write parts, each of which is whole or absent; all or, where one cannot be written, none of them.

    Args:
        parts: by file, in the order in which they come into place.

    Raises:
        OSError: one cannot be written.
    """
    contents = {}
    for part, content in parts.items():
        buffer = pa.BufferOutputStream()
        pq.write_table(content, buffer, compression="zstd")
        contents[part] = buffer.getvalue().to_pybytes()
    write_all_whole(contents)


def read_part(part: Path, table: Table, columns: list[str] | None = None) -> pa.Table:
    """Rows of a part, in the declared schema; columns that it lacks have the value of rows from before they existed.

    Args:
        part: the file.
        table: whose rows it holds.
        columns: only these.

    Raises:
        Damaged: it is not a part, or its rows are not such as `Store` writes.
        InputError: it is of a newer version of harness.
        FileNotFoundError: it is gone: the folder was compacted meanwhile.
        OSError: the disk or the system failed.
    """
    schema = SCHEMAS[table] if columns is None else pa.schema([SCHEMAS[table].field(c) for c in columns])
    try:
        with pq.ParquetFile(part) as file:
            about = file.schema_arrow
            version = (about.metadata or {}).get(b"schema_version", b"").decode(errors="replace")
            if not re.fullmatch(r"[0-9]{1,9}", version):
                raise Damaged("not written by harness (it has no schema_version)")
            if int(version) > SCHEMA_VERSION:
                raise InputError(
                    f"{part}: schema_version {version} is newer than this harness ({SCHEMA_VERSION}); upgrade it"
                )
            if "trial_id" not in about.names or len(set(about.names)) < len(about.names):
                raise Damaged("not written by harness (it has no trial_id, or a column twice)")
            content = file.read(columns=[name for name in schema.names if name in about.names])
        content.validate(full=True)
        cast = [
            content[field.name].cast(field.type)
            if field.name in about.names
            else pa.repeat(pa.scalar(absent_value(table, field.name), field.type), len(content))
            for field in schema
        ]
    except (FileNotFoundError, InputError):
        raise
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk or the system, not of the part
        raise Damaged(one_line(f"not a readable parquet file ({error})")) from None
    rows = pa.table(cast, schema=schema)
    validate_rows(table, rows)
    return rows


def latest_rows(parts: Mapping[Path, pa.Table]) -> pa.Table:
    """All rows in one table. Of a trial that is in several parts, those of the last.

    An empty part of one trial, which has its name, says that its latest record has no such rows; among the trials
    themselves it says nothing.
    """
    owner: dict[str, Path] = {}
    for path, rows in parts.items():
        trials = set(rows["trial_id"].to_pylist())
        owner |= dict.fromkeys(trials or ({path.stem} if path.parent.name != "trials" else ()), path)
    kept = [
        rows.filter(pa.array([owner[trial] == path for trial in rows["trial_id"].to_pylist()], pa.bool_()))
        for path, rows in parts.items()
    ]
    return pa.concat_tables(kept)
