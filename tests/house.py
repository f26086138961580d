"""The import graph of `harness`, measured: `python -m tests.house` prints it, `test_house.py` holds it.

Packages stand in the order of FLOORS: each imports only from those before it. Every import counts, lazy ones too.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "harness"
MOST_LINES = 450
MOST_TOP_MODULES = 6

FLOORS = (
    "_util",  # files, terminal, redaction, messages
    "errors", "metrics", "spec", "environment", "record",  # declarations, the modules beside the packages
    "sources",
    "dialects",
    "grids",
    "results",
    "training",
    "launch",
    "predict",
    "runner",
    "adapters",
    "watching",
    "analysis",
    "tuning",
    "report",
    "cli",
    "__main__",
)  # fmt: skip
"""Lowest first."""

ENTRY_POINTS = {"harness", "harness.__main__"}


@dataclass(frozen=True)
class Import:
    """One import of a harness module by another."""

    importer: str
    """Dotted name of the module, without `harness.`."""
    imported: str
    line: int

    @property
    def packages(self) -> tuple[str, str]:
        """The floors that it joins."""
        return floor_of(self.importer), floor_of(self.imported)

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules() -> dict[str, Path]:
    """Every module by its dotted name without `harness.`; the package itself is ''."""
    result = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        result[".".join(part for part in parts if part != "__init__")] = file
    return result


def floor_of(module: str) -> str:
    """The package of a module, or the module itself where it stands beside the packages."""
    return module.split(".")[0]


def imports(known: dict[str, Path]) -> list[Import]:
    """All imports among the modules, those within functions too."""
    result = []
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "harness":
                continue
            inner = (node.module or "").removeprefix("harness").removeprefix(".")
            for alias in node.names:
                full = f"{inner}.{alias.name}".removeprefix(".")
                result.append(Import(name, full if full in known else inner, node.lineno))
    return result


def upward(graph: list[Import]) -> list[Import]:
    """Imports of a package that stands later in FLOORS."""
    at = {name: number for number, name in enumerate(FLOORS)}
    return [each for each in graph if each.imported and at[each.packages[1]] > at[each.packages[0]]]


def circles(graph: list[tuple[str, str]]) -> set[str]:
    """Nodes that stand in a circle, or lead to one."""
    left: dict[str, set[str]] = {}
    for importer, imported in graph:
        left.setdefault(importer, set())
        left.setdefault(imported, set())
        if importer != imported:
            left[importer].add(imported)
    while ready := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in ready:
            del left[name]
    return set(left)


def main() -> None:
    """Print the measures."""
    known = modules()
    graph = imports(known)
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in known.items()}
    longest = max(lines, key=lambda name: lines[name])
    packages = [name for name in FLOORS if (PACKAGE / name).is_dir()]
    print(f"packages          {len(packages)}")
    print(f"modules           {len(known)}, of which {len(top_modules())} beside the packages")
    print(f"lines             {sum(lines.values()):,}")
    print(f"longest module    {longest}, {lines[longest]} lines of at most {MOST_LINES}")
    print(f"imports           {len(graph)}")
    print(f"upward imports    {len(upward(graph))}")
    print(f"circles, packages {len(circles([each.packages for each in graph]))}")
    print(f"circles, modules  {len(circles([(each.importer, each.imported) for each in graph]))}")
    print("\npackage      modules  lines  imports from")
    for name in packages:
        mine = [module for module in known if floor_of(module) == name]
        wanted = {each.packages[1] for each in graph if each.packages[0] == name} - {name, ""}
        below = ", ".join(floor for floor in FLOORS if floor in wanted)
        print(f"{name:<12} {len(mine):>7} {sum(lines[m] for m in mine):>6}  {below}")
    for each in upward(graph):
        print(f"upward: {each}")


def top_modules() -> list[str]:
    """Modules that stand beside the packages."""
    return [name for name in modules() if name and "." not in name and (PACKAGE / f"{name}.py").is_file()]


if __name__ == "__main__":
    main()
