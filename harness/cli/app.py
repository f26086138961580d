"""The `harness` command.

Errors become one line and an exit code: 2 for bad input, 3 for failed trials, 1 for a run that could not go on; a plan
in which something does not fit ends with 4.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from harness import __version__
from harness._util.terminal import plain, print_anything
from harness.cli import adapters, doctor, export, methods, plan, publish, reports, results, run, training_files, tune
from harness.cli.console import err, out
from harness.errors import InputError, TrialsFailed, is_disk_full
from harness.sources import home

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure what each fine-tuning technique costs and buys: memory, speed and loss, on your machine.",
    epilog="[dim]Begin with[/] harness run grids/smoke.yml[dim], then[/] harness report results/smoke\n\n"
    "[dim]Exit codes: 0 done; 1 could not go on; 2 bad input; 3 trials failed, or none ended ok; "
    "4 a plan does not fit; 130 interrupted[/]",
)

# Each command with its examples, in the order of `harness --help`.
_COMMANDS: dict[str, dict[Callable[..., None], tuple[str, ...]]] = {
    "Measure": {
        run.run: (
            "harness run grids/techniques.yml",
            "harness run grids/smoke.yml --repeats 3",
            "harness run my.yml --memory 8GiB --dry-run",
        ),
        plan.plan: (
            "harness plan grids/llama3-8b.yml --gpu rtx4090,a100-80",
            "harness plan my.yml --memory 24GiB --output plans/my",
            "harness plan my.yml --gpu l4 --largest micro_batch_size",
            "harness plan my.yml --gpu rtx4090 --fix --output plans/my",
            "harness plan --calibrate results",
        ),
        training_files.import_file: (
            "harness import my_axolotl.yml -o grids/mine.yml",
            "harness import train_lora.yaml",
        ),
        tune.tune: (
            "harness tune grids/tune.yml --from results/techniques",
            "harness tune grids/tune.yml --trials 60 --export best.yml",
            "harness tune my.yml --memory 12GiB --sampler gp",
        ),
    },
    "Read": {
        reports.report: (
            "harness report",
            "harness report results/smoke --output /srv/pages/smoke",
            "harness report results/techniques --environment 3f2a1b00",
        ),
        reports.recommend: (
            "harness recommend results/techniques --memory 600MiB",
            "harness recommend --max-loss 3.7 --min-speed 100 --output best.yml",
        ),
        reports.compare: (
            "harness compare laptop/results/techniques results/techniques",
            "harness compare A B --across-environments",
        ),
        publish.publish: (
            "harness publish results/techniques --to ./published/techniques",
            "harness publish results/techniques --to me/small-machines --public",
        ),
        export.export: (
            "harness export results/techniques --to tensorboard",
            "harness export results/techniques --to mlflow --place sqlite:///mlflow.db",
        ),
        results.ls: ("harness ls", "harness ls techniques", "harness ls techniques --json"),
        results.show: ("harness show 3f2a", "harness show baseline"),
        results.keys: (),
        results.schema: ("harness schema > grid.schema.json",),
        methods.methods: ("harness methods", "harness methods loha"),
    },
    "Use a trained adapter": {
        adapters.merge: (
            "harness merge 3f2a1b --out merged/stories",
            "harness merge --config train.yml --adapter models/adapter --out merged/stories",
        ),
        adapters.evaluate: ("harness evaluate baseline", "harness evaluate 3f2a1b --stories 5 --rounds 8"),
        adapters.generate: (
            "harness generate baseline --synopsis 'A lighthouse keeper finds a letter.'",
            "harness generate 3f2a1b --model base --model merged --temperature 0.7",
        ),
    },
    "Maintain": {
        doctor.doctor: ("harness doctor", "harness doctor results"),
        results.merge_results: (
            "harness merge-results laptop/results results",
            "harness merge-results a/results/smoke b/results/smoke results/smoke",
        ),
        results.clean: (
            "harness clean",
            "harness clean results/smoke --dry-run",
            "harness clean --cache",
        ),
    },
}

for _group, _commands in _COMMANDS.items():
    for _command, _examples in _commands.items():
        _epilog = "\n\n".join(("[dim]Examples:[/]", *_examples)) if _examples else None
        _name = {training_files.import_file: "import"}.get(_command)  # a word of Python's
        app.command(_name, rich_help_panel=_group, epilog=_epilog)(_command)


def main() -> None:
    """Run the command that the arguments name; `harness.__main__` handles interrupts."""
    warnings.showwarning = _show_warning
    print_anything(sys.stdout, sys.stderr)
    home.name_folders_for_libraries()
    try:
        app()
    except InputError as error:
        _exit_with(str(error), 2)
    except TrialsFailed as error:
        _exit_with(str(error), 3)
    except UnicodeEncodeError as error:  # a name of a file
        name = ascii(error.object)
        _exit_with(f"the encoding of this locale, {error.encoding}, cannot write {name}; set LC_ALL=C.UTF-8", 1)
    except ImportError as error:
        _exit_with(f"{error}; `harness doctor` says what is missing", 1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away (| head); there is nobody to tell
        raise SystemExit(1) from None
    except OSError as error:
        after = "; what was finished is kept: free some space, and run the same again" if is_disk_full(error) else ""
        _exit_with((f"{error.strerror or error}: {error.filename}" if error.filename else str(error)) + after, 1)


def _exit_with(message: str, code: int) -> None:
    err.print(f"[red]harness:[/] {plain(' '.join(message.split()))}", soft_wrap=True, highlight=False)
    raise SystemExit(code)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
    """One line for a warning of harness; those of libraries are for their developers."""
    if category.__module__.startswith("harness"):
        err.print(f"[yellow]harness:[/] {plain(' '.join(str(message).split()))}", soft_wrap=True, highlight=False)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"harness {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
