"""Progress of a run: a live bar in a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self, cast

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from harness._util.messages import one_line
from harness._util.terminal import plain, printable
from harness._util.units import counted
from harness.metrics import HEADLINE, METRICS
from harness.record import Job, Record
from harness.results.timing import row_figures

_REFRESHES = 2
"""Each second. A trial uses all cores: every refresh takes one of them from the steps that are being timed."""
_COLOURS = {
    "ok": "green",
    "timed": "green",
    "waited": "yellow",
    "oom": "yellow",
    "did_not_train": "yellow",
    "diverged": "yellow",
    "skipped": "yellow",
}


def summarize(record: Record) -> str:
    """The figures of a finished trial or visit, or how it failed, in one line."""
    if record.visit is not None and record.status == "ok":
        return _summarize_visit(record)
    if record.status == "ok":
        figures = []
        for metric in map(METRICS.__getitem__, HEADLINE):
            value = record.metrics.get(metric.name)
            if value is not None:  # bytes are shown with a unit of their own
                figures.append(metric.show(value) + (f" {metric.unit}" if metric.unit != "B" else ""))
        return "  ".join(figures)
    if record.status == "skipped":
        return str(record.error)
    reached, asked = record.metrics.get("oom_reached_bytes"), record.metrics.get("oom_requested_bytes")
    show = METRICS["oom_reached_bytes"].show
    bound = f"; held {show(reached)}" if reached else ""
    bound += f", asked {show(asked)} more" if asked else ""
    return f"in {record.phase}{bound}" if record.status == "oom" else f"in {record.phase}: {record.error}"


def _summarize_visit(record: Record) -> str:
    figures = row_figures(record.steps)
    speed, disturbed = figures["tokens_per_second"], figures["disturbed_steps"]
    counts = f"{figures['timed_steps']} of {len(record.steps)} steps" if disturbed else f"{len(record.steps)} steps"
    if record.disturbed or speed is None:
        return f"the machine worked for others during {disturbed} of {len(record.steps)} steps; timed again at the end"
    metric = METRICS["tokens_per_second"]
    return f"{metric.show(speed)} {metric.unit} over {counts}"


def outcome(record: Record) -> str:
    """The status of a trial; of a visit, whether it counts."""
    if record.visit is None or record.status != "ok":
        return record.status
    return "waited" if record.disturbed else "timed"


def _failed_attempt(record: Record) -> str:
    return f"attempt {record.attempt} failed in {record.phase}: {record.error}"


class Pace:
    """The time left of a run, from how long its trials and its visits took so far.

    Args:
        trials, visits: how many there are to do.
        visit_seconds: for how long a visit times; it loads a model too, and on a CPU does the same with the baseline.
    """

    def __init__(self, trials: int, visits: int, visit_seconds: float = 0.0) -> None:
        self._expected = {"trials": None, "visits": 4 * visit_seconds or None}
        self._left = {"trials": trials, "visits": visits}
        self._done = dict.fromkeys(self._left, 0)
        self._seconds = dict.fromkeys(self._left, 0.0)
        self._last = time.monotonic()

    @property
    def done(self) -> int:
        """Trials and visits."""
        return sum(self._done.values())

    @property
    def total(self) -> int:
        """With those that come on top: visits that do not count are made again, in blocks that the baseline is in."""
        return self.done + sum(self._left.values())

    def finished(self, record: Record) -> None:
        """A trial or a visit has ended."""
        kind = "trials" if record.visit is None else "visits"
        now = time.monotonic()
        self._seconds[kind] += now - self._last
        self._last = now
        self._done[kind] += 1
        again = kind == "visits" and (record.disturbed or record.status != "ok")
        if not again:
            self._left[kind] = max(0, self._left[kind] - 1)

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far, of trials and of visits; null before the first."""
        if not self.done:
            return None
        of_both = sum(self._seconds.values()) / self.done
        paces = {
            kind: self._seconds[kind] / done if done else self._expected[kind] or of_both
            for kind, done in self._done.items()
        }
        return sum(left * paces[kind] for kind, left in self._left.items())


def _progress(console: Console, *time_left: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *time_left,
        console=console,
        refresh_per_second=_REFRESHES,
    )


@contextlib.contextmanager
def bar(console: Console, first: str) -> Iterator[Callable[[tuple[int, int, str]], None]]:
    """A bar that disappears when the work is done. Yields its callback, which takes (done, total, what is next)."""
    progress = _progress(console, TextColumn("left"), TimeRemainingColumn())
    progress.live.transient = True
    task = progress.add_task(first, total=None)
    with progress:
        yield lambda at: progress.update(task, completed=at[0], total=at[1], description=plain(at[2]))


def _minutes(pace: Pace) -> str:
    return f"{(pace.seconds_left or 0.0) / 60:.0f} min"


class LiveDisplay:
    """For a terminal: a bar with the time left, the running trial with its phase, a line per finished one."""

    def __init__(self, console: Console, parent: LiveDisplay | None = None) -> None:
        self.console = console
        if parent is None:
            self._progress = _progress(console, TextColumn("{task.fields[left]}"))
            self._bar = self._progress.add_task("trials", total=None, left="")
            self._pace = Pace(0, 0)
        else:
            self._progress, self._bar, self._pace = parent._progress, parent._bar, parent._pace
        self._now = self._progress.add_task("", total=None, visible=False, left="")
        self._label = ""
        self._doing = ""
        self._phase = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, total: int, skipped: int, visits: int = 0, visit_seconds: float = 0.0) -> None:
        """Set the bar."""
        self._pace = Pace(total, visits, visit_seconds)
        self._progress.reset(self._bar, total=total + visits)
        if skipped:
            self.console.print(f"[dim]{counted(skipped, 'trial')} recorded already[/]")

    def trial(self, number: int, job: Job) -> None:
        """Name the running trial."""
        self._label = plain(job.label if not job.repeat else f"{job.label} (repeat {job.repeat})")
        self._doing = "train" if job.visit is None else "time"
        self._progress.reset(self._now, description=self._label, visible=True, total=None)

    def event(self, kind: str, value: object) -> None:
        """Show its phase, or its step."""
        if kind == "step":
            done, total = cast(tuple[int, int], value)
            self._progress.update(
                self._now, completed=done, total=total, description=f"{self._label} [dim]{self._doing}[/]"
            )
        elif value in ("load", "evaluate", "save"):
            self._progress.update(self._now, description=f"{self._label} [dim]{value}[/]")

    def finished(self, record: Record) -> None:
        """Leave a line behind."""
        colour = _COLOURS.get(outcome(record), "red")
        seconds = record.metrics.get("trial_seconds")
        took = f"[dim]{seconds:6.1f} s[/]" if seconds is not None else ""
        self.console.print(
            f"[{colour}]{outcome(record):>8}[/] {took}  {plain(record.label):32} {plain(summarize(record))}"
        )
        self._progress.update(self._now, visible=False)
        self._pace.finished(record)
        left = f"left {_minutes(self._pace)}"
        self._progress.update(self._bar, completed=self._pace.done, total=self._pace.total, left=left)

    def retried(self, record: Record) -> None:
        """Say why."""
        self.console.print(f"[yellow]   again[/] {'':9} {plain(record.label):32} {plain(_failed_attempt(record))}")
        self._progress.reset(self._now, description=self._label, total=None)

    def waiting(self, count: int) -> None:
        """Show how many trials other runners are running."""
        of_others = f"waiting for {counted(count, 'trial')} of another runner"
        self._progress.update(self._now, description=of_others, visible=True)

    def child_display(self) -> LiveDisplay:
        """Another running trial in the same display."""
        return LiveDisplay(self.console, self)

    def interrupted(self) -> None:
        """Say what the interrupt does."""
        self.console.print("[yellow]finishing the running trial; interrupt again to stop it now[/]")


class PlainDisplay:
    """For a file or a pipe: a line when a trial starts, and one when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._pace = Pace(0, 0)
        self._is_waiting = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, total: int, skipped: int, visits: int = 0, visit_seconds: float = 0.0) -> None:
        """Say how much there is to do."""
        self._pace = Pace(total, visits, visit_seconds)
        recorded = f", {skipped} recorded already" if skipped else ""
        timed = f"; {counted(visits, 'visit')} to time {'it' if total == 1 else 'them'}" if visits else ""
        self._print(f"{counted(total, 'trial')} to run{recorded}{timed}")

    def trial(self, number: int, job: Job) -> None:
        """Nothing: the line comes with the figures."""

    def event(self, kind: str, value: object) -> None:
        """Nothing: steps would fill a log."""

    def finished(self, record: Record) -> None:
        """One line with the figures, and the time left at this pace."""
        self._pace.finished(record)
        seconds = record.metrics.get("trial_seconds") or 0.0
        self._print(
            f"[{self._pace.done}/{self._pace.total}] {outcome(record)} {record.label}: {summarize(record)} "
            f"({seconds:.1f} s, about {_minutes(self._pace)} left)"
        )

    def retried(self, record: Record) -> None:
        """Say why."""
        self._print(f"{one_line(record.label)} again: {one_line(_failed_attempt(record))}")

    def waiting(self, count: int) -> None:
        """Print, once, how many trials other runners are running."""
        if not self._is_waiting:
            self._is_waiting = True
            self._print(f"waiting for {counted(count, 'trial')} of another runner")

    def child_display(self) -> PlainDisplay:
        """Itself: lines come as trials end."""
        return self

    def interrupted(self) -> None:
        """Say what the interrupt does."""
        self._print("finishing the running trial; interrupt again to stop it now")


def display(console: Console) -> LiveDisplay | PlainDisplay:
    """The display that suits where the output goes."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


@contextlib.contextmanager
def story_display(console: Console, models: Sequence[str]) -> Iterator[Callable[[str | None, str], None]]:
    """Shows stories as they are generated. Yields its callback, which takes the model (null: the synopsis) and a piece
    of text. Several models are shown side by side in a terminal, one after another in a file or a pipe.
    """
    if len(models) > 1 and console.is_terminal:
        yield from _side_by_side(console, models)
    else:
        yield from _one_after_another(console, models)


def _one_after_another(console: Console, models: Sequence[str]) -> Iterator[Callable[[str | None, str], None]]:
    shown: list[str] = []

    def show(name: str | None, piece: str) -> None:
        if name is None:
            console.print(Text(f"{printable(piece)}\n", style="italic"), soft_wrap=True)
            return
        if name not in shown:
            shown.append(name)
            if len(models) > 1:
                console.print(Text(f"{chr(10) * 2 * (len(shown) > 1)}--- {name}"))
        console.print(Text(printable(piece)), end="", soft_wrap=True)

    try:
        yield show
    finally:
        console.print()


def _side_by_side(console: Console, models: Sequence[str]) -> Iterator[Callable[[str | None, str], None]]:
    stories = dict.fromkeys(models, "")

    def columns() -> Table:
        table = Table.grid(expand=True)
        for _ in stories:
            table.add_column(ratio=1)
        table.add_row(*(Panel(Text(text), title=name) for name, text in stories.items()))
        return table

    def show(name: str | None, piece: str) -> None:
        if name is None:
            console.print(Text(printable(piece), style="italic"))
        else:
            stories[name] += printable(piece)

    try:
        # While it grows it is cut to the screen.
        with Live(console=console, transient=True, get_renderable=columns):
            yield show
    finally:  # whole, as far as it came
        console.print(columns())
