"""Files of multiple-choice tasks in the format of lm-evaluation-harness, next to their questions. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness._util.messages import first_line, one_line, pip_install
from harness.errors import InputError
from harness.sources import files

_DATA = Path(__file__).parent / "data"
BUNDLED: dict[str, Path] = {"story-questions": _DATA / "story_questions.yaml"}
"""67 questions about 25 of the 32 stories that are held out of `storyteller` where nothing else is asked for."""
_BUILDERS = ("json", "csv", "parquet", "arrow")
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


@dataclass(frozen=True)
class TaskFile:
    """One task."""

    name: str
    config: dict[str, Any]
    """What the file says."""
    data: dict[str, Path]
    """File of each split."""

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The questions of each split.

        Raises:
            InputError: a file cannot be read, or has none.
        """
        read = {}
        for split, file in self.data.items():
            try:
                read[split] = list(files.read_file(file, self.config["dataset_path"]))
            except files.UNREADABLE as error:
                raise InputError(one_line(f"evaluate_tasks {self.name}: {file.name}: {first_line(error)}")) from None
            if not read[split]:
                raise InputError(f"evaluate_tasks {self.name}: {file.name} has no rows")
        return read


def read(name: str, folder: str | None = None) -> TaskFile:
    """The task of a bundled name or a file.

    Args:
        name: as in `evaluate_tasks`.
        folder: that a relative path begins at; null: the current one.

    Raises:
        InputError: there is none, or it is of a kind that is not measured.
    """
    path = BUNDLED.get(name) or Path(files.full_path(name, folder))
    where = f"evaluate_tasks {name}"
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{where}: give {', '.join(BUNDLED)} or a task file of lm-evaluation-harness (.yaml)")
    try:
        config = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}{files.hint_of_current(name, folder)}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InputError(one_line(f"{where}: not YAML without code: {first_line(error)}")) from None
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: it has no keys")
    config = dict(config)
    if "include" in config:
        raise InputError(f"{where}: include is not read; write what it includes into the file")
    if config.get("output_type") != "multiple_choice":
        raise InputError(f"{where}: output_type is {config.get('output_type')}; multiple_choice is measured")
    if config.get("dataset_path") not in _BUILDERS:
        raise InputError(
            f"{where}: dataset_path is {config.get('dataset_path')}; give {', '.join(_BUILDERS)} with "
            "dataset_kwargs: {data_files: …}, files next to the task's"
        )
    return TaskFile(str(config.get("task") or path.stem), config, _data(config, path.parent, where))


def check(name: str, folder: str | None = None) -> None:
    """Check that a task is there with its questions, and what asks them.

    Raises:
        InputError: it is not.
    """
    read(name, folder).rows()
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"evaluate_tasks: lm-evaluation-harness is not installed; {pip_install('tasks')}")


def _data(config: Mapping[str, Any], folder: Path, where: str) -> dict[str, Path]:
    arguments = config.get("dataset_kwargs")
    given = arguments.get("data_files") if isinstance(arguments, Mapping) else None
    named = given if isinstance(given, Mapping) else {"train": given}
    data = {str(split): folder / file for split, file in named.items() if isinstance(file, str)}
    if len(data) < len(named):
        raise InputError(f"{where}: dataset_kwargs: data_files names no file for each split")
    for file in data.values():
        if not file.is_file():
            raise InputError(f"{where}: there is no file {file}")
    for key in _SPLITS:
        if config.get(key) is not None and config[key] not in data:
            raise InputError(f"{where}: {key} is {config[key]}; data_files has {', '.join(data)}")
    return data


def paths(name: str, folder: str | None = None) -> list[Path]:
    """The files that a task is made of, in a fixed order.

    Raises:
        InputError: as for `read`.
    """
    task = read(name, folder)
    own = BUNDLED.get(name) or Path(files.full_path(name, folder))
    return [own, *(task.data[split] for split in sorted(task.data))]
