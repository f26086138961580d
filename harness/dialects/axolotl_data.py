"""Datasets and prompts of Axolotl's training files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.dialects.rules import EMPTY, Reader
from harness.spec.datasets import named_type
from harness.spec.keys import OWN_TEMPLATE

_OWN_TEMPLATES = ("alpaca", "chatml", "llama3", "gemma", "phi_3", "phi_4")
"""Names of chat templates that are the same here."""
_ANOTHER_NAME = {"mistral_v1": "mistral", "mistral_v2v3": "mistral", "mistral_v3_tekken": "mistral",
                 "mistral_v7_tekken": "mistral", "phi_35": "phi_3", "inst": "mistral"}  # fmt: skip
_OF_FAMILIES = (
    "aya", "cohere", "llama3_2_vision", "llama4", "deepseek_v2", "deepseek_v3", "jamba", "qwen_25", "qwen3",
    "qwen3_5", "exaone", "exaone4", "gemma3", "gemma3n", "gemma4", "falcon_h1", "command_a", "command_a_tool_use",
    "command_a_rag", "llama3_1", "llama3_2", "pixtral", "llava", "qwen2_vl", "granite", "granitemoe",
)  # fmt: skip
"""Names of templates that the tokenizers of their families bring themselves."""
_CONVERSATIONS = {"chatml": "chatml", "llama-3": "llama3", "llama3": "llama3", "mistral": "mistral", "gemma": "gemma",
                  "vicuna_v1.1": "vicuna", "zephyr": "zephyr", "phi3": "phi_3"}  # fmt: skip
"""Values of `conversation`, an older name for the template of a ShareGPT dataset."""

_SHAREGPT_ROLES = {"gpt": "assistant", "human": "user"}

_PLAIN_KEYS = ("path", "name", "split", "ds_type", "shards", "data_files")
_PROMPT_KEYS = (
    "field_messages", "message_field_role", "message_field_content", "roles_to_train", "field_tools", "field_system",
)  # fmt: skip
_NO_EFFECT = ("trust_remote_code", "preprocess_shards", "input_format", "hf_use_auth_token")
_MEDIA = ("image_base_dir", "field_images")

_PREFERENCE_TYPES = (
    "chatml.", "llama3.", "zephyr.", "orpo.", "kto.", "bradley_terry.", "stepwise_supervised", "user_defined.",
    "passthrough", "chat_template.default", "chat_template.argilla", "gemma.custom", "prompt_pairs.", "ipo.",
)  # fmt: skip
"""Beginnings of types of pairs of answers."""
_ALPACA_LIKE = ("alpaca", "gpteacher")
_OWN_DEFAULTS = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "format": "{instruction} {input} ",
    "no_input_format": "{instruction} ",
    "system_format": "{system}",
}
"""What its mapping of prompt keys has where a file gives nothing: Axolotl, `UserDefinedDatasetConfig`."""
_INSTEAD = "use alpaca, chat_template, completion, or a mapping with field_instruction, field_output and format"


def read(reader: Reader) -> None:
    """The keys of data and prompts."""
    system = reader.get("default_system_message")
    entries = _entries(reader, "datasets") or _entries(reader, "pretraining_dataset")
    template = _template(reader)
    read_entries = [_dataset(reader, f"datasets[{n}]", entry, system) for n, entry in enumerate(entries)]
    if "pretraining_dataset" in reader.given:
        read_entries = [entry | {"type": _text(entry)} for entry in read_entries]
    if read_entries:
        reader.set("datasets", read_entries, "datasets", "pretraining_dataset")
        if any(entry.get("type", {}).get("kind") == "text" for entry in read_entries):
            note = "a text longer than sequence_len is left out or cut; Axolotl makes several examples of it"
            reader.note(note, "datasets", "pretraining_dataset")
    elif "datasets" not in reader.unsupported:
        reader.notes["datasets"] = "none in the file: the bundled stories (storyteller)"
    if reader.get("train_on_inputs") is True and _has_chats(reader):
        reader.note("all of a chat carries loss; in Axolotl its turns do, and not their headers", "train_on_inputs")
    reader.note("system_prompt of each dataset", "default_system_message")
    _set_template(reader, template, entries)
    _special_tokens(reader)
    _held_out(reader, system)


def _entries(reader: Reader, key: str) -> list[Any]:
    given = reader.get(key, [])
    if isinstance(given, str):
        return [{"path": given}]
    return given if isinstance(given, list) else [given]


def _text(entry: Mapping[str, Any]) -> dict[str, Any]:
    column = entry.get("type", {}).get("field_text") if isinstance(entry.get("type"), Mapping) else None
    return {"kind": "text"} | ({"field_text": column} if column else {})


def _held_out(reader: Reader, system: Any) -> None:
    """Test datasets replace a part of the training data; without either nothing is evaluated."""
    size = reader.get("val_set_size", 0)
    tests = [
        _dataset(reader, f"test_datasets[{n}]", e, system) for n, e in enumerate(_entries(reader, "test_datasets"))
    ]
    if tests:
        reader.set("test_datasets", tests, "test_datasets")
        reader.values.pop("val_set_size", None)
        reader.ignore("test_datasets are evaluated", "val_set_size")
    else:
        reader.set("val_set_size", size, "val_set_size")


def _dataset(reader: Reader, where: str, entry: Any, system: Any) -> dict[str, Any]:
    """One entry as in a grid file."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping):
        reader.refuse(where, "give a mapping with path and type", entry)
        return {"path": "unknown"}
    given = {str(key): value for key, value in entry.items() if value not in EMPTY}
    result = {key: given.pop(key) for key in _PLAIN_KEYS if key in given}
    # `path: json` names a format, and data_files the files.
    if result.get("path") in ("json", "csv", "parquet", "arrow", "text") and "data_files" in result:
        given_files = files = result.pop("data_files")
        if isinstance(files, Mapping):  # of one part, as `datasets` takes them
            files = files.get(result.get("split", "train")) if len(files) == 1 else None
        files = [files] if isinstance(files, str) else files
        if not isinstance(files, list) or len(files) != 1 or not isinstance(files[0], str):
            reader.refuse(f"{where}.data_files", "give one dataset for each file, or a pattern of files", given_files)
            return {"path": "unknown"}
        result |= {"ds_type": result["path"], "path": files[0]}
    if result.get("data_files") in (result.get("path"), [result.get("path")]):
        result.pop("data_files", None)
    prompt = _prompt(reader, where, given)
    if system is not None and prompt.get("kind") == "chat":
        prompt.setdefault("system_prompt", system)
    for name, value in given.items():
        if name in _MEDIA:
            reader.other_tasks[f"{where}.{name}"] = f"{where}.{name}: training on images"
        elif name not in _NO_EFFECT and value is not False:
            reader.refuse(f"{where}.{name}", _advice(name), value)
    return result | ({"type": prompt} if prompt else {})


def _advice(name: str) -> str:
    return {
        "revision": "download that revision and give its folder",
        "train_on_eos": "use turn: the end of each trained turn is trained on",
        "shards_idx": "leave it out: the first part is read",
        "message_field_training": "give the turns that are not trained on weight: 0 in the data",
        "message_field_training_detail": "leave it out: a turn is trained on whole, or not",
    }.get(name, "leave it out")


def _prompt(reader: Reader, where: str, given: dict[str, Any]) -> dict[str, Any]:
    """The prompt keys of an entry, taken out of what is given."""
    kind = given.pop("type", None)
    prompt: dict[str, Any]
    if isinstance(kind, Mapping):
        prompt = _own_prompt(reader, where, kind)
    elif kind is None:
        prompt = {}
    else:
        prompt = _named(reader, where, str(kind).strip(), given)
    if (ends := given.pop("train_on_eos", "turn")) not in ("turn", None):
        reader.refuse(f"{where}.train_on_eos", _advice("train_on_eos"), ends)
    prompt |= {key: given.pop(key) for key in _PROMPT_KEYS if key in given}
    if prompt.get("kind") == "chat":
        prompt.setdefault("field_system", "system")  # where a chat has no turn of it
    if "text_column" in given or "field" in given:
        prompt["field_text"] = given.pop("text_column", None) or given.pop("field", None)
        given.pop("field", None)
    _mappings(reader, where, given, prompt)
    for name in ("chat_template", "chat_template_jinja", "conversation"):
        given.pop(name, None)  # read with that of the file
    return prompt


def _mappings(reader: Reader, where: str, given: dict[str, Any], prompt: dict[str, Any]) -> None:
    """Names of a message's parts, and of roles."""
    mappings = given.pop("message_property_mappings", {})
    for name, column in mappings.items() if isinstance(mappings, Mapping) else ():
        if name in ("role", "content"):
            prompt[f"message_field_{name}"] = column
        elif name != column:
            reader.refuse(f"{where}.message_property_mappings.{name}", f"name it {name} in the data", column)
    if isinstance(given.get("roles"), Mapping):
        prompt["roles"] = given.pop("roles")
    trained = prompt.get("roles_to_train")
    if isinstance(trained, list) and all(isinstance(name, str) for name in trained):
        # Axolotl takes the names of ShareGPT's data for the roles that they are.
        prompt["roles_to_train"] = list(dict.fromkeys(_SHAREGPT_ROLES.get(name, name) for name in trained))


def _own_prompt(reader: Reader, where: str, kind: Mapping[Any, Any]) -> dict[str, Any]:
    """A mapping of prompt keys."""
    given = {str(key): value for key, value in kind.items() if value is not None}
    if given.pop("field", None) and "field_output" not in given:
        return {"kind": "text", "field_text": kind["field"]}
    known = ("system_prompt", "field_system", "field_instruction", "field_input", "field_output", "format",
             "no_input_format", "system_format")  # fmt: skip
    for name in given.keys() - {*known}:
        reader.refuse(f"{where}.type.{name}", "leave it out", given[name])
    prompt = _OWN_DEFAULTS | {key: given[key] for key in known if key in given}
    return {key: value for key, value in prompt.items() if value != "" or key == "no_input_format"}


def _named(reader: Reader, where: str, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The prompt keys of a type's name."""
    base, _, variant = kind.partition(":")
    if base in _ALPACA_LIKE and not variant:
        alpaca = named_type("alpaca")
        return alpaca if base == "alpaca" else alpaca | {"field_output": "response"}
    if base == "completion":
        return {"kind": "text"}
    if base == "chat_template":
        return {"kind": "chat", "add_special_tokens": False}
    if base.split(".")[0] == "sharegpt":
        return named_type("sharegpt") | _sharegpt(given)
    if base in ("pretrain", "text"):
        return {"kind": "text"}
    if base.startswith(_PREFERENCE_TYPES):
        reader.other_tasks[f"{where}.type"] = f"{where}.type: {kind}: preference training"
        return {}
    reader.refuse(f"{where}.type", _INSTEAD, kind)
    return {}


def _sharegpt(given: dict[str, Any]) -> dict[str, Any]:
    """Older names for the roles."""
    names = {"user": given.pop("field_human", None), "assistant": given.pop("field_model", None)}
    roles = {role: [name] for role, name in names.items() if name}
    return {"roles": roles} if roles else {}


def _template(reader: Reader) -> str | None:
    for name in ("chat_template_jinja", "chat_template"):
        given = reader.get(name)
        if isinstance(given, str):
            return given
        if given is not None:
            reader.refuse(name, "give a name or Jinja text")
    return None


def _set_template(reader: Reader, template: str | None, entries: Sequence[Any]) -> None:
    """One template for all datasets: that of the file, else the one that the entries agree on."""
    of_entries = {_of_entry(entry) for entry in entries if isinstance(entry, Mapping)} - {None}
    names: tuple[str, ...] = ("chat_template", "chat_template_jinja")
    if template is None and len(of_entries) == 1:
        template, names = of_entries.pop(), ("datasets",)
    elif of_entries - {template, "tokenizer_default", "jinja"}:
        reader.refuse("datasets.chat_template", "one chat template for all datasets", sorted(map(str, of_entries)))
    if template in (None, "tokenizer_default", "jinja"):
        reader.note("the model's own chat template", "chat_template")
        return
    name = str(template).removeprefix("tokenizer_default_fallback_")
    note = "where the tokenizer has none" if name != template else ""
    if "{{" in name or "{%" in name:
        reader.set("chat_template", name, *names)
    elif not note and name in _OF_FAMILIES and _has_chats(reader):
        reader.set("chat_template", OWN_TEMPLATE, *names, note=f"the model's, which is {name}'s")
    elif note or name in _OF_FAMILIES:
        reader.note(f"the model's own chat template, which is {name}'s", "chat_template")
    elif name in _OWN_TEMPLATES or name in _ANOTHER_NAME:
        # The names of a dataset stay what the entry became.
        reader.set("chat_template", _ANOTHER_NAME.get(name, name), *(n for n in names if n != "datasets"))
    else:
        reader.refuse(
            "chat_template", f"use tokenizer_default, Jinja text, or one of {', '.join(_OWN_TEMPLATES)}", name
        )


def _has_chats(reader: Reader) -> bool:
    """Whether a dataset is of chats, which Axolotl puts into the template; other types have prompts of their own."""
    return any(entry.get("type", {}).get("kind") == "chat" for entry in reader.values.get("datasets", []))


def _of_entry(entry: Mapping[Any, Any]) -> str | None:
    conversation = entry.get("conversation")
    of_conversation = _CONVERSATIONS.get(str(conversation), conversation) if conversation else None
    named = entry.get("chat_template_jinja") or entry.get("chat_template") or of_conversation
    return None if named is None else str(named)


def _special_tokens(reader: Reader) -> None:
    given = reader.get("special_tokens")
    if not isinstance(given, Mapping):
        if given is not None:
            reader.refuse("special_tokens", "give a mapping like {pad_token: <pad>}")
        return
    kept = {key: value for key, value in given.items() if value not in EMPTY}
    for name in [name for name in kept if name not in ("bos_token", "eos_token", "pad_token", "unk_token")]:
        reader.refuse(f"special_tokens.{name}", "give a checkpoint whose vocabulary has it", kept.pop(name))
    if kept:
        reader.set("special_tokens", kept, "special_tokens")
