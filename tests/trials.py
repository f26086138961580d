"""Real trials in the test's own process."""

from __future__ import annotations

from harness.environment import current
from harness.record import Job, Record
from harness.spec.trial import TrialSpec
from harness.training import half_matmul, trial


def run(spec: TrialSpec) -> Record:
    """Run a trial on the CPU, as a worker does."""
    half_matmul.install()
    return trial.run(Job(grid="test", spec=spec, label="test"), environment=current("cpu"))
