"""Predictions with a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from harness._util.terminal import plain
from harness.errors import InputError

if TYPE_CHECKING:  # imported where they are used: --help must answer at once
    from harness.environment import Environment
    from harness.predict.cards import Capability
    from harness.predict.prediction import Predictions, SpecPrediction
    from harness.predict.predictor import Predictor
    from harness.predict.roofline import Rates
    from harness.spec.trial import TrialSpec
from harness.cli.console import out


def predict_trials(specs: list[TrialSpec], trust_remote_code: bool, *, with_rates: bool) -> Predictions:
    """What is known of the trials before they begin; what cannot be predicted is run all the same.

    Args:
        specs: of the trials.
        trust_remote_code: let models from the hub run their own code.
        with_rates: measure the device's rates for step times; those of a part of the machine are not known.
    """
    from harness import environment
    from harness.predict.prediction import NO_PREDICTIONS, Predictions
    from harness.predict.predictor import Predictor

    if not specs:
        return NO_PREDICTIONS
    rates = device_rates(environment.resolve_device(specs[0].device)) if with_rates else None
    here = environment.current(environment.resolve_device(specs[0].device))
    with Predictor(trust_remote_code=trust_remote_code) as predictor:
        return Predictions.of(predict_all(predictor, specs, capability_of(here)), rates)


def capability_of(environment: Environment) -> Capability:
    """The generation of a machine's card; the most common one without."""
    from harness.predict import cards

    if environment.device_type == "cpu":
        return cards.AMPERE
    return cards.generation(cards.of_device(environment.device_name, environment.device_memory_bytes).capability)


def predict_all(predictor: Predictor, specs: list[TrialSpec], capability: Capability) -> list[SpecPrediction]:
    """Predictions with a bar while they are made.

    Args:
        predictor: for the device.
        specs: of the trials.
        capability: compute capability of a CUDA device.
    """
    from rich.progress import track

    predicted = predictor.predict(specs, capability)
    return list(track(predicted, "predicting peaks", total=len(specs), console=out, transient=True))


def device_rates(device_type: Literal["cpu", "cuda"]) -> Rates | None:
    """The rates of this machine's device, measured once for each environment; null where they cannot be had."""
    from harness.predict import rates_cache

    known = rates_cache.load(device_type)
    if known is not None:
        return known
    try:
        with out.status("measuring once what this device can do"):
            rates = rates_cache.measure(device_type)
    except (OSError, InputError) as error:
        out.print(
            f"the rates of this {device_type} are not known: {plain(str(error))}", style="yellow", highlight=False
        )
        return None
    out.print(f"this {device_type} at its best: {plain(rates.describe())}", style="dim", highlight=False)
    return rates
