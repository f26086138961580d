"""Fingerprints of the data and the base model behind a spec's names: equal on every machine for equal content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from harness._util.files import write_whole
from harness.data_spec import DatasetSpec
from harness.errors import InputError
from harness.record import Contents
from harness.sources import hub, models, stories
from harness.spec import TrialSpec

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


class Snapshot:
    """Fingerprints as they are when first asked for: what is edited later does not change them."""

    def __init__(self) -> None:
        self._data: dict[tuple[tuple[DatasetSpec, ...], str | None, bool], str] = {}
        self._bases: dict[tuple[str, str | None], str] = {}

    def of(self, spec: TrialSpec) -> Contents:
        """Fingerprints of what a trial of the spec reads.

        Raises:
            InputError: the data or the base model cannot be read.
        """
        of_data = spec.datasets, spec.folder, spec.skip_empty_rows
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
    """Fingerprint of the rows of a spec's datasets under their prompt keys; their order does not count.

    Raises:
        InputError: they cannot be read.
    """
    return _short(_digest(_of_dataset(dataset, spec) for dataset in spec.datasets))


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
    """Digest of a dataset's rows; that of a file is kept."""

    def of_rows() -> str:
        rows = stories.read(dataset, spec.folder, skip_empty=spec.skip_empty_rows).stories
        return _digest(sorted(_digest(row.texts) for row in rows))

    file = stories.file_of(dataset.path, spec.folder)
    if file is None or not file.is_file():
        return of_rows()
    return _kept(file, f"{dataset.model_dump_json()} {spec.skip_empty_rows}", of_rows)


def _of_file(file: Path) -> str:
    """Digest of a file's bytes."""

    def of_bytes() -> str:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    return _kept(file, "bytes", of_bytes)


def _kept(file: Path, what: str, compute: Callable[[], str]) -> str:
    """The digest of a file in the cache, where the file has not changed since; else computed and put there.

    Args:
        file: that the digest depends on.
        what: of the file is digested.
        compute: the digest.
    """
    place = hashlib.sha256(f"{file.absolute()}\0{what}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    try:
        cached = models.cache_folder() / CACHE_NAME.replace("*", place)
    except InputError:  # a cache that cannot be written only costs time
        return compute()
    state = _state(file)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(cached.read_bytes())
        if known["state"] == state:
            return str(known["digest"])
    digest = compute()
    changed_at = max(state[1:3]) / 1e9
    if state == _state(file) and time.time() - changed_at > _SETTLED_SECONDS:
        with contextlib.suppress(OSError):
            write_whole(cached, json.dumps({"state": state, "digest": digest}).encode())
    return digest


def _state(file: Path) -> list[int]:
    """Size, times and inode: a file in which none of these changed is the same."""
    there = os.stat(file)
    return [there.st_size, there.st_mtime_ns, there.st_ctime_ns, there.st_ino]


def _digest(parts: Iterable[str | None]) -> str:
    """Digest of texts; null differs from an empty one."""
    text = json.dumps(list(parts), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _short(digest: str) -> str:
    return digest[:12]
