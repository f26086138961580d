"""Give harness malformed grids, broken datasets and tampered results.

    python benchmarks/fuzz.py [--grids 10000] [--datasets 2000] [--results 300] [--seed 0] [--keep FOLDER]

Everything goes through the command's own entry point, or `stories.read`, in this process. Nothing may end in a
traceback, print more than one line of what is wrong, start a process for a refused grid, write outside the given
folders, or take long. Inputs that fail are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import io
import itertools
import json
import multiprocessing.forkserver
import multiprocessing.process
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: names of the hub are not looked up

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from harness import record
from harness.analysis import comparison
from harness.cli import app
from harness.environment import current
from harness.errors import InputError
from harness.grids import claims, document, grid, levels, yaml_file
from harness.record import InferenceRecord, Job, Record
from harness.report import tables as report_tables
from harness.report import writers
from harness.results import schema
from harness.results.store import Store
from harness.sources import files, stories
from harness.spec.datasets import DatasetSpec
from harness.spec.trial import TrialSpec

ROOT = Path(__file__).parent.parent
SLOW_SECONDS = 2.0
"""Of processor time: that of the clock depends on what else runs."""
HANG_SECONDS = 60
"""Of the clock."""


@dataclass
class Tally:
    """How the inputs ended."""

    ends: Counter[str] = field(default_factory=Counter)
    """Number of inputs by outcome."""
    failures: dict[str, str] = field(default_factory=dict)
    """By input, what went wrong."""
    slowest: tuple[float, str] = (0.0, "none")
    """Seconds of processor time, and the input."""

    def took(self, seconds: float, name: str) -> None:
        """Note how long an input took."""
        self.slowest = max(self.slowest, (seconds, name))
        if seconds > SLOW_SECONDS:
            self.fail(name, f"took {seconds:.1f} s")

    def fail(self, name: str, why: str) -> None:
        """Note what went wrong, the first time for each input."""
        self.failures.setdefault(name, why)

    def summary(self) -> str:
        """The counts, in a line."""
        ends = ", ".join(f"{count:,} {end}" for end, count in self.ends.most_common())
        seconds, name = self.slowest
        return f"{ends}; slowest {seconds:.2f} s ({name}); {len(self.failures)} failures"


class Started(BaseException):
    """A process was about to be started: the grid is valid. `except Exception` does not catch it."""


class Hangs(BaseException):
    """It took longer by the clock than anything may."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """null where it did not exit by itself."""
    out: str
    err: str
    seconds: float
    """Of processor time."""
    error: str = ""
    """The traceback that a user would have seen."""
    started: int = 0
    """Processes that it was about to start."""


def command(*arguments: str) -> Ended:
    """Run a command of harness through its own entry point, in this process; it starts no other."""
    starts = 0

    def started(*_: Any, **__: Any) -> None:
        nonlocal starts
        starts += 1
        raise Started

    def hangs(*_: Any) -> None:
        raise Hangs

    code: int | None = None
    error = ""
    out, err = io.StringIO(), io.StringIO()
    places: tuple[tuple[Any, str], ...] = (
        (subprocess.Popen, "__init__"),
        (multiprocessing.process.BaseProcess, "start"),
        (multiprocessing.forkserver, "ensure_running"),
    )
    former = [(owner, name, getattr(owner, name)) for owner, name in places]
    arguments_before, handler = sys.argv, signal.signal(signal.SIGALRM, hangs)
    began = time.process_time()
    try:
        for owner, name in places:
            setattr(owner, name, started)
        sys.argv = ["harness", *arguments]
        signal.alarm(HANG_SECONDS)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")  # each process begins without warnings that others showed
            app.main()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0
    except Started:
        pass
    except BaseException:
        error = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        sys.argv = arguments_before
        for owner, name, function in former:
            setattr(owner, name, function)
    return Ended(code, out.getvalue(), err.getvalue(), time.process_time() - began, error, starts)


def unprintable(text: str) -> str:
    """The characters of a text that steer a terminal, or nothing."""
    return "".join(sorted({c for c in text if not c.isprintable() and c not in "\n\t"}))


# ------------------------------------------------------------------------------------ grids

# Scalars and collections as YAML writes them, of every type that it has and some that it has not.
JUNK = (
    "", "~", "null", "true", "no", "0", "-1", "1.0", "1.5", "1e500", ".nan", "-.inf", "0x1F", "0o17", "1_000", "1:30",
    "9" * 40, "9" * 5000, "0x" + "f" * 5000, "-" + "9" * 4000, "1e-400", "2001-12-14", "2001-13-44",
    "2001-12-14t21:59:43.10-05:00", "''", "' '", "'x'", "x" * 700, "'" + "lang " * 20_000 + "'", '"\\ud800"',
    '"\\e[31mred\\e[0m"', '"a\\0b"', '"a\\nb"', '"\\x9b31m"', '"\\u202egnp"', '"[/red]"', '"[bold"', '"a\\\\"', "[]",
    "{}", "[1, 2]", "[[1]]", "[{}]", "[null]", "[true, 1, '1', 1.0]", "{a: 1}", "{1: 2}", "{null: x}", "{true: x}",
    "{lora_r: 4}", "{x: {lora_r: 4}}", "{x: {}}", "{levels: [1]}", "{levels: {a: {lora_r: 2}}}", "{hold: x}",
    "{path: storyteller}", "[{path: storyteller}]", "[{path: storyteller, type: {system_prompt: \"\\ud800\"}}]",
    "[{path: storyteller, type: {format: '{instruction'}}]", "[{path: storyteller, type: {format: '{instruction!r}'}}]",
    "[{path: /dev/null}]", "[{path: /dev/zero}]", "[{path: ../..}]", "[{path: a/b}]", "[{path: .jsonl}]",
    "/dev/zero", "/dev/null", "/proc/self/mem", "..", "/", "~", "~root", "~nobody-of-that-name/x", "random:tiny",
    "random:/dev/zero", "random:.json", "random:", "owner/name", "../x", "con", "-", "@x", "`x`", "%x", "!x", "*x",
    "&x", "&a [*a]", "&a {b: *a}", "*nowhere", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1, a: 2]",
    "!!binary aGVsbG8=", "!!binary '?'", "!!timestamp x", "!!int x", "!!int '1:99999'", "!!float ''", "!!bool maybe",
    "!!null x", "!!str [a]", "!!seq {a: 1}", "!!map [a]", "!!python/object/apply:os.system [exit]",
    "!!python/tuple [1, 2]", "!!python/name:os.system", "!local x", "!<tag:yaml.org,2002:str> x", "| \n    text",
    "> \n    text", "[" * 40 + "]" * 40, "{a: " * 40 + "}" * 40, "[" * 400 + "]" * 400, "? a", "- a", "a: b: c", "# x",
    "{<<: {lora_r: 4}}", "{<<: [{a: 1}, 2]}", "{<<: x}", "<<", "{=: 1}", "=", "24GiB", "1e3GiB", "-5 GB", "0B",
    "9" * 400 + "GiB", "\ufeffx", "\u2028", "ratio < 1", "[{id: a, says: b, compare: {lora_r: [4, 8]}, metric: "
    "eval_loss, expect: difference < 0}]", "[{id: a, says: \"\\e[31m\", where: {}, metric: x, expect: y}]",
    "[{id: a, says: b, compare: {lora_r: [{a: 1}, [1]]}, metric: eval_loss, expect: difference < 0}]",
)  # fmt: skip
_VALUE = re.compile(r"(?<=[:\-,\[{] )[^\n,\]}#]+|(?<=: )[^\n#]+")
_KEY = re.compile(r"[A-Za-z_0-9]+(?=:)")
_CONTROL = (
    "\x00",
    "\x07",
    "\x08",
    "\x0b",
    "\x0c",
    "\x1b",
    "\x1b[31m",
    "\x1b]0;x\x07",
    "\x7f",
    "\x85",
    "\x9b",
    "\u202e",
)
_MOST_GRID_BYTES = 2**21


def grid_seeds() -> tuple[list[bytes], dict[str, bytes]]:
    """Grid files to begin with, and the files that some of them name."""
    sys.path.insert(0, str(ROOT / "tests"))
    from malformed import FILES, MALFORMED

    def as_bytes(content: str | bytes) -> bytes:
        return content if isinstance(content, bytes) else content.encode()

    shipped = [
        file.read_bytes() for place in ("grids", "tests/lesson") for file in sorted((ROOT / place).glob("*.yml"))
    ]
    malformed = [as_bytes(text) for text, _ in MALFORMED.values()]
    small = [text for text in malformed if len(text) < 2000]
    # Half of the malformed cases say one thing each; the shipped ones have everything and take longer.
    return [*shipped * (1 + len(small) // (2 * len(shipped))), *malformed], {n: as_bytes(c) for n, c in FILES.items()}


def mutated(text: bytes, chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A grid file with one to four things wrong in it, or none."""
    for _ in range(chance.choice((0, 1, 1, 1, 1, 2, 2, 3, 4))):
        text = chance.choice(_MUTATIONS)(text, chance, seeds)
    return text[:_MOST_GRID_BYTES]


def _flip(text: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    changed = bytearray(text or b"\0")
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _lines(text: bytes, chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A line dropped, doubled, swapped with another, moved in, or from another grid."""
    lines = text.split(b"\n")
    a, b = chance.randrange(len(lines)), chance.randrange(len(lines))
    how = chance.randrange(6)
    if how == 0:
        del lines[a]
    elif how == 1:
        lines.insert(b, lines[a])
    elif how == 2:
        lines[a], lines[b] = lines[b], lines[a]
    elif how == 3:
        lines[a] = b" " * chance.randrange(6) + lines[a]
    elif how == 4:
        lines.insert(a, chance.choice(chance.choice(seeds).split(b"\n")))
    else:
        lines[a:] = []
    return b"\n".join(lines)


def _replaced(pattern: re.Pattern[str], new: Callable[[str, random.Random], str]) -> Callable[..., bytes]:
    """Replaces one match of a pattern."""

    def replace(text: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
        decoded = text.decode(errors="surrogateescape")
        matches = list(pattern.finditer(decoded))
        if not matches:
            return text
        match = chance.choice(matches)
        changed = decoded[: match.start()] + new(match[0], chance) + decoded[match.end() :]
        return changed.encode(errors="surrogateescape")

    return replace


def _misspelt(key: str, chance: random.Random) -> str:
    at = chance.randrange(len(key))
    keys = (*document.GRID_KEYS, *levels.SPEC_KEYS)
    return chance.choice(
        (key[:at] + key[at + 1 :], key[:at] + key[at] * 2 + key[at + 1 :], chance.choice(keys), "", key)
    )


def _insert(text: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    at = chance.randrange(len(text) + 1)
    return text[:at] + chance.choice((*_CONTROL, "&a ", "*a", "!!set ", "[", "}", "'", '"', ": ")).encode() + text[at:]


def _tree(text: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    """The document with a value somewhere replaced by another of its values or by junk."""
    try:
        document = yaml.load(text.decode(), yaml_file._Loader)  # noqa: S506 - which merges of merges do not blow up
        places = list(itertools.islice(_places(document), 5000))  # aliases of aliases are as many as they like
        if not 0 < len(places) < 5000:
            return text
        holder, key = chance.choice(places)
        other, of = chance.choice(places)
        holder[key] = chance.choice((other[of], {"x": other[of]}, [other[of]], chance.choice(_TREE_JUNK)))
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()
    except Exception:  # it is no YAML any more
        return text


_TREE_JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\x1b[31m", "a\nb", [], {}, [[]], [{}], [None],
    {"": ""}, {1: 2}, {None: 1}, b"\xff\x00", dt.date(2026, 1, 1), dt.datetime(2026, 1, 1), {"a", "b"},
)  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder and key within a document."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(inner)


_MUTATIONS: tuple[Callable[[bytes, random.Random, Sequence[bytes]], bytes], ...] = (
    _flip,
    _lines,
    _lines,
    _insert,
    _tree,
    _tree,
    *[_replaced(_VALUE, lambda _, chance: chance.choice(JUNK))] * 4,
    _replaced(_KEY, _misspelt),
)


def fuzz_grids(count: int, seed: int, keep: Path) -> Tally:
    """Give grid files to `harness run`; those that fail are kept."""
    chance, tally = random.Random(seed), Tally()
    seeds, files = grid_seeds()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        for file, content in files.items():
            Path(file).write_bytes(content)
        there = {*os.listdir(), "fuzzed.yml"}
        Path("fuzzed.yml").write_bytes(seeds[0])
        command("run", "fuzzed.yml")  # what a first run imports is not the next one's time
        for number in range(count):
            text = mutated(chance.choice(seeds), chance, seeds)
            case = f"grid-{seed}-{number}.yml"
            Path("fuzzed.yml").write_bytes(text)
            _look_at_grid(case, Path("fuzzed.yml"), tally)
            for extra in {*os.listdir()} - there:
                tally.fail(case, f"wrote {extra}")
            if case in tally.failures:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / case).write_bytes(text)
    return tally


def _look_at_grid(case: str, file: Path, tally: Tally) -> None:
    ended = command("run", str(file), "--results", "results")
    tally.took(ended.seconds, case)
    lines = ended.err.splitlines()
    if ended.error:
        tally.fail(case, ended.error)
    elif ended.started and ended.code is None:
        tally.ends["valid"] += 1
        if codes := unprintable(ended.out + ended.err):
            tally.fail(case, f"prints {codes!r}")
        _look_at_valid_grid(case, file, tally)
    elif ended.code != 2 or ended.out or ended.started:
        tally.fail(case, f"ended with {ended.code}, having started {ended.started}, and printed {ended.out[:200]!r}")
    elif len(lines) != 1 or not lines[0].startswith("harness: ") or not lines[0].isprintable() or len(lines[0]) > 1000:
        tally.fail(case, f"printed {ended.err[:2000]!r}")
    else:
        tally.ends["refused"] += 1


def _look_at_valid_grid(case: str, file: Path, tally: Tally) -> None:
    """What is not refused must be something that can be recorded, and read again."""
    try:
        loaded = grid.load(file)
        json.dumps(loaded.about, ensure_ascii=False, allow_nan=False).encode()
        for trial in loaded.trials[:3]:
            if not trial.label.isprintable():
                tally.fail(case, f"has a trial called {trial.label!r}")
            job = Job(grid=loaded.name, spec=trial.spec, label=trial.label, factor=trial.factor, level=trial.level)
            record = Record.of(job, environment=current("cpu"), status="ok", started_at=_STARTED)
            row = schema.trial_row(record)
            kept = pa.Table.from_pylist([row], schema.SCHEMAS["trials"]).to_pylist()[0]
            if schema.spec_of(kept).id != trial.spec.id:
                tally.fail(case, f"{trial.label} comes back as another")
    except Exception:
        tally.fail(case, traceback.format_exc())


# ------------------------------------------------------------------------------------ datasets

_STARTED = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
_TEXTS = (
    "A fox.", "", " ", "NA", "null", "=cmd|' /C calc'!A0", "@SUM(A1)", "\x00", "\x1b[31m", "\ud800", "\ufeff", "\u2028",
    "a\r\nb\rc", "é" * 300, "x" * 100_000, '"', '""', "'", ",", "\\", "{", "[1]", "NaN", "🦊", "\u202e", "<script>",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *_TEXTS, None, True, 0, -1, 10**30, 1.5, float("nan"), float("inf"), [], {}, ["a"], {"a": None}, [[["a"]]],
)  # fmt: skip
_COLUMNS = ("synopsis", "short_story", "system", "", "\ufeffsynopsis", "synopsis ", "\x1b[31m", "c" * 5000, "\ud800")
_TURNS: tuple[Any, ...] = (
    {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}, {"from": "gpt", "value": "So."},
    {"from": "human", "value": None}, {"role": "wolf", "content": "Grr."}, {"role": "assistant", "tool_calls": [{}]},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, {}, "Why?", None,
    {"role": "assistant", "content": "a", "name": "\ud800"}, {"role": "\x1b[31m", "content": "\x1b[31m"},
)  # fmt: skip
_CHATS: tuple[Any, ...] = (
    [*_TURNS[:2]], [*_TURNS[2:4]], [_TURNS[0]], [], None, json.dumps(_TURNS[:2]), "[", {"role": "user"}, [[[]]],
)  # fmt: skip
_OTHER_COLUMNS = (
    "messages", "conversations", "prompt", "completion", "instruction", "output", "input", "text", "label", "labels",
    "chosen", "rejected", "images", "input_ids", "tools",
)  # fmt: skip


def _rows_of(chance: random.Random) -> list[dict[str, Any]]:
    """Rows that are mostly stories, or mostly of one other shape."""
    rows, other = [], chance.random() < 0.4
    for _ in range(chance.choice((0, 1, 1, 2, 5))):
        row: dict[str, Any] = {"synopsis": "A fox.", "short_story": "It ran."}
        if other:
            row = {column: _cell(chance) for column in chance.sample(_OTHER_COLUMNS, chance.choice((1, 2, 3)))}
        for _ in range(chance.choice((0, 0, 0, 1, 2))):
            row[chance.choice(_COLUMNS)] = chance.choice(_VALUES)
        if chance.random() < 0.1:
            row.pop(chance.choice(list(row)))
        rows.append(row)
    return rows


def _cell(chance: random.Random) -> Any:
    """A text, a chat, or whatever else."""
    if chance.random() < 0.4:
        return chance.choice(_CHATS)
    if chance.random() < 0.3:
        return [chance.choice(_TURNS) for _ in range(chance.choice((1, 2, 4)))]
    return chance.choice(_VALUES)


def _nested(chance: random.Random) -> str:
    depth = chance.choice((50, 300, 900, 985, 995, 5000, 100_000))
    opened, closed = chance.choice((("[", "]"), ('{"a":', "}")))
    return opened * depth + "1" + closed * depth


def _json_text(chance: random.Random, *, lines: bool) -> bytes:
    rows = [json.dumps(row, ensure_ascii=chance.random() < 0.7) for row in _rows_of(chance)]
    if chance.random() < 0.25:
        story = '"short_story": "It ran."'
        rows.append(
            chance.choice(
                (
                    _nested(chance), f'{{"synopsis": {_nested(chance)}, {story}}}', "{", "[[]]",
                    "null", "[]", '"x"', "1" * 5000,
                    f'{{"synopsis": {"9" * 5000}, {story}}}', '{"synopsis": "a", "synopsis": "b", ' + story + "}",
                    "{'synopsis': 1}", f'{{"synopsis": "\\ud800", {story}}}', f'{{"synopsis": NaN, {story}}}',
                    f'{{"synopsis": -Infinity, {story}}}', f'{{"synopsis": "a\tb", {story}}}',
                    f'{{"messages": [{{"role": "user", "content": {_nested(chance)}}}]}}',
                    f'{{"messages": [{{"role": "user", "content": "a", "more": {_nested(chance)}}}]}}',
                )
            )
        )  # fmt: skip
    text = chance.choice(("\n", "\r\n", "\r", "\n\n", "\u2028")).join(rows) if lines else f"[{', '.join(rows)}]"
    if chance.random() < 0.1:
        text = f'{{"data": {text}, "more": {chance.choice(("1", "[]", "[{}]", text))}}}'
    return text.encode(chance.choice(("utf-8", "utf-8-sig", "utf-8", "utf-8", "utf-16")), "surrogatepass")


def _csv_text(chance: random.Random) -> bytes:
    rows = [[str(value) for value in row.values()] for row in _rows_of(chance)]
    header = chance.choice(
        (*[["synopsis", "short_story"]] * 5, ["synopsis"] * 2, [""], ["synopsis", "short_story", "c"], [])
    )
    comma, quote = chance.choice((",", ",", ",", ";", "\t", "|")), chance.choice(('"', '"', "", "'"))
    lines = [comma.join(f"{quote}{cell}{quote}" for cell in row) for row in (header, *rows)]
    text = chance.choice(("\n", "\r\n", "\r", "\n\r")).join(lines)
    return text.encode(chance.choice(("utf-8", "utf-8-sig", "utf-8", "utf-8", "utf-16")), "surrogatepass")


def _arrow(chance: random.Random, suffix: str) -> bytes:
    """Columns of every type that Arrow has and parquet holds, two of them perhaps of one name."""
    count = chance.choice((0, 1, 3))
    texts = ["A fox."] * count
    made: tuple[Callable[[], Any], ...] = (
        lambda: pa.array(texts),
        lambda: pa.array(texts, pa.large_string()),
        lambda: pa.array(texts).dictionary_encode(),
        lambda: pa.array([None] * count, pa.string()),
        lambda: pa.nulls(count),
        lambda: pa.array([b"\xff\x00"] * count, pa.binary()),
        lambda: pa.array([b"\xff\xfe"] * count, pa.binary()).cast(pa.string(), safe=False),
        lambda: pa.array([1.5, float("nan"), None][:count]),
        lambda: pa.array([1] * count, pa.decimal128(38, 2)),
        lambda: pa.array([2**62] * count, pa.timestamp("us", tz="UTC")),
        lambda: pa.array([-(2**62)] * count, pa.timestamp("us")),
        lambda: pa.array([2**62] * count, pa.timestamp("ns")),
        lambda: pa.array([2**30] * count, pa.date32()),
        lambda: pa.array([2**60] * count, pa.duration("s")),
        lambda: pa.array([{"a": [1]}] * count),
        lambda: pa.array([[["x"]]] * count),
        lambda: pa.array([[("k", 1)]] * count, pa.map_(pa.string(), pa.int64())),
        lambda: pa.array([0] * count, pa.time64("ns")),
        lambda: pa.array([b"ab"] * count, pa.binary(2)),
    )
    names = [chance.choice(("synopsis", "short_story", *_COLUMNS[:-1])) for _ in range(chance.choice((0, 1, 3)))]
    names += ["synopsis", "short_story"] if chance.random() < 0.8 else []
    columns = [made[0]() if chance.random() < 0.5 else chance.choice(made)() for _ in names]
    out, table = pa.BufferOutputStream(), pa.table(columns, names=names)
    if suffix == ".parquet":
        pq.write_table(table, out, compression=chance.choice(("snappy", "zstd", "gzip", "none")))
    else:
        kind = chance.choice((pa.ipc.new_file, pa.ipc.new_stream))
        options = pa.ipc.IpcWriteOptions(compression=chance.choice(("zstd", "lz4", None)))
        with kind(out, table.schema, options=options) as writer:
            writer.write_table(table)
    return bytes(out.getvalue().to_pybytes())


def _compressed(suffix: str, content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The file as it is, or compressed, and perhaps spoilt once more."""
    if chance.random() < 0.8:
        return suffix, content
    end, how = chance.choice(((".gz", "gzip"), (".zst", "zstd")))
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, how) as stream:
        stream.write(content)
    return suffix + end, _spoilt(bytes(out.getvalue().to_pybytes()), chance)


def _spoilt(content: bytes, chance: random.Random) -> bytes:
    """The file as it is, cut, flipped, or other."""
    how = chance.randrange(12)
    if how == 0:
        return content[: chance.randrange(len(content) + 1)]
    if how == 1 and content:
        changed = bytearray(content)
        for _ in range(chance.choice((1, 4, 30))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    if how == 2:
        return (
            chance.choice((b"", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\x00" * 100, b"PAR1", b"PAR1" * 5)) + content[:50]
        )
    return chance.randbytes(chance.choice((0, 10, 5000))) if how == 3 else content


_BIG = 10 * 2**20


def dataset(chance: random.Random) -> tuple[str, bytes]:
    """A file's ending and content."""
    suffix = chance.choice(files.SUFFIXES)
    if chance.random() < 0.01:  # a row of 10 MB
        row = json.dumps({"synopsis": "x" * _BIG, "short_story": "It ran."}).encode()
        return ".jsonl", row
    if suffix in (".parquet", ".arrow", ".feather"):
        content = _arrow(chance, suffix)
    elif suffix in (".csv", ".tsv"):
        content = _csv_text(chance)
    else:
        content = _json_text(chance, lines=(suffix == ".jsonl") != (chance.random() < 0.2))
    return _compressed(suffix, _spoilt(content, chance), chance)


def fuzz_datasets(count: int, seed: int, keep: Path) -> Tally:
    """Read so many dataset files; those that fail are kept."""
    chance, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            suffix, content = dataset(chance)
            case = f"dataset-{seed}-{number}{suffix}"
            file = Path(name) / f"fuzzed{suffix}"
            file.write_bytes(content)
            began = time.process_time()
            try:
                read = stories.read(DatasetSpec(path=str(file))).stories
                for story in read:
                    "".join((story.id, story.instruction, story.completion, *map(str, story.texts))).encode()
                tally.ends["read" if read else "read as nothing"] += 1
                if not read:
                    tally.fail(case, "no stories and no error")
            except InputError as error:
                tally.ends["refused"] += 1
                if not str(error).isprintable() or len(str(error)) > 1000:
                    tally.fail(case, f"printed {str(error)[:1000]!r}")
            except BaseException:
                tally.fail(case, traceback.format_exc())
            tally.took(time.process_time() - began, case)
            if case in tally.failures:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / case).write_bytes(content)
    return tally


# ------------------------------------------------------------------------------------ results

SCRIPT = "<script>alert(7041)</script>"
TEX = r"\input{secret7041}"
ESCAPED = "escaped7041"
"""Part of the names by which hostile rows would leave their folder."""
_HOSTILE_TEXTS = (
    "", " ", SCRIPT, f"</script>{SCRIPT}<img src=x onerror=alert(7041)>", f"</pre>{SCRIPT}", TEX,
    r"\write18{x} & % $ # _ ^",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b31m", "\x00", "a\nb", "a\r\nb\tc", "| a | b |", "`x` ```\n# head",
    "![x](http://x)", "[/red]", "[bold", "a\\", ":boom:", "=cmd|' /C calc'!A0", "\u202egnp", "\u2028", "x" * 20_000,
    f"../../../{ESCAPED}", f"/{ESCAPED}", "..", ".", f"{ESCAPED}/../..", "{}", "[]", "null", "1", "nan", '"x"',
    '{"a": 1}', '[{"path": "x"}]', '[{"path": "x", "type": {}}]', "[[]]", "[" * 5000, '{"versions": {}}', "ok", "oom",
    "failed", "general", "before", "base", "none", "nf4", "OK",
)  # fmt: skip
_HOSTILE: dict[str, tuple[Any, ...]] = {
    "string": (None, *_HOSTILE_TEXTS),
    "int64": (None, 0, -1, 1, -(2**63), 2**63 - 1, 2**31),
    "double": (None, 0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324),
    "bool": (None, True, False),
    "timestamp": (None, 0, -(2**62), 2**62, 253_402_300_800_000_000),
    "list": (None, [], [None], [SCRIPT], ["\x1b[31m"], ["q_proj"] * 1000),
    "list of figures": (None, [], [None], [float("nan")], [-1.0], [0.0], [1e308]),
}
_GRID_JSON = (
    "", "[]", "null", "{", '{"title": 1}', json.dumps({"title": f"\x1b[31m{SCRIPT}|{TEX}\n# x"}),
    '{"title": "\\ud800"}',
    '{"claims": 1}', '{"claims": [1]}', '{"claims": [{"id": "a"}]}', '{"claims": null, "title": null}',
    '{"tune": 1}', '{"tune": {}}', '{"tune": {"base": {}, "tune": {}}}', '{"tune": {"base": 1, "tune": [1]}}',
    "[" * 9000,
    json.dumps({"claims": [{"id": "a", "says": SCRIPT, "compare": {"lora_r": [4, 8]}, "metric": "eval_loss",
                            "expect": "difference < 0", "section": TEX}]}),
    json.dumps({"claims": [{"id": "a", "says": "b", "compare": {"lora_r": [{"a": 1}, [1]]}, "metric": "eval_loss",
                            "expect": "difference < 0"}]}),
    json.dumps({"claims": [{"id": "a", "says": "b", "where": {"lora_r": "lowest"}, "metric": "eval_loss",
                            "per": "peak_memory_bytes", "expect": "value < 1"}]}),
    "9" * 5000, '{"title": ' + "9" * 5000 + "}",
)  # fmt: skip


def valid_results(folder: Path) -> None:
    """A grid's results with something in every table: two repeats, a second baseline, failures, a search, models."""
    store = Store(folder)
    base = {"base_model": "random:tiny", "precision": "fp32", "sequence_length": 256, "train_samples": 8,
            "val_set_size": 2, "lora_r": 4}  # fmt: skip
    kinds: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("baseline", {}, {}),
        ("baseline again", {}, {"twin": True}),
        ("lora_r=8", {"lora_r": 8, "save_adapter": True}, {"factor": "lora_r", "level": "8"}),
        ("full", {"adapter": "none"}, {"factor": "technique", "level": "full"}),
        ("nf4", {"precision": "nf4"}, {"factor": "precision", "level": "nf4"}),
        ("too long", {"sequence_length": 512}, {"factor": "sequence_length", "level": "512"}),
        ("#1 lora_r=16", {"lora_r": 16}, {"study": "s-1", "study_trial": 1}),
    ]
    for repeat in range(2):
        baseline = TrialSpec.model_validate(base | {"seed": repeat}).id
        for number, (label, changes, place) in enumerate(kinds):
            spec = TrialSpec.model_validate(base | changes | {"seed": repeat})
            job = Job(grid="g", spec=spec, label=label, repeat=repeat, baseline_id=baseline, **place)
            store.write(_record(job, number))
    row = next(r for r in store.read("trials").to_pylist() if r["label"] == "lora_r=8")
    store.write_inference(row, _inference())
    for file in (f"adapters/{row['adapter_id']}/adapter_config.json", "logs/a.log", ".half.1.aside", "adapters/x/y"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    claim = {
        "id": "c",
        "says": "so",
        "compare": {"lora_r": [4, 8]},
        "metric": "peak_memory_bytes",
        "expect": "ratio < 1",
    }
    tune = {"space": {"lora_r": [4, 8, 16]}, "objectives": ["peak_memory_bytes"]}
    store.describe({"title": "G", "claims": [claim], "tune": {"base": base, "tune": tune}})


def _record(job: Job, number: int) -> Record:
    about: dict[str, Any] = {"environment": current("cpu"), "started_at": _STARTED + dt.timedelta(minutes=number)}
    if job.label == "too long":
        return Record.of(
            job, **about, status="oom", phase="forward", error="out of memory", error_type="OutOfMemory",
            log="logs/a.log", metrics={"oom_reached_bytes": 2**30, "oom_requested_bytes": 2**20},
        )  # fmt: skip
    size = 2**20 * (10 + number)
    figures: dict[str, float | int | None] = {
        "peak_memory_bytes": size, "predicted_peak_memory_bytes": size + 5, "tokens_per_second": 100.0 + number,
        "eval_loss": 2.0 + number / 100, "eval_loss_before": 3.0, "forgetting": 0.1, "general_loss_before": 2.5,
        "total_parameters": 1000, "optimizer_steps": 2, "evaluated_stories": 2, "step_seconds_median": 1.0,
        **{f"memory_{c}_bytes": size // 5 for c in ("weights", "adapters", "gradients", "optimizer", "activations")},
    }  # fmt: skip
    steps = tuple(
        record.Step(
            step=i, tracked=i == 1, seconds=1.0, loss=3.0 - i / 10, grad_norm=1.0, learning_rate=1e-4, samples=2,
            tokens=100, supervised_tokens=50, padded_tokens=120, peak_memory_bytes=size,
        )
        for i in (1, 2, 3)
    )  # fmt: skip
    texts = tuple(
        record.StoryLoss(story_id=f"{kind} {i}", when=when, loss=2.0 + i / 10, tokens=10, kind=kind)
        for kind in ("held-out", "general")
        for when in ("before", "after")
        for i in range(3)
    )  # type: ignore[arg-type]  # literals
    adapter = "0123456789abcdef" if job.spec.save_adapter else None
    return Record.of(job, **about, status="ok", metrics=figures, steps=steps, stories=texts, adapter_id=adapter)


def _inference() -> InferenceRecord:
    models = ("base", "unmerged", "merged")
    return InferenceRecord(
        environment=current("cpu"),
        models=tuple(
            record.ModelFootprint(model=m, precision="fp32", model_bytes=9, peak_inference_bytes=9) for m in models
        ),
        requests=tuple(
            record.Request(
                model=m, round=r, story_id="a", prompt_tokens=9, prefill_seconds=0.1, token_seconds=(0.1, 0.2)
            )
            for m in models
            for r in range(2)
        ),
        answers=tuple(
            record.Answer(model=m, story_id=f"{i}", loss=2.0, tokens=9, synopsis="A fox.", reference="A", story="B",
                           rouge_l=0.5, distinct_2=0.5, repetition=0.1, words=5.0)
            for m in models
            for i in range(3)
        ),
    )  # fmt: skip


def tamper(folder: Path, chance: random.Random) -> list[str]:
    """Tamper with a folder of results in one to five ways; returns what was done."""
    acts = (_hostile_values, _hostile_values, _hostile_values, _hostile_values, _damaged, _other_columns, _other_names)
    return [chance.choice(acts)(folder, chance) for _ in range(chance.choice((1, 1, 2, 3, 5)))]


def _hostile_of(kind: pa.DataType) -> tuple[Any, ...]:
    if pa.types.is_list(kind):
        return _HOSTILE["list" if pa.types.is_string(kind.value_type) else "list of figures"]
    return _HOSTILE["timestamp" if pa.types.is_timestamp(kind) else str(kind)]


def _table(folder: Path, chance: random.Random) -> str:
    there = [t for t in schema.SCHEMAS if (folder / t).is_dir()]
    return chance.choice(["trials", *there])


def _hostile_values(folder: Path, chance: random.Random) -> str:
    """Values in a column or two of one row, or of all rows."""
    name = _table(folder, chance)
    columns_of = schema.SCHEMAS[name]  # type: ignore[index]  # one of its keys
    parts = sorted((folder / name).glob("*.parquet"))
    whole = chance.random() < 0.3
    changed = []
    columns = [chance.choice(columns_of.names) for _ in range(chance.choice((1, 1, 2)))]
    given = {column: chance.choice(_hostile_of(columns_of.field(column).type)) for column in columns}
    for part in parts if whole else parts[:1] if chance.random() < 0.3 else [chance.choice(parts)] if parts else []:
        try:
            content = pq.read_table(part)
        except (pa.ArrowException, OSError):
            continue
        for column, value in given.items():
            if column in content.schema.names and len(content):
                kind = content.schema.field(column).type
                with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError):
                    filled = pa.array([value] * len(content), kind)
                    content = content.set_column(content.schema.get_field_index(column), column, filled)
        pq.write_table(content, part)
        changed.append(part.name)
    return f"{name}: {given!r:.300} in {len(changed)} parts"


def _damaged(folder: Path, chance: random.Random) -> str:
    """A part is cut, flipped, emptied, doubled, removed, or replaced by a folder."""
    name = _table(folder, chance)
    parts = sorted((folder / name).glob("*.parquet"))
    if not parts:
        return f"{name}: nothing left"
    part, how = chance.choice(parts), chance.randrange(7)
    content = part.read_bytes() if part.is_file() else b""
    if how == 0:
        part.write_bytes(content[: len(content) // 2])
    elif how == 1 and content:
        changed = bytearray(content)
        for _ in range(chance.choice((1, 5, 50))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        part.write_bytes(changed)
    elif how == 2:
        part.write_bytes(chance.choice((b"", b"PAR1", b"\x1f\x8b\x08", chance.randbytes(500))))
    elif how == 3:
        part.with_name(chance.choice(("all-1.parquet", "\x1b[31m.parquet", "[red]x.parquet", "z.parquet"))).write_bytes(
            content
        )
    elif how == 4:
        part.unlink()
    elif how == 5:
        part.unlink()
        part.mkdir()
    else:
        shutil.rmtree(folder / name)
    return f"{name}/{part.name}: damage {how}"


def _other_columns(folder: Path, chance: random.Random) -> str:
    """A part of another schema: a column dropped, of another type, doubled or added; another version."""
    name = _table(folder, chance)
    parts = [part for part in sorted((folder / name).glob("*.parquet")) if part.is_file()]
    try:
        part = chance.choice(parts)
        content = pq.read_table(part)
        column = chance.choice(content.schema.names)
    except (pa.ArrowException, OSError, IndexError):
        return f"{name}: nothing to change"
    at, how = content.schema.get_field_index(column), chance.randrange(6)
    about = content.schema.metadata
    if how == 0:
        content = content.drop_columns([column])
    elif how == 1:
        kinds = (pa.array([chance.choice(_HOSTILE_TEXTS)] * len(content)), pa.nulls(len(content)),
                 pa.array([b"\xff"] * len(content), pa.binary()), pa.array([[1]] * len(content)))  # fmt: skip
        content = content.set_column(at, column, chance.choice(kinds))
    elif how == 2:
        content = content.append_column(column, content[column])
    elif how == 3:
        content = content.append_column("more", content[column])
    elif how == 4:
        content = pa.concat_tables([content] * 3)
    else:
        about = {"schema_version": chance.choice(("", "0", "-1", "2", "x", "9" * 5000, "1.0", "\u0661", " 1"))}
    pq.write_table(content.replace_schema_metadata(about), part)
    return f"{name}/{part.name}: {column}, columns {how}"


def _other_names(folder: Path, chance: random.Random) -> str:
    """Files other than parts."""
    how = chance.randrange(5)
    if how == 0:
        content = chance.choice(_GRID_JSON)
        (folder / "grid.json").write_text(content)
        return f"grid.json: {content[:100]}"
    if how == 1:
        (folder / "grid.json").unlink(missing_ok=True)
        (folder / "grid.json").mkdir(exist_ok=True)
    place = folder / ("logs", "adapters", "leases", "set-aside")[how % 4]
    place.mkdir(exist_ok=True)
    for name in ("\x1b[31mred.log", "[red]x.log", f"{SCRIPT.replace('/', '')}.json", "new\nline.json"):
        (place / name).write_text(chance.choice(("", "{}", '{"runner": "x", "host": "y", "pid": -1, "started": 0.0}')))
    return f"names in {place.name}, {how}"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file and its content, but for locks."""
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.is_file() else b""
        for file in sorted(folder.rglob("*"))
        if file.name != ".lock"
    }


def fuzz_results(count: int, seed: int, keep: Path) -> Tally:
    """Give tampered folders to every command that reads results; those that fail are kept."""
    chance, tally = random.Random(seed), Tally()
    # Waiting for the disk would take most of the time.
    with tempfile.TemporaryDirectory() as name, _a_part_of_the_lesson(), mock.patch("os.fsync"):
        root = Path(name)
        valid_results(root / "valid" / "g")
        command("report", str(root / "valid" / "g"), "--output", str(root / "output"))  # see fuzz_grids
        shutil.rmtree(root / "output")
        for number in range(count):
            case = f"results-{seed}-{number}"
            shutil.copytree(root / "valid", root / "results")
            done = tamper(root / "results" / "g", chance)
            shutil.copytree(root / "results", root / "before")
            for folder in ("here", "output", "joined"):
                (root / folder).mkdir()
            with contextlib.chdir(root / "here"), contextlib.nullcontext() if number % 10 == 0 else _no_images():
                _look_at_results(case, root, number, tally)
            if case in tally.failures:
                shutil.copytree(root / "before", keep / case, dirs_exist_ok=True)
                (keep / case / "failure.txt").write_text("\n".join((*done, "", tally.failures[case])), errors="replace")
            for folder in {*os.listdir(root)} - {"valid"}:
                shutil.rmtree(root / folder)
    return tally


def _a_part_of_the_lesson() -> contextlib.AbstractContextManager[Any]:
    """All of its tables and claims take two seconds a report, and go through the same code."""
    whole = claims.lesson()
    part = whole.model_copy(update={"tables": whole.tables[:1], "claims": whole.claims[:4]})
    stack = contextlib.ExitStack()
    for module in (report_tables, comparison):
        stack.enter_context(mock.patch.object(module, "lesson", return_value=part))
    return stack


def _no_images() -> contextlib.AbstractContextManager[Any]:
    """They take half of a report's time: the page has the same charts."""
    return mock.patch.object(writers, "images", return_value=("", b""))


def _look_at_results(case: str, root: Path, number: int, tally: Tally) -> None:
    all_results, mine, output = str(root / "results"), str(root / "results" / "g"), root / "output"
    before = snapshot(root / "results")
    valid, joined, limits = str(root / "valid" / "g"), str(root / "joined"), ("--max-loss", "9", "--min-speed", "1")
    even = number % 2 == 0
    asked: tuple[tuple[str, ...], ...] = (
        ("ls", "--results", all_results),
        ("ls", "g", "--results", all_results),
        ("show", "lora_r=8" if even else "", "--results", all_results),
        ("report", mine, "--output", str(output)),
        # One in four each: they read the same rows in the same way.
        (
            ("recommend", mine, "--output", str(output / "best.yml")),
            ("compare", mine, valid),
            ("recommend", mine, "--output", str(output / "best.yml"), *limits),
            ("compare", valid, mine, "--across-environments"),
        )[number % 4],
        ("doctor", all_results),
        ("clean", all_results, "--dry-run"),
        ("merge-results", all_results, joined),
    )
    for arguments in asked:
        ended = command(*arguments)
        what = " ".join(arguments[:2]).replace(str(root), "")
        tally.ends[f"{arguments[0]} {ended.code}"] += 1
        tally.took(ended.seconds / (2 if arguments[0] == "report" else 1), f"{case} {what}")  # with its images
        if ended.error or ended.code not in (0, 1, 2) or ended.started:
            tally.fail(case, f"{what} ended with {ended.code}\n{ended.error}")
        elif codes := unprintable(ended.out + ended.err):
            tally.fail(case, f"{what} prints {codes!r}")
        elif any(not line.startswith("harness: ") for line in ended.err.splitlines()):
            tally.fail(case, f"{what} printed {ended.err[:2000]!r}")
    if snapshot(root / "results") != before:
        tally.fail(case, "the results were changed")
    strays = [n for n in os.listdir(root) if n not in ("valid", "results", "before", "here", "output", "joined")]
    strays += [str(f) for f in root.rglob(f"*{ESCAPED}*") if "leases" not in f.parts and "before" not in f.parts]
    if strays or os.listdir(root / "here"):
        tally.fail(case, f"wrote {strays}, {os.listdir(root / 'here')}")
    for page in (file for file in output.rglob("*") if file.is_file() and file.suffix != ".png"):
        if why := wrong_with_page(page.suffix, page.read_text(encoding="utf-8")):
            tally.fail(case, f"{page.name} {why}")


def wrong_with_page(suffix: str, text: str) -> str | None:
    """Markup or commands from rows, which a page of the report must not hold; null where there are none."""
    if codes := unprintable(text) if suffix != ".html" else unprintable(text.split("<script>")[0]):
        return f"holds {codes!r}"
    if suffix in (".html", ".md", ".svg") and re.search(r"<script>alert\(7041|<img src=x", text):
        return "holds a script"
    if suffix == ".tex" and re.search(r"(?<!\\)\\(input|write)", text):
        return "holds a command"
    return None


# ------------------------------------------------------------------------------------ all of it


def main() -> None:
    """Print the counts, and fail where anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=10_000)
    parser.add_argument("--datasets", type=int, default=2000)
    parser.add_argument("--results", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "harness-fuzz")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = False
    for what, look in (("grids", fuzz_grids), ("datasets", fuzz_datasets), ("results", fuzz_results)):
        count, began = getattr(given, what), time.monotonic()
        if count:
            tally = look(count, given.seed, given.keep)
            print(f"{count:,} {what} in {time.monotonic() - began:.0f} s: {tally.summary()}", flush=True)
            for case, why in list(tally.failures.items())[:20]:
                print(f"  {case}, kept in {given.keep}: {why.strip().splitlines()[-1][:300]}", flush=True)
            failed = failed or bool(tally.failures)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
