"""Shapes of data: equal rows in any kind of file are equal examples, and data of other kinds say what they are."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from harness.errors import InputError
from harness.sources import files, stories
from harness.sources.stories import Chat, Passage, Row, Rows, Story
from harness.spec.datasets import DatasetSpec, PromptSpec

Data = list[dict[str, Any]]
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]


def write(file: Path, rows: Data) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read_all(file: Path, *, skip_empty: bool = False, **keys: Any) -> Rows:
    return stories.read(DatasetSpec.model_validate({"path": str(file)} | keys), skip_empty=skip_empty)


@pytest.fixture
def examples(tmp_path: Path) -> Callable[..., list[Row]]:
    """The examples that rows make under prompt keys."""
    return lambda *rows, **keys: [*read_all(write(tmp_path / "d.jsonl", [*rows]), **keys).stories]


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """The line with which rows are refused, without the name of the file."""

    def line(*rows: dict[str, Any], **keys: Any) -> str:
        file = write(tmp_path / "d.jsonl", [*rows])
        with pytest.raises(InputError) as refused:
            read_all(file, **keys)
        text = str(refused.value)
        assert text.isprintable()
        assert len(text) < 1000
        assert text.startswith(f"dataset {file}")
        return text.removeprefix(f"dataset {file}").lstrip(" ,:")

    return line


Examples = Callable[..., list[Row]]
Refusal = Callable[..., str]


# ------------------------------------------------------------------------------------ which rows


@pytest.mark.parametrize(
    ("roles", "taken"),
    [
        ("user assistant", True),
        ("system user assistant user assistant", True),
        ("user assistant tool assistant", True),
        ("user assistant tool tool assistant", True),
        ("assistant user assistant", False),
        ("user assistant user", False),
        ("user user assistant", False),
        ("user assistant assistant", False),
        ("user system assistant", False),
        ("system", False),
    ],
)
def test_chats_whose_turns_do_not_alternate_are_passed_over_where_that_is_asked_for(
    tmp_path: Path, roles: str, taken: bool
) -> None:
    """As LLaMA-Factory does."""
    row = {"messages": [{"role": role, "content": "Hm."} for role in roles.split()]}
    file = write(tmp_path / "d.jsonl", [{"messages": TURNS}, row])
    rows = read_all(file, alternating_turns=True)
    assert (len(rows.stories), rows.skipped) == (1 + taken, not taken)
    if not taken:
        write(file, [row])
        with pytest.raises(InputError, match=r"1 rows has an empty messages, or turns that do not alternate$"):
            read_all(file, alternating_turns=True)


@pytest.mark.parametrize("count", [1, 3, 5, 12])
def test_so_many_rows_are_taken_and_some_again_where_there_are_fewer(tmp_path: Path, count: int) -> None:
    file = write(tmp_path / "d.jsonl", [{"text": str(n)} for n in range(5)])
    texts = [row.completion for row in read_all(file, num_samples=count).stories]
    assert len(texts) == count
    assert len({*texts}) == min(count, 5), "each once before any twice"
    assert texts == [row.completion for row in read_all(file, num_samples=count).stories]
    assert texts != [str(n) for n in range(count)] or count == 1, "not the first ones"


def test_parameters_of_a_tool_may_be_json_text(examples: Examples) -> None:
    tool = {"name": "weather", "parameters": {"type": "object"}}
    for tools in ([{"type": "function", "function": tool}], [tool]):
        as_text = json.loads(json.dumps(tools).replace('{"type": "object"}', json.dumps('{"type": "object"}')))
        assert as_text != tools
        (chat,) = examples({"messages": TURNS, "tools": as_text})
        assert chat.tools == tuple(tools)


# ------------------------------------------------------------------------------------ prompts and completions


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, ("Add.", "1 1", "2", None)),
        ({"instruction": "Add.", "input": "", "output": "2"}, ("Add.", None, "2", None)),
        ({"instruction": "Add.", "context": "1 1", "response": "2"}, ("Add.", "1 1", "2", None)),
        ({"instruction": "Add.", "output": "2", "system": "Count."}, ("Add.", None, "2", "Count.")),
        ({"question": "Why?", "answer": "So."}, ("Why?", None, "So.", None)),
        ({"question": "Why?", "context": "Rain.", "answer": "So."}, ("Why?", "Rain.", "So.", None)),
        ({"prompt": "Once", "completion": " upon"}, ("Once", None, " upon", None)),
        ({"prompt": "Once", "response": "upon", "id": 3}, ("Once", None, "upon", None)),
        # The columns of the bundled stories come before all others.
        ({"synopsis": "S", "short_story": "T", "messages": TURNS, "text": "U", "label": 1}, ("S", None, "T", None)),
        ({"synopsis": "S", "short_story": "T", "chosen": "U", "rejected": "V"}, ("S", None, "T", None)),
        ({"synopsis": "S", "instruction": "I", "output": "O"}, ("I", None, "O", None)),
    ],
)
def test_columns_of_prompts_are_recognised(
    examples: Examples, row: dict[str, Any], expected: tuple[str | None, ...]
) -> None:
    (story,) = examples(row)
    assert isinstance(story, Story)
    assert (story.instruction, story.input, story.completion, story.system) == expected


def test_keys_come_before_what_is_recognised(examples: Examples, refusal: Refusal) -> None:
    row = {"instruction": "I", "input": "N", "output": "O", "question": "Q", "answer": "A", "messages": TURNS}
    assert isinstance(examples(row)[0], Chat)
    (story,) = examples(row, field_instruction="question", field_output="answer", system_prompt="S")
    assert story == Story("Q", "A", "S", None, story.prompt)
    (story,) = examples(row, kind="instruction", field_input="answer")
    assert (story.instruction, story.completion) == ("I", "O")
    assert isinstance(story, Story)
    assert story.input == "A"
    assert examples(row, field_text="answer")[0] == Passage("A", PromptSpec(field_text="answer"))
    assert refusal(row, field_text="answer", field_messages="messages").endswith("set kind to chat or text")
    assert refusal(row, field_output="tale").startswith("has no column 'synopsis'; it has 'answer', 'input',")
    assert refusal(row, field_messages="talk").startswith("has no column 'talk'")
    assert refusal(row, kind="text").startswith("has no column 'text'")
    assert refusal({"a": "b"}, kind="chat").startswith("has no column 'messages'; it has 'a' (set")


def test_alpaca_without_its_input_column(examples: Examples) -> None:
    (story,) = examples({"instruction": "I", "output": "O"}, type="alpaca")
    assert isinstance(story, Story)
    assert (story.instruction, story.input) == ("I", None)


def test_system_prompt_of_a_recognised_column(examples: Examples) -> None:
    rows = [{"instruction": "I", "output": "O", "system": system} for system in ("Sing.", "")]
    read = examples(*rows, system_prompt="Tell.")
    assert [story.system for story in read if isinstance(story, Story)] == ["Sing.", "Tell."]


def test_text_alone(examples: Examples) -> None:
    assert examples({"text": " A text.\n", "url": "x"}) == [Passage(" A text.\n", PromptSpec())]
    assert examples({"body": "B", "title": "T"}, type="completion", field_text="body")[0].completion == "B"


def test_columns_that_fit_nothing(refusal: Refusal) -> None:
    line = refusal({"plot": "A", "tale": "B"})
    assert line.startswith("has no column 'synopsis'; it has 'plot', 'tale' (set field_instruction, field_input")
    assert "field_messages for chats, or field_text for texts" in line
    assert refusal({"synopsis": "A", "text": "B"}).startswith("has no column 'short_story'")
    many = refusal({f"column {i} {'x' * 500}": "" for i in range(1000)})
    assert "and 988 more" in many


# ------------------------------------------------------------------------------------ chats


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": SHAREGPT},
        {"conversation": TURNS},
        {"dialog": SHAREGPT},
        {"messages": json.dumps(TURNS), "text": "rendered", "prompt": "Why?"},
        {"conversations": [{"role": "Human", "content": "Why?"}, {"role": "bot", "content": "Because."}]},
        {"messages": [turn | {"tool_calls": None, "name": None} for turn in TURNS]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "W"}, {"text": "hy?"}]}, TURNS[1]]},
        {"messages": [{"role": "user", "content": "Why?", "from": None, "value": None}, SHAREGPT[1]]},
    ],
)
def test_chats_are_recognised(examples: Examples, row: dict[str, Any]) -> None:
    assert examples(row) == [Chat(tuple(TURNS), PromptSpec())]


def test_chat_of_other_names(examples: Examples, refusal: Refusal) -> None:
    turns = [{"who": "narrator", "says": "Why?"}, {"who": "Fox", "says": "So."}, {"who": "assistant", "says": "No."}]
    keys = {"field_messages": "talk", "message_field_role": "who", "message_field_content": "says"}
    line = refusal({"talk": turns}, **keys)
    assert line.startswith("row 1: 'talk', turn 1: role 'narrator' is unknown; say what it is with roles")
    roles = {"user": "narrator", "assistant": ["Fox"]}
    (chat,) = examples({"talk": turns}, **keys, roles=roles)
    assert isinstance(chat, Chat)
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant", "assistant"]
    assert (chat.completion, chat.instruction) == ("No.", "Why?")
    # Roles that are given come before the usual ones, and may be any that a template knows.
    (chat,) = examples({"messages": TURNS}, roles={"judge": "user"})
    assert isinstance(chat, Chat)
    assert chat.messages[0]["role"] == "judge"
    assert refusal({"talk": turns}, field_messages="talk").endswith(
        "turn 1 has no 'role', but 'says', 'who'; set message_field_role"
    )


def test_tools_and_their_calls_are_kept(examples: Examples, refusal: Refusal) -> None:
    tool = {"type": "function", "function": {"name": "rain", "parameters": {"town": {"type": "string"}}}}
    call = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Ulm"}}}
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Ask."},
        {"role": "tool", "content": "no", "tool_call_id": "1", "name": "rain"},
        TURNS[1],
    ]
    (chat,) = examples({"messages": turns, "tools": [tool]})
    assert isinstance(chat, Chat)
    assert chat.tools == (tool,)
    assert chat.messages[1] == turns[1] | {"content": ""}
    assert chat.messages[2] == turns[2]
    as_text = json.loads(json.dumps(turns))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"town": "Ulm"})
    for tools in (json.dumps([tool]), [json.dumps(tool)]):
        assert examples({"messages": as_text, "tools": tools}) == [chat]
    as_text[1]["tool_calls"] = json.dumps(as_text[1]["tool_calls"])
    (other,) = examples({"messages": as_text, "functions": [tool]}, field_tools="functions")
    assert isinstance(other, Chat)
    assert (other.messages, other.tools) == (chat.messages, chat.tools)
    assert "its tools are 'rain'; they must be a list" in refusal({"messages": turns, "tools": "rain"})
    assert "has tool_calls [7]; they must be" in refusal({"messages": [TURNS[0], TURNS[1] | {"tool_calls": [7]}]})


def test_a_call_in_openais_older_format_is_one(examples: Examples) -> None:
    tool = {"name": "rain", "parameters": {"town": {"type": "string"}}}
    call = {"name": "rain", "arguments": '{"town": "Ulm"}'}
    for content in ({}, {"content": None}, {"content": ""}):
        older = {"role": "assistant", "function_call": call} | content
        (chat,) = examples({"messages": [TURNS[0], older, TURNS[1]], "functions": [tool]})
        assert isinstance(chat, Chat)
        assert chat.tools == (tool,)
        (called,) = chat.messages[1]["tool_calls"]
        assert called["function"] == {"name": "rain", "arguments": {"town": "Ulm"}}
        assert chat.messages[1].keys() == {"role", "content", "tool_calls"}


def test_an_input_without_an_instruction_is_the_prompt(examples: Examples, refusal: Refusal) -> None:
    row = {"instruction": "", "input": "Say hi.", "output": "Hi."}
    for keys in ({}, {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}):
        (story,) = examples(row, **keys)
        assert isinstance(story, Story)
        assert (story.instruction, story.input) == ("Say hi.", None)
    assert "'instruction' is ''; it must be text" in refusal(row | {"input": " "})


def test_a_format_reads_what_it_names_from_the_usual_columns(examples: Examples) -> None:
    row = {"instruction": "Q", "input": "I", "output": "A", "system": "S"}
    keys = {"field_instruction": "instruction", "field_output": "output"}
    (story,) = examples(row, **keys, format="{system}{instruction}{input}")
    assert isinstance(story, Story)
    assert (story.input, story.system) == ("I", "S")
    (plain,) = examples(row, **keys, format="{instruction}")
    assert isinstance(plain, Story)
    assert (plain.input, plain.system) == (None, None), "it names neither"


def test_usual_names_of_tools_in_sharegpt(examples: Examples) -> None:
    names = ["system", "human", "function_call", "observation", "gpt"]
    (chat,) = examples({"conversations": [{"from": name, "value": name} for name in names]})
    assert isinstance(chat, Chat)
    assert [turn["role"] for turn in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [turn["content"] for turn in chat.messages] == names


def test_system_text_begins_a_chat_that_has_none(examples: Examples) -> None:
    own = {"role": "system", "content": "Own."}
    rows = [{"messages": TURNS}, {"messages": [own, *TURNS]}, {"messages": TURNS, "lead": "Sing."}]
    chats = [chat for chat in examples(*rows, system_prompt="Tell.", field_system="lead") if isinstance(chat, Chat)]
    assert [chat.messages[0]["content"] for chat in chats] == ["Tell.", "Own.", "Sing."]
    assert [len(chat.messages) for chat in chats] == [3, 3, 3]


def test_prompt_and_completion_of_turns(examples: Examples, refusal: Refusal) -> None:
    first = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, TURNS[0]]
    row = {"prompt": first, "completion": [TURNS[1]]}
    (chat,) = examples(row)
    assert chat == Chat((*first, TURNS[1]), PromptSpec(), trained_from=3)
    (chat,) = examples(row, system_prompt="S")
    assert isinstance(chat, Chat)
    assert (chat.trained_from, len(chat.messages)) == (4, 5)
    assert "no turn of assistant with text to train on (it has user)" in refusal(row | {"completion": [TURNS[0]]})
    assert refusal(row | {"completion": "So."}).startswith("row 1: 'prompt' is [")
    assert refusal(row | {"completion": []}).startswith("row 1: 'completion' is []; it must be text")
    assert chat.id != examples({"messages": [*first, TURNS[1]]})[0].id, "there, the first answer is trained on too"


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([], r"row 1: 'messages' is \[\]; it must be a list of turns, or skip_empty_rows: true passes over"),
        (None, r"row 1: 'messages' is None; it must be a list of turns, or skip_empty_rows: true"),
        ("Hi.", r"row 1: 'messages' is 'Hi\.'; it must be a list of turns$"),
        ("[broken", r"row 1: 'messages' is '\[broken'; it must be a list of turns$"),
        ({"role": "user"}, r"'messages' is \{'role': 'user'\}; it must be a list of turns$"),
        (["Hi."], r"'messages', turn 1 is 'Hi\.'; it must be a mapping with role and content"),
        ([*TURNS, {"role": "wolf", "content": "Grr."}], r"turn 3: role 'wolf' is unknown; .*\{user: \['wolf'\]\}"),
        (
            [*TURNS, {"role": "assistant", "content": "b", "weight": 0.5}],
            r"turn 3: its weight is 0\.5; give 0, which le",
        ),
        ([TURNS[0], TURNS[1] | {"weight": 0}], r"no turn of assistant with text to train on"),
        ([{"role": 3, "content": "a"}], r"turn 1: its role is 3; it must be text"),
        ([{"content": "a"}], r"turn 1 has no 'role', but 'content'; set message_field_role"),
        ([{"role": "user", "text": "a"}], r"turn 1 has no 'content', but 'role', 'text'; set message_field_content"),
        ([{"role": "user", "content": None}], r"turn 1: its content is None; it must be text"),
        ([{"role": "user", "content": 5}], r"turn 1: its content is 5; it must be text"),
        ([{"role": "user", "content": "\ud800"}], r"turn 1: its content is '\\ud800'; it must be text"),
        ([{"role": "user", "content": "a", "x": ["\ud800"]}], r"turn 1 holds '\\ud800', which is no text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], r"a part of its content is 'image'; .*text"),
        ([{"role": "user", "content": [3]}], r"a part of its content is 3; .*text"),
        (TURNS[:1], r"no turn of assistant with text to train on \(it has user\); add one or set roles_to_train, or s"),
        ([TURNS[0], {"role": "assistant", "content": " "}], r"no turn of assistant with text to train on \(it has u"),
    ],
)
def test_what_is_no_chat(refusal: Refusal, turns: Any, expected: str) -> None:
    line = refusal({"messages": turns})
    assert re.search(expected, line), line


def test_turns_nested_without_end(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    deep = "[" * 300 + "]" * 300
    file.write_text('{"messages": [{"role": "user", "content": "a", "more": ' + deep + "}]}")
    with pytest.raises(InputError, match="turn 1 is nested in more than 64 levels"):
        read_all(file)


def test_roles_that_are_trained(examples: Examples, refusal: Refusal) -> None:
    (chat,) = examples({"messages": TURNS[:1]}, roles_to_train=["user"])
    assert chat.completion == "Why?"
    assert "no turn of gpt with text to train on (it has user, assistant)" in refusal(
        {"conversations": SHAREGPT}, roles_to_train="gpt"
    )


def test_rows_without_anything_to_train_on_are_passed_over(tmp_path: Path) -> None:
    nothing = [{"messages": turns} for turns in ([], None, TURNS[:1], [TURNS[0], TURNS[1] | {"content": ""}])]
    rows = read_all(write(tmp_path / "d.jsonl", [{"messages": TURNS}, *nothing]), skip_empty=True)
    assert (len(rows.stories), rows.skipped) == (1, 4)
    with pytest.raises(InputError, match=r"d\.jsonl: each of its 4 rows has an empty messages$"):
        read_all(write(tmp_path / "d.jsonl", nothing), skip_empty=True)
    wolf = write(tmp_path / "d.jsonl", [{"messages": TURNS}, {"messages": [{"role": "wolf", "content": "Grr."}]}])
    with pytest.raises(InputError, match=r"row 2: 'messages', turn 1: role 'wolf' is unknown"):
        read_all(wolf, skip_empty=True)
    texts = [{"text": text} for text in ("A", "", None, " ")]
    assert read_all(write(tmp_path / "d.jsonl", texts), skip_empty=True).skipped == 3


# ------------------------------------------------------------------------------------ other data

CHOSEN = {"chosen": "So.", "rejected": "No."}


@pytest.mark.parametrize(
    ("row", "what", "keys", "completion"),
    [
        (
            {"prompt": "Why?"} | CHOSEN,
            "is a preference dataset: prompt, chosen, rejected; harness trains on prompts with completions, chats or "
            "texts; field_instruction: prompt and field_output: chosen under datasets: type: read what was chosen",
            {"field_instruction": "prompt", "field_output": "chosen"},
            "So.",
        ),
        (
            CHOSEN,
            "is a preference dataset: chosen, rejected; harness trains on prompts with completions, chats or texts; "
            "field_text: chosen under",
            {"field_text": "chosen"},
            "So.",
        ),
        (
            {"prompt": "Why?", "chosen": TURNS, "rejected": TURNS, "messages": TURNS},
            "is a preference dataset: prompt, chosen, rejected; harness trains on prompts with completions, chats or "
            "texts; field_messages: chosen under",
            {"field_messages": "chosen"},
            "Because.",
        ),
        (
            {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]},
            "is a preference dataset: prompt, chosen, rejected; harness trains on prompts with completions, chats or "
            "texts; field_instruction: prompt and field_output: chosen",
            {"field_instruction": "prompt", "field_output": "chosen"},
            "Because.",
        ),
        (
            {"question": "Why?", "system": "S."} | CHOSEN,
            "is a preference dataset: chosen, rejected; harness trains on prompts with completions, chats or texts; "
            "field_instruction: question and field_output: chosen",
            {"field_instruction": "question", "field_output": "chosen"},
            "So.",
        ),
        (
            {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]},
            "is a preference dataset: chosen, rejected; harness trains on prompts with completions, chats or texts; "
            "add what was chosen to the turns of each chat",
            {},
            "",
        ),
        ({"message_id": "a", "parent_id": None, "text": "Hi.", "role": "prompter"},
         "is a dataset of conversation trees: parent_id, role, text; ", {}, ""),
        (
            {"prompt": "Why?", "completion": "So.", "label": True},
            "is an unpaired preference dataset: prompt, completion, label; ",
            {"kind": "instruction"},
            "So.",
        ),
        ({"text": "T", "label": 3}, "is a dataset of labelled texts: text, label; ", {"field_text": "text"}, "T"),
        ({"prompt": "Why?", "id": 1}, "is a dataset of prompts without completions: prompt; ", {"field_text": "prompt"},
         "Why?"),
        ({"prompt": "Why?", "completions": ["a", "b"], "labels": [True, False]},
         "is a dataset of judged steps: prompt, completions, labels; ", {}, ""),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1]},
         "is a dataset that is tokenised already: input_ids; ", {}, ""),
        ({"image": {"bytes": "x"}, "text": "T"}, "is a dataset of images: image; ", {"field_text": "text"}, "T"),
        ({"images": ["a.png"], "messages": TURNS}, "is a dataset of images: images; ", {"kind": "chat"}, "Because."),
    ],
)  # fmt: skip
def test_data_for_other_kinds_of_training(
    examples: Examples, refusal: Refusal, row: dict[str, Any], what: str, keys: dict[str, Any], completion: str
) -> None:
    assert refusal(row).startswith(what)
    if keys:
        assert examples(row, **keys)[0].completion == completion, "what the line says reads it"


def test_a_column_of_no_images_is_no_dataset_of_images(examples: Examples) -> None:
    assert isinstance(examples({"images": [], "messages": TURNS})[0], Chat)


# ------------------------------------------------------------------------------------ every kind of file


def _csv(file: Path, rows: Data, separator: str = ",", encoding: str = "utf-8") -> None:
    """Cells of a table hold text: lists are JSON."""
    with file.open("w", encoding=encoding, newline="") as text:
        table = csv.DictWriter(text, [*dict.fromkeys(column for row in rows for column in row)], delimiter=separator)
        table.writeheader()
        for row in rows:
            table.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})


def _stream(file: Path, rows: Data) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)


def _saved(folder: Path, rows: Data) -> None:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(folder))


def _compressed(file: Path, content: bytes) -> None:
    with pa.output_stream(str(file), compression="zstd") as sink:
        sink.write(content)


def _lines(rows: Data) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _two_files(folder: Path, rows: Data) -> None:
    folder.mkdir(exist_ok=True)
    write(folder / "train-00000-of-00002.jsonl", rows[:1])
    parquet.write_table(pa.Table.from_pylist(rows[1:]), folder / "train-00001-of-00002.parquet")


KINDS: dict[str, Callable[[Path, Data], Any]] = {
    "lines.jsonl": lambda file, rows: file.write_text(_lines(rows), "utf-8"),
    "lines.json": lambda file, rows: file.write_text(_lines(rows), "utf-8"),
    "list.jsonl": lambda file, rows: file.write_text(json.dumps(rows, indent=1)),
    "list.json": lambda file, rows: file.write_text(json.dumps(rows)),
    "object.json": lambda file, rows: file.write_text(json.dumps({"version": "1", "data": rows}, indent=2)),
    "object.jsonl": lambda file, rows: file.write_text(json.dumps({"rows": rows}, indent=1)),
    "one line.json": lambda file, rows: file.write_text(json.dumps({"rows": rows})),
    "utf16.jsonl": lambda file, rows: file.write_text(_lines(rows), "utf-16"),
    "utf16.json": lambda file, rows: file.write_text(json.dumps(rows, ensure_ascii=False), "utf-16"),
    "lines.jsonl.gz": lambda file, rows: file.write_bytes(gzip.compress(_lines(rows).encode())),
    "list.JSON.GZ": lambda file, rows: file.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "lines.jsonl.bz2": lambda file, rows: file.write_bytes(bz2.compress(_lines(rows).encode())),
    "list.json.xz": lambda file, rows: file.write_bytes(lzma.compress(json.dumps(rows).encode())),
    "lines.ndjson": lambda file, rows: file.write_text(_lines(rows), "utf-8"),
    "lines.jsonl.zst": lambda file, rows: _compressed(file, _lines(rows).encode()),
    "comma.csv": _csv,
    "semicolon.csv": lambda file, rows: _csv(file, rows, ";"),
    "tab.csv": lambda file, rows: _csv(file, rows, "\t"),
    "pipe.csv": lambda file, rows: _csv(file, rows, "|"),
    "table.tsv": lambda file, rows: _csv(file, rows, "\t"),
    "utf16.csv": lambda file, rows: _csv(file, rows, ";", "utf-16"),
    "table.parquet": lambda file, rows: parquet.write_table(pa.Table.from_pylist(rows), file),
    "table.feather": lambda file, rows: feather.write_feather(pa.Table.from_pylist(rows), str(file)),
    "stream.arrow": _stream,
    "saved": _saved,
    "folder": _two_files,
}
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(str.strip)


@st.composite
def data(draw: st.DrawFn) -> Data:
    """Two or three rows of one shape."""
    shape = draw(st.sampled_from(["stories", "alpaca", "chat", "sharegpt", "text"]))
    count = draw(st.integers(2, 3))
    match shape:
        case "stories":
            return [{"synopsis": draw(TEXTS), "short_story": draw(TEXTS)} for _ in range(count)]
        case "alpaca":
            inputs = st.just("") | TEXTS
            return [{"instruction": draw(TEXTS), "input": draw(inputs), "output": draw(TEXTS)} for _ in range(count)]
        case "text":
            # A header of one column does not say what separates.
            return [{"id": str(number), "text": draw(TEXTS)} for number in range(count)]
    role, content, column = ("role", "content", "messages") if shape == "chat" else ("from", "value", "conversations")
    rows = []
    for number in range(count):
        turns = [{role: name, content: draw(TEXTS)} for name in ("user", "assistant") * draw(st.integers(1, 2))]
        if number and draw(st.booleans()):  # Arrow gives the other turns this key too
            turns[0]["name"] = draw(TEXTS)
        rows.append({column: turns})
    return rows


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=data())
def test_the_same_rows_in_every_kind_of_file_are_the_same_examples(rows: Data, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("kinds")
    read: dict[str, list[Row]] = {}
    for name, write_rows in KINDS.items():
        write_rows(folder / name, rows)
        read[name] = [*read_all(folder / name).stories]
    expected = read["lines.jsonl"]
    assert len(expected) == len(rows)
    assert {name for name, there in read.items() if there != expected} == set()
    assert {name for name, there in read.items() if [e.texts for e in there] != [e.texts for e in expected]} == set()


_TURN = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]),
    st.sampled_from(["user", "assistant", "gpt", "x", "", None, 3, [], [{}], {"a": [None]}, "\ud800"]),
)
_CELLS = st.none() | st.text(max_size=3) | st.lists(_TURN, max_size=3) | st.integers() | st.lists(st.text(max_size=2))
_NAMES = ["messages", "conversations", "prompt", "completion", "text", "instruction", "output", "chosen", "rejected",
          "label", "labels", "tools", "system", "input_ids", "images", "input", "synopsis"]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(_NAMES), _CELLS, max_size=4), max_size=3),
    suffix=st.sampled_from([".jsonl", ".json"]),
    skip_empty=st.booleans(),
)
def test_any_rows_are_read_or_refused_in_a_line(
    rows: Data, suffix: str, skip_empty: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / f"rows{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    message = ""
    try:
        read = read_all(file, skip_empty=skip_empty)
        assert read.stories
        for example in read.stories:
            assert example.id
            assert example.completion or isinstance(example, Chat)
            json.dumps(example.texts).encode()
            if isinstance(example, Chat):
                assert all(isinstance(turn["content"], str) for turn in example.messages)
    except InputError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 1000


def test_a_stream_that_breaks_off_between_two_batches_is_refused(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pylist([{"text": "A"}])
    file, ends = tmp_path / "d.arrow", []
    with file.open("wb") as sink, pa.ipc.new_stream(sink, batch.schema) as out:
        for _ in range(2):
            out.write_batch(batch)
            ends.append(sink.tell())
    assert len(read_all(file).stories) == 2
    file.write_bytes(file.read_bytes()[: ends[0]])
    with pytest.raises(InputError, match=r"d\.arrow cannot be read as \.arrow: its end is missing"):
        read_all(file)


def test_lengths_of_a_damaged_stream_are_not_followed(tmp_path: Path) -> None:
    _stream(tmp_path / "d.arrow", [{"text": "A" * 77}])
    content = (tmp_path / "d.arrow").read_bytes()
    before, after = (b"\0\0\0\0" + end.to_bytes(4, "little") for end in (77, 2**30))
    at = content.rindex(before)
    (tmp_path / "d.arrow").write_bytes(content[:at] + after + content[at + 8 :])
    with pytest.raises(InputError, match=r"d\.arrow cannot be read as \.arrow: "):
        read_all(tmp_path / "d.arrow")


@pytest.mark.parametrize("suffix", [*files.SUFFIXES, ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".csv.zst", ".parquet.gz"])
@pytest.mark.parametrize("how", ["cut", "half", "other", "flipped"])
def test_damaged_files_are_refused_in_a_line(suffix: str, how: str, tmp_path: Path) -> None:
    """None is read as fewer rows than it had, but for a table of text that ends between two rows."""
    rows: Data = [{"synopsis": f"number {i}", "short_story": f"Once {i} " * 20} for i in range(50)]
    name = {
        ".jsonl": "lines.jsonl", ".ndjson": "lines.ndjson", ".json": "list.json", ".csv": "comma.csv",
        ".tsv": "table.tsv", ".parquet": "table.parquet", ".arrow": "stream.arrow", ".feather": "table.feather",
    }  # fmt: skip
    inner = files.suffix_of(f"a{suffix}")
    KINDS[name[inner]](tmp_path / "whole", rows)
    content = (tmp_path / "whole").read_bytes()
    file = tmp_path / f"d{suffix}"
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    elif suffix.endswith(".bz2"):
        content = bz2.compress(content)
    elif suffix.endswith(".xz"):
        content = lzma.compress(content)
    elif suffix.endswith(".zst"):
        _compressed(file, content)
        content = file.read_bytes()
    chance = random.Random(0)
    flipped = bytearray(content)
    for _ in range(20):
        flipped[chance.randrange(len(flipped))] = chance.randrange(256)
    file.write_bytes(
        {"cut": content[:-9], "half": content[: len(content) // 2], "other": b"\x89PNG\r\n\x1a\n\xff",
         "flipped": bytes(flipped)}[how]
    )  # fmt: skip
    message, count = "", 0
    try:
        count = len(read_all(file).stories)
    except InputError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 1000
    if inner in (".csv", ".tsv") and suffix == inner and how in ("cut", "half"):
        assert count <= 50  # such a file does not say where it ends
    elif how in ("cut", "half", "other"):
        assert message, f"{count} rows"
