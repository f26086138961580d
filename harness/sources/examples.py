"""What a row becomes: a prompt and a completion, a chat, or a text; before tokenisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.spec.datasets import PromptSpec


@dataclass(frozen=True)
class Story:
    """One example of a prompt and a completion, before tokenisation."""

    instruction: str
    completion: str
    system: str | None
    input: str | None
    prompt: PromptSpec

    @property
    def id(self) -> str:
        """16 hex digits of the hash of its texts, whatever its position in the file."""
        return _hash("\0".join((self.instruction, self.input or "", self.completion)))

    @property
    def texts(self) -> list[str | None]:
        """All that a trial reads of it."""
        return [self.instruction, self.input, self.completion, self.system]


@dataclass(frozen=True)
class Chat:
    """One example of several turns."""

    messages: tuple[dict[str, Any], ...]
    """As chat templates take them: `role` and `content` each, perhaps `tool_calls` and others."""
    prompt: PromptSpec
    tools: tuple[dict[str, Any], ...] = ()
    """What the assistant may call, as JSON schemas."""
    trained_from: int = 0
    """Number of the first message that may carry loss: those before it are a prompt."""

    @property
    def id(self) -> str:
        """As of a story."""
        return _hash(str(self.texts[0]))

    @property
    def texts(self) -> list[str | None]:
        """All that a trial reads of it."""
        return [json.dumps([self.messages, self.tools, self.trained_from], sort_keys=True, default=str)]

    @property
    def instruction(self) -> str:
        """What the last trained turn answers."""
        return self._last(self.messages[:-1], lambda turn: turn["role"] == "user")

    @property
    def completion(self) -> str:
        """The last trained turn."""
        return self._last(self.messages, self.prompt.trains)

    @staticmethod
    def _last(turns: Sequence[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool]) -> str:
        texts = [turn.get("content") for turn in turns if wanted(turn)]
        return next((text for text in reversed(texts) if isinstance(text, str)), "")


@dataclass(frozen=True)
class Passage:
    """One example of a text without a prompt: all of it carries loss."""

    completion: str
    prompt: PromptSpec
    instruction: str = ""

    @property
    def id(self) -> str:
        """As of a story."""
        return _hash(self.completion)

    @property
    def texts(self) -> list[str | None]:
        """All that a trial reads of it."""
        return [self.completion]


Row = Story | Chat | Passage
"""One example before tokenisation."""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
