"""Turns of a chat as chat templates take them, with the roles that data of many kinds name in their own ways."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from harness.errors import InputError
from harness.sources import cells
from harness.sources.cells import brief
from harness.sources.examples import Chat
from harness.spec.datasets import PromptSpec

_USUAL = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bot", "chatbot", "function_call", "tool_call"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
}
_ROLES = {name: role for role, names in _USUAL.items() for name in names}
"""Roles of chat templates by the usual names."""
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
OR_SKIP = ", or skip_empty_rows: true passes over such rows"


class EmptyRow(InputError):
    """A row without anything to train on."""


class PassedOver(EmptyRow):
    """A row that its dataset's keys pass over."""


def chat(
    turns: Any, prompt: PromptSpec, where: str, *, answer: Any = None, system: str | None = None, tools: Any = None
) -> Chat:
    """A chat of a row's values.

    Args:
        turns: a list of mappings, or JSON text of one.
        prompt: how they are read, and which of them are trained on.
        where: the dataset, the row and the column, for messages.
        answer: turns that follow; loss is on them alone. Null: there are none, and any turn may carry loss.
        system: what a chat without a system turn begins with.
        tools: a list of JSON schemas, or JSON text of one.

    Raises:
        EmptyRow: there are no turns, or none of them is trained on.
        PassedOver: they do not alternate, and are to.
        InputError: they are none.
    """
    messages = _messages(turns, prompt, where)
    if prompt.alternating_turns and not _alternate(messages):
        raise PassedOver(f"{where}: user and assistant do not take turns to the assistant's last")
    trained_from = 0
    if answer is not None:
        trained_from = len(messages)
        messages += _messages(answer, prompt, where)
    if system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
        trained_from += bool(trained_from)
    if not any(_is_trained(message, prompt) for message in messages[trained_from:]):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages[trained_from:]))
        raise EmptyRow(
            f"{where}: no turn of {' or '.join(prompt.roles_to_train)} with text to train on (it has {roles}); "
            f"add one or set roles_to_train{OR_SKIP}"
        )
    return Chat(tuple(messages), prompt, _tools(tools, where), trained_from)


def _alternate(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether user (or tools, whose answers in a row are one turn) and assistant take turns, and the assistant ends."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    merged = [role for before, role in itertools.pairwise(["", *turns]) if (before, role) != ("tool", "tool")]
    takes_turns = all((role == "assistant") == bool(number % 2) for number, role in enumerate(merged))
    return takes_turns and len(merged) % 2 == 0 < len(merged) and "system" not in merged


def _is_trained(message: dict[str, Any], prompt: PromptSpec) -> bool:
    return prompt.trains(message) and bool(message["content"].strip() or message.get("tool_calls"))


def _messages(turns: Any, prompt: PromptSpec, where: str) -> list[dict[str, Any]]:
    turns = cells.parsed(turns)
    if cells.is_empty(turns):
        raise EmptyRow(f"{where} is {brief(turns)}; it must be a list of turns{OR_SKIP}")
    if not isinstance(turns, list):
        raise InputError(f"{where} is {brief(turns)}; it must be a list of turns")
    roles = {name: role for role, names in prompt.roles for name in (role, *names)}
    return [_message(turn, prompt, roles, f"{where}, turn {number}") for number, turn in enumerate(turns, start=1)]


def _message(turn: Any, prompt: PromptSpec, roles: dict[str, str], where: str) -> dict[str, Any]:
    """`role`, `content`, and whatever else a turn has."""
    if not isinstance(turn, dict):
        raise InputError(f"{where} is {brief(turn)}; it must be a mapping with role and content")
    if isinstance(turn.get("function_call"), dict):  # one call, as OpenAI's format had it before tool_calls
        call = {"type": "function", "function": turn["function_call"]}
        turn = {"tool_calls": [call]} | {key: value for key, value in turn.items() if key != "function_call"}
    role_key = _key(turn, prompt.message_field_role, _ROLE_KEYS)
    content_key = _key(turn, prompt.message_field_content, _CONTENT_KEYS)
    if turn.get(role_key) is None or (content_key not in turn and not turn.get("tool_calls")):
        missing, key = (role_key, "role") if turn.get(role_key) is None else (content_key, "content")
        raise InputError(f"{where} has no {missing!r}, but {cells.names(turn)}; set message_field_{key}")
    rest = {key: value for key, value in turn.items() if key not in (role_key, content_key, "role", "content")}
    try:
        rest = cells.without_nulls(rest | {"tool_calls": _tool_calls(rest.get("tool_calls"))})
    except ValueError as error:
        raise InputError(f"{where} {error}") from None
    if rest.get("weight", 1) not in (0, 1):
        raise InputError(
            f"{where}: its weight is {brief(rest['weight'])}; give 0, which leaves a turn out of the loss, or 1"
        )
    role = _role(turn[role_key], roles, where)
    return {"role": role, "content": _content(turn.get(content_key), where, "tool_calls" in rest), **rest}


def _key(turn: dict[str, Any], given: str | None, usual: Sequence[str]) -> str:
    """The key of a turn that is given, else the first of the usual ones that says something, else that is there."""
    if given is not None:
        return given
    there = [key for key in usual if turn.get(key) is not None] or [key for key in usual if key in turn]
    return there[0] if there else usual[0]


def _role(name: Any, roles: dict[str, str], where: str) -> str:
    """The role as chat templates know it."""
    if not isinstance(name, str):
        raise InputError(f"{where}: its role is {brief(name)}; it must be text")
    role = roles.get(name) or _ROLES.get(name.strip().lower())
    if role is None:
        raise InputError(
            f"{where}: role {brief(name)} is unknown; say what it is with roles under datasets: type:, "
            f"like {{user: [{brief(name)}]}}"
        )
    return role


def _content(value: Any, where: str, has_calls: bool) -> str:
    """A turn's text; parts of it are joined, and a turn that only calls tools has none."""
    if value is None and has_calls:
        return ""
    if isinstance(value, list):
        value = "".join(_part(part, where) for part in value)
    if not cells.is_text(value):
        raise InputError(f"{where}: its content is {brief(value)}; it must be text")
    return str(value)


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise InputError(f"{where}: a part of its content is {brief(kind)}; harness trains on parts of type text alone")


def _tool_calls(calls: Any) -> list[Any] | None:
    """Calls with their arguments as mappings, which templates write as JSON; null: there are none.

    Raises:
        ValueError: they are no list of mappings.
    """
    calls = cells.parsed(calls)
    if cells.is_empty(calls):
        return None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"has tool_calls {brief(calls)}; they must be a list of mappings")
    return [_with_arguments(call) for call in calls]


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_arguments(call["function"])}
    if "arguments" not in call:
        return call
    arguments = cells.parsed(call["arguments"], "{")
    return call | {"arguments": arguments}


def _with_parameters(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with its parameters as a mapping: tables hold them as JSON text, since each tool has others."""
    if isinstance(tool.get("function"), dict):
        return tool | {"function": _with_parameters(tool["function"])}
    return tool | {"parameters": cells.parsed(tool["parameters"], "{")} if "parameters" in tool else tool


def _tools(tools: Any, where: str) -> tuple[dict[str, Any], ...]:
    tools = cells.parsed(tools)
    if cells.is_empty(tools):
        return ()
    each = [cells.parsed(tool, "{") for tool in tools] if isinstance(tools, list) else []
    if not each or not all(isinstance(tool, dict) for tool in each):
        raise InputError(f"{where}: its tools are {brief(tools)}; they must be a list of mappings, or JSON text of one")
    try:
        return tuple(cells.without_nulls([_with_parameters(tool) for tool in each]))
    except ValueError as error:
        raise InputError(f"{where}: its tools: {error}") from None
