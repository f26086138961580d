"""Rules of the house: who may import whom, where a value may be read, and which words are used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

from house import FLOORS, MOST_LINES, MOST_TOP_MODULES, PACKAGE, ROOT, circles, imports, modules, top_modules, upward

WITHOUT_TORCH = ("_util", "sources", "dialects", "grids", "results", "runner", "analysis", "tuning", "report", "cli")
"""Packages that never import torch: commands answer at once, and a report needs no GPU stack."""
WITH_TORCH = {
    "launch.cluster",  # Ray, an extra
    "launch.scheduler",  # submitit, an extra
    "launch.preload",  # what the fork server imports for its children
    "launch.quiet",  # and before that
}
"""Modules of `launch` outside the runner's process."""


def test_every_module_is_in_its_place() -> None:
    names = modules().keys() - {""}
    assert {name.split(".")[0] for name in names} == {*FLOORS}
    assert len(top_modules()) <= MOST_TOP_MODULES


def test_modules_are_short() -> None:
    long = {name: n for name, file in modules().items() if (n := len(file.read_text().splitlines())) > MOST_LINES}
    assert not long


def test_no_import_points_upward() -> None:
    assert not [str(each) for each in upward(imports(modules()))]


def test_no_circles() -> None:
    graph = imports(modules())
    assert not circles([each.packages for each in graph])
    assert not circles([(each.importer, each.imported) for each in graph])


def exports(package: str) -> set[str]:
    """Modules that a package lists for others."""
    tree = ast.parse((PACKAGE / package / "__init__.py").read_text())
    lists = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return set(ast.literal_eval(lists[0]))


def test_packages_are_entered_by_what_they_export() -> None:
    """Whatever another package imports is listed in `__all__`, and nothing private ever is."""
    listed = {package: exports(package) for package in FLOORS if (PACKAGE / package).is_dir()}
    for package, names in listed.items():
        assert {f"{package}.{name}" for name in names} <= modules().keys()
        assert not [name for name in names if name.startswith("_")]
    wrong = []
    for each in imports(modules()):
        importer, package = each.packages
        if (
            importer != package
            and package in listed
            and each.imported.removeprefix(f"{package}.") not in listed[package]
        ):
            wrong.append(str(each))
    assert not wrong


def test_private_names_stay_in_their_module() -> None:
    """What another module uses is public, and has a docstring for it."""
    wrong = [
        f"{name}:{node.lineno} {alias.name}"
        for name, file in modules().items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harness")
        for alias in node.names
        if alias.name.startswith("_") and alias.name not in (*FLOORS, "__version__")
    ]
    assert not wrong


def test_every_package_says_its_one_job() -> None:
    for name in FLOORS:
        if (PACKAGE / name).is_dir():
            doc = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
            assert doc, name
            assert len(doc.splitlines()[0]) > 20, name


def test_no_torch_in_the_runner() -> None:
    names = [
        name
        for name in modules()
        if name.split(".")[0] in (*WITHOUT_TORCH, "launch") and name not in WITH_TORCH
    ]  # fmt: skip
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(f'harness.{name}')\n"
        "    if 'torch' in sys.modules: sys.exit(f'harness.{name} imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_installed_package_has_every_file() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["harness"]
    files = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert files == {file for pattern in patterns for file in PACKAGE.glob(pattern)}


def test_lora_and_precision_are_read_where_models_are_built() -> None:
    pattern = re.compile(r"\.(lora_\w+|use_dora|use_rslora|precision|double_quantization)\b")
    readers = {name for name, file in modules().items() if pattern.search(file.read_text())}
    # What can be changed of a spec to make it fit is a list of such keys. Layers of peft have attributes of such names.
    of_training = {f"training.{name}" for name in ("model", "adapter_methods", "adapter_targets", "adapter_inputs")}
    of_training |= {"training.optimizers", "training.initialisations"}  # LoRA-FA scales by rank and alpha
    of_training |= {"training.lora_variants"}
    assert readers <= {
        "spec.trial",
        "spec.capabilities",
        "cli.methods",
        "predict.fixes",
        "predict.matching",
        *of_training,
    }


def test_yaml_is_read_with_a_safe_loader_only() -> None:
    for name, file in modules().items():
        for call in re.findall(r"yaml\.(?:unsafe_|full_)?load\w*\([^\n]*", file.read_text()):
            assert "_Loader" in call, f"{name}: {call}"


def test_words_of_the_text_are_about_the_project() -> None:
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("grids/*.yml")]
    for file in (*files, ROOT / "Makefile"):
        assert not re.search(r"/tmp/|/work/|/root/|TODO|FIXME", file.read_text()), file  # noqa: S108 - looked for


# ------------------------------------------------------------------------------------ one word for one thing

FORMER_WORDS = {
    "told", "heard", "hear", "hears", "said", "beside", "elsewhere", "found", "hollow", "faces", "versus",
    "withheld", "vigil", "workshop", "situation", "seat", "seats", "neighbour", "neighbours", "room", "rooms",
    "silent", "endings",
}  # fmt: skip
"""Words that gave way to the field's own (docs/architecture.md); no identifier has one as a part."""
FORMER_NAMES = {
    "share", "share_out", "let_go", "as_on", "at_work", "AT_WORK", "HERE", "Served", "served", "private",
    "tell", "silent_end",
}  # fmt: skip
"""The same of whole identifiers."""
OTHERS_WORK = {"neighbours", "predict_elsewhere"}
"""Benchmarks of processes that are not harness's (those of harness are concurrent trials), and of rows of others."""


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Names that a module defines, takes or assigns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):  # what is read may be a library's
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg
        elif isinstance(node, ast.alias) and node.asname is not None:
            yield node.asname


def words_of(identifier: str) -> set[str]:
    """`LiveTensors` → live, tensors; `peak_memory` → peak, memory."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}


def test_former_words_are_gone_from_identifiers() -> None:
    wrong = []
    files = [file for folder in ("harness", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    for file in files:
        names = {*identifiers(ast.parse(file.read_text())), *file.relative_to(ROOT).with_suffix("").parts} - OTHERS_WORK
        wrong += [
            f"{file.relative_to(ROOT)}: {name}"
            for name in sorted(names)
            if words_of(name) & FORMER_WORDS or name.strip("_") in FORMER_NAMES
        ]
    assert not wrong, "\n".join(wrong)
