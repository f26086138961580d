"""Scaling of `harness report`: seconds and memory by number of rows, for synthetic results and committed ones.

The page of each size is opened in Chromium, where it is installed: its size, and the seconds until its plots are drawn.
The cost should grow no faster than the rows: the last ratio is seconds per row at the largest size over the
smallest one's, after subtracting the cost of a report of ten rows.

    python benchmarks/report_scale.py [--rows 25000 50000 100000]
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy
import pyarrow as pa
import pyarrow.parquet as pq

from harness.environment import current
from harness.record import Job, Record
from harness.results.schema import SCHEMAS, Table, absent_value, trial_row
from harness.spec.trial import TrialSpec

ROOT = Path(__file__).parent.parent
REPEATS = 5
STORIES = 4
STEPS = 4


def fill(folder: Path, rows: int) -> None:
    """Write this number of trials, `REPEATS` of each configuration, with their steps and stories."""
    generator = numpy.random.default_rng(0)
    configs = max(2, rows // REPEATS)
    config = numpy.repeat(numpy.arange(configs), REPEATS)
    repeat = numpy.tile(numpy.arange(REPEATS), configs)
    count = len(config)
    spec = TrialSpec(base_model="random:tiny")
    job = Job(grid="scale", spec=spec, label="x")
    template = trial_row(
        Record.of(job, environment=current("cpu"), status="ok", started_at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
    )
    columns = {name: pa.array([value] * count, SCHEMAS["trials"].field(name).type) for name, value in template.items()}
    ids = [f"{c:07d}-{r}" for c, r in zip(config, repeat, strict=True)]
    size = 1 + config / configs
    speed = 100 / size * generator.normal(1, 0.02, count)
    loss = 3 - numpy.log(size) / 10
    varied = {
        "trial_id": ids,
        "spec_id": ids,
        "label": ["baseline" if c == 0 else f"configuration {c}" for c in config],
        "repeat": repeat,
        "seed": repeat,
        "baseline_id": [f"{0:07d}-{r}" for r in repeat],
        "lora_r": 1 + config % 997,
        "lora_alpha": 1 + config // 997,
        "peak_memory_bytes": (size * 2**30).astype(int),
        "tokens_per_second": speed,
        "eval_loss": loss,
        **{f"memory_{c}_bytes": (size * 2**27).astype(int) for c in ("weights", "adapters", "gradients", "optimizer")},
        "memory_activations_bytes": (size * 2**29).astype(int),
    }
    columns |= {name: pa.array(values, SCHEMAS["trials"].field(name).type) for name, values in varied.items()}
    _keep(folder, "trials", columns)
    _keep(
        folder,
        "stories",
        {
            "trial_id": numpy.repeat(ids, STORIES),
            "story_id": numpy.tile([f"story {i}" for i in range(STORIES)], count),
            "kind": ["held-out"] * (count * STORIES),
            "when": ["after"] * (count * STORIES),
            "loss": numpy.repeat(loss, STORIES) + generator.normal(0, 0.01, count * STORIES),
            "tokens": [100] * (count * STORIES),
        },
    )
    steps = count * STEPS
    rate = numpy.repeat(speed, STEPS) * generator.normal(1, 0.01, steps)
    same = {name: [100] * steps for name in ("tokens", "supervised_tokens", "padded_tokens", "samples")}
    _keep(
        folder,
        "steps",
        {
            "trial_id": numpy.repeat(ids, STEPS),
            "step": numpy.tile(numpy.arange(1, STEPS + 1), count),
            "tracked": numpy.tile(numpy.arange(STEPS) < 2, count),
            "seconds": 100 / rate,
            "loss": generator.normal(3, 0.1, steps),
            "grad_norm": [1.0] * steps,
            "learning_rate": [1e-4] * steps,
            "peak_memory_bytes": pa.nulls(steps, pa.int64()),
            **same,
        },
    )


def _keep(folder: Path, table: Table, columns: dict[str, object]) -> None:
    schema = SCHEMAS[table]
    count = len(columns["trial_id"])  # type: ignore[arg-type]  # any sequence
    missing = {field.name: [absent_value(table, field.name)] * count for field in schema}  # as in rows of before
    arrays = [pa.array((missing | columns)[field.name], field.type) for field in schema]
    (folder / table).mkdir(parents=True)
    pq.write_table(pa.table(arrays, schema=schema), folder / table / "all-synthetic.parquet")


def report(folder: Path, out: Path) -> tuple[float, float]:
    """Seconds, and peak resident GiB, of the command in a process of its own."""
    began = time.perf_counter()
    arguments = [sys.executable, "-m", "harness", "report", str(folder), "--output", str(out)]
    with (out.parent / "log").open("w") as log:
        actions = [(os.POSIX_SPAWN_DUP2, log.fileno(), stream) for stream in (1, 2)]
        pid = os.posix_spawn(sys.executable, arguments, os.environ, file_actions=actions)
        _, status, usage = os.wait4(pid, 0)
    assert status == 0, (out.parent / "log").read_text()
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def opening(page: Path) -> float | None:
    """Seconds until a page is there with all of its plots, in Chromium; null without it."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        return None
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        browser.get("about:blank")
        began = time.perf_counter()
        browser.get(page.as_uri())
        drawn = (By.CSS_SELECTOR, "body[data-drawn=yes]")
        WebDriverWait(browser, 120, poll_frequency=0.02).until(lambda b: b.find_elements(*drawn))
        return time.perf_counter() - began
    finally:
        browser.quit()


def main() -> None:
    """Print a line for each size, and how seconds per row grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    sizes = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        committed = ROOT / "results/techniques"
        if committed.is_dir():
            seconds, memory = report(committed, scratch / "committed")
            print(f"committed techniques: {seconds:6.1f} s, {memory:.2f} GiB (target: 15 s)", flush=True)
        fill(scratch / "few", 10)
        nothing, _ = report(scratch / "few", scratch / "out-few")
        costs = []
        for rows in sizes:
            fill(scratch / str(rows), rows)
            seconds, memory = report(scratch / str(rows), scratch / f"out-{rows}")
            costs.append((seconds - nothing) / rows)
            page = scratch / f"out-{rows}/report.html"
            opened = opening(page)
            shown = "no Chromium" if opened is None else f"opens in {opened:.1f} s"
            size = f"page {page.stat().st_size / 1e6:.1f} MB, {shown} (targets: 5 MB, 3 s)"
            print(f"{rows:>8,} rows:         {seconds:6.1f} s, {memory:.2f} GiB; {size}", flush=True)
    print(f"ten rows:             {nothing:6.1f} s; target: 100,000 in 20 s and 2 GiB")
    print(f"seconds per row, largest over smallest size: {costs[-1] / costs[0]:.2f} (1 is linear)")


if __name__ == "__main__":
    main()
