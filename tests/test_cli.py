"""The commands as people run them: the real program. In a process of its own where it starts others or must be quick;
else in this one, through its own entry point: starting 30 would take as long as all that they do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from conftest import Answer
from malformed import FILES, MALFORMED

from harness.grids import grid

ROOT = Path(__file__).parent.parent
SHORT = ROOT / "results/short"
Ask = Callable[..., Answer]
TINY = """
name: tiny
visits: 0
base: {base_model: random:tiny, precision: fp32, sequence_length: 256, train_samples: 8, val_set_size: 2, lora_r: 4}
vary:
  lora_r: [8]
  technique:
    full | fine-tuning <b>: {adapter: none}
"""


def harness(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_help_is_quick_since_it_imports_nothing_large(tmp_path: Path) -> None:
    """How quick: `benchmarks/startup.py`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "harness", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0
    assert "harness run grids/smoke.yml" in " ".join(done.stdout.split())
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "harness.cli.app" in imported
    assert not imported & {"torch", "transformers", "numpy", "pandas", "pyarrow", "scipy", "altair", "optuna", "yaml"}


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "plan",
        "tune",
        "report",
        "recommend",
        "compare",
        "ls",
        "show",
        "keys",
        "doctor",
        "merge",
        "evaluate",
        "generate",
    ],
)
def test_every_command_explains_itself(ask: Ask, command: str) -> None:
    code, output, _ = ask(command, "--help")
    assert code == 0
    assert f"harness {command}" in output


def test_run_report_ls_show_and_run_again(tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "tiny.yml").write_text(TINY)
    code, output, _ = ask("run", "tiny.yml", "--dry-run")
    assert code == 0
    assert "lora_r=8" in output
    assert not (tmp_path / "results").exists()

    first = harness("run", "tiny.yml", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "4 trials ended (4 ok)" in first.stdout
    trials = pandas.read_parquet(tmp_path / "results/tiny/trials")
    assert sorted(trials["label"]) == ["baseline", "baseline again", "full | fine-tuning <b>", "lora_r=8"]
    assert (trials["status"] == "ok").all()
    assert trials["eval_loss"].isna().all(), "a loss of random weights means nothing"
    assert len(pandas.read_parquet(tmp_path / "results/tiny/steps")) == 32

    code, output, _ = ask("run", "tiny.yml")
    assert code == 0
    assert "nothing to run" in output
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "results/tiny/trials"), trials)

    assert ask("report", "results/tiny")[0] == 0
    text = (tmp_path / "reports/tiny/report.md").read_text()
    memory = trials.set_index("label")["peak_memory_bytes"]
    ratio = memory["lora_r=8"] / memory["baseline"]
    row = next(line for line in text.splitlines() if "lora_r=8" in line)
    assert f"{ratio:.2f}" in row
    assert "full \\| fine-tuning &lt;b>" in text, "a label cannot break the table or become markup"

    listed = ask("ls")[1]
    assert "tiny" in listed
    assert "4 ok" in listed
    shown = ask("show", "lora_r=8")[1]
    assert "lora_r: 8" in shown
    assert "peak_memory_bytes" in shown
    assert "lora_r: 8" in ask("show", "lora_r=8", "--results", "results/tiny")[1], "one grid of several"
    assert "lora_r=8" in ask("ls", "tiny", "--results", "results/tiny")[1]


def test_a_label_of_many_trials_is_a_list(ask: Ask) -> None:
    shown = ask("show", "baseline", "--results", str(ROOT / "results"))[1]
    assert "give the beginning of an id, or --results results/<grid>" in " ".join(shown.split())
    assert len(shown.splitlines()) < 100
    assert "optimizer:" not in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "nowhere.yml"), "no such file"),
        (("run", "tiny.yml", "--memory", "lots"), "--memory: 'lots' is not a size; write it like 24GiB"),
        (("report", str(SHORT), "--output", "tiny.yml"), "--output tiny.yml is a file; name a folder"),
        (("recommend", str(SHORT), "--output", "."), "--output . is a folder; name a file"),
        (
            ("compare", str(ROOT / "results/short"), str(ROOT / "results/short"), "-o", "tiny.yml/x"),
            "tiny.yml is a file",
        ),
        (
            ("export", str(ROOT / "results/biases"), "--to", "mlflow", "--place", "no://where"),
            "--to mlflow --place no:",
        ),
        (("run", "tiny.yml", "--device", "gpu"), "cuda"),
        (("run", "tiny.yml", "--device", "cuda"), "no card"),
        (("run", "tiny.yml", "--rerun", "broken"), "failed"),
        (("run", "tiny.yml", "--engine", "rey"), "use local, ray, submitit, inline"),
        (("run", "tiny.yml", "--cpus", "2"), "--cpus goes with --engine ray"),
        (("run", "tiny.yml", "--workers", "many"), "give 1, 2, … or auto"),
        (("run", "tiny.yml", "--workers", "9999"), "9999 workers, and"),
        (("report", "results/none"), "no such folder"),
        (("ls", "none"), "no grid"),
        (("show", "none"), "no trial"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    tmp_path: Path, ask: Ask, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "tiny.yml").write_text(TINY)
    code, _, errors = ask(*arguments)
    assert code == 2
    assert errors.startswith("harness: ")
    assert len(errors.splitlines()) == 1
    assert says in errors
    assert not (tmp_path / "results").exists()


def test_a_dry_run_says_what_a_run_would_stop_at(tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "g.yml").write_text(
        "base: {base_model: random:tiny, datasets: [{path: nowhere.jsonl}]}\nvary: {lora_r: [4]}\n"
    )
    code, printed, errors = ask("run", "g.yml", "--dry-run")
    assert (code, "3 trials, 3 to run" in printed) == (0, True)
    assert errors.startswith("a run here would stop: dataset nowhere.jsonl: no such file")
    (tmp_path / "g.yml").write_text("base: {base_model: random:tiny}\nvary: {lora_target_modules: [[query]]}\n")
    code, printed, errors = ask("run", "g.yml", "--dry-run", "--json")
    assert (code, errors.count("3 trials, 3 to run")) == (0, 1)
    assert "LlamaForCausalLM has no module query" in json.loads(printed)["stops_at"]
    (tmp_path / "g.yml").write_text(
        "base: {base_model: random:tiny, sequence_length: 200, val_set_size: 0}\nvary: {lora_r: [4]}\n"
    )
    code, printed, errors = ask("run", "g.yml", "--dry-run")
    assert (code, errors) == (0, "")
    assert "cut to 200 tokens" in printed, "what a run says of its data is said beforehand"


def test_a_level_that_is_the_baseline_is_named(tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "g.yml").write_text("base: {base_model: random:tiny, lora_r: 16}\nvary: {lora_r: [4, 16]}\n")
    code, printed, _ = ask("run", "g.yml", "--dry-run")
    assert (code, "3 trials, 3 to run" in printed) == (0, True)
    assert "lora_r=16 is the same configuration as baseline, which runs for both" in printed


def test_two_runs_are_compared_within_80_columns(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, printed, _ = ask("compare", str(SHORT), str(SHORT))
    assert "629.60 MiB" in printed
    assert "second against first" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_malformed_grids_are_one_line_exit_two_and_start_nothing(tmp_path: Path) -> None:
    """One process looks at all of them through the command's own entry point: starting 40 would take a minute."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, (text, _) in MALFORMED.items():
        (tmp_path / f"{name}.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    script = (
        "import sys, subprocess, multiprocessing.process, multiprocessing.forkserver\n"
        "from harness.cli import app\n"
        "def refuse(*a, **k): raise SystemError('a process was started')\n"
        "subprocess.Popen.__init__ = refuse\n"
        "multiprocessing.process.BaseProcess.start = refuse\n"
        "multiprocessing.forkserver.ensure_running = refuse\n"
        "for name in sys.argv[1:]:\n"
        "    sys.argv = ['harness', 'run', name]\n"
        "    print('==', name, file=sys.stderr, flush=True)\n"
        "    try:\n"
        "        app.main()\n"
        "        code = 0\n"
        "    except SystemExit as leave:\n"
        "        code = leave.code\n"
        "    print(name, code, 'torch' in sys.modules, flush=True)\n"
    )
    names = [f"{name}.yml" for name in MALFORMED]
    assert len(names) >= 30
    done = subprocess.run(
        [sys.executable, "-c", script, *names],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == [f"{name} 2 False" for name in names]
    output = done.stderr.split("== ")[1:]
    for block in output:
        name, *lines = block.strip().splitlines()
        assert len(lines) == 1, block
        assert lines[0].startswith("harness: "), block
    assert len(output) == len(names)


def test_doctor_names_what_is_missing(tmp_path: Path) -> None:
    done = harness("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    for what in ("device", "torch", "bitsandbytes", "smollm2-135m-instruct"):
        assert what in done.stdout


def test_training_file_of_the_lesson_runs_as_a_grid_up_to_its_hub_model(ask: Ask) -> None:
    code, output, errors = ask("run", str(ROOT / "tests/lesson/advanced_train2.yml"), "--dry-run")
    assert code == 0, errors
    assert "1 trial," in output


def test_the_shipped_grids_are_whole(tmp_path: Path) -> None:
    trials = {"short": 12, "techniques": 22, "smoke": 8, "llama3-8b": 22}
    for name, least in trials.items():
        loaded = grid.load(ROOT / "grids" / f"{name}.yml")
        assert len(loaded.trials) >= least, name
        assert sum(t.baseline and not t.repeat for t in loaded.trials) == 1
    precisions = {t.spec.precision for t in grid.load(ROOT / "grids/short.yml").trials}
    assert precisions >= {"fp32", "bf16", "int8", "nf4"}


TUNE = """
name: search
base: {base_model: random:tiny, precision: fp32, sequence_length: 256, train_samples: 6, val_set_size: 2, lora_r: 4}
tune:
  space: {lora_r: [4, 8, 16], gradient_checkpointing: [false, true]}
  objectives: [tokens_per_second, peak_memory_bytes]
  constraints: ["peak_memory_bytes <= 1GiB"]
  trials: 3
  confirm: 1
visits: 1
visit_seconds: 0.05
"""


@pytest.mark.long
def test_tune_export_run_and_report(tmp_path: Path, ask: Ask, quiet: Any) -> None:
    (tmp_path / "search.yml").write_text(TUNE)
    code, _, errors = ask("run", "search.yml")
    assert code == 2
    assert "run it with harness tune" in errors

    code, output, errors = ask("tune", "search.yml", "--export", "best.yml")
    assert code == 0, errors
    assert "3 trials in study search-" in output
    assert "Against the baseline" in output or "Take baseline" in output
    rows = pandas.read_parquet(tmp_path / "results/search/trials")
    assert (rows["status"] == "ok").all()
    assert set(rows["repeat"]) == {0, 1}
    assert (rows["memory_budget"] == 2**30).all()

    code, output, errors = ask("run", "best.yml", "--dry-run")
    assert code == 0, errors
    assert "1 to run" in output

    code, _, errors = ask("report", "results/search")
    assert code == 0, errors
    written = tmp_path / "reports/search"
    assert (written / "recommended.yml").read_text() == (tmp_path / "best.yml").read_text()
    assert {"tuning-front.svg", "tuning-history.svg", "tuning-slices.svg"} <= {f.name for f in written.glob("plots/*")}
    assert "The winner and its rivals" in (written / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["tune", "tiny.yml"], "tiny.yml: tune is missing"),
        (["tune", "search.yml", "--sampler", "tpa"], "unknown sampler 'tpa'; did you mean tpe"),
        (["tune", "many.yml"], "num_processes 999, and "),
        (["tune", "search.yml", "--from", "nowhere"], "--from nowhere: no trials there"),
        (["tune", "search.yml", "--memory", "lots"], "'lots' is not a size"),
        (["tune", "search.yml", "--storage", "nodb://x"], "the study's storage cannot be opened"),
    ],
)
def test_tune_refuses_in_one_line(tmp_path: Path, ask: Ask, arguments: list[str], output: str) -> None:
    (tmp_path / "search.yml").write_text(TUNE)
    (tmp_path / "many.yml").write_text(TUNE.replace("lora_r: [4, 8, 16]", "num_processes: [1, 999]"))
    (tmp_path / "tiny.yml").write_text(TINY)
    code, _, errors = ask(*arguments)
    assert code == 2
    assert output in " ".join(errors.split())
    assert len(errors.strip().splitlines()) == 1


def test_methods_are_listed_within_80_columns(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "methods"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.match(r"│ trainable_tokens +│ yes ", line) for line in lines)
    assert any(re.match(r"│ hra +│ yes +│ yes +│ - +│ - ", line) for line in lines)
    one = harness("methods", "loha", cwd=tmp_path)
    assert "nf4: does not train:" in one.stdout, one.stderr
    assert "rank_dropout" in one.stdout
    assert "target_modules" not in one.stdout, "a key of its own"
    assert "did you mean loha?" in harness("methods", "lohaa", cwd=tmp_path).stderr
