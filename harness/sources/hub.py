"""Access to the Hugging Face hub: whether it can be reached, and rows of its datasets."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path
from typing import Any

from harness._util.messages import first_line, one_line
from harness.errors import InputError
from harness.spec.datasets import DatasetSpec

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def read_hub(dataset: DatasetSpec) -> list[dict[str, Any]]:
    """The training rows of a dataset of the hub, or of the local cache, or those that its `split` names.

    Raises:
        InputError: it cannot be read.
    """
    from datasets import Dataset, load_dataset

    path, options = dataset.path, _options(dataset)
    check_hub_or_cache(path, "dataset")
    try:
        loaded = load_dataset(options.pop("path"), split=dataset.split or "train", **options)
        return loaded.to_list() if isinstance(loaded, Dataset) else [dict(row) for row in loaded]
    except Exception as error:  # a foreign dataset and four libraries can raise anything
        raise InputError(
            f"dataset {path} cannot be read from the hub ({one_line(first_line(error))}); "
            "check the name, or give a local file or storyteller (bundled)"
        ) from None


def _options(dataset: DatasetSpec) -> dict[str, Any]:
    """What `load_dataset` takes to read a dataset, but for its split. The format of files is given as a loader of that
    name, which takes their addresses in full.
    """
    options: dict[str, Any] = {"path": dataset.path}
    if dataset.name is not None:
        options["name"] = dataset.name
    if dataset.data_files and dataset.ds_type:
        options["path"] = dataset.ds_type
        options["data_files"] = [f"hf://datasets/{dataset.path}/{file}" for file in dataset.data_files]
    elif dataset.data_files:
        options["data_files"] = [*dataset.data_files]
    return options


def downloads(name: str, kind: str) -> Path:
    """Folder of the local cache for what is downloaded of a `model` or `dataset`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"


def update_model(name: str) -> None:
    """Let the local cache name the present commit of a model, by its configuration. Without a connection it stays.

    Raises:
        InputError: no connection, and nothing in the cache.
    """
    from huggingface_hub import hf_hub_download

    check_hub_or_cache(name, "model")
    with contextlib.suppress(Exception):  # the hub's client can raise anything; what loads the model says what is wrong
        _connect()
        hf_hub_download(name, "config.json")


def commit(name: str) -> str:
    """The commit of a model that the local cache has.

    Raises:
        InputError: it has none, and it cannot be fetched.
    """
    latest = downloads(name, "model") / "refs" / "main"
    if not latest.is_file():
        update_model(name)
    try:
        return latest.read_text(encoding="utf-8").strip()
    except OSError:
        raise InputError(f"model {name}: its config.json cannot be fetched from the hub; check the name") from None


def check_hub_or_cache(name: str, kind: str) -> None:
    """Check that the hub can be reached, or that the local cache has something of `name`.

    The hub's client would retry for half a minute without a network.

    Raises:
        InputError: no connection, and nothing in the cache.
    """
    if downloads(name, kind).is_dir() or (kind == "dataset" and _in_datasets_cache(name)):
        return
    local = "a local file or storyteller (bundled)" if kind == "dataset" else "a local folder, a bundled model"
    if kind == "model":
        local += " (smollm2-135m-instruct) or random:<architecture>"
    try:
        _connect()
    except OSError as error:
        raise InputError(
            f"{kind} {name} is on the hub, which cannot be reached ({one_line(first_line(error))}), "
            f"and it is not in the local cache; give {local}"
        ) from None


def _connect() -> None:
    """Connect once to the hub, or trust a proxy to.

    Raises:
        OSError: there is no connection.
    """
    from urllib.parse import urlparse
    from urllib.request import getproxies, proxy_bypass

    from huggingface_hub import constants

    endpoint = urlparse(constants.ENDPOINT)
    host = endpoint.hostname or ""
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    if not getproxies().keys() & {endpoint.scheme, "all"} or proxy_bypass(host):
        port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=5).close()


def _in_datasets_cache(name: str) -> bool:
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
