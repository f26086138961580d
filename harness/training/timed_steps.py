"""The steps that a timing visit repeats: of a trial, or of the baseline, which is timed in turn with it."""

from __future__ import annotations

from typing import Any

import torch

from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, compilation, limits, model, order
from harness.training.batches import Batch
from harness.training.live_tensors import LiveTensors
from harness.training.step import StepResult, Trainer


class TimedSteps:
    """A model, and its different steps.

    Args:
        network: trained in place.
        spec: of the trial.
        stories: its data.
        pad_id: token of padding.
        device: of the model.
        options: further arguments of `Trainer`.
    """

    def __init__(
        self, network: Any, spec: TrialSpec, stories: batches.Data, pad_id: int, device: torch.device, **options: Any
    ) -> None:
        self.spec = spec
        planned = len(order.optimizer_steps(spec, stories.train))
        self.trainer = Trainer(network, spec, device, planned, **options)
        self.steps = [
            list(batches.micro_batches(examples, spec, pad_id, device))
            for examples in order.timed_steps(spec, stories.train)
        ]

    @classmethod
    def load(cls, spec: TrialSpec, device: torch.device, *, trust_remote_code: bool) -> TimedSteps:
        """Those of a spec whose model and data are not there yet, warmed up.

        Args:
            spec: of a trial in one process.
            device: to load its model on.
            trust_remote_code: let a model from the hub run its own code.
        """
        tokenizer = checkpoints.load_tokenizer(spec, trust_remote_code=trust_remote_code)
        stories = batches.load(spec, tokenizer)
        network = model.load(spec, device, trust_remote_code=trust_remote_code)
        if spec.torch_compile:
            compilation.compile_layers(network)
        pad_id = checkpoints.pad_id(tokenizer, limits.of_model(network).embeddings)
        loaded = cls(network, spec, stories, pad_id, device)
        for step in loaded._first():
            loaded.trainer.step(step)
        return loaded

    def warm_up(self, tracker: LiveTensors) -> None:
        """Do what is done once, under a tracker, by whose budget the steps are held."""
        for step in self._first():
            self.trainer.tracked_step(step, tracker)

    def _first(self) -> list[list[Batch]]:
        """The widest step; what is compiled may need graphs of each."""
        widest = max(self.steps, key=lambda step: max(batch.padded_tokens for batch in step))
        return self.steps if self.spec.compiles else [widest]

    def take(self, number: int) -> StepResult:
        """One of the steps, by its number from 0, which goes round."""
        return self.trainer.step(self.steps[number % len(self.steps)])
