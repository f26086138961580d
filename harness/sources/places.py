"""Where the rows of a dataset are: its files by the parts that they belong to, a saved dataset, or the hub."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from harness.errors import InputError
from harness.sources import cells
from harness.sources.files import (
    COMPRESSIONS,
    LOADERS,
    SUFFIXES,
    format_of,
    full_path,
    hint_of_current,
    is_data,
    is_relative,
    suffix_of,
)
from harness.sources.hub import HUB_ID
from harness.spec.datasets import DatasetSpec

_DATA = Path(__file__).parent / "data"
BUNDLED: dict[str, Path] = {
    "storyteller": _DATA / "storyteller.jsonl",
    "storyteller-openings": _DATA / "openings.jsonl",  # the first sentences of every fourth of them
}
TRAIN = "train"
"""The part that is trained on."""
_PART_WORDS = {
    "train": TRAIN, "training": TRAIN,
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
"""Words of a file's name, or of its folder's, and the part that each says; those of the datasets library."""
_DEEPEST = 2
"""Levels of folders within a folder in which data files are looked for."""
_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that describe a dataset."""


@dataclass(frozen=True)
class Place:
    """Where rows are."""

    kind: Literal["files", "saved", "configured", "hub"]
    """`saved`: by `save_to_disk`. `configured`: a folder whose README names the files of each configuration."""
    root: Path = Path()
    """Folder that names of files are shown from."""
    parts: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """Files of each part; those of `saved` and `configured` are all under `train`."""
    ds_type: str | None = None
    """Format of the files, where their names do not say it."""

    @property
    def files(self) -> list[Path]:
        """All that the rows depend on; none for the hub."""
        return [file for files in self.parts.values() for file in files]


def locate(dataset: DatasetSpec, folder: str | None) -> Place:
    """Where the rows of a dataset are.

    The first that there is: a bundled name; with `data_files`, the name of a format; a folder; a file; a pattern of
    files; an id of the hub.

    Args:
        dataset: its path and the keys next to it.
        folder: that a relative path begins at; null: the current one.

    Raises:
        InputError: there is none of them.
    """
    path, place = dataset.path, Path(full_path(dataset.path, folder))
    try:
        if path in BUNDLED:
            return _one_file(dataset, BUNDLED[path])
        if os.path.isdir(place):
            return _folder(dataset, place)
        if path in LOADERS and dataset.data_files:
            return _named(dataset, Path(full_path("", folder) or "."), path)
        if os.path.isfile(place) and format_of(path, dataset.ds_type):
            return _one_file(dataset, place)
        if glob.has_magic(path):
            return _pattern(dataset, str(place))
    except OSError as error:
        raise InputError(f"dataset {path} cannot be read: {error.strerror} ({error.filename})") from None
    exists = os.path.exists(place)
    if exists or not HUB_ID.fullmatch(path) or is_data(path) or hint_of_current(path, folder):
        raise _nowhere(dataset, folder, exists)
    return Place("hub")


def is_relative_path(path: str, folder: str | None = None) -> bool:
    """Whether it is a file, a folder or a pattern whose place depends on the folder that paths begin at.

    Args:
        path: of a dataset.
        folder: that it begins at if it is relative; null: the current one.
    """
    if path in BUNDLED or not is_relative(path):
        return False
    if is_data(path) or path in LOADERS or glob.has_magic(path) or not HUB_ID.fullmatch(path):
        return True
    return os.path.exists(full_path(path, folder)) or os.path.exists(path)


def absolute(path: str, folder: str) -> str:
    """The path of a dataset that means the same from every folder; a relative one begins at `folder`.

    The name of a format stands for the folder itself, in which its `data_files` are.
    """
    if not is_relative_path(path, folder):
        return path
    place = full_path(path, folder)
    return os.path.abspath(full_path("", folder) if path in LOADERS and not os.path.isdir(place) else place)


# ------------------------------------------------------------------------------------ files


def _one_file(dataset: DatasetSpec, file: Path) -> Place:
    if dataset.name is not None or dataset.data_files:
        key = "name" if dataset.name is not None else "data_files"
        raise InputError(f"dataset {dataset.path} is one file; {key} is for folders and datasets of the hub")
    return Place("files", file.parent, {TRAIN: (file,)}, dataset.ds_type)


def _pattern(dataset: DatasetSpec, pattern: str) -> Place:
    files = _matches(dataset, pattern, dataset.ds_type)
    return Place("files", _common_folder(files), {TRAIN: files}, dataset.ds_type)


def _named(dataset: DatasetSpec, root: Path, ds_type: str | None) -> Place:
    """The files that `data_files` names, in its order."""
    files: dict[Path, None] = {}
    for name in dataset.data_files:
        path = full_path(name, str(root))
        if not glob.has_magic(name) and not os.path.isfile(path):
            raise InputError(f"dataset {dataset.path}: data_files: no such file as {name} (looked in {root})")
        files |= dict.fromkeys(_matches(dataset, path, ds_type) if glob.has_magic(name) else (Path(path),))
    _check_formats(dataset, [*files], ds_type)
    return Place("files", root, {TRAIN: tuple(files)}, ds_type)


def _matches(dataset: DatasetSpec, pattern: str, ds_type: str | None) -> tuple[Path, ...]:
    files = tuple(Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path))
    if not files:
        raise InputError(f"dataset {dataset.path}: no file matches {pattern}")
    _check_formats(dataset, files, ds_type)
    return files


def _check_formats(dataset: DatasetSpec, files: Sequence[Path], ds_type: str | None) -> None:
    for file in files:
        if format_of(file.name, ds_type) is None:
            raise InputError(
                f"dataset {dataset.path}: the name of {file.name} does not say its format; "
                f"set ds_type to one of {', '.join(LOADERS)}, or name files that end in {', '.join(SUFFIXES)}"
            )


def _common_folder(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([str(file.absolute().parent) for file in files]))


# ------------------------------------------------------------------------------------ folders


def _folder(dataset: DatasetSpec, root: Path) -> Place:
    saved = all(os.path.isfile(root / name) for name in ("dataset_info.json", "state.json"))
    if saved or os.path.isfile(root / "dataset_dict.json"):
        if dataset.name is not None or dataset.data_files:
            key = "name" if dataset.name is not None else "data_files"
            raise InputError(f"dataset {dataset.path} was saved as one whole; leave out {key}, and choose with split")
        return Place("saved", root, {TRAIN: tuple(_files_beneath(root))})
    if dataset.name is not None:
        if _names_configurations(root):
            return Place("configured", root, {TRAIN: tuple(_files_beneath(root))})
        root = _configuration(dataset, root)
    if dataset.data_files:
        return _named(dataset, root, dataset.ds_type)
    return Place("files", root, _parts(dataset, root), dataset.ds_type)


def _names_configurations(root: Path) -> bool:
    """Whether the README has the lines at its beginning that tell the datasets library which files to read."""
    try:
        with (root / "README.md").open(encoding="utf-8", errors="replace") as text:
            header = text.read(100_000).split("\n---", 1)[0]
    except OSError:
        return False
    return header.startswith("---") and re.search(r"^configs:", header, re.MULTILINE) is not None


def _configuration(dataset: DatasetSpec, root: Path) -> Path:
    """The folder within a folder that has the name of a configuration."""
    names = sorted(name for name in os.listdir(root) if os.path.isdir(root / name))
    if dataset.name not in names:
        raise InputError(
            f"dataset {dataset.path} has no configuration {dataset.name!r}: no README.md that names it, and no folder "
            f"of that name{f' among {cells.names(names)}' if names else ''}; leave out name"
        )
    return root / str(dataset.name)


def _parts(dataset: DatasetSpec, root: Path) -> dict[str, tuple[Path, ...]]:
    """Data files of a folder by what their names say; all of them under `train` where none says anything."""
    beneath = _files_beneath(root)
    files = [file for file in beneath if file.name not in _ABOUT_DATA and is_data(file.name, dataset.ds_type)]
    if not files:
        there = f"; it holds {cells.names([file.name for file in beneath])}" if beneath else "; it is empty"
        wanted = f"of ds_type {dataset.ds_type}" if dataset.ds_type else f"({', '.join(SUFFIXES)})"
        raise InputError(f"dataset {dataset.path} is a folder without data files {wanted}{there}")
    parts: dict[str, list[Path]] = {}
    for file in files:
        if part := _part_of(file.relative_to(root)):
            parts.setdefault(part, []).append(file)
    chosen = {part: tuple(of_part) for part, of_part in parts.items()} or {TRAIN: tuple(files)}
    for of_part in chosen.values():
        _refuse_twins(dataset, of_part, root)
    return chosen


def _files_beneath(root: Path) -> list[Path]:
    """Files of a folder, sorted, but for hidden ones and those deeper than data lie.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    files: list[Path] = []
    for top, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        depth = len(Path(top).relative_to(root).parts)
        folders[:] = [name for name in folders if depth < _DEEPEST and not name.startswith((".", "_"))]
        files += [Path(top) / name for name in names if not name.startswith((".", "_"))]
    return sorted(file for file in files if file.is_file())


def _part_of(file: Path) -> str | None:
    """The part that a file belongs to, by its own name, else by the folder nearest to it that says one."""
    for name in (_stem(file), *reversed(file.parent.parts)):
        for word in re.split(r"[^a-zA-Z]+", name.lower()):
            if word in _PART_WORDS:
                return _PART_WORDS[word]
    return None


def _stem(file: Path) -> str:
    """A file's name without what says its format."""
    name = file.name
    for ending in (*COMPRESSIONS, suffix_of(file.name)):
        if ending and name.lower().endswith(ending):
            name = name[: -len(ending)]
    return name


def _refuse_twins(dataset: DatasetSpec, files: Sequence[Path], root: Path) -> None:
    """Refuse files that differ in their format alone: they are likely the same rows."""
    first: dict[Path, Path] = {}
    for file in files:
        twin = first.setdefault(file.with_name(_stem(file)), file)
        if twin != file:
            both = f"{twin.relative_to(root)} and {file.relative_to(root)}"
            raise InputError(f"dataset {dataset.path} has both {both}; name those to read with data_files")


# ------------------------------------------------------------------------------------ nowhere


def _nowhere(dataset: DatasetSpec, folder: str | None, exists: bool) -> InputError:
    path = dataset.path
    if not exists and (is_data(path) or hint_of_current(path, folder)):
        looked_in = full_path("", folder) or Path.cwd()
        return InputError(f"dataset {path}: no such file (looked in {looked_in}){hint_of_current(path, folder)}")
    near = difflib.get_close_matches(path, BUNDLED, n=1)
    if path in LOADERS:
        way = f"{path} is a format and needs data_files, the files to read"
    elif near:
        way = f"did you mean {near[0]}?"
    else:
        way = f"give {', '.join(BUNDLED)}, a file ({', '.join(SUFFIXES)}), a folder of them or a hub id (owner/name)"
        if exists:
            way += f"; of any other file ds_type says the format ({', '.join(LOADERS)})"
    return InputError(f"dataset {path!r} is unknown; {way}")
