"""A story's prompt: its text by the dataset's format, the model's chat template or a plain one, and its tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from harness._util.messages import first_line, one_line
from harness.errors import InputError
from harness.sources.stories import Story

_PLAIN_SYSTEM = "{system}\n\n"
_PLAIN_TURN = "### Instruction:\n{instruction}\n\n### Response:\n"


@dataclass(frozen=True)
class Prompt:
    """What a completion follows."""

    text: str
    by_template: bool = False
    """Whether the chat template wrote it: the completion then ends as an assistant's turn does."""
    system_folded: bool = False
    """Whether the system text stands in the user's turn, since the chat template has no place for it."""


def render(story: Story, tokenizer: Any) -> Prompt:
    """The prompt of a story.

    The template is the dataset's `format` (`no_input_format` where the row has no input), else the model's chat
    template, else a plain one.

    Raises:
        InputError: the chat template refuses the user's turn.
    """
    prompt = story.prompt
    template = prompt.format if story.input is not None else prompt.no_input_format or prompt.format
    values = {"instruction": story.instruction, "input": story.input or "", "system": story.system or ""}
    if template is not None:
        names_system = "{system}" in template
        lead = prompt.system_format.format(system=story.system) if story.system and not names_system else ""
        return Prompt(lead + template.format(**values))
    instruction = (
        story.instruction if story.input is None else prompt.input_separator.join((story.instruction, story.input))
    )
    if tokenizer.chat_template:
        return _as_chat(story.system, instruction, tokenizer)
    lead = _PLAIN_SYSTEM.format(**values) if story.system else ""
    return Prompt(lead + _PLAIN_TURN.format(instruction=instruction))


def ended(ids: list[int], tokenizer: Any, end: int | None = None) -> list[int]:
    """With an end token (null: the tokenizer's), if there is one and the text does not end with it already."""
    end = tokenizer.eos_token_id if end is None else end
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def apart(text: str, completion: str, tokenizer: Any, end: int | None = None) -> tuple[list[int], int]:
    """Tokens of a prompt and of its completion, each by itself, so that the border is exact with any tokenizer.

    Args:
        text: of the prompt.
        completion: what follows it.
        tokenizer: of the model.
        end: token that ends the completion; null: the tokenizer's.

    Returns:
        the ids, and the number of the first one of the completion.
    """
    head = token_ids(text, tokenizer)
    tail = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    return head + ended(tail, tokenizer, end), len(head)


def joined(text: str, completion: str, tokenizer: Any, end: int | None = None) -> tuple[list[int], int]:
    """As `apart`, of both as one text: a token that has characters of both is the completion's."""
    prompt, whole = token_ids(text, tokenizer), token_ids(text + completion, tokenizer)
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    return ended(whole, tokenizer, end), sum(1 for _ in equal)


def token_ids(text: str, tokenizer: Any, own: list[int] | None = None) -> list[int]:
    """Tokens of a prompt, with what the tokenizer puts before a text, once: a template may have it already.

    What it puts after a text is left out: the completion follows.

    Args:
        text: of the prompt.
        tokenizer: of the model.
        own: tokens of the text alone; null: the tokenizer makes them.
    """
    whole = list(tokenizer(text)["input_ids"])
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"]) if own is None else own
    start = next((i for i in range(len(whole)) if whole[i : i + len(own)] == own), 0)
    return own if own[:start] == whole[:start] else whole[:start] + own


def _as_chat(system: str | None, instruction: str, tokenizer: Any) -> Prompt:
    """By the chat template. Some refuse a system turn and others leave it out: it then begins the user's turn."""
    user = {"role": "user", "content": instruction}
    if not system:
        return Prompt(_apply([user], tokenizer), by_template=True)
    try:
        text = _apply([{"role": "system", "content": system}, user], tokenizer)
    except InputError:
        text = ""
    if system.strip() in text:
        return Prompt(text, by_template=True)
    folded = _apply([user | {"content": f"{system}\n\n{instruction}"}], tokenizer)
    return Prompt(folded, by_template=True, system_folded=True)


def _apply(turns: list[dict[str, str]], tokenizer: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:  # what a template may raise, and what its code may
        raise InputError(
            f"the model's chat template refuses a prompt ({one_line(first_line(error))}); give one with format under "
            "datasets: type:"
        ) from None
    return text
