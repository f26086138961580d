"""Warm start of a study from rows measured before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from harness._util.messages import one_line
from harness.environment import Environment
from harness.grids.search import BEFORE, Score, Search
from harness.metrics import FITS, METRICS
from harness.record import NO_CONTENTS, Contents, trial_id
from harness.results.join import copy_trial
from harness.results.schema import spec_of
from harness.results.store import Store
from harness.spec.trial import TrialSpec
from harness.tuning.ownership import ROWS
from harness.tuning.samplers import distribution, fallback_value

_OTHER = "with other content of their data or base model"
_UNKNOWN = "from before contents were fingerprinted"


@dataclass(frozen=True)
class WarmStart:
    """Adds measured trials to a study and copies their rows to its store."""

    study: optuna.Study
    search: Search
    store: Store
    environment: Environment
    """That of the study's own trials."""
    contents_of: Callable[[TrialSpec], Contents]
    """Fingerprints of what the study's own trials read."""

    def add(self, source: Path) -> str:
        """Add the rows of a results folder that lie in the search space; says how many were used.

        A trial within the memory bound is the same with the bound as without, so its row is copied under the spec with
        the bound. A trial beyond it is added to the study as a violation, without its row.
        """
        rows = Store(source).read("trials").to_pylist()
        counts = dict.fromkeys(
            ("used", "of another environment", "outside the space", _OTHER, _UNKNOWN, "without a score"), 0
        )
        for row in sorted(rows, key=lambda r: r["started_at"]):
            if row["environment_id"] != self.environment.id:
                counts["of another environment"] += 1
                continue
            if row["twin"] or row["seed"] != self.search.base.seed:
                continue
            bounded: dict[str, Any] = {"memory_budget": self.search.memory, "device": self.search.base.device}
            spec = spec_of(row).model_copy(update=bounded | {"folder": self.search.base.folder})
            params = self.search.place(spec)
            score = self.search.score(row["status"], {name: row[name] for name in METRICS})
            if params is None:
                counts["outside the space"] += 1
            elif (contents := Contents.of_row(row)) != self.contents_of(spec):
                counts[_UNKNOWN if contents == NO_CONTENTS else _OTHER] += 1
            elif score is None:
                counts["without a score"] += 1
            else:
                counts["used"] += 1
                self._add_trial(Store(source), row, spec, params, score)
        used = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "no trials"
        return f"rows of {source}: {used}"

    def _add_trial(
        self, source: Store, row: Mapping[str, Any], spec: TrialSpec, params: Mapping[str, Any], score: Score
    ) -> None:
        number = len(self.study.get_trials(deepcopy=False))
        is_base = spec.id == self.search.base.id
        label = "baseline" if is_base else one_line(f"#{number} {row['label']}, measured before")
        by_name = {parameter.name: parameter for parameter in self.search.parameters}
        values = [fallback_value(self.study, self.search, k) if v is None else v for k, v in enumerate(score.values)]
        copied_id = trial_id(spec, self.environment, Contents.of_row(row))
        within = self.search.memory is None or max(row[name] or 0 for name in FITS) <= self.search.memory
        is_copied = row["status"] == "ok" and within
        about = {"source": source.folder.name, "label": label, "status": row["status"]}
        self.study.add_trial(
            optuna.trial.create_trial(
                params=dict(params),
                distributions={name: distribution(by_name[name]) for name in params},
                values=values,
                constraints=dict(score.violations),
                user_attrs=about | ({ROWS: {copied_id: label}} if is_copied else {}),
            )
        )
        if is_copied:
            place = {
                "grid": self.search.name, "label": label, "factor": None, "level": BEFORE,
                "baseline_id": self.search.base.id, "study": self.study.study_name, "study_trial": number,
                "memory_budget": self.search.memory, "device": self.search.base.device, "spec_id": spec.id,
                "folder": spec.folder, "trial_id": copied_id,
            }  # fmt: skip
            copy_trial(self.store, source, row["trial_id"], {**row, **place})
