"""The page of a run while it runs: who may ask, what it says, and that no trial pays for it."""

from __future__ import annotations

import datetime as dt
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import formula
import pytest
from chromium import chromium
from conftest import SMALL, Answer
from rich.console import Console
from test_cli import ROOT
from test_launch import Watch, grid_of
from test_report import measured

from harness import environment
from harness.analysis import loading
from harness.cli import live
from harness.cli.live import LivePage
from harness.errors import InputError
from harness.launch.local import LocalLauncher
from harness.record import Job, Record, Step, Visit
from harness.results.store import Store
from harness.runner.grid_run import run_grid
from harness.spec.trial import TrialSpec

Ask = Callable[..., Answer]
GRID = {"name": "g", "visits": 0, "base": SMALL | {"device": "cpu", "train_samples": 4}, "vary": {"lora_r": [8, 16]}}


def get(address: str, path: str = "/", host: str | None = None, method: str = "GET") -> tuple[int, str, Any]:
    """Status, body and headers of an answer."""
    name = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(name, timeout=20)
    try:
        connection.request(method, path, headers={"Host": host or name})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def state(address: str) -> dict[str, Any]:
    return dict(json.loads(get(address, "/state")[1]))


def job(label: str = "one", **given: Any) -> Job:
    return Job(grid="g", spec=TrialSpec.model_validate(SMALL), label=label, **given)


def record(of: Job, **outcome: Any) -> Record:
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return Record.of(of, environment=environment.current("cpu"), started_at=now, **{"status": "ok"} | outcome)


class Built:
    """Stands for the building of pages: counts them, with what was running at each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running: list[list[str]] = []
        self.page: LivePage | None = None
        self.error: Exception | None = None
        monkeypatch.setattr(live.document, "document", lambda measurements, folder: measurements)
        monkeypatch.setattr(live.page, "html", self._html)
        monkeypatch.setattr(live, "_BETWEEN_BUILDS", 0.0)

    def _html(self, measurements: Any, *, live: str) -> str:
        assert self.page is not None
        self.running.append([each["label"] for each in self.page.state()["running"]])
        if self.error is not None:
            raise self.error
        return f"page {live} of {measurements} rows"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    return Built(monkeypatch)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def page(console: Console, built: Built) -> Iterator[LivePage]:
    with LivePage(console, "A grid <b>") as started:
        built.page = started
        yield started


@pytest.fixture(scope="module")
def idle() -> Iterator[LivePage]:
    """A page of a run that has not begun."""
    with LivePage(Console(file=io.StringIO()), "idle") as started:
        yield started


class AtLoad(Watch):
    """A display that asks the server while a trial runs."""

    def __init__(self, ask: Callable[[str], None]) -> None:
        super().__init__()
        self.ask = ask

    def event(self, kind: str, value: Any) -> None:
        super().event(kind, value)
        if value == "load":
            self.ask(self.running)


# ------------------------------------------------------------------------------------ who may ask


def test_only_this_machine_can_ask(idle: LivePage) -> None:
    port = int(idle.address.rstrip("/").rpartition(":")[2])
    assert idle.address == f"http://127.0.0.1:{port}/"
    with pytest.raises(ConnectionRefusedError):  # another address of this machine: it listens on no other
        socket.create_connection(("127.0.0.2", port), timeout=5)


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", "/", "127.0.0.1:{port}", 200),
        ("HEAD", "/", "localhost:{port}", 200),
        ("GET", "/state", "localhost:{port}", 200),
        ("GET", "/", "evil.example", 403),
        ("GET", "/", "evil.example:{port}", 403),
        ("GET", "/state", "127.0.0.1", 403),
        ("GET", "/state", "127.0.0.1:{port}.evil.example", 403),
        ("HEAD", "/state", "evil.example:{port}", 403),
        ("GET", "/favicon.ico", "127.0.0.1:{port}", 404),
        ("GET", "/state/", "127.0.0.1:{port}", 404),
        ("GET", "/../../etc/passwd", "127.0.0.1:{port}", 404),
        ("POST", "/state", "127.0.0.1:{port}", 501),
        ("DELETE", "/", "127.0.0.1:{port}", 501),
        ("OPTIONS", "/", "evil.example", 501),
    ],
)
def test_what_is_answered(idle: LivePage, method: str, path: str, host: str, status: int) -> None:
    port = idle.address.rstrip("/").rpartition(":")[2]
    answered, body, headers = get(idle.address, path, host.format(port=port), method)
    assert answered == status
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert not headers["Access-Control-Allow-Origin"]
    assert (status == 200) == headers["Content-Type"].startswith(("text/html", "application/json"))
    assert "evil" not in body
    assert not (body and method == "HEAD")


def test_two_hosts_are_refused(idle: LivePage) -> None:
    name = idle.address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(name, timeout=20)
    connection.putrequest("GET", "/state", skip_host=True)
    for host in (name, "evil.example"):
        connection.putheader("Host", host)
    connection.endheaders()
    assert connection.getresponse().status == 403
    connection.close()


# ------------------------------------------------------------------------------------ what it says


def test_the_state_says_how_far_the_run_is(page: LivePage) -> None:
    shown = Watch()
    followed = page.follow(shown, Path("g"), lambda: Any)
    assert state(page.address)["total"] == 0
    followed.begin(2, 3, 2, 4.0)
    now = state(page.address)
    assert (now["title"], now["done"], now["total"], now["rows"]) == ("A grid <b>", 0, 4, 3)
    assert now["seconds_left"] is None
    assert shown.total == 2

    one = job("a <script>", repeat=1)
    followed.trial(1, one)
    followed.event("phase", "load")
    running = {"label": "a <script>", "repeat": 1, "timing": False, "phase": "load", "step": None, "of": None}
    assert state(page.address)["running"] == [running]
    followed.event("phase", "forward")
    followed.event("step", (3, 16))
    assert state(page.address)["running"] == [running | {"step": 3, "of": 16}]
    followed.finished(record(one, metrics={"peak_memory_bytes": 2**20}))
    now = state(page.address)
    assert (now["done"], now["rows"], now["running"], now["failed"]) == (1, 4, [], 0)
    assert now["seconds_left"] > 0
    assert now["ended"] == [{"label": "a <script>", "repeat": 1, "status": "ok", "line": "1.00 MiB"}]

    failed = record(job("b\x1b[2J"), status="failed", phase="load", error_type="X", error="no such file")
    followed.finished(failed)
    visit = job("c", visit=Visit(block=1))
    followed.trial(3, visit)
    assert state(page.address)["running"][0]["timing"]
    step = Step(step=1, tracked=False, seconds=1.0, loss=1.0, grad_norm=1.0, learning_rate=1e-4, samples=1, tokens=9,
                supervised_tokens=9, padded_tokens=9, peak_memory_bytes=None, block=1)  # fmt: skip
    steps = (step, step.model_copy(update={"disturbed": True}), step.model_copy(update={"disturbed": True}))
    followed.finished(record(visit, steps=steps, disturbed=True))
    now = state(page.address)
    assert (now["done"], now["rows"], now["failed"], now["disturbed_steps"]) == (3, 5, 1, 2)
    assert [each["status"] for each in now["ended"]] == ["waited", "failed", "ok"]
    assert now["ended"][1]["line"] == "in load: no such file"
    assert "\x1b" not in now["ended"][1]["label"]

    followed.waiting(2)
    assert state(page.address)["note"] == "waiting for 2 trials of another runner"
    followed.trial(4, one)
    assert state(page.address)["note"] == ""
    assert ("", "waiting", 2) in shown.seen, "the terminal shows it too"


def test_a_run_of_several_trials_is_followed(
    page: LivePage, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request is answered at once and builds nothing while a trial runs; the next page is built after the trial."""
    asked: list[tuple[str, str, int]] = []

    def ask(label: str) -> None:
        now = state(page.address)
        assert now["running"][0] | {"label": label, "phase": "load"} == now["running"][0]
        assert (now["done"] == 0) == (now["seconds_left"] is None)
        if label in ("b", "c"):
            before = len(built.running)
            asked.append((label, get(page.address)[1], now["done"]))
            assert len(built.running) == before

    monkeypatch.setenv("FORMULA_SECONDS", "0.05")
    store = Store(tmp_path / "g")
    base = TrialSpec.model_validate(formula.BASE)
    specs = {name: base.model_copy(update={"seed": seed}) for seed, name in enumerate("abcd")}
    with LocalLauncher(child=formula.child, preload="harness.grids.search") as launcher:
        followed = page.follow(AtLoad(ask), store.folder, lambda: len(store.read("trials")))  # type: ignore[arg-type]
        run_grid(grid_of(**specs), store, launcher, followed)
    assert built.running == [[], []], "one for each request, and nothing was running"
    (first, small, _), (second, page_of_two, _) = asked
    assert (first, second) == ("b", "c")
    assert "The report appears here" in small
    assert "A grid &lt;b&gt;" in small
    assert page_of_two == "page 1 of 2 rows"
    assert get(page.address)[1] == "page 2 of 3 rows", "nobody has asked since"


def test_the_rows_of_an_earlier_run_are_there_at_once(page: LivePage, built: Built) -> None:
    page.follow(Watch(), Path("g"), lambda: 7).begin(2, 7)  # type: ignore[arg-type, return-value]
    assert built.running == [[]]
    assert get(page.address)[1] == "page 1 of 7 rows"


def test_a_page_that_takes_long_is_built_seldom(page: LivePage, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_BETWEEN_BUILDS", 4.0)
    followed = page.follow(Watch(), Path("g"), lambda: time.sleep(0.2))  # type: ignore[arg-type, return-value]
    followed.begin(9, 0)
    for _ in range(3):
        get(page.address)
        followed.finished(record(job()))
    assert len(built.running) == 1
    time.sleep(0.9)
    followed.finished(record(job()))
    assert len(built.running) == 2, "the request is remembered"


def test_of_several_workers_a_trial_runs_undisturbed_most_of_the_time(page: LivePage, built: Built) -> None:
    first = page.follow(Watch(), Path("g"), lambda: 1)  # type: ignore[arg-type, return-value]
    second = first.child_display()
    first.begin(9, 0)
    for display, name in ((first, "a"), (second, "b")):
        display.trial(1, job(name))
    assert [each["label"] for each in state(page.address)["running"]] == ["a", "b"]
    for _ in range(3):
        get(page.address)
        first.finished(record(job("a")))
        first.trial(1, job("a"))
    assert built.running == [["b"]], "once in 30 seconds"
    first.finished(record(job("a")))
    second.finished(record(job("b")))
    assert built.running == [["b"], []], "nothing runs: no need to wait"


# ------------------------------------------------------------------------------------ what goes wrong


def test_a_page_that_cannot_be_built_is_a_warning(page: LivePage, built: Built, console: Console) -> None:
    followed = page.follow(Watch(), Path("g"), lambda: 1)  # type: ignore[arg-type, return-value]
    followed.begin(9, 0)
    get(page.address)
    followed.finished(record(job()))
    built.error = RuntimeError("no [such] column\nat all")
    get(page.address)
    for _ in range(3):
        followed.finished(record(job()))
    assert len(built.running) == 4, "each ended trial may be what it takes"
    assert printed(console).count("the page could not be built: no [such] column") == 1
    assert state(page.address)["note"] == "the page could not be built: no [such] column"
    assert get(page.address)[1] == "page 1 of 1 rows", "the last good one stays"
    built.error = None
    followed.finished(record(job()))
    assert get(page.address)[1] == "page 2 of 1 rows"


def test_rows_that_cannot_be_compared_are_named_on_the_small_page(
    page: LivePage, built: Built, console: Console
) -> None:
    built.error = InputError("g: trials of 2 environments (<a>, b) are not comparable")
    followed = page.follow(Watch(), Path("g"), lambda: 1)  # type: ignore[arg-type, return-value]
    followed.begin(9, 1)
    status, text, _ = get(page.address)
    assert status == 200
    assert "trials of 2 environments (&lt;a&gt;, b) are not comparable" in text
    assert 'data-version="1"' in text
    assert "could not" not in printed(console)


def test_a_run_whose_report_cannot_be_made_ends_well(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    (tmp_path / "g.yml").write_text(json.dumps(GRID))
    monkeypatch.setattr(live.document, "document", broken)
    code, output, errors = ask("run", "g.yml", "--live", "--engine", "inline", "--no-predict", "--quiet", "--json")
    assert code == 0
    assert json.loads(output)["left"] == 0
    first_line = errors.splitlines()[0]
    assert re.fullmatch(r"the report while it grows: http://127\.0\.0\.1:\d+/", first_line), "even with --quiet"
    assert not (tmp_path / "reports").exists()
    code, output, _ = ask("run", "g.yml", "--live", "--engine", "inline", "--no-predict")
    assert code == 0
    assert "the report could not be written: broken" in output


def test_nothing_is_shown_of_a_dry_run(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "g.yml").write_text(json.dumps(GRID))
    code, _, errors = ask("run", "g.yml", "--live", "--dry-run")
    assert code == 2
    assert "leave one of them out" in errors


# ------------------------------------------------------------------------------------ from the first row to the report


def started(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """A run with a page, and its address."""
    (folder / "g.yml").write_text(json.dumps(GRID))
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "run", "g.yml", "--live", "--no-predict", *options],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("the report while it grows: "):
            return process, line.split()[-1]
    raise AssertionError("it ended before it began")


def test_the_page_becomes_the_report(tmp_path: Path) -> None:
    process, address = started(tmp_path, "--engine", "inline")
    assert process.stdout is not None
    pages, now = [get(address)[1]], {"finished": False}
    while not now["finished"]:
        now = state(address)
        if now["version"] != str(len(pages) - 1) and not now["finished"]:
            pages.append(get(address)[1])
        time.sleep(0.1)
    last = get(address)[1]
    output = process.stdout.read()
    process.stdout.close()
    assert process.wait(60) == 0, output
    assert "The report appears here" in pages[0]
    file = tmp_path / "reports/g/report.html"
    assert last == file.read_text(), "an open page is the file in the end"
    assert 'id="live"' not in last
    assert 'id="live"' in pages[1]
    assert "lora_r=8" in last
    assert (tmp_path / "reports/g/report.md").is_file(), "all of the report, as by `harness report`"
    assert "the report: reports/g/report.html" in output
    with pytest.raises(ConnectionRefusedError):
        get(address)


@pytest.mark.long
@pytest.mark.parametrize(
    ("signals", "code"),
    [([signal.SIGINT], 130), ([signal.SIGINT] * 2, 130), ([signal.SIGTERM], 143), ([signal.SIGHUP], 129)],
)
def test_an_interrupted_run_leaves_the_page_of_its_rows(
    tmp_path: Path, signals: list[signal.Signals], code: int
) -> None:
    process, _ = started(tmp_path)
    assert process.stdout is not None
    lines = iter(process.stdout)
    next(line for line in lines if line.startswith("[1/"))
    time.sleep(0.3)  # the page counts a trial once the terminal shows it
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    output = "".join(lines)
    process.stdout.close()
    assert process.wait(60) == code, output
    assert "go on" in output or "goes on" in output, "it says what the same command does"
    assert "the report: reports/g/report.html" in output
    assert "baseline" in (tmp_path / "reports/g/report.html").read_text()
    assert not (tmp_path / "reports/g/report.md").exists(), "the page alone, which is quicker"


# ------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def browser() -> Iterator[Any]:
    """It reaches this machine alone."""
    with chromium(loopback=True) as started:
        yield started


def test_an_open_page_follows_the_run(
    browser: Any, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def until(what: Callable[[Any], Any]) -> None:
        WebDriverWait(browser, 30, ignored_exceptions=[Exception]).until(what)

    def text(name: str) -> str:
        return str(browser.find_element(By.ID, name).text)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(live, "_BETWEEN_BUILDS", 0.0)
    folder = tmp_path / "results" / "g"
    measured(lambda **overrides: TrialSpec.model_validate(SMALL | overrides), folder)
    (one, two) = job("<script>alert(1)</script>", repeat=1), job("two")
    with LivePage(console, "A grid <b>") as page:
        followed = page.follow(Watch(), folder, lambda: loading.load(folder))
        browser.get(page.address)
        assert browser.find_element(By.TAG_NAME, "h1").text == "A grid <b>"
        followed.begin(3, 0)
        followed.trial(1, one)
        until(lambda _: text("live") == "0 of 3 trials and visits done")
        followed.event("step", (3, 16))
        until(lambda _: text("now") == "running: <script>alert(1)</script> (repeat 1), training: step 3 of 16")
        followed.event("step", (9, 16))
        until(lambda _: text("now").endswith("step 9 of 16"))
        failed = record(one, status="failed", phase="load", error_type="X", error="no <b>")
        monkeypatch.setattr(live, "_BETWEEN_BUILDS", 1e9)  # the small page stays, and lists it
        page._built_at, page._build_seconds = time.monotonic(), 1.0
        followed.finished(failed)
        until(lambda _: text("ended") == "<script>alert(1)</script> (repeat 1): failed. in load: no <b>")
        assert "1 of 3" in text("live")
        assert "1 failed" in text("live")

        # A row comes: the small page becomes the report.
        monkeypatch.setattr(live, "_BETWEEN_BUILDS", 0.0)
        followed.trial(2, two)
        followed.finished(record(two))
        until(lambda b: b.find_element(By.TAG_NAME, "body").get_attribute("data-drawn") == "yes")
        until(lambda _: text("live").startswith("2 of 3 trials and visits done · about "))
        assert browser.find_element(By.ID, "live").get_attribute("data-version") == "1"

        # Another one: the page is loaded again, and stays where it was read.
        browser.execute_script("window.scrollTo(0, 900); window.before = true")
        followed.trial(3, two)
        followed.finished(record(two))
        until(lambda b: b.find_element(By.ID, "live").get_attribute("data-version") == "2")
        until(lambda _: text("live").startswith("3 of 3"))
        assert browser.execute_script("return window.before === undefined")
        until(lambda b: abs(b.execute_script("return window.scrollY") - 900) < 100)

        # The run ends: it is the file now.
        page.write_report(loading.load(folder), folder)
        until(lambda b: not b.find_elements(By.ID, "live"))
        assert browser.find_element(By.ID, "techniques-rows")
    errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not errors, errors
