"""Predictions that can be compared to the byte."""

from __future__ import annotations

import gc

from harness.environment import DeviceType
from harness.predict import peak
from harness.predict.prediction import Prediction
from harness.spec.trial import TrialSpec


def predicted(spec: TrialSpec, device_type: DeviceType = "cuda") -> Prediction:
    """What is predicted of a spec, without the time that it took, and with the work in one order."""
    gc.disable()  # two ways to predict would make it run at other moments, and small tensors in cycles wait for it
    try:
        prediction = peak.predict(spec, device_type)
    finally:
        gc.enable()
    work = sorted(prediction.work, key=lambda each: each.model_dump_json())
    return prediction.model_copy(update={"seconds": 0.0, "work": tuple(work)})
