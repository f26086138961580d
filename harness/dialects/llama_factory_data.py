"""Data of LLaMA-Factory's training files: names of datasets, what dataset_info.json says of them, templates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from harness._util.messages import unknown
from harness.dialects.common import derive
from harness.dialects.rules import Reader
from harness.spec.keys import OWN_TEMPLATE

TOOL = "LLaMA-Factory"
_FILES = frozenset({".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt"})
_ONLINE = "ONLINE"
"""What `dataset_dir` is where names are those of the hub."""

_OWN_SYSTEM = "its own system prompt only where default_system gives it"
OWN_TEMPLATES: Mapping[str, tuple[str, str]] = {
    "alpaca": ("alpaca", f"begins with BOS; {_OWN_SYSTEM}"),
    "chatml": ("chatml", ""),
    "vicuna": ("vicuna", f"with a space after the system prompt and before an answer; {_OWN_SYSTEM}"),
}
"""Templates that belong to no model family: the template here, and what is other than there, in a few words."""
_PLAIN_TEMPLATES = frozenset({"default", "empty", "fewshot"})
"""Templates that are no model's and have no counterpart."""
_VISION = re.compile(r"(^|_)(omni|audio|vision|mllm)|vl(m|_|$)|llava|paligemma|pixtral|minicpm_[ov]|mllama|glm[0-9_]+v")


def read_template(reader: Reader) -> None:
    """Take over the template. One of a model family is the model's own, which is in its tokenizer."""
    if "template" not in reader.given:
        return
    name = str(reader.get("template"))
    if _VISION.search(name):
        reader.other_task("template", "a model of images or sounds")
    elif reader.get("stage") == "pt":
        reader.ignore("chats, and these are texts", "template")
    elif name in OWN_TEMPLATES:
        own, note = OWN_TEMPLATES[name]
        derive(reader, "chat_template", own, "template", note=note)
    elif name in _PLAIN_TEMPLATES:
        reader.refuse("template", f"use that of the model's family, or {', '.join(OWN_TEMPLATES)}")
    else:
        derive(reader, "chat_template", OWN_TEMPLATE, "template", note="the model's, which it must have")


def read_datasets(reader: Reader) -> None:
    """Take over the names of datasets. What they stand for is in a file: `datasets_from` reads its contents."""
    if reader.get("ignore_pad_token_for_loss") is False:
        reader.refuse("ignore_pad_token_for_loss", "leave it out: padding carries no loss")
    else:
        reader.ignore("padding, which carries no loss", "ignore_pad_token_for_loss")
    if "datasets" in reader.given:
        reader.note("datasets, which stand before it", "dataset", "dataset_dir", "max_samples", "default_system")
        return
    given = reader.get("dataset")
    if given is None:
        if not reader.other_tasks and reader.get("do_train") is True:
            reader.refuse("dataset", "name one")
        reader.ignore("details of dataset", "dataset_dir", "max_samples", "default_system")
        return
    folder = reader.get("dataset_dir", "data")
    if str(folder).startswith("REMOTE:"):
        reader.refuse("dataset_dir", "download that folder, and name it")
    entries = [{"path": _path(name, str(folder))} for name in _names(given)]
    _finish(entries, reader.given)
    reader.values["datasets"] = entries
    reader.note(f"datasets: {', '.join(str(entry['path']) for entry in entries)}", "dataset")
    reader.note("where the datasets are", "dataset_dir")
    reader.note(f"of each dataset the first {reader.get('max_samples')} rows", "max_samples")
    reader.note("system_prompt of the datasets", "default_system")


def info_path(document: Mapping[str, Any]) -> str | None:
    """The file that says what the datasets of a training file are, from the folder in which the tool is run.

    Returns:
        its path; null: the names are those of the hub or of files.
    """
    folder = str(document.get("dataset_dir") or "data")
    online = folder == _ONLINE or folder.startswith("REMOTE:")
    return None if online or not document.get("dataset") else str(PurePath(folder) / "dataset_info.json")


def datasets_from(document: Mapping[str, Any], info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The datasets of a training file, as in a grid file.

    Args:
        document: keys and values of the training file.
        info: contents of the dataset_info.json that `info_path` names.

    Raises:
        ValueError: as `datasets_of`.
    """
    entries = datasets_of(_names(document["dataset"]), info, folder=str(document.get("dataset_dir") or "data"))
    _finish(entries, document)
    return entries


def datasets_of(names: Iterable[str], info: Mapping[str, Any], *, folder: str = "data") -> list[dict[str, Any]]:
    """Datasets by their names in a dataset_info.json, as in a grid file.

    Args:
        names: of the datasets.
        info: contents of the file.
        folder: that it is in.

    Raises:
        ValueError: in one line: a name is not in it, or its rows are not those of supervised fine-tuning on text.
    """
    entries = []
    for name in names:
        if name not in info:
            raise ValueError(f"dataset_info.json: {unknown('dataset', name, info)}")
        entry = info[name]
        if not isinstance(entry, Mapping):
            raise ValueError(f"dataset_info.json: {name} is no mapping like {{file_name: mine.json}}")
        _refuse_other_names(name, entry)
        _refuse_other(name, entry)
        entries.append(_where(name, entry, folder) | {"type": _type(name, entry)})
    return entries


def _names(given: Any) -> list[str]:
    names = given if isinstance(given, list) else str(given).split(",")
    return [str(name).strip() for name in names if str(name).strip()]


def _path(name: str, folder: str) -> str:
    is_file = PurePath(name).suffix in _FILES
    return str(PurePath(folder) / name) if is_file and folder != _ONLINE else name


def _finish(entries: list[dict[str, Any]], document: Mapping[str, Any]) -> None:
    """Add what a training file says of all its datasets."""
    for entry in entries:
        most = document.get("max_samples")
        if most and "num_samples" in entry:  # the first of those that are taken at random
            if isinstance(entry["num_samples"], int):  # else the spec refuses it
                entry["num_samples"] = min(entry["num_samples"], most) if isinstance(most, int) else most
        elif most:
            entry["split"] = f"{entry.get('split', 'train')}[:{most}]"
        kind = entry.get("type")
        if document.get("stage") == "pt" and kind is None:
            entry["type"] = "completion"
        elif document.get("default_system"):
            entry["type"] = {**(kind or {}), "system_prompt": document["default_system"]}


_NAMES: Mapping[str, tuple[str, ...]] = {
    "columns": ("prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios",
                "chosen", "rejected", "kto_tag"),
    "tags": ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"),
}  # fmt: skip
"""Keys of a dataset's description that name columns and roles, and what they may hold."""


def _refuse_other_names(name: str, entry: Mapping[str, Any]) -> None:
    for key, known in _NAMES.items():
        given = entry.get(key) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"dataset_info.json: {name} has {key} {given!r}; give a mapping like {{{known[0]}: …}}")
        for each, value in given.items():
            if each not in known:
                raise ValueError(f"dataset_info.json: {name}: {key}: {unknown('key', each, known)}")
            if value is not None and not isinstance(value, str):
                raise ValueError(f"dataset_info.json: {name}: {key}: {each} is {value!r}; give a name")


def _refuse_other(name: str, entry: Mapping[str, Any]) -> None:
    columns = {key for key, column in (entry.get("columns") or {}).items() if column is not None}
    if entry.get("ranking") or any(key in columns for key in ("chosen", "rejected", "kto_tag")):
        raise ValueError(f"dataset_info.json: {name} has preferences; harness trains on single answers")
    media = [key for key in ("images", "videos", "audios") if key in columns]
    if media:
        raise ValueError(f"dataset_info.json: {name} has {media[0]}; harness trains on text")
    if "history" in columns:
        raise ValueError(f"dataset_info.json: {name} has a history; give whole chats with formatting: sharegpt")


def _where(name: str, entry: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Path, configuration and part of a dataset, and how many of its rows."""
    if "hf_hub_url" in entry:
        if "folder" in entry:
            raise ValueError(f"dataset_info.json: {name} is a folder of a dataset of the hub; download it, and name it")
        where = {"path": str(entry["hf_hub_url"])}
    elif "file_name" in entry:
        where = {"path": str(PurePath(folder) / str(entry["file_name"]))}
    else:
        raise ValueError(
            f"dataset_info.json: {name} has neither file_name nor hf_hub_url; download it, and name a file"
        )
    where |= {"name": entry["subset"]} if entry.get("subset") else {}
    where |= {"num_samples": entry["num_samples"]} if entry.get("num_samples") is not None else {}
    return where | ({"split": entry["split"]} if entry.get("split", "train") != "train" else {})


def _type(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt keys of a dataset."""
    formatting, columns = entry.get("formatting", "alpaca"), entry.get("columns")
    if formatting == "alpaca":
        return _alpaca(columns)
    if formatting in ("sharegpt", "openai"):
        return _chat(columns or {}, entry.get("tags") or {}, openai=formatting == "openai")
    raise ValueError(f"dataset_info.json: {name} has formatting {formatting!r}; use alpaca, sharegpt or openai")


def _alpaca(columns: Mapping[str, str] | None) -> dict[str, Any]:
    # Where a description has columns, those that it does not name are not read.
    columns = {"prompt": "instruction", "query": "input", "response": "output"} if columns is None else columns
    prompt = columns.get("prompt", "instruction")
    if "response" not in columns and set(columns) <= {"prompt"}:
        return {"kind": "text", "field_text": prompt}
    keys = {
        "kind": "instruction",
        "field_instruction": prompt,
        "field_input": columns.get("query"),
        "input_separator": "\n" if columns.get("query") else None,
        "field_output": columns.get("response", "output"),
        "field_system": columns.get("system"),
    }
    return {key: value for key, value in keys.items() if value is not None}


def _chat(columns: Mapping[str, str], tags: Mapping[str, str], *, openai: bool) -> dict[str, Any]:
    role, content = ("role", "content") if openai else ("from", "value")
    keys: dict[str, Any] = {
        "kind": "chat",
        "alternating_turns": True,
        "field_messages": columns.get("messages", "messages" if openai else "conversations"),
        "message_field_role": tags.get("role_tag", role),
        "message_field_content": tags.get("content_tag", content),
        "field_system": columns.get("system"),
        "field_tools": columns.get("tools"),
    }
    if tags.keys() - {"role_tag", "content_tag"}:
        answer = tags.get("assistant_tag", "assistant" if openai else "gpt")
        keys["roles"] = {
            "system": [tags.get("system_tag", "system")],
            "user": [tags.get("user_tag", "user" if openai else "human")],
            "assistant": [answer, tags.get("function_tag", "function_call")],
            "tool": [tags.get("observation_tag", "observation")],
        }
    return {key: value for key, value in keys.items() if value is not None}
