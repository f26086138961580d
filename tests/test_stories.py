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

from harness.errors import InputError
from harness.sources import files, hub, models, stories
from harness.sources.stories import Story
from harness.spec.datasets import DatasetSpec, PromptSpec

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


def test_what_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        asked.append((path, options))
        return ROWS

    monkeypatch.setattr(hub, "check_hub_or_cache", lambda name, kind: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert stories.read(DatasetSpec(path="owner/name")).held_out == ()
    rows = spec_read("owner/name", name="en", split="validation[:10%]", shards=2, data_files=["a.jsonl"])
    assert [story.completion for story in rows.stories] == [row["short_story"] for row in ROWS[::2]]
    spec_read("owner/name", data_files="b.txt", ds_type="json")
    assert asked == [
        ("owner/name", {"split": "train"}),
        ("owner/name", {"split": "validation[:10%]", "name": "en", "data_files": ["a.jsonl"]}),
        ("json", {"split": "train", "data_files": ["hf://datasets/owner/name/b.txt"]}),
    ]


# ------------------------------------------------------------------------------------ folders, patterns and parts


def spec_read(path: Path | str, folder: Path | None = None, **keys: Any) -> stories.Rows:
    dataset = DatasetSpec.model_validate({"path": str(path)} | keys)
    return stories.read(dataset, None if folder is None else str(folder))


def refused(path: Path | str, folder: Path | None = None, **keys: Any) -> str:
    with pytest.raises(InputError) as refusal:
        spec_read(path, folder, **keys)
    assert str(refusal.value).isprintable()
    return str(refusal.value).removeprefix(f"dataset {path}").lstrip(" ,:")


def numbers(first: int, end: int) -> list[dict[str, str]]:
    return [{"synopsis": f"{i}", "short_story": f"{i}"} for i in range(first, end)]


def read_numbers(rows: tuple[stories.Row, ...]) -> list[int]:
    return [int(story.instruction) for story in rows]


def filled(folder: Path, **files_of: tuple[int, int]) -> Path:
    """A folder with files of numbers; `__` in a name stands for a folder."""
    for name, (first, end) in files_of.items():
        file = folder / (name.replace("__", "/").replace("_of_", "-of-") + ".jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_jsonl(file, numbers(first, end))
    return folder


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        ({"train": (0, 3), "test": (3, 5)}, [0, 1, 2], [3, 4]),
        ({"train": (0, 3), "validation": (3, 5)}, [0, 1, 2], [3, 4]),
        ({"train": (0, 3), "eval": (3, 5), "notes": (7, 9)}, [0, 1, 2], [3, 4]),
        ({"train": (0, 3), "test": (3, 5), "dev": (7, 9)}, [0, 1, 2], [3, 4]),
        ({"data__train-00001_of_00002": (2, 3), "data__train-00000_of_00002": (0, 2), "data__test-0_of_1": (3, 5)},
         [0, 1, 2], [3, 4]),
        ({"train__a": (0, 2), "train__b": (2, 3), "test__a": (3, 5)}, [0, 1, 2], [3, 4]),
        ({"my_training_rows": (0, 1), "my-test-rows": (3, 4)}, [0], [3]),
        ({"b": (2, 3), "a": (0, 2), "latest": (4, 5), "trainers": (5, 6)}, [0, 1, 2, 4, 5], []),
        ({"train": (0, 1), ".hidden__train": (5, 6), "_made__train": (5, 6), "a__b__c__train": (5, 6)}, [0], []),
    ],
)  # fmt: skip
def test_folder_of_files(
    names: dict[str, tuple[int, int]], train: list[int], held_out: list[int], tmp_path: Path
) -> None:
    rows = spec_read(filled(tmp_path, **names))
    assert read_numbers(rows.stories) == train
    assert read_numbers(rows.held_out) == held_out


def test_folder_that_is_not_clear(tmp_path: Path) -> None:
    only_test = filled(tmp_path / "a", test=(0, 2))
    assert refused(only_test) == "has no part train, but test; name the one to train on with split"
    assert read_numbers(spec_read(only_test, split="test").stories) == [0, 1]
    twice = filled(tmp_path / "b", train=(0, 2))
    _write_parquet(twice / "train.parquet", numbers(0, 2))
    assert refused(twice) == "has both train.jsonl and train.parquet; name those to read with data_files"
    assert read_numbers(spec_read(twice, data_files="train.parquet").stories) == [0, 1]
    (tmp_path / "c").mkdir()
    assert "is a folder without data files (.jsonl, " in refused(tmp_path / "c")
    (tmp_path / "c" / "rows.txt").write_text("A\n\nB\n")
    assert refused(tmp_path / "c").endswith("; it holds 'rows.txt'")
    assert [text.completion for text in spec_read(tmp_path / "c", ds_type="text").stories] == ["A", "B"]
    empty = filled(tmp_path / "d", train=(0, 2), test=(0, 0))
    assert refused(empty) == "has no rows in its part test; leave its file away, or set split: train"
    assert read_numbers(spec_read(empty, split="train").stories) == [0, 1]


def test_what_only_describes_data_is_not_read(tmp_path: Path) -> None:
    folder = filled(tmp_path, b=(0, 2))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    assert read_numbers(spec_read(folder).stories) == [0, 1]


def test_rows_of_several_files_are_named_by_their_file(tmp_path: Path) -> None:
    folder = filled(tmp_path, train=(0, 3), sub__test=(3, 5))
    (folder / "train.jsonl").write_text('{"synopsis": "A", "short_story": "B"}\n{"synopsis": "C", "short_story": 7}\n')
    assert refused(folder) == "row 2 of train.jsonl: 'short_story' is 7; it must be text, written in quotes"
    filled(folder, train=(0, 3))
    (folder / "sub" / "test.jsonl").write_text("{")
    assert refused(folder).startswith("sub/test.jsonl cannot be read as .jsonl: line 1, column 2: ")
    _write_jsonl(folder / "sub" / "test.jsonl", [{"synopsis": "A"}])
    assert refused(folder).startswith("sub/test.jsonl, has no column 'short_story'; it has 'synopsis'")


def test_pattern_of_files(tmp_path: Path) -> None:
    filled(tmp_path, data__b=(2, 4), data__a=(0, 2), data__test=(4, 5), data__sub__c=(5, 6))
    (tmp_path / "data" / "README.md").write_text("rows")
    assert read_numbers(spec_read("data/*.jsonl", tmp_path).stories) == [0, 1, 2, 3, 4]
    assert read_numbers(spec_read(tmp_path / "data/[ab].jsonl").stories) == [0, 1, 2, 3]
    assert read_numbers(spec_read("data/**/*.jsonl", tmp_path).stories) == [0, 1, 2, 3, 5, 4]
    assert refused("data/*.csv", tmp_path).startswith("no file matches /")
    assert refused("data/*", tmp_path).startswith("the name of README.md does not say its format; set ds_type")


def test_files_within_a_folder(tmp_path: Path) -> None:
    filled(tmp_path, d__b=(2, 4), d__a=(0, 2), d__train=(7, 9))
    assert read_numbers(spec_read("d", tmp_path, data_files=["b.jsonl", "a.jsonl"]).stories) == [2, 3, 0, 1]
    assert read_numbers(spec_read("d", tmp_path, data_files="[ab].jsonl").stories) == [0, 1, 2, 3]
    assert refused("d", tmp_path, data_files=["c.jsonl"]).startswith("data_files: no such file as c.jsonl (looked in /")
    assert refused("d/a.jsonl", tmp_path, data_files=["c"]).startswith("is one file; data_files is for folders and")
    # As in training files that name a format in place of a path.
    (tmp_path / "rows.log").write_bytes((tmp_path / "d/a.jsonl").read_bytes())
    assert read_numbers(spec_read("json", tmp_path, data_files=["rows.log"]).stories) == [0, 1]
    assert "json is a format and needs data_files" in refused("json", tmp_path)
    assert stories.absolute("json", str(tmp_path)) == str(tmp_path)


def test_configurations_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = filled(tmp_path / "d", en__train=(0, 2), en__test=(5, 6), de__train=(2, 4))
    rows = spec_read(folder, name="en")
    assert (read_numbers(rows.stories), read_numbers(rows.held_out)) == ([0, 1], [5])
    assert refused(folder, name="fr").startswith("has no configuration 'fr': no README.md that names it, and no folder")
    lines = ["configs:", "- config_name: best", "  data_files:", "  - {split: train, path: de/*}"]
    lines += ["  - {split: test, path: en/test.jsonl}"]
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", "# Rows"]))
    rows = spec_read(folder, name="best")
    assert (read_numbers(rows.stories), read_numbers(rows.held_out)) == ([2, 3], [5])
    assert refused(folder, name="worst").startswith("cannot be read as a folder: BuilderConfig 'worst' not found")
    assert refused(folder / "de" / "train.jsonl", name="en").startswith("is one file; name is for folders and")


def test_saved_datasets(tmp_path: Path) -> None:
    import datasets

    train, test = (datasets.Dataset.from_list(numbers(*ends)) for ends in ((0, 4), (4, 6)))
    train.shuffle(seed=0).select([2, 1]).save_to_disk(str(tmp_path / "one"))
    assert set(read_numbers(spec_read(tmp_path / "one").stories)) < {0, 1, 2, 3}
    assert spec_read(tmp_path / "one").held_out == ()
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "both"))
    rows = spec_read(tmp_path / "both")
    assert (read_numbers(rows.stories), read_numbers(rows.held_out)) == ([0, 1, 2, 3], [4, 5])
    assert read_numbers(spec_read(tmp_path / "both", split="test").stories) == [4, 5]
    assert refused(tmp_path / "both", data_files="a.arrow").startswith("was saved as one whole; leave out data_files")
    datasets.DatasetDict(a=train, b=test).save_to_disk(str(tmp_path / "others"))
    assert refused(tmp_path / "others") == "has no part train, but a, b; name the one to train on with split"
    bad = datasets.Dataset.from_list([{"synopsis": "A", "short_story": ""}])
    datasets.DatasetDict(train=train, test=bad).save_to_disk(str(tmp_path / "bad"))
    assert refused(tmp_path / "bad").startswith("row 1 of test: 'short_story' is ''; it must be text")
    for damage in (b"", b"ARROW1", (tmp_path / "one" / "data-00000-of-00001.arrow").read_bytes()[:-300]):
        (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(damage)
        assert refused(tmp_path / "one").startswith("cannot be read as a folder: ")
    (tmp_path / "one" / "state.json").write_text("[]")
    assert refused(tmp_path / "one").startswith("cannot be read as a folder: ")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("train[:3]", [0, 1, 2]),
        ("train[-2:]", [8, 9]),
        ("train[80%:]", [8, 9]),
        ("train[:10%]+test[1:]", [0, 11]),
        ("validation", [20]),
        ("train[:999]", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_split(split: str, expected: list[int], tmp_path: Path) -> None:
    folder = filled(tmp_path, train=(0, 10), test=(10, 12), val=(20, 21))
    rows = spec_read(folder, split=split)
    assert read_numbers(rows.stories) == expected
    assert rows.held_out == (), "it says what is read"
    if "+" not in split and "val" not in split:
        assert read_numbers(spec_read(folder / "train.jsonl", split=split).stories) == expected


def test_split_that_is_none(tmp_path: Path) -> None:
    folder = filled(tmp_path, train=(0, 10), test=(10, 12))
    assert refused(folder, split="dev") == "split 'dev' names 'dev', which is none of its parts: 'test', 'train'"
    for split in ("train[1", "train[a:]", "train[:200%]", "train[5]", "train[1:2:3]", "train[:5%](often)"):
        assert refused(folder, split=split).startswith(f"split {split!r} is none (")
    assert refused(folder, split="train[3:3]").startswith("has no rows in its part train[3:3]; it needs at least one")
    assert refused(folder, split="train+").startswith("split 'train+' names '', which is none of its parts")
    (folder / "train.jsonl").write_text('{"synopsis": "A", "short_story": "B"}\n' * 3 + '{"synopsis": "C"}\n')
    assert refused(folder, split="train[2:]").startswith("row 4 of train.jsonl: 'short_story' is None")


def test_shards_are_every_nth_row(tmp_path: Path) -> None:
    rows = spec_read(filled(tmp_path, train=(0, 10), test=(10, 13)), shards=4)
    assert (read_numbers(rows.stories), read_numbers(rows.held_out)) == ([0, 4, 8], [10, 11, 12])


def test_format_of_files_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes((filled(tmp_path / "d", a=(0, 2)) / "a.jsonl").read_bytes())
    (tmp_path / "lines.txt").write_text("A\u2028fox.\r\n\r\nA hen.", encoding="utf-16", newline="")
    assert read_numbers(spec_read(tmp_path / "rows", ds_type="json").stories) == [0, 1]
    assert refused(tmp_path / "rows").endswith("ds_type says the format (json, csv, parquet, arrow, text)")
    texts = spec_read(tmp_path / "lines.txt", ds_type="text").stories
    assert [text.completion for text in texts] == ["A\u2028fox.", "A hen."]
    assert refused(tmp_path / "rows", ds_type="parquet").startswith("cannot be read as parquet: ")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"\x1f\x8b\x08\0\0", r"as \.jsonl: it is compressed; let its name end in \.gz"),
        ("a.json", b"BZh91AY", r"as \.json: it is compressed; let its name end in \.bz2"),
        ("a.csv", b"\xfd7zXZ\0\0", r"as \.csv: it is compressed; let its name end in \.xz"),
        ("a.jsonl.xz", b'{"synopsis": "A"}', r"as \.jsonl: .*format"),
        ("a.csv", b"PAR1\0", r"it holds Parquet; let its name end in \.parquet, or set ds_type: parquet"),
        ("a.json", b"ARROW1\0\0", r"it holds Arrow; let its name end in \.arrow"),
        ("a.csv", b"PK\x03\x04\0", r"it is an archive or a spreadsheet; unpack it, or save its table as \.csv"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", r"a pointer of Git LFS; fetch"),
        ("a.jsonl.gz", b'{"synopsis": "A"}', r"as \.jsonl: .*incorrect header"),
        ("a.csv", "a,b\nc,\xe9\n".encode("latin-1"), r"'utf-8' codec .*, in line 2; save it as UTF-8"),
        ("a.json", b'{"a": [{"synopsis": "A"}], "b": [{"c": 1}]}', r"several lists of rows \('a', 'b'\); keep one"),
        ("a.json", b'{"synopsis": ["A", "B"], "short_story": ["C", "D"]}', r"a list for each column \('synopsis', "),
        ("a.json", b'{"synopsis": {"0": "A"}, "short_story": {"0": "C"}}', r"a mapping for each column \('syn"),
        ("a.json", b'{"synopsis": "A", "short_story": "B"}', r"it holds \{'synopsis': .*, not a list of rows"),
        ("a.json", b'{"messages": [{"role": "user", "content": "A"}]}', r"it holds .*, not a list of rows"),
        ("a.json", b'{"messages": [{"who": "A", "says": "B"}]}', r"it holds .*'messages'.*, not a list of rows"),
        ("a.jsonl", b'["A"]\n["B"]\n', r"line 1 is \['A'\], not an object with columns"),
        ("a.jsonl", b'{"synopsis": "A"}\n{"syn', r"line 2, column "),
        ("a.csv", b"synopsis;short_story\nA;B;C\n", r"row 1 has more fields .*; quote texts with semicolons"),
        ("a.feather", b"FEA1\0\0\0\0FEA1", r"cannot be read as \.feather: "),
    ],
)  # fmt: skip
def test_damaged_and_wrongly_named_files(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as refusal:
        read(tmp_path / name)
    assert str(refusal.value).isprintable()


def test_an_object_without_rows_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"data": []}')
    assert refused(tmp_path / "a.json") == "has no rows; it needs at least one"


def test_separator_is_that_of_the_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"synopsis, long, or short";short_story\n"A; B";"C, ""D"", E, F"\n')
    (story,) = read(tmp_path / "a.csv", field_instruction="synopsis, long, or short")
    assert (story.instruction, story.completion) == ("A; B", 'C, "D", E, F')


def test_order_in_which_a_path_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundled name, a folder or a file from the grid's folder, and only then the hub."""
    import datasets

    grids, current = tmp_path / "grids", tmp_path / "current"
    current.mkdir()
    filled(grids, storyteller__train=(0, 1), owner__name__train=(1, 3), plain__train=(3, 4))
    monkeypatch.setattr(hub, "check_hub_or_cache", lambda name, kind: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: ROWS)
    monkeypatch.chdir(current)
    assert len(spec_read("storyteller", grids).stories) == 240
    assert read_numbers(spec_read("owner/name", grids).stories) == [1, 2]
    assert read_numbers(spec_read("plain", grids).stories) == [3]
    assert len(spec_read("owner/other", grids).stories) == len(ROWS)
    # What would be the hub's, and lies in the current folder, is asked for.
    filled(current, owner__other__train=(0, 1))
    assert "; it is in the current folder, so write ../current/owner/other" in refused("owner/other", grids)
    for path, relative in {
        "storyteller": False, "a.jsonl": True, "a.jsonl.gz": True, "data/*.csv": True, "plain": True, "./plain": True,
        "owner/name": True, "far/away": False, "/data/a.jsonl": False, "~/data": False, "json": True,
    }.items():  # fmt: skip
        assert stories.is_relative_file(path, str(grids)) == relative, path
    assert stories.absolute("owner/name", str(grids)) == str(grids / "owner" / "name")
    assert stories.absolute("far/away", str(grids)) == "far/away"
    assert stories.absolute("../d/*.jsonl", str(grids)) == str(tmp_path / "d" / "*.jsonl")


def test_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path / "d", train=(0, 2))

    def scandir(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", scandir)
    assert refused(folder).startswith("cannot be read: Permission denied (")


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
