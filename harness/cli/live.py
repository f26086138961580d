"""The report's page while its grid runs (`harness run --live`), for browsers of this machine alone."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from rich.console import Console

from harness._util.messages import first_line, one_line
from harness._util.terminal import plain, printable
from harness.analysis import loading
from harness.analysis.measurements import Measurements
from harness.cli.beforehand import environments_of
from harness.cli.console import err
from harness.cli.failures import FAILURES
from harness.cli.loopback import LoopbackServer
from harness.cli.progress import Pace, display, outcome, summarize
from harness.errors import InputError
from harness.grids.grid import Grid
from harness.launch.launcher import Launcher
from harness.record import Job, Record
from harness.report import document, page, writers
from harness.results.store import Store
from harness.runner.display import Display

_ENDED_SHOWN = 6
"""Ended trials whose figures the state has."""
_BETWEEN_BUILDS = 4.0
"""Least time between two builds, as a multiple of what the last one took: pages take a fifth of a run at most."""
_BETWEEN_BUILDS_OF_WORKERS = 30.0
"""Least seconds between two builds while another worker's trial runs."""
_ASKED_RECENTLY = 6.0
"""Seconds within which a page that is open has asked for the state: it asks every 2."""
_WAIT_FOR_BROWSER = 3.0
"""Seconds for which an open page may fetch the finished report before the server stops."""


@dataclass
class _Running:
    """A trial or a visit that runs."""

    label: str
    repeat: int
    timing: bool
    """It is a visit."""
    phase: str | None = None
    step: tuple[int, int] | None = None
    """Of how many."""

    def document(self) -> dict[str, Any]:
        step, of = self.step or (None, None)
        about = {"label": self.label, "repeat": self.repeat, "timing": self.timing, "phase": self.phase}
        return about | {"step": step, "of": of}


class LivePage:
    """Serves the page of the rows that there are, and how far the run is.

    A trial is timed on all cores, and a page takes seconds of them. So a request is answered with the page as it was
    last built, and the next one is built between trials, by the thread that runs them, once a browser has asked.

    Args:
        console: where its address is printed, and warnings.
        title: of the grid.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, printable(title)
        self._lock = threading.Lock()
        self._pace = Pace(0, 0)
        self._running: dict[object, _Running] = {}
        self._ended: deque[dict[str, Any]] = deque(maxlen=_ENDED_SHOWN)
        self._rows = self._disturbed = self._failed = 0
        self._note = ""
        self._finished = self._interrupted = self._is_written = False
        self._load: Callable[[], Measurements] | None = None
        self._folder = Path()

        self._building = threading.Lock()
        self._page, self._version = b"", 0
        self._asked = self._changed = False
        self._asked_at = self._built_at = float("-inf")
        self._build_seconds = 0.0
        self._warnings: set[str] = set()
        self._taken = threading.Event()
        """The last page was fetched."""
        self._server = LoopbackServer({
            "/": ("text/html; charset=utf-8", self._answer_page, self._was_sent),
            "/state": ("application/json", self._answer_state, lambda: None),
        })  # fmt: skip

    @property
    def address(self) -> str:
        """Of the page."""
        return self._server.address

    def __enter__(self) -> Self:
        self._page = self._small_page("The report appears here when the first trial has ended.")
        self._server.start()
        # With --quiet too: the port is a free one, so nobody can know it.
        console = err if self._console.quiet else self._console
        console.print(f"the report while it grows: {self.address}", highlight=False, soft_wrap=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            ended_by_user = kind is None or issubclass(kind, KeyboardInterrupt)
            if ended_by_user and not self._is_written and self._load is not None and self._rows:
                self._interrupted = True
                self._write_what_there_is(self._load)
            self._finished = True
            self._wait_for_browser()
        finally:
            self._server.stop()

    def follow(self, shown: Display, folder: Path, load: Callable[[], Measurements]) -> Display:
        """A display that shows a run in `shown`, and on the page.

        Args:
            shown: the display in the terminal.
            folder: of the run's results.
            load: reads the rows that there are.
        """
        self._folder, self._load = folder, load
        return _Followed(self, shown)

    def write_report(self, measurements: Measurements, folder: Path) -> None:
        """Write the report of the finished run as `harness report` does; after Ctrl-C its page alone, which is quicker.

        What goes wrong is a warning.

        Args:
            measurements: the rows of the run.
            folder: where they were read from.
        """
        target = Path("reports") / folder.resolve().name
        formats = ("html",) if self._interrupted else writers.FORMATS
        try:
            writers.write(document.document(measurements, folder), target, formats=formats)
            content = (target / "report.html").read_bytes()
        except Exception as error:  # whatever it is, the trials are recorded
            self._warn("the report could not be written", error)
            return
        self._is_written = True
        with self._lock:
            self._page, self._version, self._finished = content, self._version + 1, True
        self._console.print(f"the report: {plain(str(target / 'report.html'))}", highlight=False, soft_wrap=True)

    def _write_what_there_is(self, load: Callable[[], Measurements]) -> None:
        try:
            measurements = load()
        except Exception as error:
            self._warn("the report could not be written", error)
            return
        self.write_report(measurements, self._folder)

    def _wait_for_browser(self) -> None:
        """Give a page that is open the time to become the report."""
        if self._is_written and time.monotonic() - self._asked_at < _ASKED_RECENTLY:
            self._taken.wait(_WAIT_FOR_BROWSER)

    def _warn(self, what: str, error: Exception) -> None:
        """Print a line, once for each cause."""
        line = one_line(f"{what}: {first_line(error)}")
        self._note = line
        if line not in self._warnings:
            self._warnings.add(line)
            self._console.print(f"[yellow]{plain(line)}[/]", highlight=False, soft_wrap=True)

    # ---- what the server answers with; called from its threads

    def _answer_page(self) -> bytes:
        self._asked = True
        self._asked_at = time.monotonic()
        return self._page

    def _was_sent(self) -> None:
        if self._finished:
            self._taken.set()

    def _answer_state(self) -> bytes:
        self._asked_at = time.monotonic()
        return json.dumps(self.state()).encode()

    def state(self) -> dict[str, Any]:
        """How far the run is, as the page asks for it."""
        with self._lock:
            return {
                "title": self._title,
                "done": self._pace.done,
                "total": self._pace.total,
                "seconds_left": self._pace.seconds_left,
                "running": [each.document() for each in self._running.values()],
                "disturbed_steps": self._disturbed,
                "failed": self._failed,
                "ended": [*self._ended],
                "rows": self._rows,
                "version": str(self._version),
                "note": self._note,
                "finished": self._finished,
            }

    # ---- what the display reports; called from the threads that run trials

    def began(self, total: int, recorded: int, visits: int, visit_seconds: float) -> None:
        """A run of so many trials begins."""
        with self._lock:
            self._pace = Pace(total, visits, visit_seconds)
            self._running.clear()
            self._rows = recorded
        if recorded and not self._version:
            self._asked = self._changed = True  # nothing runs yet, and whoever opens the page finds the rows
        self._build_if_wanted()

    def runs(self, key: object, job: Job) -> None:
        """A trial or a visit runs."""
        with self._lock:
            self._note = ""
            self._running[key] = _Running(printable(job.label), job.repeat, job.visit is not None)

    def reported(self, key: object, kind: str, value: object) -> None:
        """It is at this phase, or at this step."""
        running = self._running.get(key)
        if running is None:
            return
        if kind == "step":
            running.step = cast(tuple[int, int], value)
        elif value in ("load", "evaluate", "save"):  # the others are parts of a step
            running.phase, running.step = str(value), None

    def ended(self, key: object, record: Record) -> None:
        """It has ended; the page is built where a browser asked for it."""
        line = {"label": record.label, "repeat": record.repeat, "status": outcome(record), "line": summarize(record)}
        with self._lock:
            self._running.pop(key, None)
            self._pace.finished(record)
            self._disturbed += sum(step.disturbed for step in record.steps)
            self._failed += record.status in FAILURES
            self._rows += record.visit is None
            self._ended.appendleft({name: printable(v) if isinstance(v, str) else v for name, v in line.items()})
        self._changed = True
        self._build_if_wanted()

    def tells(self, note: str) -> None:
        """Show a line until a trial runs."""
        self._note = note

    def interrupted(self) -> None:
        """The run is asked to end. This is called by a signal, which may come anywhere: no lock is taken."""
        self._interrupted = True

    # ---- building

    def _build_if_wanted(self) -> None:
        """Build the page where a browser has asked since the last time, and enough time has passed."""
        if not (self._asked and self._changed) or self._load is None or self._interrupted:
            return
        least = _BETWEEN_BUILDS * self._build_seconds
        if self._running:
            least = max(least, _BETWEEN_BUILDS_OF_WORKERS)
        if time.monotonic() - self._built_at < least or not self._building.acquire(blocking=False):
            return
        try:
            # First of all: a request meanwhile, and a trial that ends meanwhile, want the next page.
            self._asked = self._changed = False
            began = time.monotonic()
            self._build(self._load)
            self._built_at = time.monotonic()
            self._build_seconds = self._built_at - began
        finally:
            self._building.release()

    def _build(self, load: Callable[[], Measurements]) -> None:
        version = self._version + 1
        try:
            try:
                content = page.html(document.document(load(), self._folder), live=str(version)).encode()
            except InputError as error:  # no rows that can be compared: not a fault of the page
                content = self._small_page(str(error), version)
        except Exception as error:  # whatever it is, the trial that comes next is not harmed
            self._asked = True
            self._warn("the page could not be built", error)
            return
        with self._lock:
            self._page, self._version = content, version

    def _small_page(self, note: str, version: int = 0) -> bytes:
        return page.render("live.html.j2", title=self._title, version=version, note=note).encode()


class _Followed:
    """A display of a terminal, whose run is shown on a page too."""

    def __init__(self, live: LivePage, shown: Display) -> None:
        self._live, self._shown = live, shown

    def begin(self, total: int, skipped: int, visits: int = 0, visit_seconds: float = 0.0) -> None:
        """The run starts."""
        self._shown.begin(total, skipped, visits, visit_seconds)
        self._live.began(total, skipped, visits, visit_seconds)

    def trial(self, number: int, job: Job) -> None:
        """A trial or a visit starts."""
        self._live.runs(self, job)
        self._shown.trial(number, job)

    def event(self, kind: str, value: object) -> None:
        """Its phase, or its step."""
        self._live.reported(self, kind, value)
        self._shown.event(kind, value)

    def retried(self, record: Record) -> None:
        """An attempt failed, and another one follows."""
        self._shown.retried(record)
        self._live.reported(self, "phase", "load")

    def finished(self, record: Record) -> None:
        """A trial or a visit ended."""
        self._shown.finished(record)
        self._live.ended(self, record)

    def interrupted(self) -> None:
        """The user asked to stop."""
        self._live.interrupted()
        self._shown.interrupted()

    def waiting(self, count: int) -> None:
        """Other runners run what is left."""
        self._shown.waiting(count)
        self._live.tells(f"waiting for {count} trials of another runner")

    def child_display(self) -> Display:
        """Of another worker."""
        return _Followed(self._live, self._shown.child_display())


def serving(console: Console, title: str, *, wanted: bool) -> AbstractContextManager[LivePage | None]:
    """A live page, where one is wanted."""
    return LivePage(console, title) if wanted else contextlib.nullcontext()


@contextlib.contextmanager
def shown(console: Console, live: LivePage | None, grid: Grid, store: Store, launcher: Launcher) -> Iterator[Display]:
    """The display of a run in the terminal, and on a page where there is one.

    Args:
        console: where the display is shown.
        live: the page; null: none.
        grid: that runs.
        store: where its rows are kept.
        launcher: that runs its trials.
    """
    with display(console) as in_terminal:
        if live is None:
            yield in_terminal
            return
        here = environments_of(grid, launcher)
        yield live.follow(in_terminal, store.folder, lambda: loading.load(store.folder, here=here))
