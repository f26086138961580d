"""The technique comparison: each trial against the baseline in memory, speed and loss."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from harness.environment import cards, current
from harness.errors import InputError
from harness.metrics import METRICS, show_bytes
from harness.results import Store
from harness.stats import Difference, paired_difference

MISSING = "–"

NOTES = (
    "Memory is the highest sum of live tensors over the training steps. Speed counts non-padding tokens of the timed "
    "steps. × is the ratio to the baseline of the same repeat, averaged over repeats.",
    "Loss is in nats per completion token on held-out stories; ± is the 95 % interval (Student's t) of the paired "
    "per-story differences from the baseline, and * marks an interval without 0.",
    "Speeds of single repeats carry no interval yet: read differences of a few per cent as noise.",
)


@dataclass(frozen=True)
class Line:
    """One configuration beside the baseline; null where it was not measured."""

    factor: str | None
    label: str
    status: str
    note: str
    """Why there are no figures, where there are none."""
    memory_bytes: float | None
    memory_ratio: float | None
    tokens_per_second: float | None
    speed_ratio: float | None
    eval_loss: float | None
    loss_difference: Difference | None
    repeats: int


def compare(
    folder: Path, environment: str | None = None, baseline_ids: Collection[str | None] | None = None
) -> tuple[list[Line], str]:
    """The comparison of a results folder within one environment and one version of its grid.

    Args:
        folder: `results/<grid>`.
        environment: id of the environment; without it this machine's, or the only one that there is.
        baseline_ids: baselines of the grid's version; without it the newest of each repeat.

    Returns:
        The lines, and a description of the environment that says what was left out.

    Raises:
        InputError: nothing was recorded, or in several other environments: those are not comparable.
    """
    store = Store(folder)
    rows = store.read("trials").to_pylist()
    if not rows:
        raise InputError(f"{folder}: no trials are recorded; `harness run` fills it")
    chosen = environment or _environment(folder, rows)
    here = [row for row in rows if row["environment_id"] == chosen]
    if not here:
        there = ", ".join(sorted({row["environment_id"] for row in rows}))
        raise InputError(f"{folder}: no trials of environment {chosen!r}; there is {there}")
    # An edited grid has another baseline: what was compared with the former one stays in the parquet.
    current_ids = baseline_ids if baseline_ids is not None else _newest_baselines(here)
    kept = [row for row in here if row["baseline_id"] in current_ids]
    described = f"{describe(here[0])}; environment {chosen}"
    if len(here) < len(rows):
        described += f" ({len(rows) - len(here)} trials of other environments are left out)"
    if len(kept) < len(here):
        described += f" ({len(here) - len(kept)} trials of other versions of the grid are left out)"
    return lines(kept, _story_losses(store)), described


def _newest_baselines(rows: list[dict[str, Any]]) -> set[str | None]:
    """For each repeat, what its latest trial was compared with."""
    latest = {row["repeat"]: row["baseline_id"] for row in sorted(rows, key=lambda r: r["started_at"])}
    return set(latest.values())


def _environment(folder: Path, rows: list[dict[str, Any]]) -> str:
    """This machine's environment if it is among the rows, else the only one."""
    there = {row["environment_id"] for row in rows}
    here = {current(device).id for device in ("cpu", "cuda") if device == "cpu" or cards()} & there
    for choice in (here, there):
        if len(choice) == 1:
            return choice.pop()
    raise InputError(
        f"{folder}: trials of {len(there)} environments ({', '.join(sorted(there))}) are not comparable; "
        "choose one with --environment"
    )


def describe(row: dict[str, Any]) -> str:
    """Where the trials of a row's environment ran."""
    environment = json.loads(row["environment"])
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    kernel = "" if environment["half_matmul"] == "native" else ", 16-bit products in blocks of fp32"
    return (
        f"{environment['device_name']}, {show_bytes(environment['device_memory_bytes'])}, "
        f"{environment['cpu_cores']} CPU cores{kernel}; {versions}"
    )


def _story_losses(store: Store) -> dict[str, dict[str, float]]:
    """Loss after training by trial and story."""
    found: dict[str, dict[str, float]] = {}
    for row in store.read("stories").to_pylist():
        if row["when"] == "after":
            found.setdefault(row["trial_id"], {})[row["story_id"]] = row["loss"]
    return found


def lines(rows: list[dict[str, Any]], stories: dict[str, dict[str, float]]) -> list[Line]:
    """One line per configuration, the baseline first, then factor by factor."""
    baselines = {row["spec_id"]: row for row in rows if _is_baseline(row) and row["status"] == "ok"}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: r["repeat"]):
        groups.setdefault(row["label"], []).append(row)
    order = list(dict.fromkeys(row["factor"] for row in sorted(rows, key=lambda r: r["factor"] or "")))
    found = [_line(group, baselines, stories) for group in groups.values()]
    return sorted(found, key=lambda x: (x.label != "baseline", order.index(x.factor), _natural(x.label)))


def _is_baseline(row: dict[str, Any]) -> bool:
    return row["spec_id"] == row["baseline_id"] and not row["twin"]


def _natural(label: str) -> tuple[str, float, str]:
    """Sort `lora_r=4` before `lora_r=64`."""
    name, _, value = label.partition("=")
    try:
        return name, float(value), ""
    except ValueError:
        return name, 0.0, value


def _line(
    group: list[dict[str, Any]], baselines: dict[int, dict[str, Any]], stories: dict[str, dict[str, float]]
) -> Line:
    measured = [row for row in group if row["status"] == "ok"]
    first = group[0]
    pairs = [(row, baselines[row["baseline_id"]]) for row in measured if row["baseline_id"] in baselines]
    failed = next((row for row in group if row["status"] != "ok"), None)
    return Line(
        factor=first["factor"],
        label=first["label"],
        status=failed["status"] if failed else "ok",
        note=_failure(failed) if failed else "",
        memory_bytes=_mean(row["peak_memory_bytes"] for row in measured),
        memory_ratio=_ratio(pairs, "peak_memory_bytes"),
        tokens_per_second=_mean(row["tokens_per_second"] for row in measured),
        speed_ratio=_ratio(pairs, "tokens_per_second"),
        eval_loss=_mean(row["eval_loss"] for row in measured),
        loss_difference=None if _is_baseline(first) else _loss_difference(pairs, stories),
        repeats=len(measured),
    )


def _failure(row: dict[str, Any]) -> str:
    note = f"{row['status']} in {row['phase']}"
    if row["oom_reached_bytes"] is not None:
        need = row["oom_reached_bytes"] + (row["oom_requested_bytes"] or 0)
        note += f", needs at least {show_bytes(need)}"
    return note


def _mean(values: Iterable[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def _ratio(pairs: list[tuple[dict[str, Any], dict[str, Any]]], metric: str) -> float | None:
    return _mean(row[metric] / base[metric] for row, base in pairs if row[metric] and base[metric])


def _loss_difference(
    pairs: list[tuple[dict[str, Any], dict[str, Any]]], stories: dict[str, dict[str, float]]
) -> Difference | None:
    """Differences story by story, averaged over repeats, so that a story counts once.

    Null where the two were judged on other tokens of the stories: those losses do not compare.
    """
    by_story: dict[str, list[float]] = {}
    for row, base in pairs:
        if _judged_on(row) != _judged_on(base):
            return None
        mine, theirs = stories.get(row["trial_id"], {}), stories.get(base["trial_id"], {})
        for story in mine.keys() & theirs.keys():
            by_story.setdefault(story, []).append(mine[story] - theirs[story])
    means = {story: sum(d) / len(d) for story, d in by_story.items()}
    return paired_difference(means, dict.fromkeys(means, 0.0))


def _judged_on(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["datasets"], row["eval_sequence_length"] or row["sequence_length"], row["val_set_size"])


# ------------------------------------------------------------------------------------ faces

_HEADINGS = ("Technique", "Peak memory", "×", "Tokens/s", "×", "Eval loss", "Difference")


def _cells(line: Line) -> tuple[str, ...]:
    if line.status != "ok" and not line.repeats:
        return (line.label, line.note, *[MISSING] * 5)
    return (
        line.label if line.status == "ok" else f"{line.label} ({line.note})",
        _show("peak_memory_bytes", line.memory_bytes),
        _times(line.memory_ratio),
        _show("tokens_per_second", line.tokens_per_second),
        _times(line.speed_ratio),
        _show("eval_loss", line.eval_loss),
        _difference(line.loss_difference),
    )


def _show(metric: str, value: float | None) -> str:
    return MISSING if value is None else METRICS[metric].show(value)


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return MISSING
    half = (difference.high - difference.low) / 2
    return f"{difference.mean:+.4f} ± {half:.4f}" + ("*" if difference.distinguishable else "")


def markdown(name: str, found: list[Line], environment: str) -> str:
    """The comparison as a Markdown page."""
    repeats = sorted({line.repeats for line in found if line.repeats})
    rows = [_HEADINGS, ("---", *["---:"] * 6), *(_cells(line) for line in found)]
    table = "\n".join("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows)
    notes = "\n".join(f"- {note}" for note in NOTES)
    return (
        f"# Technique comparison: {name}\n\nMeasured on {_escaped(environment)}.\n"
        f"Repeats: {', '.join(map(str, repeats)) or 'none'}.\n\n{table}\n\n{notes}\n"
    )


def _escaped(text: str) -> str:
    """Text that cannot end a cell or begin markup."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`").split())


def terminal(name: str, found: list[Line], environment: str) -> Table:
    """The comparison as a table for the terminal."""
    table = Table(title=escape(f"{name}, on {environment}"), title_justify="left")
    for number, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for line in found:
        table.add_row(*(escape(cell) for cell in _cells(line)), style="bold" if line.label == "baseline" else None)
    return table
