"""Rules of the house: who may import whom, and where a value may be read."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "harness"

# Imports point downward: a module may import those of lower floors, and of its own where noted.
FLOORS: dict[str, int] = {
    "cli": 6, "display": 6, "doctor": 6, "cleaning": 6, "__main__": 7, "until_decided": 5, "tune": 5, "largest": 5,
    "launch": 5, "launch.local": 5, "launch.planner": 5, "launch.preload": 5, "launch.isolated": 5,
    "launch.merging": 5, "launch.serving": 5, "launch.leases": 5, "launch.attempt": 5, "launch.logs": 5,
    "launch.cluster": 5, "launch.inline": 5, "launch.endings": 5, "report": 5, "report.measurements": 5,
    "report.words": 5, "report.tables": 5, "report.verdicts": 5, "report.plots": 5, "report.document": 5,
    "report.faces": 5, "report.recommend": 5, "report.versus": 5, "report.found": 5, "report.tuning": 5,
    "report.tuning_plots": 5, "report.planned": 5, "report.served": 5, "worker": 4, "ranks": 4, "trial": 4, "plan": 4,
    "merge": 4, "inference": 4, "training": 3, "evaluate_model": 3, "target": 3, "replay": 3, "hollow": 3,
    "calibration": 3, "model": 2, "data": 2, "distributed": 2, "memory": 2, "flops": 1, "half_matmul": 2,
    "card_watch": 1, "rates": 2, "story_metrics": 1, "grid": 2, "search": 2, "claims": 2, "results": 2, "stats": 2,
    "prediction": 2, "roofline": 2, "cards": 2, "model_source": 1, "stories": 1, "spec": 1, "metrics": 1,
    "environment": 1, "wording": 1, "errors": 0, "files": 0, "private": 0, "terminal": 0, "": 0,
}  # fmt: skip
WITHOUT_TORCH = ("cli", "display", "doctor", "grid", "launch", "launch.local", "launch.planner", "launch.isolated",
                 "launch.merging", "launch.serving", "launch.leases", "launch.attempt", "launch.inline", "launch.logs",
                 "launch.endings", "cleaning", "report.served", "results", "stats",
                 "claims", "until_decided", "search", "tune", "calibration", "largest", "cards", "prediction",
                 "roofline", "report.planned", "report.tuning", "report.tuning_plots", "report.found",
                 "report", "report.document", "report.faces", "report.recommend", "report.versus",
                 "model_source", "stories")  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = file
    return found


def imports(file: Path) -> set[str]:
    """Names of harness modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "harness":
            inner = (node.module or "").removeprefix("harness").removeprefix(".")
            names = {f"{inner}.{a.name}".removeprefix(".") for a in node.names}
            found |= {name if name in FLOORS else inner for name in names}
    return found


def test_every_module_has_a_floor() -> None:
    assert modules().keys() == FLOORS.keys()


def test_imports_point_downward() -> None:
    graph = {name: imports(file) for name, file in modules().items()}
    wrong = [(a, b) for a, wanted in graph.items() for b in wanted if FLOORS[b] > FLOORS[a]]
    assert not wrong


def test_no_circles() -> None:
    graph = {name: imports(file) - {name} for name, file in modules().items()}
    left = dict(graph)
    while True:
        ready = [name for name, wanted in left.items() if not wanted & left.keys()]
        if not ready:
            break
        for name in ready:
            del left[name]
    # The worker is imported by name when a child starts, never by the runner.
    assert not left, f"a circle among {sorted(left)}"


def test_no_torch_in_the_runner() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_TORCH}:\n"
        "    importlib.import_module(f'harness.{name}')\n"
        "    if 'torch' in sys.modules: sys.exit(f'harness.{name} imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lora_and_precision_are_read_in_one_module() -> None:
    pattern = re.compile(r"\.(lora_\w+|use_dora|use_rslora|precision|double_quantization)\b")
    readers = {name for name, file in modules().items() if pattern.search(file.read_text())}
    assert readers <= {"spec", "model"}


def test_yaml_is_read_with_a_safe_loader_only() -> None:
    for name, file in modules().items():
        for call in re.findall(r"yaml\.(?:unsafe_|full_)?load\w*\([^\n]*", file.read_text()):
            assert "_Loader" in call, f"{name}: {call}"


def test_words_of_the_text_are_about_the_project() -> None:
    root = PACKAGE.parent
    files = [*PACKAGE.rglob("*.py"), *root.glob("*.md"), *root.glob("grids/*.yml"), root / "Makefile"]
    for file in files:
        assert not re.search(r"/tmp/|/work/|/root/|TODO|FIXME", file.read_text()), file  # noqa: S108 - looked for
