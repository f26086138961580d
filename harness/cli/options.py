"""Options that several commands have, and the groups in which `--help` shows them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from harness.errors import InputError

TRIALS = "Which trials"
LIMITS = "Limits and retries"
WHERE = "Where trials run"
PREDICTION = "Prediction"
OUTPUT = "Input and output"

STALL_SECONDS = 1800.0
"""Default of `--stall`."""

Results = Annotated[
    Path,
    typer.Option(
        "--results", metavar="DIR", rich_help_panel=OUTPUT, help="Results folder, with a subfolder for each grid."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print JSON, and everything else to stderr.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", rich_help_panel=OUTPUT, help="Print errors alone, and what --json prints.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", rich_help_panel=OUTPUT, help="Let models from the hub run their own code here."
    ),
]
WithoutUnsupported = Annotated[
    bool,
    typer.Option(
        "--without-unsupported",
        rich_help_panel=TRIALS,
        help="Leave out what a training file of another tool asks for and harness has not; the report names it.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(metavar="MODEL", rich_help_panel=TRIALS, help="Base model of every trial, instead of the file's."),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", rich_help_panel=LIMITS, help="Memory budget of every trial, like 24GiB; enforced."),
]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", rich_help_panel=WHERE, help="cpu or cuda, instead of the file's.")
]
MaxTrials = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", rich_help_panel=TRIALS, help="Allow a grid of up to N trials; without it 500."),
]
Timeout = Annotated[
    float | None, typer.Option(min=1, metavar="SECONDS", rich_help_panel=LIMITS, help="Time limit of a trial.")
]
Stall = Annotated[
    float,
    typer.Option(
        min=0, metavar="SECONDS", rich_help_panel=LIMITS, help="Time limit without a sign of life in a step; 0: none."
    ),
]
Retries = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", rich_help_panel=LIMITS, help="Further attempts where a trial's process is killed or lost."
    ),
]
AllowFailures = Annotated[
    bool,
    typer.Option(
        "--allow-failures",
        rich_help_panel=LIMITS,
        help="Exit with 0 where trials failed, were killed or took too long, or none ended ok; without it with 3.",
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        rich_help_panel=WHERE,
        help="Trials at the same time, each on a part of the machine; auto: one for each card.",
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="ENGINE",
        rich_help_panel=WHERE,
        help="local: processes here; ray: tasks of a cluster; submitit: jobs of SLURM; inline: this process, for a "
        "debugger.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", rich_help_panel=WHERE, help="With --engine ray: the cluster's address, or auto."),
]
Cpus = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", rich_help_panel=WHERE, help="With --engine ray or submitit: cores of a trial."),
]
Accelerator = Annotated[
    str | None,
    typer.Option(
        metavar="CARD", rich_help_panel=WHERE, help="With --engine ray: use only this kind of card, like H100."
    ),
]
Partition = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=WHERE, help="With --engine submitit: SLURM's partition."),
]
JobMinutes = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", rich_help_panel=WHERE, help="With --engine submitit: time limit of a job."),
]
Array = Annotated[
    bool | None,
    typer.Option(
        "--array",
        rich_help_panel=WHERE,
        help="With --engine submitit: ask for all workers at once, as one job array.",
        show_default=False,
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TRACKER",
        rich_help_panel=OUTPUT,
        help="Send the results, when the run ends, to mlflow, tensorboard, trackio or wandb; may be repeated.",
    ),
]
Live = Annotated[
    bool,
    typer.Option(
        "--live",
        rich_help_panel=OUTPUT,
        help="Serve the report while the grid runs, at an address of this machine alone; write it when the run ends.",
    ),
]
GridFolder = Annotated[Path, typer.Argument(metavar="RESULTS", help="Results of a grid.", show_default=True)]
EnvironmentId = Annotated[str | None, typer.Option(metavar="ID", help="Environment id, where there are several.")]
TrialName = Annotated[
    str,
    typer.Argument(metavar="TRIAL", help="Beginning of the id, or label, of a trial with save_adapter: true."),
]


def check_memory(text: str | None) -> None:
    """Refuse what is no size.

    Raises:
        InputError: it is none.
    """
    from harness._util.units import parse_bytes

    if text is None:
        return
    try:
        parse_bytes(text)
    except ValueError as error:
        raise InputError(f"--memory: {error}") from None


def check_output(path: Path | None, *, is_folder: bool) -> None:
    """Refuse a file where a folder is wanted, and the other way round, before the work.

    Raises:
        InputError: it cannot be written.
    """
    if path is None:
        return
    there = next((each for each in (path, *path.parents) if os.path.exists(each)), path)
    wanted = "a folder" if is_folder else "a file"
    if there != path and not there.is_dir():
        raise InputError(f"--output {path}: {there} is a file, and no folder can be in it; name another")
    if os.path.exists(path) and path.is_dir() != is_folder:
        raise InputError(f"--output {path} is {'a file' if is_folder else 'a folder'}; name {wanted}")
