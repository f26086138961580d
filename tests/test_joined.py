"""One report of several grids, the formats of a report, and what a terminal shows of it."""

from __future__ import annotations

import contextlib
import csv
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rows import keep
from typer.testing import CliRunner

from harness.analysis import loading
from harness.analysis.words import NOT_MEASURED
from harness.cli.app import app
from harness.environment import current
from harness.errors import InputError
from harness.grids.claims import lesson
from harness.report import document, joined, page, writers
from harness.report.document import Document
from harness.report.tables import Cell
from harness.results.store import Store
from harness.spec.trial import TrialSpec

ROOT = Path(__file__).parent.parent
Small = Callable[..., TrialSpec]
COMMITTED = {"lesson": "fb116a5f", "practice": "bd5fabe1", "forgetting": "557a4f59", "biases": "fb116a5f"}
"""Environments by grid."""
_NOT_HERE = "not measured here"


def grid(small: Small, folder: Path, kinds: dict[str, dict[str, Any]], **figures: Any) -> None:
    """Three repeats of these techniques, each of which holds a tenth less than the one before."""
    generator = random.Random(str(folder.name))
    for seed in range(3):
        for number, (label, changes) in enumerate({"baseline": {}, **kinds}.items()):
            losses = [2.0 + i / 10 - number / 5 + generator.uniform(-0.01, 0.01) for i in range(6)]
            keep(
                Store(folder), small(seed=seed, **changes), label, losses, rates=[100.0, 101.0],
                **{"peak_memory_bytes": int(1000 * 0.9**number), "tokens_per_second": 100.0 + number + seed / 10,
                   "eval_loss": sum(losses) / 6} | figures,
            )  # fmt: skip


@pytest.fixture
def two_grids(small: Small, tmp_path: Path) -> list[Path]:
    """One that varied the rank, and one that varied dropout and the rank too."""
    folders = [tmp_path / "results" / name for name in ("ranks", "both")]
    grid(small, folders[0], {"lora_r=8": {"lora_r": 8}})
    grid(small, folders[1], {"lora_dropout=0.1": {"lora_dropout": 0.1}, "lora_r=8": {"lora_r": 8}})
    return folders


def parts_of(folders: list[Path], **environments: str) -> list[Document]:
    return [
        document.document(loading.load(folder, environments.get(folder.name)), folder, grids=len(folders))
        for folder in folders
    ]


@pytest.fixture(scope="module")
def committed() -> tuple[list[Document], Document]:
    with contextlib.chdir(ROOT):  # the report names its folders as they were given
        parts = parts_of([Path("results") / name for name in COMMITTED], **COMMITTED)
        return parts, joined.join(parts, "The lesson")


def test_the_committed_report_is_rendered_from_the_committed_rows(
    committed: tuple[list[Document], Document],
) -> None:
    assert writers.markdown(committed[1]) == (ROOT / "reports/lesson/report.md").read_text()


def test_each_cell_of_the_lesson_is_filled_from_whichever_grid_measured_it(
    committed: tuple[list[Document], Document],
) -> None:
    parts, whole = committed
    tables = {table.id: table for table in whole.tables}
    filled = 0
    for table in lesson().tables:
        own = [next(t for t in part.tables if t.id == table.id) for part in parts]
        for number, row in enumerate(tables[table.id].rows):
            assert row[0].text == own[0].rows[number][0].text
            for column in (2, 4, 6):
                measured = [t.rows[number][column].text for t in own if t.rows[number][column].text != NOT_MEASURED]
                assert (row[column].text == NOT_MEASURED) == (not measured), (table.id, row[0].text)
                filled += bool(measured)
            assert (row[-1].text == NOT_MEASURED) == all(row[c].text == NOT_MEASURED for c in (2, 4, 6))
    assert filled > 60
    alone = [{v.claim.id for v in part.verdicts if v.word == _NOT_HERE} for part in parts]
    missing = {v.claim.id for v in whole.verdicts if v.word == _NOT_HERE}
    of_lesson = {claim.id for claim in lesson().claims}
    assert missing & of_lesson == set.intersection(*alone) & of_lesson
    assert len(missing & of_lesson) < min(map(len, alone))


def test_a_cell_that_the_first_grid_lacks_is_filled_from_another(two_grids: list[Path]) -> None:
    first, second = parts_of(two_grids)
    table, other = (next(t for t in part.tables if t.id == "lora-parameters") for part in (first, second))
    row = tuple(Cell(NOT_MEASURED) if column == 6 else cell for column, cell in enumerate(table.rows[0]))
    without_loss = replace(table, rows=(row, *table.rows[1:]))
    tables = tuple(without_loss if each is table else each for each in first.tables)
    whole = joined.join([replace(first, tables=tables), second], "Both")
    filled = next(t for t in whole.tables if t.id == "lora-parameters").rows[0]
    assert filled[2].text == table.rows[0][2].text
    assert filled[6].text == f"{other.rows[0][6].text} (both)"
    assert filled[-1].text == "ranks, both"


def test_a_joined_claim_names_its_grid_and_the_verdicts_of_the_others(two_grids: list[Path]) -> None:
    parts = parts_of(two_grids)
    whole = joined.join(parts, "Both")
    verdicts = {verdict.claim.id: verdict for verdict in whole.verdicts}
    both = verdicts["rank-memory"]
    assert both.source.startswith("ranks; by both: ")
    assert both.size == next(v for v in parts[0].verdicts if v.claim.id == both.claim.id).size
    dropout = next(v for v in whole.verdicts if v.source == "both")
    assert "lora_dropout" in dropout.claim.compare


def test_a_claim_is_taken_from_the_first_grid_that_decides_it(two_grids: list[Path]) -> None:
    first, second = parts_of(two_grids)
    undecided = [replace(v, word="not decided") if v.claim.id == "rank-memory" else v for v in first.verdicts]
    whole = joined.join([replace(first, verdicts=undecided), second], "Both")
    verdict = next(v for v in whole.verdicts if v.claim.id == "rank-memory")
    assert verdict.word == "contradicted"
    assert verdict.source.startswith("both; by ranks: not decided")


def test_grids_of_one_report_are_judged_together(two_grids: list[Path]) -> None:
    """Their families are of one report: each interval is wider than in the report of its grid alone."""
    (alone,) = parts_of(two_grids[:1])
    together = parts_of(two_grids)[0]
    for metric in ("tokens_per_second", "eval_loss"):
        (narrow,), (wide,) = (part.comparison.estimates[metric].values() for part in (alone, together))
        assert (wide.high or 0) - (wide.low or 0) > (narrow.high or 0) - (narrow.low or 0) > 0
    caveats = joined.join([together, *parts_of(two_grids)[1:]], "t").caveats
    assert "judged together, each figure of each at 97.50%" in caveats[0]
    assert not any("looked at" in caveat for caveat in caveats), "nobody looked twice"


def test_the_page_of_several_grids_tells_their_rows_apart(two_grids: list[Path]) -> None:
    whole = joined.join(parts_of(two_grids), "Both")
    keys = [configuration.key for configuration in whole.configurations]
    assert len(set(keys)) == len(keys) == 5
    techniques = whole.tables[0]
    assert techniques.headings[:2] == ("Technique", "Grid")
    assert [row[1].text for row in techniques.rows] == ["ranks"] * 2 + ["both"] * 3
    assert set(techniques.keys) == set(keys)
    assert len({chart.id for chart in whole.charts}) == len(whole.charts)
    assert [group.heading for group in whole.front.groups] == ["ranks: Adapters", "both: Adapters"]
    text = page.html(whole)
    assert all(f'data-key="{key}"' in text for key in keys)


def test_two_runs_of_a_grid_differ_by_the_names_of_their_folders(two_grids: list[Path]) -> None:
    for folder in two_grids:
        Store(folder).describe({"title": "Ranks"})
    whole = joined.join(parts_of(two_grids), "Both")
    names = [folder.name for folder in two_grids]
    assert all(sentence.startswith(f"Ranks ({name})") for sentence, name in zip(whole.summary, names, strict=False))


def test_each_grid_keeps_its_own_claims_and_its_memory(small: Small, two_grids: list[Path]) -> None:
    for folder, says, metric in zip(two_grids, ("rank 8 saves", "dropout is slower"), ("peak_memory_bytes",
                                    "tokens_per_second"), strict=True):  # fmt: skip
        claim = {"id": "mine", "says": says, "compare": {"lora_r": [4, 8]}, "metric": metric, "expect": "ratio < 1"}
        Store(folder).describe({"title": folder.name, "claims": [claim]})
    parts = parts_of(two_grids)
    whole = joined.join(parts, "Both")
    mine = [(v.claim.says, v.claim.section, v.source) for v in whole.verdicts if v.claim.id == "mine"]
    assert mine == [("rank 8 saves", "of ranks", "ranks"), ("dropout is slower", "of both", "both")]
    assert set(whole.front.memory) == {configuration.key for configuration in whole.configurations}
    assert whole.front.grid == "ranks"
    assert whole.front.cards[0].title == "Least memory (ranks)"


def report(*words: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_several_grids_are_reported_by_one_command(two_grids: list[Path], tmp_path: Path) -> None:
    result = report(*two_grids, "--title", "Both of them", "-o", tmp_path / "out", "--format", "md,csv")
    assert result.exit_code == 0, result.output
    assert {file.suffix for file in (tmp_path / "out").rglob("*.*")} == {".md", ".csv", ".json"}
    assert (tmp_path / "out/report.md").read_text().startswith("# Both of them\n")
    with (tmp_path / "out/comparisons.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["grid"], row["technique"]) for row in rows} == {
        ("ranks", "baseline"), ("ranks", "lora_r=8"),
        ("both", "baseline"), ("both", "lora_dropout=0.1"), ("both", "lora_r=8"),
    }  # fmt: skip
    with (tmp_path / "out/claims.csv").open() as file:
        assert {row["Grid"] for row in csv.DictReader(file)} >= {"", "both"}


def test_what_cannot_be_joined_is_refused_in_a_line(two_grids: list[Path], small: Small, tmp_path: Path) -> None:
    other = current("cpu").model_copy(update={"cpu_name": "another"})
    other_machine = tmp_path / "results" / "there"
    grid(small, other_machine, {"lora_r=8": {"lora_r": 8}}, environment=other)
    for words, complaint in (
        ((*two_grids, other_machine), "--across-environments"),
        ((two_grids[0], two_grids[0]), "two of the folders are named ranks"),
        ((two_grids[0], "--format", "pdf"), "--format names pdf; give some of html,md,csv,tex,svg,png"),
        ((two_grids[0], "--format", ","), "--format names nothing"),
        ((*two_grids, "--environment", "a", "--environment", "b", "--environment", "c"), "given 3 times for 2 folders"),
        ((two_grids[0], tmp_path / "results/none"), "no such folder"),
    ):
        result = report(*words, "-o", tmp_path / "out")
        assert isinstance(result.exception, InputError), "exit code 2"
        assert complaint in str(result.exception)
        assert not (tmp_path / "out").exists()
    joined_anyway = report(*two_grids, other_machine, "--across-environments", "-o", tmp_path / "out", "--format", "md")
    assert joined_anyway.exit_code == 0, joined_anyway.output
    text = (tmp_path / "out/report.md").read_text()
    assert "there was measured in another environment than ranks: cpu\\_name" in text or "another instead of" in text
    assert "![" not in text, "its pictures were not written"


def test_a_terminal_shows_the_answers_in_thirty_lines_and_everything_on_request(tmp_path: Path) -> None:
    folder = ROOT / "results/techniques"
    words = (folder, "--environment", "fb116a5f", "-o", tmp_path, "--format", "csv")
    short, full = (CliRunner().invoke(app, ["report", *map(str, (*words, *more))]) for more in ((), ("--full",)))
    lines = short.output.splitlines()
    assert len(lines) <= 30
    text = " ".join(short.output.split())
    for answer in ("Least memory: QLoRA", "Fastest: lora_target", "Lowest loss: lora_alpha=64", "Of 60 claims"):
        assert answer in text
    assert "DoRA" not in text
    assert len(full.output.splitlines()) > 60
    assert "DoRA" in full.output


def test_markdown_begins_with_the_first_screen_and_folds_long_tables() -> None:
    folder = ROOT / "results/techniques"
    whole = document.document(loading.load(folder, "fb116a5f"), folder)
    text = writers.markdown(whole)
    beginning = text[: text.index("## Techniques against the baseline")]
    assert beginning.index("plots/effects.svg") < beginning.index("| Least memory | QLoRA")
    assert "<details><summary>Techniques against the baseline: 23 rows</summary>\n\n| Technique |" in text
    assert text.count("<details>") == text.count("\n\n</details>") > 2
    short = replace(whole.tables[0], rows=whole.tables[0].rows[:5])
    assert "<details>" not in writers.markdown(replace(whole, tables=(short,), verdicts=()))
