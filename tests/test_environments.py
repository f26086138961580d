"""Where people run it: long temporary folders, users without a home, terminals of ASCII, interrupts, scripts."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formula
import pandas
import pytest
import yaml
from conftest import FEW, SMALL, Answer
from test_launch import Watch
from tiny_models import tiny_model

from harness._util.terminal import print_anything
from harness.analysis import comparison, longer, sequential
from harness.cli import failures, run, tune
from harness.errors import InputError, TrialsFailed
from harness.grids import preflight
from harness.launch import fork_server, inline
from harness.launch.local import LocalLauncher
from harness.predict.predictor import Predictor
from harness.report import writers
from harness.runner import grid_run
from harness.sources import home, models
from harness.tuning import study

ROOT = Path(__file__).parent.parent
Ask = Callable[..., Answer]
STOPPED = "harness: stopped; what was finished is kept, and the same command goes on from there\n"
NAMELESS = 54321
"""A user id that no system gives away."""


def grid(folder: Path, name: str = "g", **vary: Any) -> Path:
    base = SMALL | {"datasets": [{"path": FEW}], "train_samples": 4}
    file = folder / f"{name}.yml"
    file.write_text(yaml.safe_dump({"name": name, "visits": 0, "base": base, "vary": vary}), encoding="utf-8")
    return file


def python(*arguments: str, cwd: Path, prefix: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"} | variables
    return subprocess.run(
        [*prefix, sys.executable, *arguments],
        cwd=cwd,
        env={name: value for name, value in environment.items() if value},
        capture_output=True,
        timeout=240,
    )


# ------------------------------------------------------------------------------------ folders and users


@pytest.fixture
def nameless(tmp_path: Path) -> tuple[str, ...]:
    """The beginning of a command line that runs it as a user without a name; where that cannot be, as this one."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        return ()
    for folder in (tmp_path, *tmp_path.parents):
        mode = folder.stat().st_mode
        if mode & 0o055 != 0o055:
            folder.chmod(mode | 0o055)
    os.chown(tmp_path, NAMELESS, NAMELESS)
    # The interpreter may be in the home of root; what may be read there may not be written.
    read = [f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    return ("setpriv", f"--reuid={NAMELESS}", f"--regid={NAMELESS}", "--clear-groups", *read)


@pytest.mark.long
def test_a_run_without_home_name_or_short_tmpdir_on_a_terminal_of_ascii(
    tmp_path: Path, nameless: tuple[str, ...]
) -> None:
    grid(tmp_path, technique={"ü − 2": {"lora_r": 8}})
    temporary = tmp_path / ("t" * 150)
    temporary.mkdir()
    if nameless:
        os.chown(temporary, NAMELESS, NAMELESS)
    where = {"TMPDIR": str(temporary), "HOME": "" if nameless else "/dev/null", "HARNESS_CACHE": "",
             "XDG_CACHE_HOME": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # fmt: skip
    done = python("-m", "harness", "run", "g.yml", "--no-predict", cwd=tmp_path, prefix=nameless, **where)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "u - 2" in done.stdout.decode("ascii")
    assert set(pandas.read_parquet(tmp_path / "results/g/trials")["label"]) == {"baseline", "baseline again", "ü − 2"}
    caches = [folder.name for folder in temporary.iterdir() if folder.name.startswith("harness-")]
    assert len(caches) == 1
    assert not (tmp_path / "~").exists(), "no library takes ~ for a folder"

    done = python("-m", "harness", "report", "results/g", cwd=tmp_path, prefix=nameless, **where)
    assert (done.returncode, done.stderr) == (0, b"")
    done.stdout.decode("ascii")
    for name in ("report.md", "report.html"):
        assert "ü − 2" in (tmp_path / "reports/g" / name).read_text(encoding="utf-8")


def test_sockets_have_a_folder_with_a_short_path_which_is_removed(tmp_path: Path) -> None:
    temporary = tmp_path / ("t" * 150)
    temporary.mkdir()
    code = (
        "from multiprocessing import util\n"
        "from harness.launch import fork_server\n"
        "fork_server.start('harness.errors')\n"
        "print(util.get_temp_dir())\n"
    )
    done = python("-c", code, cwd=tmp_path, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.decode().strip())
    assert not folder.is_relative_to(tmp_path)
    assert not folder.exists()


def test_without_any_short_folder_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * 150)
    monkeypatch.setattr(fork_server, "_SHORT_FOLDERS", (str(tmp_path / "none"),))
    monkeypatch.setattr(fork_server.util, "get_temp_dir", tempfile.mkdtemp)
    with pytest.raises(InputError, match=r"too long for sockets.*set TMPDIR to a folder with at most 75 bytes"):
        fork_server._shorten_socket_paths()


def test_a_temporary_cache_is_nobody_elses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "HARNESS_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    folder = models.cache_folder()
    assert folder.parent.parent == tmp_path
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    home.name_folders_for_libraries()
    assert os.environ["HF_HOME"] == str(folder.parent / "huggingface")
    folder.parent.chmod(0o777)  # as somebody else may have left it
    with pytest.raises(InputError, match="set HARNESS_CACHE to a folder of yours"):
        models.cache_folder()


def test_a_cache_that_cannot_be_written_is_refused_before_work_starts(
    tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid(tmp_path, lora_r=[8])
    monkeypatch.setenv("HARNESS_CACHE", "/dev/null/cache")
    code, _, errors = ask("run", "g.yml")
    assert code == 2
    assert errors.splitlines() == [
        "harness: the cache /dev/null/cache cannot be written, and weights are kept there; "
        "set HARNESS_CACHE to a folder that can"
    ]
    assert not (tmp_path / "results").exists()
    code, output, _ = ask("doctor")
    assert code == 1
    assert "no  cache: /dev/null/cache cannot be written" in output


# ------------------------------------------------------------------------------------ terminals


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", "x0.5 -3 ... +-1 u ?"), ("latin-1", "×0.5 -3 ... ±1 ü ?"), ("utf-8", None)]
)
def test_a_terminal_gets_the_nearest_signs_that_it_has(encoding: str, printed: str | None) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_anything(terminal, None)
    terminal.write("×0.5 −3 … ±1 ü 日")
    terminal.flush()
    assert terminal.buffer.getvalue().decode(encoding) == (printed or "×0.5 −3 … ±1 ü 日")  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables_and_help_are_drawn_in_what_a_terminal_has(tmp_path: Path, encoding: str) -> None:
    for arguments in (("keys",), ("run", "--help")):
        done = python("-m", "harness", *arguments, cwd=tmp_path, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, b"")
        assert "?" * 5 not in done.stdout.decode(encoding), "lines are drawn with signs that it has"


# ------------------------------------------------------------------------------------ interrupts

INTERRUPT_AT = """
import os, signal, sys
from harness.__main__ import main
wanted, sys.argv = sys.argv[1], ["harness", "run", "g.yml", "--no-predict"]
class Interrupting:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
main()
"""


@pytest.mark.parametrize("module", ["harness.cli.app", "typer", "pydantic", "harness.cli.tune", "numpy", "pyarrow"])
def test_an_interrupt_while_libraries_are_imported_says_how_to_go_on(tmp_path: Path, module: str) -> None:
    grid(tmp_path, lora_r=[8])
    done = python("-c", INTERRUPT_AT, module, cwd=tmp_path)
    assert (done.returncode, done.stderr.decode()) == (130, STOPPED)


def test_an_interrupt_waits_for_the_library_that_is_being_imported(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n"
        "    raise ImportError('half imported') from None\n"
    )
    (tmp_path / "harness_like.py").write_text(
        "import time\n"
        "from harness import __main__ as entry\n"
        "from harness.cli import app\n"
        "def command():\n"
        "    import library\n"
        "    print('imported', flush=True)\n"
        "    time.sleep(20)\n"
        "app.main = command\n"
        "entry.main()\n"
    )
    done = python("harness_like.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (130, b"imported\n", STOPPED)


def test_the_fork_server_never_receives_an_interrupt(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\n"
        "from multiprocessing import forkserver\n"
        "from harness.launch import fork_server, isolated\n"
        "fork_server.start('harness.errors')\n"
        "server = forkserver._forkserver._forkserver_pid\n"
        "for _ in range(20):\n"
        "    os.kill(server, signal.SIGINT)\n"
        "    time.sleep(0.01)\n"
        "assert isolated.run_isolated(os.getppid) == server\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


class Impatient(Watch):
    """Ctrl-C amid one trial."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def trial(self, number: int, job: Any) -> None:
        super().trial(number, job)
        self.at -= 1

    def event(self, kind: str, value: Any) -> None:
        if (self.at, kind) == (0, "phase"):
            os.kill(os.getpid(), signal.SIGINT)


def _of_formula(*_: Any) -> LocalLauncher:
    return LocalLauncher(child=formula.child, preload="harness.grids.search")


Computed = Callable[..., tuple[int, str, list[dict[str, Any]]]]


@pytest.fixture
def computed(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Computed:
    """Runs a grid whose trials compute a formula, with Ctrl-C amid the n-th of them: exit code, what was printed in one
    line, and how each of its grids was run: its name, how many trials ran, and the options.
    """
    for command in (run, tune):
        monkeypatch.setattr(command, "make_launcher", _of_formula)
        monkeypatch.setattr(command, "inspect_trials", lambda *_, **__: None)
    monkeypatch.setattr(preflight, "preflight", lambda *_, **__: None)
    monkeypatch.setattr(tune, "device_rates", lambda *_: None)
    monkeypatch.setattr(Predictor, "predict", lambda _, specs: [])
    # What is printed of the rows takes seconds, and is nothing that these tests ask about.
    monkeypatch.setattr(comparison, "compare", lambda measurements: measurements)
    monkeypatch.setattr(writers, "terminal", lambda compared: "")
    monkeypatch.setattr(longer, "sentences", lambda compared: [])
    monkeypatch.setattr(run.beforehand, "print_forecast", lambda *_: None)
    real = grid_run.run_grid

    def call(*command: str, at: int = 0, **given: Any) -> tuple[int, str, list[dict[str, Any]]]:
        file = {"name": "g", "visits": 0, "base": formula.BASE} | given
        (tmp_path / "g.yml").write_text(yaml.safe_dump(file), encoding="utf-8")
        calls: list[dict[str, Any]] = []

        def watched(grid: Any, store: Any, by: Any, display: Any, *others: Any, **options: Any) -> grid_run.Summary:
            nonlocal at
            watch = Impatient(at)
            summary = real(grid, store, by, watch, *others, **options)
            at = watch.at
            calls.append({"name": grid.name, "ran": len(summary.records), **options})
            return summary

        monkeypatch.setattr(grid_run, "run_grid", watched)
        code, output, errors = ask(command[0], "g.yml", *command[1:])
        return code, " ".join((output + errors).split()), calls

    return call


def looks_twice(
    grid_of: Callable[[int], Any], least: int, most: int, execute: Callable[[Any], bool], *_: Any, **__: Any
) -> dict[str, Any] | None:
    """In place of `until_decided`: each look finds something undecided that one more repeat decides."""
    return {} if all(execute(grid_of(repeats)) for repeats in range(least, most + 1)) else None


def test_an_interrupt_ends_looking_for_what_is_undecided(computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "until_decided", looks_twice)
    decide = ("run", "--no-predict", "--until-decided", "3")
    code, printed, calls = computed(*decide, at=2, vary={"lora_r": [8]})
    assert (code, [each["ran"] for each in calls]) == (130, [2])
    assert "1 trial left; go on with the same command" in printed
    # Nothing is left of the first version, amid whose last trial it comes; but further ones may be.
    code, printed, calls = computed(*decide, at=1, vary={"lora_r": [8]})
    assert (code, [each["ran"] for each in calls]) == (130, [1])
    assert "not decided within" not in printed
    assert "stopped before all was decided; the same command goes on" in printed
    code, printed, calls = computed(*decide, "--minutes", "0", vary={"lora_r": [8]})
    assert (code, [each["ran"] for each in calls]) == (0, [0]), "nor does any follow once the time is up"
    assert "not decided within" not in printed
    code, printed, calls = computed(*decide, vary={"lora_r": [8]})
    assert (code, [each["ran"] for each in calls]) == (0, [0, 2, 2])
    assert "not decided within 3 visits and repeats: none" in printed


def test_what_is_run_again_is_so_once(computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "until_decided", looks_twice)
    computed("run", "--no-predict", vary={"lora_r": [8]})
    _, _, calls = computed("run", "--no-predict", "--until-decided", "2", "--rerun", "all", vary={"lora_r": [8]})
    assert [each["ran"] for each in calls] == [3, 2], "the second time the further repeat alone"
    assert calls[1]["rerun"] == {"skipped"}


def test_an_interrupt_amid_the_last_learning_rate_ends_before_the_comparison(computed: Computed) -> None:
    given = {"vary": {"lora_r": [8]}, "tune_first": {"learning_rate": [1e-4, 1e-3]}}
    code, printed, calls = computed("run", "--no-predict", at=4, **given)
    assert (code, [(each["name"], each["ran"]) for each in calls]) == (130, [("g-rates", 4)])
    assert "the comparison begins with the next run of the same command" in printed
    code, _, calls = computed("run", "--no-predict", **given)
    assert (code, [(each["name"], each["ran"]) for each in calls]) == (0, [("g-rates", 0), ("g", 3)])


def test_a_dry_run_counts_what_a_limit_lets_begin(computed: Computed) -> None:
    given = {"vary": {"lora_r": [8, 16]}}
    assert "4 trials, 4 to run, 1 of them now" in computed("run", "--dry-run", "--limit", "1", **given)[1]
    assert "of them now" not in computed("run", "--dry-run", "--limit", "4", **given)[1]
    _, printed, _ = computed("run", "--dry-run", "--limit", "7", tune_first={"learning_rate": [1e-4, 1e-3]}, **given)
    assert "6 trainings find the learning rates" in printed
    assert "4 trials, 4 to run, 1 of them now" in printed, "the trainings come first"
    _, printed, _ = computed("run", "--dry-run", "--limit", "2", tune_first={"learning_rate": [1e-4, 1e-3]}, **given)
    assert "find the learning rates, 6 of them to run, 2 now" in printed
    assert "0 of them now" in printed


SEARCHED = {"tune": {"space": {"lora_r": {"low": 1, "high": 16}}, "objectives": ["eval_loss"], "trials": 1,
                     "confirm": 2}}  # fmt: skip


def test_an_interrupted_confirmation_says_what_is_left(computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    left = grid_run.Summary((), 0, left=0, untimed=("baseline",), visits_left=3, asked=True, over=True)
    monkeypatch.setattr(study, "run_grid", lambda *_, **__: left)
    code, printed, _ = computed("tune", **SEARCHED)
    assert code == 130
    assert "3 timing visits left; go on with the same command" in printed


def test_a_search_without_a_disk_ends_with_one_line(
    tmp_path: Path, computed: Computed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    code, printed, _ = computed("tune", "--results", "file", **SEARCHED)
    assert code == 1
    assert printed.endswith("harness: Not a directory: file/g")
    (tmp_path / "results/g").mkdir(parents=True)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results/g")

    monkeypatch.setattr("optuna.storages.RDBStorage", full)
    code, printed, _ = computed("tune", **SEARCHED)
    assert code == 1
    assert "No space left on device: results/g; what was finished is kept: free some space" in printed


# ------------------------------------------------------------------------------------ scripts


def test_failed_trials_are_exit_code_three_and_one_line(tmp_path: Path, ask: Ask) -> None:
    damaged = Path(tiny_model(tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    ask("--version")  # what was printed meanwhile is read
    grid(tmp_path, base_model=[str(damaged)])
    for options in ((), ("--rerun", "killed")):  # the second time all are recorded
        code, output, errors = ask("run", "g.yml", "--no-predict", *options)
        assert code == 3
        assert "Traceback" not in output
        (line,) = errors.splitlines()
        assert line.startswith(f"harness: 1 of 3 trials failed: base_model={damaged} (failed, see results/g/logs/")
        assert line.endswith("; run them again with --rerun and that status; --allow-failures accepts that")
    log = tmp_path / line.split("see ")[1].split(")")[0]
    assert "Traceback" in log.read_text(encoding="utf-8")
    code, _, errors = ask("run", "g.yml", "--no-predict", "--allow-failures")
    assert code == 0
    assert "1 of 3 trials failed" in errors
    assert ask("run", "g.yml", "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("statuses", "complete", "message"),
    [
        (["ok", "oom", "diverged", "did_not_train", "skipped"], True, None),
        (["oom"], False, None),
        (["oom", "oom", "skipped"], True, r"none of 3 trials ended ok \(2 oom, 1 skipped\)"),
        (["ok", "timeout"], False, "1 of 2 trials failed: 1 .timeout.$"),
        (["killed"] * 5 + ["failed"], True, "6 of 6 trials failed: .*; 2 .killed.; and 3 more"),
        ([], True, None),
    ],
)
def test_results_are_no_failures(statuses: list[str], complete: bool, message: str | None) -> None:
    rows = [{"label": str(n), "repeat": 0, "status": status, "log": None} for n, status in enumerate(statuses)]
    if message is None:
        failures.refuse(rows, Path("g"), complete=complete)
        return
    with pytest.raises(TrialsFailed, match=message):
        failures.refuse(rows, Path("g"), complete=complete)
    with failures.allowed(True):
        failures.refuse(rows, Path("g"), complete=complete)


def test_what_an_inline_trial_warns_of_goes_to_its_log(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as file, inline._errors_to(file):
        print("from Python", file=sys.stderr)
        os.write(2, b"from C++\n")
    print("afterwards", file=sys.stderr)
    assert capfd.readouterr().err == "afterwards\n"
    assert set(log.read_text(encoding="utf-8").splitlines()) == {"from Python", "from C++"}


def test_a_library_that_cannot_be_imported_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    grid(tmp_path, lora_r=[8])
    path = os.pathsep.join((str(broken.parent), str(ROOT)))
    done = python("-m", "harness", "run", "g.yml", "--no-predict", "--limit", "1", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 2
    assert done.stderr == b"harness: OSError: libtorch.so: cannot open shared object file\n"
