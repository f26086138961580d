"""Real trials in the test's own process."""

from __future__ import annotations

import pytest

from harness.environment import current
from harness.record import Job, Record, Visit
from harness.spec.keys import FORMATS, QUANTISED
from harness.spec.trial import TrialSpec
from harness.training import half_matmul, trial


def run(spec: TrialSpec, visit: Visit | None = None) -> Record:
    """Run a trial on the CPU, or a visit to one, as a worker does."""
    half_matmul.install()
    return trial.run(Job(grid="test", spec=spec, label="test", visit=visit), environment=current("cpu"))


def quantizer_of(precision: str) -> dict[str, str]:
    """The key that goes with a quantised precision, where bitsandbytes does not have it; needs its library."""
    if precision not in QUANTISED or precision in FORMATS["bitsandbytes"]:
        return {}
    (quantizer,) = (name for name, formats in FORMATS.items() if precision in formats)
    pytest.importorskip(quantizer)
    return {"quantizer": quantizer}
