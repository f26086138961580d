"""Rows of a dataset, from wherever they are: those to train on, and those that the data themselves hold out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness._util.messages import first_line, one_line
from harness.errors import InputError
from harness.sources import cells, hub, places
from harness.sources.files import UNREADABLE, read_file, suffix_of
from harness.sources.places import TRAIN, Place
from harness.spec.datasets import DatasetSpec

_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval", "evaluation")
"""Parts whose rows are held out, the first that there is."""


class NumberedRow(NamedTuple):
    """A row and where it stands."""

    of: str
    """The file or the part, where a dataset has several; else empty."""
    number: int
    """From 1."""
    values: dict[str, Any]

    @property
    def place(self) -> str:
        """For a message."""
        return f"row {self.number} of {self.of}" if self.of else f"row {self.number}"


_Rows = list[NumberedRow]
_Readers = dict[str, Callable[[], _Rows]]
"""How the rows of each part are read."""


def read(dataset: DatasetSpec, folder: str | None) -> tuple[_Rows, _Rows]:
    """Rows to train on, and rows to hold out: none where the data have no part for it, or `split` says what is read.

    Of `shards` equal parts every n-th row is one, beginning with the first; what is held out is read whole.

    Args:
        dataset: its path and the keys next to it.
        folder: that a relative path begins at; null: the current one.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    place = places.locate(dataset, folder)
    if place.kind == "hub":
        return _checked(dataset, _numbered(hub.read_hub(dataset)))[:: dataset.shards or 1], []
    readers = _of_library(dataset, place) if place.kind != "files" else _of_files(dataset, place)
    if dataset.split is not None:
        return _checked(dataset, _of_split(dataset, dataset.split, readers))[:: dataset.shards or 1], []
    if TRAIN not in readers:
        raise InputError(
            f"dataset {dataset.path} has no part {TRAIN}, but {', '.join(readers)}; name the one to train on with split"
        )
    held_out = next((part for part in _HELD_OUT if part in readers), None)
    return (
        _checked(dataset, readers[TRAIN]())[:: dataset.shards or 1],
        _checked(dataset, readers[held_out](), held_out) if held_out else [],
    )


def _checked(dataset: DatasetSpec, rows: _Rows, held_out: str | None = None) -> _Rows:
    """The rows, of which there must be one."""
    if not rows:
        part = held_out or dataset.split
        of = f" in its part {part}" if part else ""
        way = f"leave its file away, or set split: {TRAIN}" if held_out else "it needs at least one"
        raise InputError(f"dataset {dataset.path} has no rows{of}; {way}")
    return rows


def _numbered(rows: Iterable[dict[str, Any]], of: str = "") -> _Rows:
    return [NumberedRow(of, number, row) for number, row in enumerate(rows, start=1)]


# ------------------------------------------------------------------------------------ of files


def _of_files(dataset: DatasetSpec, place: Place) -> _Readers:
    single = len(place.files) == 1

    def reader(files: Sequence[Path]) -> Callable[[], _Rows]:
        return lambda: [row for file in files for row in _of_file(dataset, place, file, single)]

    return {part: reader(files) for part, files in place.parts.items()}


def _of_file(dataset: DatasetSpec, place: Place, file: Path, single: bool) -> _Rows:
    name = "" if single else _shown(file, place.root)
    try:
        return _numbered(read_file(file, place.ds_type), name)
    except UNREADABLE as error:
        kind = place.ds_type or suffix_of(file.name)
        what = f"dataset {dataset.path}" + (f": {name}" if name else "")
        raise InputError(f"{what} cannot be read as {kind}: {one_line(first_line(error))}") from None


def _shown(file: Path, root: Path) -> str:
    """A file's path from the dataset's folder, in printable characters."""
    for path, start in ((file, root), (file.absolute(), root.absolute())):
        if path.is_relative_to(start):
            return one_line(str(path.relative_to(start)))
    return one_line(file.name)


# ------------------------------------------------------------------------------------ of the datasets library


def _of_library(dataset: DatasetSpec, place: Place) -> _Readers:
    """Parts of a folder that the datasets library reads."""
    import datasets

    try:
        if place.kind == "saved":
            loaded = datasets.load_from_disk(str(place.root))
        else:
            loaded = datasets.load_dataset(str(place.root), dataset.name)
        parts = {str(name): part for name, part in loaded.items()} if isinstance(loaded, dict) else {TRAIN: loaded}
    except Exception as error:  # a foreign dataset and the libraries that read it can raise anything
        raise _unreadable(dataset, error) from None

    def reader(name: str) -> Callable[[], _Rows]:
        return lambda: _of_part(dataset, parts[name], name if len(parts) > 1 else "")

    return {name: reader(name) for name in parts}


def _of_part(dataset: DatasetSpec, part: Any, name: str) -> _Rows:
    try:
        part.data.table.validate(full=True)  # lengths within a damaged file may lead anywhere
        return _numbered(part.to_list(), one_line(name))
    except Exception as error:
        raise _unreadable(dataset, error) from None


def _unreadable(dataset: DatasetSpec, error: Exception) -> InputError:
    return InputError(f"dataset {dataset.path} cannot be read as a folder: {one_line(first_line(error))}")


# ------------------------------------------------------------------------------------ split


def _of_split(dataset: DatasetSpec, split: str, readers: _Readers) -> _Rows:
    """The rows that a split names: parts, or slices of them, joined by `+`.

    Raises:
        InputError: there is no such part, or it is no slice.
    """
    wanted = [re.split(r"[\[(]", term, maxsplit=1)[0].strip() for term in split.split("+")]
    for part in wanted:
        if part not in readers:
            raise InputError(
                f"dataset {dataset.path}: split {split!r} names {part!r}, which is none of its parts: "
                f"{cells.names(readers)}"
            )
    rows = {part: readers[part]() for part in dict.fromkeys(wanted)}
    if split in rows:
        return rows[split]
    from datasets import ReadInstruction

    try:
        slices = ReadInstruction.from_spec(split).to_absolute({part: len(of_part) for part, of_part in rows.items()})
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"dataset {dataset.path}: split {split!r} is none ({one_line(first_line(error))}); "
            "write it like train, train[:100] or train[10%:]"
        ) from None
    return [row for each in slices for row in rows[each.splitname][each.from_ : each.to]]
