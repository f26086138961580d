"""The pages stay true: figures are predicted again, links lead somewhere, commands, options and names exist."""

from __future__ import annotations

import functools
import importlib
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pandas
import pytest
import typer
import yaml
from house import modules
from pages import GENERATED, filled, phrase

from harness._util.units import GIB, parse_bytes, show_scientific
from harness.cli import app
from harness.environment import DeviceType
from harness.grids import grid, imported, search_file
from harness.grids.claims import lesson
from harness.metrics import COMPONENTS
from harness.predict import cards, peak
from harness.predict.prediction import MARGIN, Prediction, fits
from harness.record import Phase
from harness.spec.trial import TrialSpec
from harness.training import inspection

ROOT = Path(__file__).parent.parent
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
         for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}  # fmt: skip
MEMORY = PAGES["docs/memory.md"]


def fenced(kind: str, page: str) -> list[str]:
    """Bodies of the page's code blocks of this kind."""
    return re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)


def spans(page: str) -> list[str]:
    """What stands between backticks in the page's sentences and tables."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


# ------------------------------------------------------------------------------------ figures of docs/memory.md

UNITS = {"MiB": 2**20, "GiB": GIB}

AGAIN = {
    "grids/techniques.yml": ("baseline", "full fine-tuning, 8-bit AdamW"),
    "grids/llama3-8b.yml": ("baseline", "full fine-tuning, AdamW"),
    "grids/several-cards.yml": ("over 8, LoRA",),
    "surprises.yml": ("lora_dropout=0",),
}
"""Rows that are predicted again, wherever they stand."""


@dataclass(frozen=True)
class Table:
    """Predictions as they are shown."""

    file: str
    device: str
    """`cpu`, `cuda`; `each`: the headings say."""
    size: int
    """Bytes of the unit."""
    rows: tuple[dict[str, str], ...]
    """By heading."""


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables(kind: str) -> Iterator[tuple[list[str], list[dict[str, str]]]]:
    """What a marker says, and the rows of the table that it stands before."""
    for marker, body in re.findall(rf"<!-- {kind}:?(.*?) -->\n(.*?)<!-- end -->", MEMORY, re.DOTALL):
        heading, _, *lines = body.strip().splitlines()
        names = cells(heading)
        yield marker.split(), [dict(zip(names, cells(line), strict=True)) for line in lines]


TABLES = [Table(file, device, UNITS[unit], tuple(rows)) for (file, device, unit), rows in tables("plan")]


@functools.cache
def written(kind: str) -> str:
    """The YAML of the page that has this key."""
    (text,) = (text for text in fenced("yaml", MEMORY) if kind in text)
    return text


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, TrialSpec]]:
    """The trials of each grid that the page names, by their names."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "surprises.yml").write_text(written("name: surprises"))
    files = [folder / name if name == "surprises.yml" else ROOT / name for name in AGAIN]
    return {
        name: {trial.label: trial.spec for trial in grid.load(file).trials if not (trial.twin or trial.repeat)}
        for name, file in zip(AGAIN, files, strict=True)
    }


@functools.cache
def predicted(spec: TrialSpec, device: DeviceType) -> Prediction:
    return peak.predict(spec, device)


def expected(heading: str, spec: TrialSpec, table: Table) -> str | None:
    """What stands under a heading; null: it is not known from a prediction."""
    on = re.search(r"--device (\w+)", heading)
    device: DeviceType = "cpu" if (on.group(1) if on else table.device) == "cpu" else "cuda"
    prediction = predicted(spec, device)
    phase = heading.removesuffix(" step")
    if heading == "reserved":
        return f"{prediction.needed_bytes / table.size:.2f}"
    if heading == "peak" or on:
        return f"{prediction.peak_memory_bytes / table.size:.2f}"
    if heading in COMPONENTS:
        return f"{prediction.breakdown[f'memory_{heading}_bytes'] / table.size:.2f}"
    if heading == "in":
        return max(prediction.phases, key=prediction.phases.__getitem__)
    if heading == "FLOP/step":
        return show_scientific(prediction.flops)
    if phase in get_args(Phase):
        return f"{prediction.phases[phase] / table.size:.2f}"  # type: ignore[index]  # it is one
    if heading in CAPACITIES:
        capacity = CAPACITIES[heading]
        verdict = fits(prediction, capacity, MARGIN[device])
        return f"{verdict} ({prediction.needed_bytes / capacity:.0%})"
    assert heading in ("trial", "largest on rtx4090")
    return None


CAPACITIES = {"24GiB": parse_bytes("24GiB"), "rtx4090": cards.capacity("rtx4090"), "l4": cards.capacity("l4")}


@pytest.mark.long
@pytest.mark.parametrize("file", AGAIN)
def test_figures_are_predicted_again(file: str, specs: dict[str, dict[str, TrialSpec]]) -> None:
    seen = set()
    for table in TABLES:
        for row in table.rows:
            if table.file != file or row["trial"] not in AGAIN[file]:
                continue
            seen.add(row["trial"])
            for heading, shown in row.items():
                if table.device == "each" and "--device cpu" in heading:
                    continue  # a second prediction of the same row: time is short
                wanted = expected(heading, specs[file][row["trial"]], table)
                assert wanted in (shown, None), (row["trial"], heading)
    assert seen == set(AGAIN[file])


def test_every_row_is_one_of_its_grid_and_agrees_with_itself(specs: dict[str, dict[str, TrialSpec]]) -> None:
    assert {table.file for table in TABLES} == set(AGAIN)
    peaks: dict[tuple[str, str], str] = {}
    for table in TABLES:
        for row in table.rows:
            label = row["trial"]
            assert label in specs[table.file]
            if "peak" in row:
                assert peaks.setdefault((table.file, label), row["peak"]) == row["peak"], label
            if "weights" in row:
                together = sum(float(row[name]) for name in COMPONENTS)
                assert together == pytest.approx(float(row["peak"]), abs=0.031), label
            if "forward" in row:
                highest = max(row.values(), key=lambda cell: float(cell) if cell != label else 0.0)
                assert highest == peaks[table.file, label]
            for name in CAPACITIES.keys() & row.keys():
                used = float(row["reserved"]) * table.size / CAPACITIES[name]
                shown = float(row[name].partition("(")[2].removesuffix("%)")) / 100
                assert shown == pytest.approx(used, abs=0.011), (label, name)


@pytest.mark.parametrize(
    ("page", "sentence", "report", "shown"),
    [
        ("memory", "0.69 (0.62 to 0.77)", "techniques", "| gradient_checkpointing=true | .* ×0.69 (0.62–0.77) slower"),
        ("search", "(−0.012 nats, −0.061 to +0.038)", "tune", "eval loss −0.012 (−0.061 to +0.038) not"),
        ("search", "better by more than 0.13 nats", "tune", "better in eval loss by more than 0.13 nats"),
        ("grids", "0.25 nats more than LoRA (0.17 to 0.33)", "forgetting", "| −0.250 (−0.326 to −0.173) | 64 passages"),
    ],
)
def test_sentences_have_the_figures_of_the_reports(page: str, sentence: str, report: str, shown: str) -> None:
    assert sentence in " ".join(PAGES[f"docs/{page}.md"].split())
    pattern = re.escape(shown).replace(re.escape(".*"), ".*")
    assert re.search(pattern, (ROOT / f"reports/{report}/report.md").read_text(encoding="utf-8"))


def test_memory_outside_of_training_is_that_of_the_rows() -> None:
    rows = pandas.read_parquet(ROOT / "results/techniques/trials")
    baseline = rows[(rows["label"] == "baseline") & (rows["environment_id"] == "fb116a5f")]
    evaluating = baseline["peak_evaluate_bytes"].max() / UNITS["MiB"]
    process = [f"{baseline['peak_process_bytes'].agg(end) / GIB:.2f}" for end in ("min", "max")]
    assert f"{evaluating:.2f} MiB while evaluating" in " ".join(MEMORY.split())
    assert f"{' to '.join(process)} GiB of process" in " ".join(MEMORY.split())


def test_the_sum_adds_up() -> None:
    ((_, rows),) = tables("sum")
    *parts, total = ((row["Arithmetic"], int(row["Bytes"].replace(",", ""))) for row in rows)
    for arithmetic, size in parts:
        assert math.prod(float(factor) for factor in arithmetic.replace(",", "").split("×")) == size, arithmetic
    assert sum(size for _, size in parts) == total[1]


# ------------------------------------------------------------------------------------ links, commands, options, files


def anchors(page: str) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def commands(page: str) -> list[str]:
    """Commands in the page's console blocks and in its sentences."""
    lines = [line for block in fenced("console", page) for line in block.splitlines()]
    typed = [match[1].split(" #")[0].strip() for line in lines if (match := re.match(r"\S*\$ (.*)", line))]
    return [*typed, *spans(page)]


def commands_of(program: str) -> list[str]:
    """Arguments of a program's commands on all pages, each once."""
    lines = [line for page in PAGES.values() for line in commands(page)]
    return [*dict.fromkeys(line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} "))]


@functools.cache
def known() -> dict[str, Any]:
    """The commands that there are."""
    group: Any = typer.main.get_command(app.app)
    return dict(group.commands)


@pytest.mark.parametrize("line", commands_of("harness"))
def test_commands_are_accepted(line: str) -> None:
    name, *arguments = shlex.split(line)
    if line in ("--help", "--version"):
        return
    if arguments:
        known()[name].make_context(name, arguments)
    assert name in known()


@pytest.mark.parametrize("line", commands_of("make"))
def test_make_has_the_target(line: str) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    (target,) = (word for word in shlex.split(line) if "=" not in word)
    assert target in targets


def test_scripts_exist() -> None:
    files = [word for line in commands_of("python") for word in line.split() if word.endswith(".py")]
    named = [line.removeprefix("-m ").split()[0] for line in commands_of("python") if line.startswith("-m tests.")]
    assert files
    assert named
    for file in (*files, *(f"{module.replace('.', '/')}.py" for module in named)):
        assert (ROOT / file).is_file(), file


def test_options_exist() -> None:
    options = {
        option for command in known().values() for p in command.params for option in (*p.opts, *p.secondary_opts)
    }
    named = {
        match[0] for page in PAGES.values() for span in spans(page) if (match := re.match(r"--?[a-z][a-z-]*", span))
    }
    assert {"--largest", "--gpu", "-o", "--retries", "--storage"} <= named <= options | {"--help"}


@pytest.mark.parametrize("text", fenced("yaml", PAGES["docs/grids.md"])[:1])
def test_the_grid_of_the_page_is_valid(text: str, tmp_path: Path) -> None:
    claims = next(each for each in fenced("yaml", PAGES["docs/grids.md"]) if each.startswith("claims:"))
    (tmp_path / "mine.yml").write_text(text + claims)
    loaded = grid.load(tmp_path / "mine.yml")
    assert loaded.name == "mine"
    assert len(loaded.trials) == 10, "eight trials, the baseline and the baseline again"
    assert loaded.claims


def test_the_methods_of_the_page_can_be_trained(tmp_path: Path) -> None:
    methods = next(each for each in fenced("yaml", PAGES["docs/grids.md"]) if "LoHa" in each)
    (tmp_path / "mine.yml").write_text("base: {base_model: random:tiny, val_set_size: 0}\n" + methods)
    trials = grid.load(tmp_path / "mine.yml").trials
    assert {trial.spec.adapter for trial in trials} == {"lora", "loha", "oft", "prompt_tuning"}
    inspection.inspect((trial.label, trial.spec) for trial in trials)


def test_the_search_of_the_page_is_valid(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text(fenced("yaml", PAGES["docs/search.md"])[0])
    search = search_file.load(tmp_path / "mine.yml")
    assert search.place(search.base), "the base is a point of its space"


def test_training_files_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "padded.yml").write_text(written("smollm2-135m"))
    assert len(grid.load(tmp_path / "padded.yml").trials) >= 1


# ------------------------------------------------------------------------------------ the lesson


def test_the_lesson_page_has_every_claim_and_section() -> None:
    page = PAGES["docs/lesson.md"]
    sources = page[page.index("| Section, as cited") : page.index("<!-- lesson: claims -->")]
    for claim in lesson().claims:
        assert f"| `{claim.id}` |" in page
        assert claim.section in sources
    assert f"{len(lesson().claims)} claims" in PAGES["README.md"]


@pytest.mark.parametrize("name", [name for name in PAGES if name != "docs/lesson.md"])
def test_the_lesson_is_introduced_before_it_is_named(name: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[name], flags=re.DOTALL)
    first = re.search(r"\blesson\b(?!\.\w)", text, re.IGNORECASE)
    assert first is None or re.match(r"lesson('s)?\]\([^)]*lesson\.md\)", text[first.start() :], re.IGNORECASE)


# ------------------------------------------------------------------------------------ the map


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_those_of_the_code(name: str) -> None:
    """`python -m tests.pages` writes them again."""
    assert PAGES[name] == filled(name)


def test_the_tree_has_every_module_with_a_phrase() -> None:
    page = PAGES["docs/architecture.md"]
    for module in modules().keys() - {""}:
        *_, name = module.split(".")
        assert re.search(rf"^ +{name}(/|\.py) +\S", page, re.MULTILINE), module
        assert len(phrase(module)) > 10, module


def names() -> list[str]:
    """Dotted names and paths between backticks in CONTRIBUTING and the architecture page."""
    named = [span for page in ("CONTRIBUTING.md", "docs/architecture.md") for span in spans(PAGES[page])]
    return [*dict.fromkeys(span.removesuffix("()") for span in named)]


LIBRARIES = (
    "concurrent",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "optuna",
    "multiprocessing",
    "tqdm",
    "yaml",
    "ray",
)


def resolve(name: str) -> Any:
    """The object of a dotted name; null where no module is called so."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[length:], value)
    return None


@pytest.mark.parametrize(
    "name", [n for n in names() if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", n) and "/" not in n]
)
def test_names_exist(name: str) -> None:
    top = name.split(".")[0]
    if top in LIBRARIES:
        assert resolve(name) is not None
    elif name.split(".")[-1] in ("py", "yml", "toml", "md", "txt", "csv"):
        assert (ROOT / name).is_file()
    else:
        assert top in {module.split(".")[0] for module in modules()}, "a module of harness, without `harness.`"
        assert resolve(f"harness.{name}") is not None


@pytest.mark.parametrize("path", [n for n in names() if re.fullmatch(r"[\w.-]+(/[\w.-]*)+", n)])
def test_paths_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_module_with_a_patch_stands_in_the_table() -> None:
    page = PAGES["docs/architecture.md"]
    rows = [cells(line) for line in page[page.index("## Patches") :].splitlines() if line.startswith("|")]
    listed = {module for row in rows for module in re.findall(r"`([^`]+)`", row[2])}
    patches = re.compile(
        r"mock\.patch|torch\.(_\w|utils\._|library)|\._(internal|subclasses)|[Pp]rivate (API|attr)|ndocumented"
    )
    used = {name for name, file in modules().items() if patches.search(file.read_text(encoding="utf-8"))}
    assert used <= listed


# ------------------------------------------------------------------------------------ files that other tools read


def test_files_of_the_repository_are_valid() -> None:
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) >= 4
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    for text in texts.values():
        assert isinstance(yaml.safe_load(text), dict)
    for target in ("make check", "make test"):
        assert target in texts["ci.yml"]
    assert "secrets." not in texts["ci.yml"]


def test_training_files_in_the_docs_become_what_stands_below_them(tmp_path: Path) -> None:
    pairs = re.findall(
        r"`([\w.-]+)`:\n\n```yaml\n(.*?)```\n\nbecomes\n\n```yaml\n(.*?)```",
        (ROOT / "docs/files.md").read_text(),
        re.DOTALL,
    )
    assert len(pairs) == 4
    for name, text, expected in pairs:
        file = tmp_path / name
        file.write_text(text)
        assert imported.grid_file(imported.read(file), file, tmp_path) == expected
