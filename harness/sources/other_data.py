"""Data for other kinds of training, known by their columns: what they are, and which key would read them anyway."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from harness.sources import cells
from harness.sources.json_rows import CHAT_COLUMNS

_TRAINS_ON = "harness trains on prompts with completions, chats or texts"
_IMAGES = ("image", "images", "pixel_values")
_LABELS = ("label", "labels")
_COMPLETIONS = ("completion", "response", "output", "answer")
_PROMPTS = ("prompt", "question", "instruction", "input")


def what(columns: Collection[str], rows: Sequence[dict[str, Any]]) -> str | None:
    """What rows of these columns are, and what would do, as the rest of a message; null: perhaps rows to train on.

    Args:
        columns: of all rows.
        rows: all of them.
    """
    there = {*columns}
    for kind, needed, way in _kinds(there, rows):
        named = [column for column in needed if column in there]
        if named:
            return f"is {kind}: {', '.join(named)}; {_TRAINS_ON}; {way}"
    return None


def _kinds(there: set[str], rows: Sequence[dict[str, Any]]) -> list[tuple[str, Sequence[str], str]]:
    """What the rows are, the columns by which it is known, and what would do; without columns it is none of it."""
    chat = next((column for column in CHAT_COLUMNS if column in there), None)
    images = [column for column in _IMAGES if any(not cells.is_empty(row.get(column)) for row in rows)]
    answered = bool(there & {*_COMPLETIONS}) or chat is not None
    labels = [column for column in _LABELS if column in there]
    return [
        (
            "a dataset of conversation trees",
            ("parent_id", "role", "text") if {"parent_id", "role", "text"} <= there else (),
            "join each thread of messages to a chat",
        ),
        ("a dataset of images", images, "name the column of a text alone with field_text"),
        (
            "a preference dataset",
            ("prompt", "chosen", "rejected") if {"chosen", "rejected"} <= there else (),
            _way_of_preference(there, rows),
        ),
        (
            "a dataset of judged steps",
            ("prompt", "completions", *labels) if "completions" in there and labels else (),
            "join the steps of each row to one completion",
        ),
        (
            "an unpaired preference dataset",
            ("prompt", "completion", *labels) if {"prompt", "completion"} <= there and labels else (),
            "kind: instruction under datasets: type: reads it without its labels",
        ),
        (
            "a dataset of labelled texts",
            ("text", *labels) if "text" in there and labels and not answered else (),
            "field_text: text under datasets: type: reads it without its labels",
        ),
        (
            "a dataset that is tokenised already",
            () if answered or "text" in there else ("input_ids",),
            "give the texts that it was made of",
        ),
        (
            "a dataset of prompts without completions",
            () if answered or "text" in there else ("prompt",),
            "add completions, name their column with field_output and field_instruction: prompt, or read the prompts "
            "alone with field_text: prompt",
        ),
    ]


def _way_of_preference(there: set[str], rows: Sequence[dict[str, Any]]) -> str:
    """Which keys read what was chosen."""
    column = next((name for name in _PROMPTS if name in there), None)
    chosen, prompt = (
        next((value for row in rows if not cells.is_empty(value := row.get(name))), None)
        for name in ("chosen", column or "prompt")
    )
    where = "under datasets: type:"
    if column is not None and type(chosen) is type(prompt):
        return f"field_instruction: {column} and field_output: chosen {where} read what was chosen"
    if not isinstance(chosen, list | str):
        return "add what was chosen to the turns of each chat"
    key = "field_messages" if isinstance(chosen, list) else "field_text"
    return f"{key}: chosen {where} reads what was chosen"
