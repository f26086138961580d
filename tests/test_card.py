"""What needs a CUDA card, as far as it can be tested without one: samples of the driver, and the visit."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas
import pynvml
import pytest
import rows
import torch
from test_launch import Watch, formula_grid

from harness.analysis import loading
from harness.launch.local import LocalLauncher
from harness.metrics import METRICS
from harness.report import document
from harness.results.store import Store
from harness.runner.grid_run import run_grid
from harness.spec.trial import TrialSpec
from harness.training import card_watch
from harness.training.clock import DeviceClock

Small = Callable[..., TrialSpec]
ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda")


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_visit")


# ------------------------------------------------------------------------------------ the driver's answers


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card whose driver answers what is set; null: not supported."""
    card = SimpleNamespace(joules=100.0, clock=1500, most=2000, temperature=60, reasons=0)

    @contextlib.contextmanager
    def handle(device: torch.device) -> Iterator[SimpleNamespace]:
        yield card

    def answer(name: str, of: Callable[[], Any]) -> None:
        def ask(*arguments: Any) -> Any:
            value = of()
            if value is None:
                raise pynvml.NVMLError_NotSupported
            return value

        monkeypatch.setattr(pynvml, name, ask)

    monkeypatch.setattr(card_watch, "handle", handle)
    monkeypatch.setattr(card_watch, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(card_watch, "MIN_ENERGY_SECONDS", 0.05)
    answer("nvmlDeviceGetTotalEnergyConsumption", lambda: None if card.joules is None else int(1000 * card.joules))
    answer("nvmlDeviceGetClockInfo", lambda: card.clock)
    answer("nvmlDeviceGetMaxClockInfo", lambda: card.most)
    answer("nvmlDeviceGetTemperature", lambda: card.temperature)
    answer("nvmlDeviceGetCurrentClocksThrottleReasons", lambda: card.reasons)
    return card


def test_energy_clock_heat_and_throttling(driver: SimpleNamespace) -> None:
    with card_watch.CardWatch(CUDA) as watch:
        time.sleep(0.2)
        driver.joules, driver.temperature = 130.0, 71
        driver.reasons = pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
        time.sleep(0.2)
        driver.temperature = 65
    metrics = watch.metrics(tokens=60)
    assert metrics["joules_per_token"] == pytest.approx(0.5)
    assert metrics["card_clock_share"] == 0.75
    assert metrics["card_temperature"] == 71
    assert 0 < (metrics["throttled_share"] or 0) < 1
    assert metrics.keys() <= METRICS.keys()


def test_what_the_card_does_not_support_is_null(driver: SimpleNamespace) -> None:
    driver.joules = driver.reasons = None
    with card_watch.CardWatch(CUDA) as watch:
        time.sleep(0.06)
    metrics = watch.metrics(tokens=60)
    assert (metrics["joules_per_token"], metrics["throttled_share"]) == (None, None)
    assert metrics["card_temperature"] == 60
    driver.joules, driver.reasons = 1.0, pynvml.nvmlClocksThrottleReasonGpuIdle
    with card_watch.CardWatch(CUDA) as watch:
        pass
    metrics = watch.metrics(tokens=60)
    assert metrics["joules_per_token"] is None, "too short a time for the counter"
    assert metrics["throttled_share"] == 0, "an idle card is not throttled"


def test_a_cpu_is_not_watched() -> None:
    with card_watch.CardWatch(torch.device("cpu")) as watch:
        pass
    assert set(watch.metrics(tokens=1).values()) == {None}


def test_steps_on_a_card_are_timed_by_its_clock(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two events enclose a step; it waits for the second before it reads it."""
    happened: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("synchronize")

        def elapsed_time(self, later: Event) -> float:
            happened.append("elapsed")
            return 1250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = DeviceClock(CUDA)
    assert clock.seconds_since(clock.now()) == 1.25
    assert happened == ["record", "record", "synchronize", "elapsed"]


def test_a_throttled_trial_is_named(small: Small, tmp_path: Path) -> None:
    store = Store(tmp_path / "g")
    for label, spec, throttled in (
        ("baseline", small(), 0.0),
        ("hot", small(lora_r=8), 0.4),
        ("cool", small(lora_r=16), 0.0),
    ):
        figures = {"peak_memory_bytes": 100, "tokens_per_second": 10.0, "throttled_share": throttled}
        rows.keep(store, spec, label, [3.0, 4.0], **figures)
    caveats = [
        line for line in document.document(loading.load(store.folder), store.folder).caveats if "throttled" in line
    ]
    assert len(caveats) == 1
    assert "in 1 trials (hot)" in caveats[0]


# ------------------------------------------------------------------------------------ the visit


def test_no_trial_begins_when_the_time_is_over(tmp_path: Path) -> None:
    summary = run_grid(formula_grid(3), Store(tmp_path), LocalLauncher(), Watch(), until=time.monotonic())
    assert (summary.records, summary.left) == ((), 3)


def test_a_dry_run_says_what_would_be_and_for_how_long(
    visit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "g.yml"
    base = {"base_model": "random:tiny", "device": "cuda", "max_steps": 100, "val_set_size": 2, "sequence_length": 128}
    vary = {"precision": ["fp32"], "technique": {"too large": {"memory_budget": "1MiB"}}}
    grid.write_text(json.dumps({"name": "g", "base": base, "vary": vary}))
    monkeypatch.setattr(visit, "PARTS", (visit.Part(grid, 1, 0.5), visit.Part(grid, 3, 1.0)))
    monkeypatch.setenv("COLUMNS", "160")
    visit.dry_run("h100")
    lines = capsys.readouterr().out.splitlines()
    assert any("g, 3 times" in line for line in lines)
    assert sum(" fits " in line for line in lines) == 3, "the baseline, its second run, and fp32"
    assert sum(" does not fit " in line for line in lines) == 1
    assert any("g: 10 trials, about 1 minutes" in line for line in lines)
    with pytest.raises(SystemExit, match="no data sheet; there are t4"):
        visit.dry_run("abacus")


def test_what_is_missing_comes_from_wheels(visit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "ROOT", tmp_path)
    monkeypatch.setattr(visit, "NEEDED", {"yaml": "PyYAML", "abacus_of_harness": "abacus-of-harness"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SystemExit, match="not installed: abacus-of-harness; give --wheels"):
        visit._install(None)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    about = "abacus_of_harness-1.0.dist-info"
    with zipfile.ZipFile(wheels / "abacus_of_harness-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("abacus_of_harness.py", "BEADS = 100\n")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: abacus-of-harness\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    visit._install(wheels)
    code = [sys.executable, "-c", "import abacus_of_harness; print(abacus_of_harness.BEADS)"]
    assert subprocess.run(code, capture_output=True, text=True, check=True).stdout == "100\n", "for its children too"


def test_what_a_visit_needs_is_named(visit: ModuleType) -> None:
    """The runner imports no package that the visit does not install."""
    code = (
        "import sys, site\n"
        "from harness.analysis import measurements\n"
        "from harness.cli import app, doctor, progress\n"
        "from harness.launch import local\n"
        "from harness.predict import predictor\n"
        "from harness.report import document, writers\n"
        "places = tuple(site.getsitepackages())\n"
        "print(*{name.split('.')[0] for name, module in sys.modules.items()\n"
        "        if (getattr(module, '__file__', None) or '').startswith(places)})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    # These come with torch, pandas, attrs and Jinja2, or are imported where they happen to be (cloudpickle).
    others = {
        "attrs",
        "numpy",
        "typing_extensions",
        "packaging",
        "markupsafe",
        "dateutil",
        "pytz",
        "charset_normalizer",
        "idna",
        "cloudpickle",
    }
    imported = {name for name in done.stdout.split() if not name.startswith("_")}
    assert imported - others - visit.NEEDED.keys() == set()


@pytest.mark.long
def test_a_visit_runs_reports_and_keeps_a_log(
    visit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: what a visit does there is the same but for the card."""
    grid = tmp_path / "g.yml"
    base = {"base_model": "random:tiny", "precision": "fp32", "train_samples": 12, "val_set_size": 2, "lora_r": 4}
    grid.write_text(json.dumps({"name": "g", "base": base | {"device": "cpu"}, "vary": {"lora_r": [8]}, "visits": 0}))
    monkeypatch.setattr(visit, "PARTS", (visit.Part(grid, 2, 1.0),))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    visit.visit(time.monotonic() + 600, tmp_path / "results", tmp_path / "reports")
    trials = pandas.read_parquet(tmp_path / "results/g/trials")
    assert len(trials) == 5
    log = (tmp_path / "results/gpu_visit.log").read_text()
    assert f"$ harness run {grid}" in log
    assert "g: 5 ok in environment" in log
    assert "predicted peaks: " in log
    assert "peaks: 2 of 2 repeated configurations have the same to the byte" in log
    assert (tmp_path / "reports/g/report.html").is_file()
