"""Fingerprints of the data and the base model behind a spec's names: equal on every machine for equal content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness._util.files import write_whole
from harness.errors import InputError
from harness.record import Contents
from harness.sources import hub, models, places, stories, task_files
from harness.sources.examples import Row
from harness.spec.datasets import DatasetSpec
from harness.spec.trial import TrialSpec

CACHE_NAME = "fingerprint-*.json"
"""Files of the cache folder that hold digests."""
_READ_OF_BASE = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "*.py", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.*", "*.model", "*.tiktoken", "chat_template*",
    "additional_chat_templates/*",
)  # fmt: skip
"""Files of a model's folder that a trial reads: configuration, weights, own code and tokenizer."""
_SETTLED_SECONDS = 2.0
"""A file that changed less than this ago may change again without another time: its digest is not kept."""


_Datasets = tuple[DatasetSpec, ...]


class Snapshot:
    """Fingerprints as they are when first asked for: what is edited later does not change them."""

    def __init__(self) -> None:
        self._data: dict[tuple[Any, ...], str] = {}
        self._bases: dict[tuple[str, str | None], str] = {}

    def of(self, spec: TrialSpec) -> Contents:
        """Fingerprints of what a trial of the spec reads.

        Raises:
            InputError: the data or the base model cannot be read.
        """
        of_data = spec.datasets, spec.test_datasets, spec.evaluate_tasks, spec.folder, spec.skip_empty_rows
        of_base = spec.base_model, spec.folder
        if of_data not in self._data:
            self._data[of_data] = data(spec)
        if of_base not in self._bases:
            self._bases[of_base] = base(spec)
        return Contents(self._data[of_data], self._bases[of_base])


def of(spec: TrialSpec) -> Contents:
    """Fingerprints of what a trial of the spec would read now.

    Raises:
        InputError: the data or the base model cannot be read.
    """
    return Contents(data(spec), base(spec))


def data(spec: TrialSpec) -> str:
    """Fingerprint of the rows of a spec's datasets under their prompt keys, whose order does not count, and of the
    files of its tasks.

    Raises:
        InputError: they cannot be read.
    """
    digests: list[str | None] = [_of_dataset(dataset, spec) for dataset in spec.datasets]
    if spec.test_datasets:
        digests += [None, *(_of_dataset(dataset, spec) for dataset in spec.test_datasets)]
    if spec.evaluate_tasks:
        digests += [
            None,
            *(_of_file(file) for task in spec.evaluate_tasks for file in task_files.paths(task, spec.folder)),
        ]
    return _short(_digest(digests))


def base(spec: TrialSpec) -> str:
    """Fingerprint of a spec's base model: its configuration, weights and tokenizer; of the hub, its commit.

    Raises:
        InputError: it cannot be read.
    """
    source = models.resolve(spec.base_model, spec.folder)
    if source.kind == "random":
        config = models.random_config(source.name, spec.folder)
        return _short(_digest([json.dumps(config, sort_keys=True)]))
    if source.kind == "hub":
        return _short(_digest([hub.commit(source.name)]))
    if source.kind == "bundled":
        return _short(_of_file(models.bundled_file()))
    folder = Path(source.name)
    files = sorted({file for pattern in _READ_OF_BASE for file in folder.glob(pattern) if file.is_file()})
    try:
        return _short(_digest(f"{file.relative_to(folder)}\0{_of_file(file)}" for file in files))
    except OSError as error:
        raise InputError(f"base_model {spec.base_model}: {error.strerror} ({error.filename})") from None


def _of_dataset(dataset: DatasetSpec, spec: TrialSpec) -> str:
    """Digest of a dataset's rows; that of files is kept."""

    def of_rows() -> str:
        rows = stories.read(dataset, spec.folder, skip_empty=spec.skip_empty_rows)
        to_train = _of_examples(rows.stories)
        return _digest([to_train, _of_examples(rows.held_out)]) if rows.held_out else to_train

    def files() -> list[Path]:
        return places.locate(dataset, spec.folder).files

    return _kept(files, f"{dataset.model_dump_json()} {spec.skip_empty_rows}", of_rows) if files() else of_rows()


def _of_examples(examples: Iterable[Row]) -> str:
    return _digest(sorted(_digest(example.texts) for example in examples))


def _of_file(file: Path) -> str:
    """Digest of a file's bytes."""

    def of_bytes() -> str:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    return _kept(lambda: [file], "bytes", of_bytes)


def _kept(files: Callable[[], list[Path]], what: str, compute: Callable[[], str]) -> str:
    """The digest of files in the cache, where none has changed since, come or gone; else computed and put there.

    Args:
        files: that the digest depends on, as they are now.
        what: of the files is digested.
        compute: the digest.
    """
    try:
        cached = models.cache_folder() / CACHE_NAME.replace("*", _place(files(), what))
        state = _state(files())
    except (InputError, OSError):  # a cache that cannot be written only costs time; a file may have gone just now
        return compute()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(cached.read_bytes())
        if known["state"] == state:
            return str(known["digest"])
    digest = compute()
    changed_at = max(max(times) for _, _, *times, _ in state) / 1e9
    with contextlib.suppress(OSError, InputError):
        if state == _state(files()) and time.time() - changed_at > _SETTLED_SECONDS:
            write_whole(cached, json.dumps({"state": state, "digest": digest}).encode())
    return digest


def _place(files: Iterable[Path], what: str) -> str:
    """Part of the name under which a digest is kept."""
    names = "\0".join(str(file.absolute()) for file in files)
    return hashlib.sha256(f"{names}\0{what}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _state(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size, times and inode of each file: one in which none of these changed is the same."""
    state: list[list[Any]] = []
    for file in files:
        there = os.stat(file)
        name = hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:16]
        state.append([name, there.st_size, there.st_mtime_ns, there.st_ctime_ns, there.st_ino])
    return state


def _digest(parts: Iterable[str | None]) -> str:
    """Digest of texts; null differs from an empty one."""
    text = json.dumps(list(parts), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _short(digest: str) -> str:
    return digest[:12]
