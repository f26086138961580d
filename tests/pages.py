"""Generated parts of the pages: the tables of docs/lesson.md and the tree of docs/architecture.md.

`python -m tests.pages` writes them again, from harness/grids/lesson.yml, committed reports and the modules' docstrings.
"""

from __future__ import annotations

import ast
import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from harness._util.units import show_bytes
from harness.grids.claims import Claim, Contrast, lesson

sys.path.insert(0, str(Path(__file__).parent))  # run as a script, as pytest does for its modules
from house import FLOORS, PACKAGE, ROOT, modules


def level(value: Any, key: str) -> str:
    """A level of a condition in words."""
    if isinstance(value, tuple | list):
        return " or ".join(level(one, key) for one in value)
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "on" if value else "off"
    if key == "memory_budget":
        return show_bytes(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def condition(contrast: Contrast) -> str:
    """Which trials are compared or looked at."""
    compared = [f"`{key}` {level(a, key)} → {level(b, key)}" for key, (a, b) in contrast.compare.items()]
    common = [f"`{key}` {level(value, key)}" for key, value in contrast.where.items()]
    text = ", ".join(compared)
    if contrast.hold:
        text += f" at equal {' and '.join(f'`{key}`' for key in contrast.hold)}"
    elif contrast.free:
        text += " *"
    return "; ".join(part for part in (text, ", ".join(common)) if part)


def figure(claim: Claim) -> str:
    """What is measured."""
    return f"`{claim.metric}`" + (f" ÷ `{claim.per}`" if claim.per else "")


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    names = list(headings)
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def tables() -> Iterator[str]:
    """The lesson's tables: each row's condition and the lesson's words."""
    for each in lesson().tables:
        yield from (f"### {each.title}", "")
        rows = ((row.name, condition(row), row.memory or "–", row.speed or "–", row.loss or "–") for row in each.rows)
        yield from table(("Technique", "Compared", "Memory", "Speed", "Loss"), rows)
        yield ""


def claims() -> Iterator[str]:
    """The claims by section: figure, condition, expectation, and what the committed reports say."""
    every, measured = lesson().claims, verdicts()
    for section in dict.fromkeys(claim.section for claim in every):
        yield from (f"### {section}", "")
        rows = (
            (f"`{c.id}`", c.says, figure(c), condition(c), c.expect, measured[c.id])
            for c in every
            if c.section == section
        )
        yield from table(("Id", "Claim", "Figure", "Condition", "Expected", "Measured"), rows)
        yield ""


REPORT = ROOT / "reports/lesson"
"""The committed report that judges the lesson, of several grids."""


def verdicts() -> dict[str, str]:
    """By claim, its verdict in the committed report, the size, the grid that measured it, and why: one sentence of
    docs/lesson-why.yml.
    """
    why = yaml.safe_load((ROOT / "docs/lesson-why.yml").read_text(encoding="utf-8"))
    ids = {claim.says: claim.id for claim in lesson().claims}
    by_claim = {}
    with (REPORT / "claims.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if (claim := ids.get(row["Claim"])) is None:
                continue  # of one grid, not of the lesson
            size, grid = row["Measured"].removeprefix("'"), row["Grid"].split(";")[0]
            measured = f"**{row['Verdict']}**: {size} ({grid})" if grid else f"{row['Verdict']}"
            by_claim[claim] = f"{measured}. {why[claim]}"
    return by_claim


def tree() -> Iterator[str]:
    """Packages and modules, the highest floor first, each with the first sentence of its docstring."""
    yield from ("```text", "harness/")
    names = modules().keys()
    for floor in reversed(FLOORS):
        package = (PACKAGE / floor).is_dir()
        yield f"  {floor + ('/' if package else '.py'):<26}{phrase(floor)}"
        for name in sorted(each for each in names if each.startswith(f"{floor}.")):
            yield f"    {name.removeprefix(f'{floor}.') + '.py':<24}{phrase(name)}"
    yield "```"


MOST_CHARACTERS = 90


def phrase(module: str) -> str:
    """The first sentence of a module's docstring, cut where it is long."""
    doc = ast.get_docstring(ast.parse(modules()[module].read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"\.(?:\s|$)", " ".join(doc.split("\n\n")[0].split()), maxsplit=1)[0]
    for separators in ("[:;]", ","):
        while len(sentence) > MOST_CHARACTERS and (shorter := re.match(rf"(.+){separators} ", sentence)):
            sentence = shorter[1]
    return sentence


GENERATED: dict[str, dict[str, Callable[[], Iterator[str]]]] = {
    "docs/lesson.md": {"lesson: tables": tables, "lesson: claims": claims},
    "docs/architecture.md": {"tree": tree},
}
"""By page, the parts between `<!-- name -->` and `<!-- end -->`."""


def filled(name: str) -> str:
    """A page with its generated parts as they ought to be."""
    page = (ROOT / name).read_text(encoding="utf-8")
    for marker, lines in GENERATED[name].items():
        before, _, rest = page.partition(f"<!-- {marker} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}<!-- {marker} -->\n\n" + "\n".join(lines()) + f"\n{end}{after}"
    return page


if __name__ == "__main__":
    for each in GENERATED:
        (ROOT / each).write_text(filled(each), encoding="utf-8")
