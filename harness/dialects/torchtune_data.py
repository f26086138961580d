"""Tokenizer and datasets of torchtune's training files: the builders of `torchtune.datasets` and their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.dialects.common import MOST_POSITIONS
from harness.dialects.components import Component, whole_number
from harness.dialects.references import is_reference
from harness.dialects.rules import Reader, Unlike

_POSITIONS = {
    "llama2": 4096, "code_llama2": 16_384, "llama3": 8192, "llama3_1": 131_072, "llama3_2": 131_072,
    "llama3_3": 131_072, "mistral": 32_768, "gemma": 8192, "gemma2": 8192, "phi3": 4096, "phi4": 16_384,
    "qwen2": 32_768, "qwen2_5": 32_768, "qwen3": 40_960,
}  # fmt: skip
"""Tokens that torchtune's builders of a family have positions for."""
_FILES = ("json", "csv", "parquet", "arrow", "text")
"""Sources that name a format of files, not a dataset."""
_LOADING = ("cache_dir", "token", "num_proc", "streaming", "download_mode", "verification_mode", "trust_remote_code")
_TEXTS = {
    "GrammarErrorCorrectionTemplate": ("Correct this to standard English: ", "\n---\nCorrected: "),
    "SummarizeTemplate": ("Summarize this dialogue:\n", "\n---\nSummary:\n"),
    "QuestionAnswerTemplate": ("Question: ", "\n\nAnswer: "),
}
"""What torchtune's prompt templates put before and after a prompt."""
_OWN_TEMPLATES = ("Llama2ChatTemplate", "MistralChatTemplate")
_NO_TEMPLATE = "give the text as format under the dataset's type, or a chat template as chat_template"
_ELSE = "without a dataset the bundled stories are trained on"
_PREFERENCES = ("preference", "hh_rlhf", "stack_exchange", "Preference")
_IMAGES = ("multimodal", "vqa", "llava", "cauldron", "image")
_WITHOUT_TURNS = ("gemma_tokenizer", "llama2_tokenizer", "mistral_tokenizer")
"""Tokenizers that mark no turns of themselves: what a prompt template puts around a prompt is all there is."""
_TOKENIZER_FILES = (
    "path", "vocab_path", "merges_path", "merges_file", "special_tokens_path", "tokenizer_json_path",
    "tokenizer_config_json_path", "generation_config_path", "max_num_tiles", "image_size",
)  # fmt: skip


@dataclass(frozen=True)
class _Around:
    """What a prompt template puts around a prompt; nothing where the model's own chat template is used."""

    format: str | None = None
    system: str = "{system}"
    """How a system prompt stands before it, where there is one."""
    turns: bool = True
    """Whether torchtune's tokenizer puts the prompt into a turn of a chat."""


def read(reader: Reader) -> None:
    """Read `tokenizer` and `dataset`; the family of `model` decides how long an example may be."""
    tokenizer = Component.of(reader, "tokenizer")
    length, around = None, _Around()
    if tokenizer is not None:
        length = tokenizer.take("max_seq_len", None)
        around = _prompt_template(reader, tokenizer)
        tokenizer.drop(*_TOKENIZER_FILES)
        if tokenizer.take("truncation_type", "right") != "right":
            tokenizer.refuse("truncation_type", "examples are cut on the right", "left")
        tokenizer.refuse_rest()
        reader.note("files of the base model's folder", "tokenizer")
    given = reader.get("dataset")
    if given is None:
        reader.refuse("dataset", f"torchtune has no default; {_ELSE}")
    else:
        length = _datasets(reader, given, around) or length
    _sequence_length(reader, length)


def _sequence_length(reader: Reader, length: Any) -> None:
    if length is not None:
        try:
            reader.set("sequence_length", whole_number(length, least=8), "tokenizer")
            return
        except Unlike as error:
            reader.refuse("tokenizer.max_seq_len", str(error), length)
    given = reader.get("model")
    path = str(given.get("_component_", "")) if isinstance(given, Mapping) else ""
    positions = _POSITIONS.get((path.split(".") + [""] * 3)[2])
    note = "torchtune cuts nothing without max_seq_len" + "; its model has so many positions" * (positions is not None)
    reader.set("sequence_length", positions or MOST_POSITIONS, "tokenizer", note=note)


def _prompt_template(reader: Reader, tokenizer: Component) -> _Around:
    plain = tokenizer.name in _WITHOUT_TURNS
    # Without the key, those of Llama 2 and Mistral have the template of their chats.
    bare = plain and (tokenizer.name == "gemma_tokenizer" or "prompt_template" in tokenizer.arguments)
    template = tokenizer.take("prompt_template", None)
    if template is None:
        return _Around("{instruction}", turns=False) if bare else _Around()
    if isinstance(template, Mapping):
        return _custom_template(tokenizer, template)
    name = str(template).rpartition(".")[2]
    if name in _TEXTS:
        before, after = _TEXTS[name]
        return _Around(f"{before}{{instruction}}{after}", turns=not plain)
    if name == "ChatMLTemplate":
        reader.set("chat_template", "chatml", "tokenizer")
    elif name in _OWN_TEMPLATES:
        reader.note(f"{name}: the base model's own chat template", "tokenizer")
    else:
        tokenizer.refuse("prompt_template", _NO_TEMPLATE, template)
    return _Around()


def _custom_template(tokenizer: Component, template: Mapping[str, Any]) -> _Around:
    """Texts before and after each role's turns, as `format`: it has one prompt, and nothing after the completion."""
    try:
        tags = {role: (str(before or ""), str(after or "")) for role, (before, after) in template.items()}
    except (TypeError, ValueError):
        tags = {"assistant": ("", "?")}
    lead, end = tags.get("assistant", ("", ""))
    if end or not {*tags} <= {"system", "user", "assistant"}:
        tokenizer.refuse("prompt_template", _NO_TEMPLATE, str(dict(template)))
        return _Around()
    system, user = (tuple(map(_escaped, tags.get(role, ("", "")))) for role in ("system", "user"))
    text = f"{user[0]}{{instruction}}{user[1]}{_escaped(lead)}"
    return _Around(text, f"{system[0]}{{system}}{system[1]}", turns=tokenizer.name not in _WITHOUT_TURNS)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _datasets(reader: Reader, given: Any, around: _Around) -> Any:
    """Read one dataset or a list of them.

    Returns:
        `max_seq_len` of the datasets, which older builders have; null where there is none.
    """
    whole = given.get("datasets") if isinstance(given, Mapping) and "ConcatDataset" in str(given) else None
    several = whole if isinstance(whole, list) else given
    if not isinstance(several, list):
        several = [several]
    loss_on_prompts: list[bool] = []
    lengths: list[Any] = []
    entries = []
    for number, each in enumerate(several):
        place = "dataset" if len(several) == 1 else f"dataset[{number}]"
        dataset = Component.read(reader, place, each)
        if dataset is not None:
            lengths.append(dataset.take("max_seq_len", None))
            entries += _entries(reader, dataset, around, loss_on_prompts)
    if entries:
        reader.values["datasets"] = entries
    _same_loss(reader, loss_on_prompts)
    if len(set(map(str, lengths))) > 1:
        reader.refuse("dataset[].max_seq_len", "one length for all; give it to the tokenizer", lengths)
    return lengths[0] if lengths else None


def _same_loss(reader: Reader, loss_on_prompts: list[bool]) -> None:
    """A spec has one answer for all of its datasets."""
    if len({*loss_on_prompts}) > 1:
        reader.refuse("dataset[].train_on_input", "the same for all datasets", loss_on_prompts)
    elif loss_on_prompts:
        reader.set("train_on_inputs", loss_on_prompts[0], "dataset")


def _entries(reader: Reader, dataset: Component, around: _Around, loss_on_prompts: list[bool]) -> list[dict[str, Any]]:
    """A dataset as entries of a spec, one for each of its files; none where it is refused."""
    if any(word in dataset.path for word in _PREFERENCES):
        reader.other_task("dataset", "training on preferences")
        return []
    if any(word in dataset.path for word in _IMAGES) or {"image_dir", "image_tag"} & dataset.arguments.keys():
        reader.other_task("dataset", "a model of images")
        return []
    builder = _BUILDERS.get(dataset.name) if dataset.path.startswith("torchtune.datasets.") else None
    if builder is None:
        dataset.refuse("_component_", f"use one of torchtune.datasets: {', '.join(_BUILDERS)}; {_ELSE}")
        return []
    columns = dataset.take("column_map", {})
    kind = builder.kind(dataset, columns)
    sources = _sources(dataset, builder)
    dataset.reader.note(" + ".join(source["path"] for source in sources), "dataset")
    if kind["type"] != "completion":
        loss_on_prompts.append(_loss_on_prompts(dataset, kind, builder.train_on_input))
        if system := dataset.text("new_system_prompt"):
            kind["system_prompt"] = system
        _around(dataset, kind, around)
    _refuse_options(dataset)
    return [source | kind for source in sources]


def _around(dataset: Component, kind: dict[str, Any], around: _Around) -> None:
    """The text of a prompt template, which a spec has under each dataset."""
    within = "; torchtune puts it into a turn of the model's chat" if around.turns else ""
    if isinstance(kind["type"], dict) and around.format is not None:
        kind["format"] = (around.system if "system_prompt" in kind else "") + around.format
        dataset.reader.note(f"the prompt template alone{within}", "dataset")
    elif around.format == "{instruction}":
        if kind["type"] != "alpaca":
            dataset.reader.note("turns as the model's chat marks them; torchtune's tokenizer marks none", "dataset")
    elif around.format is not None:
        dataset.reader.refuse("tokenizer.prompt_template", _NO_TEMPLATE, around.format)
    if kind["type"] == "alpaca" and within:
        dataset.reader.note(f"the prompt of Alpaca alone{within}", "dataset")


def _loss_on_prompts(dataset: Component, kind: dict[str, Any], default: bool) -> bool:
    """By `train_on_input`, or by `masking_strategy`, which newer builders have in its place."""
    strategy = dataset.take("masking_strategy", "train_on_all" if default else "train_on_assistant")
    given = dataset.take("train_on_input", None)
    if given is not None:
        return bool(given)
    one_answer = kind["type"] == "alpaca" or isinstance(kind["type"], dict)
    if strategy not in ("train_on_all", "train_on_assistant") and not (strategy == "train_on_last" and one_answer):
        dataset.refuse("masking_strategy", "use train_on_all or train_on_assistant", strategy)
    return bool(strategy == "train_on_all")


def _sources(dataset: Component, builder: _Builder) -> list[dict[str, Any]]:
    """Paths, parts and configurations; several files of a named format are one entry each."""
    path = dataset.text("source", builder.source)
    common = {"name": dataset.text("subset", dataset.text("name", builder.name)), "split": dataset.text("split")}
    common = {key: value for key, value in common.items() if value is not None}
    files = dataset.take("data_files", None)
    if isinstance(files, Mapping):
        files = files.get(str(common.get("split", "train")).partition("[")[0], [])
    files = files if isinstance(files, list) else [files] if files else []
    for text in (path, *files):
        if not isinstance(text, str) or is_reference(text) or "://" in text:
            dataset.refuse("source", "give a dataset of the hub or local files", text)
            return []
    if path not in _FILES:
        return [{"path": path, **({"data_files": files} if files else {}), **common}]
    if not files:
        dataset.refuse("data_files", f"source {path} needs the files' names", None)
    return [{"path": file, "ds_type": path, **common} for file in files]


def _refuse_options(dataset: Component) -> None:
    if dataset.take("packed", False):
        dataset.refuse("packed", "examples are padded, not packed; use packed: false", True)
    if (filtered := dataset.take("filter_fn", None)) is not None:
        dataset.refuse("filter_fn", "filter the rows beforehand", filtered)
    if (folder := dataset.take("data_dir", None)) is not None:
        dataset.refuse("data_dir", "name the files as data_files", folder)
    dataset.drop(*_LOADING)
    dataset.refuse_rest()


_Kind = Callable[[Component, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class _Builder:
    """A builder of `torchtune.datasets`: how it reads a row, and its own defaults."""

    kind: _Kind
    source: str | None = None
    name: str | None = None
    train_on_input: bool = False


def _alpaca(dataset: Component, columns: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {f"field_{name}": columns[name] for name in ("instruction", "input", "output") if name in columns}
    return {"type": "alpaca", **renamed}


def _pairs(prompt: str, answer: str) -> _Kind:
    def kind(dataset: Component, columns: Mapping[str, Any]) -> dict[str, Any]:
        template = str(dataset.take("template", "")).rpartition(".")[2]  # of older versions
        if template == "AlpacaInstructTemplate":
            return _alpaca(dataset, columns)
        if template:
            dataset.refuse("template", _NO_TEMPLATE, template)
        names = {"instruction": columns.get("input", prompt), "output": columns.get("output", answer)}
        return {"type": {"kind": "instruction", **{f"field_{key}": name for key, name in names.items()}}}

    return kind


def _turns(dataset: Component, columns: Mapping[str, Any]) -> dict[str, Any]:
    column, style = dataset.text("conversation_column"), dataset.text("conversation_style")
    if style not in ("sharegpt", "openai"):
        dataset.refuse("conversation_style", "use sharegpt or openai", style)
    named = {} if column is None else {"field_messages": column}
    return {"type": "sharegpt" if style == "sharegpt" else "chat_template", **named}


def _orca(dataset: Component, columns: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "sharegpt", "field_messages": columns.get("conversations", "conversations")}


def _text(column: str) -> _Kind:
    def kind(dataset: Component, columns: Mapping[str, Any]) -> dict[str, Any]:
        if dataset.arguments.get("add_eos") is False:
            dataset.refuse("add_eos", "a text ends with its end token; use true", "false")
        dataset.drop("add_eos")
        return {"type": "completion", "field_text": dataset.text("column", column)}

    return kind


_BUILDERS: dict[str, _Builder] = {
    "alpaca_dataset": _Builder(_alpaca, "tatsu-lab/alpaca", train_on_input=True),
    "alpaca_cleaned_dataset": _Builder(_alpaca, "yahma/alpaca-cleaned", train_on_input=True),
    "instruct_dataset": _Builder(_pairs("input", "output")),
    "grammar_dataset": _Builder(_pairs("input", "output"), "liweili/c4_200m"),
    "samsum_dataset": _Builder(_pairs("dialogue", "summary"), "Samsung/samsum"),
    "chat_dataset": _Builder(_turns),
    "slimorca_dataset": _Builder(_orca, "Open-Orca/SlimOrca-Dedup"),
    "text_completion_dataset": _Builder(_text("text")),
    "cnn_dailymail_articles_dataset": _Builder(_text("article"), "ccdv/cnn_dailymail", "3.0.0"),
    "wikitext_dataset": _Builder(_text("page"), "EleutherAI/wikitext_document_level", "wikitext-103-v1"),
}
