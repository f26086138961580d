"""Where examples come from and how a row becomes one: the keys under `datasets:`."""

from __future__ import annotations

import dataclasses
import enum
import string
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from harness._util.redact import redact_home

MOST = 2**31 - 1
"""Largest count: larger ones are typing errors, and seeds and Arrow columns have bounds."""
PositiveInt = Annotated[StrictInt, Field(ge=1, le=MOST)]


class Frozen(BaseModel):
    """A declaration that validates itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Metadata of a field in its `Annotated`: what is known of it besides its type."""

    measured: bool = True
    """Whether it changes what is measured; else it is left out of the id."""
    memory: bool = True
    """Whether it changes the memory of a training step."""
    untrained: bool = True
    """Whether it may change a bit of the untrained model's loss on held-out stories."""
    given: bool = True
    """Whether a grid file may give it; else harness sets it."""
    absent: Any = ...
    """For a field that was added later: its value in rows and ids from before. `...`: it was there from the start."""

    @classmethod
    def of(cls, field: FieldInfo) -> Facts:
        """The facts of a field; the defaults where it declares none.

        Raises:
            TypeError: it declares several.
        """
        declared = [each for each in field.metadata if isinstance(each, cls)]
        if len(declared) > 1:
            raise TypeError(f"{field.description!r}: declare one Facts with all of them")
        return declared[0] if declared else cls()


class Part(enum.StrEnum):
    """Metadata of a field in its `Annotated`: the part of a training that it acts on, in the order of reports."""

    WEIGHTS = "weights"
    """The base model's, and the arithmetic on them."""
    ADAPTERS = "adapters"
    """What is trained."""
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    """What a forward pass computes and keeps."""
    DATA = "data"
    """What is in a micro-batch."""
    TRAINING = "training"
    """How long and how fast it learns."""
    SEVERAL = "several"
    """Of a technique of several keys: they act on different parts."""

    @classmethod
    def of(cls, field: FieldInfo) -> Part | None:
        """The part that a field acts on; null where it declares none.

        Raises:
            TypeError: it declares several.
        """
        declared = [each for each in field.metadata if isinstance(each, cls)]
        if len(declared) > 1:
            raise TypeError(f"{field.description!r}: declare one part")
        return declared[0] if declared else None


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} is not one line of printable text")
    return text


Line = Annotated[StrictStr, Field(min_length=1, max_length=500), AfterValidator(_one_line)]
"""One line of printable text."""
NameOrPath = Annotated[Line, AfterValidator(redact_home)]
"""A path under the home folder begins with `~`, so that it is equal for every user."""


def _later(default: Any) -> Any:
    """A key that was added later: left out of JSON at its default, so that ids from before stay valid."""
    return Field(default, exclude_if=lambda value: value == default)


_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
_TYPES: dict[str, dict[str, Any]] = {
    "alpaca": {
        "kind": "instruction",
        "field_instruction": "instruction",
        "field_input": "input",
        "field_output": "output",
        "format": _ALPACA.format(", paired with an input that provides further context")
        + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "no_input_format": _ALPACA.format("") + "### Instruction:\n{instruction}\n\n### Response:\n",
    },
    "chat_template": {"kind": "chat"},
    "completion": {"kind": "text"},
    "prompt_completion": {"kind": "instruction", "field_instruction": "prompt", "field_output": "completion"},
    "sharegpt": {
        "kind": "chat",
        "field_messages": "conversations",
        "message_field_role": "from",
        "message_field_content": "value",
    },
}
"""Names that `type` accepts, and the keys that each stands for. The prompt of `alpaca` is that of Stanford's Alpaca,
which Axolotl's type of this name has too."""


BARE = "{instruction}"
"""The `format` of prompts that stand as they are, as TRL takes them; of chats it says nothing."""


def named_type(name: str) -> dict[str, Any]:
    """The prompt keys that a name of `type` stands for.

    Raises:
        KeyError: there is none of that name.
    """
    return dict(_TYPES[name])


def name_of_type(keys: Mapping[str, Any]) -> str | None:
    """The name of `type` that stands for some prompt keys; null: there is none."""
    return next((name for name, stands_for in _TYPES.items() if stands_for == keys), None)


def _with_placeholders(text: str, needed: str, *others: str) -> str:
    """The text.

    Raises:
        ValueError: it has other placeholders than these, or lacks the first.
    """
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(text)]
    except ValueError as error:
        raise ValueError(f"{text!r} has a brace that stands alone ({error}); double it") from None
    names = [name for name, _, _ in parts if name is not None]
    if not {*names} <= {needed, *others} or any(spec or how for _, spec, how in parts):
        known = ", ".join(f"{{{name}}}" for name in (needed, *others))
        raise ValueError(f"{text!r} has a placeholder other than {known}")
    if needed not in names:
        raise ValueError(f"{text!r} never names {{{needed}}}")
    return text


class PromptSpec(Frozen):
    """How a row becomes an example: a prompt and a completion, the turns of a chat, or a text."""

    kind: Literal["auto", "instruction", "chat", "text"] = _later("auto")
    """`auto`: by the columns. `instruction`: a prompt and a completion. `chat`: turns. `text`: loss on all of it."""
    system_prompt: StrictStr | None = None
    """Instruction that stands before every prompt."""
    field_system: StrictStr | None = None
    """Column whose text, where a row has one, replaces `system_prompt`."""
    field_instruction: StrictStr = "synopsis"
    """Column of the prompt."""
    field_input: StrictStr | None = None
    """Column of further input to the prompt; absent from the bundled stories."""
    input_separator: StrictStr = _later("\n\n")
    """What stands between a prompt and its further input, where no `format` places it."""
    field_output: StrictStr = "short_story"
    """Column of the completion; the loss is taken here."""
    field_messages: StrictStr | None = _later(None)
    """Column of a chat's turns; null: `messages` or `conversations`, whichever is there."""
    message_field_role: StrictStr | None = _later(None)
    """Key of a turn's role; null: `role` or `from`."""
    message_field_content: StrictStr | None = _later(None)
    """Key of a turn's text; null: `content` or `value`."""
    roles: tuple[tuple[StrictStr, tuple[StrictStr, ...]], ...] = _later(())
    """Names of roles in the data, by the template's: `{assistant: [gpt, model]}`; the usual ones are known."""
    roles_to_train: Annotated[tuple[StrictStr, ...], Field(min_length=1)] = _later(("assistant",))
    """Roles whose turns carry loss; `all`: every token of a chat, and of an answer all that follows its prompt, as TRL
    has it without `assistant_only_loss`."""
    alternating_turns: bool = _later(False)
    """Pass over chats in which, after a system turn, user and assistant do not take turns to the assistant's last, as
    LLaMA-Factory does; what tools answer counts as the user's."""
    add_special_tokens: bool = _later(True)
    """Whether a chat begins with what the tokenizer puts before a text, where its template does not have it; TRL and
    Axolotl leave it to the template."""
    field_tools: StrictStr | None = _later(None)
    """Column of a chat's tools; null: `tools`, where it is there."""
    field_text: StrictStr | None = _later(None)
    """Column of a text; null: `text`."""
    format: StrictStr | None = None
    """Prompt text with `{instruction}`, `{input}` and `{system}`; replaces the chat template. `{instruction}` alone is
    the prompt as it stands."""
    no_input_format: StrictStr | None = None
    """As `format`, for rows without input."""
    system_format: StrictStr = _later("{system}\n")
    """What a prompt of `format` begins with where there is a system text, unless `format` places it."""
    tokenize_jointly: bool = _later(False)
    """Whether a prompt and its completion are tokenised as one text, as TRL does: the space that ends a prompt is then
    a part of the completion's first token."""

    @property
    def trains_all(self) -> bool:
        """Whether every token of a chat carries loss."""
        return "all" in self.roles_to_train

    def trains(self, turn: Mapping[str, Any]) -> bool:
        """Whether a turn carries loss: its role is trained on, and it has no `weight` of 0, as in OpenAI's format."""
        return (self.trains_all or turn["role"] in self.roles_to_train) and turn.get("weight", 1) != 0

    @field_validator("roles", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """A mapping, where one name may stand without a list, as pairs."""
        if not isinstance(value, Mapping):
            return value
        return tuple((role, (names,) if isinstance(names, str) else names) for role, names in value.items())

    @field_validator("roles_to_train", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("format", "no_input_format")
    @classmethod
    def _has_only_known_placeholders(cls, text: str | None) -> str | None:
        return None if text is None else _with_placeholders(text, "instruction", "input", "system")

    @field_validator("system_format")
    @classmethod
    def _has_only_the_system_text(cls, text: str) -> str:
        return _with_placeholders(text, "system")


class DatasetSpec(Frozen):
    """Where stories come from."""

    path: NameOrPath
    """Bundled name (`storyteller`, `storyteller-openings`), a file (.jsonl, .csv, .parquet, …) or a pattern of files, a
    folder, or a hub id."""
    name: Line | None = _later(None)
    """Configuration of a dataset of the hub."""
    split: Line | None = _later(None)
    """Part that is read, like `train` or `train[:1000]`; null: `train`, with `test` held out where a folder has one."""
    data_files: tuple[NameOrPath, ...] = _later(())
    """Files within `path`."""
    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = _later(None)
    """Format of the files, where their names do not say it."""
    shards: PositiveInt | None = _later(None)
    """Read one of so many equal parts alone."""
    num_samples: PositiveInt | None = _later(None)
    """Train on so many of its rows, taken at random, the same for every seed; where they are fewer, on all of them and
    on some again, as LLaMA-Factory does."""
    type: PromptSpec = PromptSpec()
    """Prompt keys, or a name: `alpaca`, `chat_template`, `completion`, `prompt_completion`, `sharegpt`."""

    @model_validator(mode="before")
    @classmethod
    def _gather_prompt_keys(cls, values: Any) -> Any:
        """A name of `type` as what it stands for, and prompt keys that stand next to it, as in Axolotl's files."""
        if not isinstance(values, Mapping):
            return values
        kept = {key: value for key, value in values.items() if key not in PromptSpec.model_fields}
        given = {key: value for key, value in values.items() if key in PromptSpec.model_fields}
        named = kept.get("type")
        if isinstance(named, str):
            if named not in _TYPES:
                raise ValueError(f"type {named!r} is unknown; use {', '.join(_TYPES)}, or a mapping of prompt keys")
            kept["type"] = _TYPES[named] | given
        elif given and (named is None or isinstance(named, Mapping)):
            kept["type"] = dict(named or {}) | given
        elif named is None:
            kept.pop("type", None)
        return kept

    @field_validator("data_files", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, str) else value
