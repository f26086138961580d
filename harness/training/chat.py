"""Chats as tokens: a whole chat rendered once by the chat template, and the tokens of its turns that carry loss.

Where these are is known by the template's own marks; else by rendering the chat up to the turn, and with it; else,
where a template renders earlier turns in another way than last ones, by comparison with other words in their place.
"""

from __future__ import annotations

import functools
import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from harness._util.messages import first_line, one_line
from harness.errors import InputError
from harness.sources.stories import Chat
from harness.spec.datasets import BARE
from harness.training import chat_templates, prompts

Span = tuple[int, int]
"""First index and the one after the last."""
Message = dict[str, Any]

_ASSISTANT = frozenset({"assistant"})
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = 0xF0000
"""First character of a private area, of which no text is made: what stands in place of a turn's own words."""
_OTHER = "use another chat_template (a name, or Jinja text)"


@dataclass(frozen=True)
class ChatTokens:
    """A tokenised chat."""

    ids: tuple[int, ...]
    completions: tuple[Span, ...]
    """Tokens of each turn that carries loss."""
    system_folded: bool
    """Whether the system turn begins the first user turn, since the template has no place for it."""
    tools_left_out: bool
    """Whether the template does not show the tools."""
    parts_left_out: bool = False
    """Whether turns have a weight of 0, and no other token than those of `completions` may carry loss."""


def tokenise(chat: Chat, tokenizer: Any, *, everything: bool = False) -> ChatTokens:
    """The tokens of a chat, and where those of its trained turns are.

    Args:
        chat: the turns.
        tokenizer: with its chat template.
        everything: whether all tokens are to carry loss; where a turn has a weight of 0, the words of all others do.

    Raises:
        InputError: the chat template refuses the chat, or does not show a turn.
    """
    if everything and any(message.get("weight", 1) == 0 for message in chat.messages):
        every_turn = replace(chat, prompt=chat.prompt.model_copy(update={"roles_to_train": ("all",)}))
        return replace(tokenise(every_turn, tokenizer), parts_left_out=True)
    if chat.prompt.format not in (None, BARE):
        raise InputError("format under datasets: type: is of prompts, and the rows are chats; use chat_template")
    rendering, folded = _rendered(chat, tokenizer)
    roles = frozenset(chat.prompt.roles_to_train)
    first = max(0, chat.trained_from - folded)
    numbers = [n for n, m in enumerate(rendering.messages) if chat.prompt.trains(m) and n >= first]
    if folded and "system" in roles:
        raise InputError(f"roles_to_train: the chat template has no system turn; leave system out, or {_OTHER}")
    own = _own_tokens(rendering.text, tokenizer)
    whole = chat.prompt.trains_all and len(numbers) == len(rendering.messages) - first
    spans = _marked(rendering, own, numbers) if roles == _ASSISTANT else None
    if spans is None:
        turns = [rendering.from_turn(first)] if whole else [rendering.turn(number) for number in numbers]
        own, spans = _mapped(rendering.text, own, turns, tokenizer)
    ids = prompts.token_ids(rendering.text, tokenizer, own.ids) if chat.prompt.add_special_tokens else own.ids
    completions = ((1, len(ids)),) if whole and not first else _apart(spans, len(ids) - len(own.ids))
    return ChatTokens(tuple(ids), completions, folded, not rendering.shows_tools)


def instruction_before(chat: Chat, trained: int) -> str:
    """What the last of so many trained turns answers: the user's turn before it."""
    numbers = [n for n, m in enumerate(chat.messages) if chat.prompt.trains(m) and n >= chat.trained_from]
    before = chat.messages[: numbers[min(trained, len(numbers)) - 1]] if numbers else chat.messages
    return next((_content(m) for m in reversed(before) if m["role"] == "user"), "")


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends what the assistant says, by the chat template; null: it has none of its own."""
    return _end_by(tokenizer, tokenizer.chat_template)


@functools.lru_cache(maxsize=1)
def _end_by(tokenizer: Any, _: str | None) -> int | None:
    """Found once for a tokenizer and its template: it is asked for each text."""
    last = {"role": "assistant", "content": "b"}
    try:
        rendering = _Rendering([{"role": "user", "content": "a"}, last], (), tokenizer)
        start, end = rendering.turn(1)
    except InputError:
        return None
    text = rendering.text[start:end].rpartition("b")[2].strip()
    return tokenizer.convert_tokens_to_ids(text) if text in _special(tokenizer) else None


# ------------------------------------------------------------------------------------ text


def _rendered(chat: Chat, tokenizer: Any) -> tuple[_Rendering, bool]:
    """A chat as the template takes it, and whether its system turn had to begin the user's."""
    messages = list(chat.messages)
    as_given: _Rendering | InputError
    try:
        as_given = _Rendering(messages, chat.tools, tokenizer)
    except InputError as error:
        as_given = error
    if messages[0]["role"] == "system" and (isinstance(as_given, InputError) or 0 in as_given.hidden):
        folded = _folded(messages)
        if folded is not None:
            return _shown(_Rendering(folded, chat.tools, tokenizer)), True
    if isinstance(as_given, InputError):
        raise as_given
    return _shown(as_given), False


def _folded(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with the system's at the beginning of the first user's; null: there is none of a user."""
    system, *rest = messages
    number = next((n for n, message in enumerate(rest) if message["role"] == "user"), None)
    if number is None:
        return None
    rest[number] = rest[number] | {"content": f"{_content(system)}\n\n{_content(rest[number])}"}
    return rest


def _shown(rendering: _Rendering) -> _Rendering:
    """The rendering.

    Raises:
        InputError: a turn is not in it.
    """
    for number in rendering.hidden:
        message = rendering.messages[number]
        what = "the calls of tools in a turn" if message.get("tool_calls") else "a turn"
        raise InputError(
            f"the chat template does not show {what} of the role {one_line(str(message['role']))!r}; {_OTHER}, or give "
            "its role by another name with roles under datasets: type:, or leave such rows out"
        )
    return rendering


class _Rendering:
    """Messages as the chat template renders them, whole, in part and changed.

    Raises:
        InputError: the template refuses the messages.
    """

    def __init__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], tokenizer: Any) -> None:
        self.messages = list(messages)
        self.tools: list[dict[str, Any]] | None = [*tools] or None
        self.tokenizer = tokenizer
        self.template = None if tokenizer.chat_template else chat_templates.PLAIN
        self.text = self.of(self.messages)
        self.hidden = self._hidden()

    def of(self, messages: Sequence[Message], *, to_generate: bool = False, with_tools: bool = True) -> str:
        """The text of other messages, with the beginning of an answer where one is to be generated."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=self.tools if with_tools else None,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=to_generate,
            )
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise InputError(
                f"the chat template refuses a chat of {len(messages)} turns ({one_line(first_line(error))}); {_OTHER}"
            ) from None
        return text

    @property
    def has_marks(self) -> bool:
        """Whether the template says itself what the assistant's words are."""
        return _MARK.search(self.template or self.tokenizer.get_chat_template(None, self.tools)) is not None

    @property
    def shows_tools(self) -> bool:
        """Whether the text is another one without the tools, if there are any."""
        return self.tools is None or self._is_other(self.messages, with_tools=False)

    def _hidden(self) -> list[int]:
        """Numbers of messages that leave no trace in the text."""
        probes = [chr(_PROBE + number) for number in range(len(self.messages))]
        try:
            text = self.of([_altered(*pair) for pair in zip(self.messages, probes, strict=True)])
        except InputError:  # it looks into what is written: each message's own words are looked for
            text = self.text + "".join(
                probe for probe, m in zip(probes, self.messages, strict=True) if _content(m).strip() in self.text
            )
        return [n for n, probe in enumerate(probes) if probe not in text or not self._shows_calls(n)]

    def _shows_calls(self, number: int) -> bool:
        """Whether the text is another one without any of the calls of a message. Names are no sign of them: that of a
        tool may be a word of the chat.
        """
        message = self.messages[number]
        calls = list(message.get("tool_calls") or ())
        fewer = [{**message, "tool_calls": calls[:n] + calls[n + 1 :]} for n in range(len(calls))]
        return all(self._is_other([*self.messages[:number], other, *self.messages[number + 1 :]]) for other in fewer)

    def _is_other(self, messages: Sequence[Message], *, with_tools: bool = True) -> bool:
        """Whether the text of other messages is another one; one that is refused is."""
        try:
            return self.of(messages, with_tools=with_tools) != self.text
        except InputError:
            return True

    # -------------------------------------------------------------------------------- turns

    def turn(self, number: int) -> Span:
        """The characters of a turn that carry loss: an assistant's from where it begins to answer to its end-of-turn
        token, another's words and that token.
        """
        of_assistant = self.messages[number]["role"] == "assistant"
        return (self._by_prefixes(number) if of_assistant else None) or self._by_comparison(number, of_assistant)

    def from_turn(self, number: int) -> Span:
        """The characters from where a turn differs from the beginning of an answer in its place, to the end."""
        return _equal(self.of(self.messages[:number], to_generate=True), self.text) if number else 0, len(self.text)

    def _by_prefixes(self, number: int) -> Span | None:
        """What the chat with the turn has beyond the chat before it; null: the whole one does not begin with both."""
        if number == 0:
            return None
        try:
            before = self.of(self.messages[:number], to_generate=True)
            after = self.of(self.messages[: number + 1])
        except InputError:
            return None
        if not (len(before) < len(after) and self.text.startswith(before) and self.text.startswith(after)):
            return None
        turn = after[len(before) :]
        return len(before), len(before) + len(_without_space_after_end(turn, _content(self.messages[number])))

    def _by_comparison(self, number: int, of_assistant: bool) -> Span:
        start, end = self._words(number)
        if of_assistant and number > 0:
            _, previous = self._words(number - 1)
            between = self._after(number, to_generate=True)
            if between is not None and self.text.startswith(between, previous) and previous + len(between) <= start:
                start = previous + len(between)
        return start, end + len(self._closing(number, end))

    def _words(self, number: int) -> Span:
        """The characters that come of a message: where the text differs from one with other words in its place."""
        other = self.of(_with_other_words(self.messages, number))
        return _differing(self.text, other)

    def _closing(self, number: int, end: int) -> str:
        """The end-of-turn token of a turn whose words end there; an empty text where there is none."""
        after = self._after(number + 1)
        closing = "" if after is None else after.rstrip() or after
        if self.text.startswith(closing, end) and closing:
            return closing
        tokens = _special(self.tokenizer)
        known = (t for t in tokens if self.text.startswith(t, end) and (after is None or after.startswith(t)))
        return max(known, key=len, default="")

    def _after(self, count: int, *, to_generate: bool = False) -> str | None:
        """What follows the words of the last of the first messages; null: these are refused by themselves."""
        messages = self.messages[:count]
        try:
            one = self.of(messages, to_generate=to_generate)
            other = self.of(_with_other_words(messages, count - 1), to_generate=to_generate)
        except InputError:
            return None
        return None if one == other else one[_differing(one, other)[1] :]


def _content(message: Message) -> str:
    """The text of a message; an empty one where it has none."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in content)
    return content if isinstance(content, str) else ""


def _with_other_words(messages: Sequence[Message], number: int) -> list[Message]:
    return [*messages[:number], _altered(messages[number], chr(_PROBE)), *messages[number + 1 :]]


def _altered(message: Message, words: str) -> Message:
    """A message of the same kind with other words."""
    other = message | {"content": words}
    if message.get("tool_calls"):
        other["tool_calls"] = [_altered_call(call, words) for call in message["tool_calls"]]
    return other


def _altered_call(call: Any, words: str) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _altered_call(call["function"], words)}
    arguments = words if isinstance(call.get("arguments"), str) else {words: words}
    return call | {"name": words, "arguments": arguments}


def _differing(text: str, other: str) -> Span:
    """The characters of a text from the first that differs from another's to the last."""
    start = _equal(text, other)
    most = min(len(text), len(other)) - start
    return start, len(text) - min(most, _equal(text[::-1], other[::-1]))


def _equal(text: str, other: str) -> int:
    """Number of characters with which both begin."""
    return next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _without_space_after_end(turn: str, content: str) -> str:
    """A turn without the white space after its end-of-turn token; where it has no such token, that space is its end."""
    bare, content = turn.rstrip(), content.rstrip()
    return turn if content and bare.endswith(content) else bare


def _special(tokenizer: Any) -> list[str]:
    """Texts of the tokens that stand for something."""
    return [token for token in dict.fromkeys((*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())) if token]


# ------------------------------------------------------------------------------------ tokens


@dataclass(frozen=True)
class _Own:
    """The tokens of a text without what the tokenizer puts around it."""

    ids: list[int]
    offsets: list[Span] | None
    """Characters of each; null: the tokenizer does not say."""


def _own_tokens(text: str, tokenizer: Any) -> _Own:
    fast = bool(getattr(tokenizer, "is_fast", False))
    options = {"return_offsets_mapping": True} if fast else {}
    encoded = tokenizer(text, add_special_tokens=False, **options)
    return _Own(list(encoded["input_ids"]), [(a, b) for a, b in encoded["offset_mapping"]] if fast else None)


def _marked(rendering: _Rendering, own: _Own, numbers: Sequence[int]) -> list[Span] | None:
    """Spans of tokens by the template's own marks; null: it has none, or they are not one for each assistant turn."""
    if own.offsets is None or not rendering.has_marks:
        return None
    encoded = rendering.tokenizer.apply_chat_template(
        rendering.messages,
        tools=rendering.tools,
        chat_template=rendering.template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = encoded["assistant_masks"]
    edges = [n for n, (one, other) in enumerate(itertools.pairwise((0, *mask, 0))) if one != other]
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    assistants = [number for number, message in enumerate(rendering.messages) if message["role"] == "assistant"]
    if list(encoded["input_ids"]) != own.ids or len(runs) != len(assistants):
        return None
    return [run for number, run in zip(assistants, runs, strict=True) if number in numbers]


def _mapped(text: str, own: _Own, turns: Sequence[Span], tokenizer: Any) -> tuple[_Own, list[Span]]:
    """Spans of characters as spans of tokens. A token that begins before a turn and has characters of it belongs to it.

    A tokenizer without offsets tokenises what is in the turns and between them separately: the tokens may be others.
    """
    if own.offsets is not None:
        starts = [start for start, _ in own.offsets]
        ends = list(itertools.accumulate((end for _, end in own.offsets), max))
        return own, [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in turns]
    ids: list[int] = []
    edges = [0]
    for start, end in itertools.pairwise((0, *itertools.chain(*turns), len(text))):
        ids += tokenizer(text[start:end], add_special_tokens=False)["input_ids"] if start < end else []
        edges.append(len(ids))
    return _Own(ids, None), list(zip(edges[1:-1:2], edges[2:-1:2], strict=True))


def _apart(spans: Sequence[Span], shift: int) -> tuple[Span, ...]:
    """Spans in order, moved by what stands before the text, without the first token and what an earlier one has."""
    result: list[Span] = []
    for start, end in sorted(spans):
        least = result[-1][1] if result else 1
        if max(start + shift, least) < end + shift:
            result.append((max(start + shift, least), end + shift))
    return tuple(result)
