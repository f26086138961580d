"""Datasets: every kind of file gives the same stories, and what cannot be read says so."""

from __future__ import annotations

import csv
import json
import random
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.data_spec import DatasetSpec, PromptSpec
from harness.errors import InputError
from harness.sources import files, hub, models, stories
from harness.sources.stories import Story

# What people's stories hold: quotes, commas, line ends, characters beyond 16 bits, and the line
# separators of Unicode, at which str.splitlines() cuts and JSON does not.
ROWS: list[dict[str, str]] = [
    {"synopsis": 'A fox, a hen and a "friend".', "short_story": "It ran.\n\nIt hid.\tIt slept."},
    {"synopsis": "Ein Märchen 🦊", "short_story": "Es war einmal, 1.0, NA, null."},
    {"synopsis": "NA", "short_story": "007"},
    {"synopsis": "Two lines\u2028in one\u2029string\x85here", "short_story": " Spaces stay. "},
]


def _write_json(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def _write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pandas.DataFrame(rows).to_parquet(path)


def _write_indexed_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pandas.DataFrame(rows).set_index("synopsis").to_parquet(path)


def read(path: Path | str, **prompt: Any) -> list[Story]:
    return list(stories.read(DatasetSpec(path=str(path), type=PromptSpec(**prompt))).stories)


# ------------------------------------------------------------------------------------ read


def test_bundled_stories() -> None:
    rows = read("storyteller")
    assert len(rows) == 240
    assert len({story.id for story in rows}) == 240
    assert all(story.instruction.strip() and len(story.completion) > 200 for story in rows)
    assert {story.system for story in rows} == {None}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", _write_jsonl),
        ("a.json", _write_json),
        ("a.csv", _write_csv),
        ("a.CSV", _write_csv),
        ("a.parquet", _write_parquet),
        ("indexed.parquet", _write_indexed_parquet),
    ],
)
def test_every_kind_of_file_gives_the_same_stories(
    name: str, write: Callable[[Path, list[dict[str, str]]], None], tmp_path: Path
) -> None:
    write(tmp_path / name, ROWS)
    expected = [Story(row["synopsis"], row["short_story"], None, None, PromptSpec()) for row in ROWS]
    assert read(tmp_path / name) == expected


def test_line_separator_inside_a_string_survives(tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert read(tmp_path / "a.jsonl")[3].instruction == "Two lines\u2028in one\u2029string\x85here"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_files_of_a_spreadsheet_or_another_system(name: str, tmp_path: Path) -> None:
    """A byte order mark at the start and CR LF at the ends of lines change nothing."""
    texts = {
        "a.jsonl": '{"synopsis": "A", "short_story": "B"}\r\n\r\n{"synopsis": "C", "short_story": "D"}\r\n',
        "a.json": '[{"synopsis": "A", "short_story": "B"},\r\n{"synopsis": "C", "short_story": "D"}]\r\n',
        "a.csv": "synopsis,short_story\r\nA,B\r\n\r\nC,D\r\n",
    }
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + texts[name].encode())
    assert [(s.instruction, s.completion) for s in read(tmp_path / name)] == [("A", "B"), ("C", "D")]


def test_long_stories_in_csv(tmp_path: Path) -> None:
    long = "word " * 50_000
    _write_csv(tmp_path / "a.csv", [{"synopsis": "A", "short_story": long}])
    assert read(tmp_path / "a.csv")[0].completion == long


def test_relative_path_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_jsonl(tmp_path / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("a.jsonl") == read("~/a.jsonl") == read(tmp_path / "a.jsonl")


# ------------------------------------------------------------------------------------ columns


def test_columns_of_any_name(tmp_path: Path) -> None:
    row = {"question": "Why?", "context": "A fox.", "answer": "Because.", "note": "unused"}
    _write_jsonl(tmp_path / "a.jsonl", [row, row | {"context": ""}, row | {"context": "  "}])
    rows = read(tmp_path / "a.jsonl", field_instruction="question", field_input="context", field_output="answer")
    assert [(s.instruction, s.input, s.completion) for s in rows] == [
        ("Why?", "A fox.", "Because."),
        ("Why?", None, "Because."),
        ("Why?", None, "Because."),
    ]


def test_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    _write_csv(tmp_path / "a.csv", [{"plot": "A fox.", "tale": "It ran."}])
    with pytest.raises(InputError, match=r"a\.csv has no column 'synopsis'; it has 'plot', 'tale' \(set field_instr"):
        read(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"has no column 'story'; it has 'plot', 'tale'"):
        read(tmp_path / "a.csv", field_instruction="plot", field_output="story")
    assert read(tmp_path / "a.csv", field_instruction="plot", field_output="tale")[0].completion == "It ran."


def test_column_that_only_some_rows_have(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"synopsis": "A", "short_story": "B"}\n{"synopsis": "C"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, row 2: 'short_story' is None; it must be text"):
        read(tmp_path / "a.jsonl")


def test_cells_that_are_no_text(tmp_path: Path) -> None:
    pandas.DataFrame({"synopsis": ["A", None], "short_story": ["B", "C"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 2: 'synopsis' is None; it must be text"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("synopsis,short_story\nA\n")
    with pytest.raises(InputError, match=r"a\.csv, row 1: 'short_story' is None; it must be text"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text('[{"synopsis": "A", "short_story": "B", "context": 5}]')
    with pytest.raises(InputError, match=r"a\.json, row 1: 'context' is 5; it must be text"):
        read(tmp_path / "a.json", field_input="context")


def test_system_column_falls_back_to_the_system_prompt(tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "without.jsonl", ROWS[:1])
    assert read(tmp_path / "without.jsonl", field_system="system", system_prompt="Tell.")[0].system == "Tell."
    assert read(tmp_path / "without.jsonl", field_system="system")[0].system is None

    rows = [ROWS[0] | {"system": "Sing."}, ROWS[1] | {"system": ""}]
    _write_csv(tmp_path / "with.csv", rows)
    examples = read(tmp_path / "with.csv", field_system="system", system_prompt="Tell.")
    assert [story.system for story in examples] == ["Sing.", "Tell."]
    # Named by nobody, the column says nothing.
    assert read(tmp_path / "with.csv", system_prompt="Tell.")[0].system == "Tell."

    pandas.DataFrame([rows[0], ROWS[1] | {"system": None}]).to_parquet(tmp_path / "with.parquet")
    examples = read(tmp_path / "with.parquet", field_system="system", system_prompt="Tell.")
    assert [story.system for story in examples] == ["Sing.", "Tell."]


# ------------------------------------------------------------------------------------ ids


def test_ids_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    shuffled = ROWS.copy()
    random.Random(0).shuffle(shuffled)
    assert shuffled != ROWS
    _write_jsonl(tmp_path / "a.jsonl", ROWS)
    _write_csv(tmp_path / "b.csv", shuffled)
    before = {story.instruction: story.id for story in read(tmp_path / "a.jsonl")}
    after = {story.instruction: story.id for story in read(tmp_path / "b.csv")}
    assert before == after
    assert len(set(before.values())) == len(ROWS)


def test_ids_are_of_the_texts_alone() -> None:
    story = Story("A fox.", "It ran.", None, None, PromptSpec())
    # Losses of recorded trials are paired by it.
    assert story.id == "4af4c79fa316d338"
    assert Story("A fox.", "It ran.", "Tell.", None, PromptSpec(field_output="tale")).id == story.id
    others = [
        Story("A fox.", "It hid.", None, None, PromptSpec()),
        Story("A hen.", "It ran.", None, None, PromptSpec()),
        Story("A fox.", "It ran.", None, "Red.", PromptSpec()),
        Story("A fox.I", "t ran.", None, None, PromptSpec()),
    ]
    assert len({story.id, *(other.id for other in others)}) == 5


def test_held_out_count() -> None:
    assert stories.held_out(16, 240) == 16
    assert stories.held_out(0.1, 240) == 24
    assert stories.held_out(0, 1) == 0
    assert stories.held_out(239, 240) == 239
    for wanted, distinct in [(240.0, 240), (0.99, 10), (1.0, 1)]:
        with pytest.raises(InputError, match=rf"val_set_size {wanted:g} leaves nothing.* {distinct} distinct stories"):
            stories.held_out(wanted, distinct)


# ------------------------------------------------------------------------------------ the hub


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub at which nobody listens, no proxy, and empty caches."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(urllib.request, "getproxies", dict)


@pytest.mark.usefixtures("unreachable")
def test_unreachable_hub_is_reported_at_once() -> None:
    started = time.perf_counter()
    with pytest.raises(InputError) as refusal:
        read("jaydenccc/AI_Storyteller_Dataset")
    with pytest.raises(InputError) as of_model:
        models.check("unsloth/Meta-Llama-3.1-8B-Instruct")
    assert time.perf_counter() - started < 10

    message = str(refusal.value)
    assert message.isprintable()
    assert message.startswith("dataset jaydenccc/AI_Storyteller_Dataset is on the hub, which cannot be reached (")
    assert message.endswith("it is not in the local cache; give a local file or storyteller (bundled)")
    assert "model unsloth/Meta-Llama-3.1-8B-Instruct is on the hub, which cannot be reached" in str(of_model.value)
    assert "smollm2-135m-instruct" in str(of_model.value)


@pytest.mark.usefixtures("unreachable")
def test_unresponsive_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall that drops packets never answers."""

    def connect(address: tuple[str, int], timeout: float | None = None) -> None:
        assert address == ("127.0.0.1", 1)
        assert timeout is not None
        assert timeout <= 10
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(InputError, match=r"cannot be reached \(timed out\)"):
        read("owner/name")


@pytest.mark.usefixtures("unreachable")
def test_offline_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def connect(*_: Any, **__: Any) -> None:
        pytest.fail("asked the network although HF_HUB_OFFLINE is set")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(InputError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\)"):
        read("owner/name")


@pytest.mark.usefixtures("unreachable")
def test_proxy_for_other_addresses_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """`no_proxy` alone is no way to the hub."""
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"no": "localhost", "ftp": "http://127.0.0.1:2"})
    with pytest.raises(InputError, match="cannot be reached"):
        hub.check_hub_or_cache("owner/name", "model")
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"http": "http://127.0.0.1:2"})
    monkeypatch.setattr(urllib.request, "proxy_bypass", lambda host: 0)
    hub.check_hub_or_cache("owner/name", "model")  # the proxy may know the way


@pytest.mark.usefixtures("unreachable")
def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    for folder, name, kind in [
        ("hub/models--owner--name", "owner/name", "model"),
        ("hub/datasets--owner--one", "owner/one", "dataset"),
        ("datasets/owner___two", "owner/two", "dataset"),
    ]:
        with pytest.raises(InputError, match="not in the local cache"):
            hub.check_hub_or_cache(name, kind)
        (tmp_path / folder).mkdir(parents=True)
        hub.check_hub_or_cache(name, kind)


def test_whatever_the_hub_s_libraries_raise_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Odd(Exception):
        pass

    def load_dataset(path: str, split: str) -> list[dict[str, str]]:
        raise Odd(f"{path} is gated\nask its owner")

    monkeypatch.setattr(hub, "check_hub_or_cache", lambda name, kind: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"cannot be read from the hub \(owner/name is gated\); check") as refusal:
        read("owner/name")
    assert str(refusal.value).isprintable()

    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: ROWS)
    assert [story.completion for story in read("owner/name")] == [row["short_story"] for row in ROWS]


def test_local_file_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stories.txt").write_text("A fox.")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"'data/stories\.txt' is unknown; give storyteller, .*, a file \(\.jsonl"):
        read("data/stories.txt")


# ------------------------------------------------------------------------------------ anything else

_ROW = st.dictionaries(st.sampled_from(["synopsis", "short_story", "system"]), st.none() | st.integers() | st.text())
_JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5) | _ROW, st.lists, max_leaves=5)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=st.binary(max_size=40)
    | st.text('ab,"\n\r\t {}[]:\\\0', max_size=40).map(lambda tail: ("synopsis,short_story\n" + tail).encode())
    | st.lists(_JSON, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.lists(_JSON, max_size=3).map(lambda rows: json.dumps(rows).encode()),
    suffix=st.sampled_from(files.SUFFIXES),
)
def test_any_file_is_read_or_refused(content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / f"any{suffix}"
    file.write_bytes(content)
    try:
        rows = read(file, field_system="system")
    except InputError as refusal:
        assert str(refusal).isprintable()  # noqa: PT017 - either outcome is right
    else:
        assert rows
        assert all(story.instruction.strip() and story.completion.strip() and story.id for story in rows)
