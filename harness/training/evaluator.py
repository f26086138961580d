"""What is measured of a trial's model before training and after it: losses of texts, and answers to questions."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch

from harness.record import ItemScore, LossesBefore, StoryLoss
from harness.sources import models
from harness.spec.trial import TrialSpec
from harness.training import batches, compilation, evaluation, loss_before, tasks
from harness.training.memory import MemoryMeter
from harness.training.step import Diverged

When = Literal["before", "after"]

_LARGEST_EXPONENT = math.log(sys.float_info.max)


class Evaluator:
    """The evaluations of one trial.

    Args:
        spec: of the trial.
        device: of the model.
        recorded: of the same untrained model, which are not measured again; null: none.
    """

    def __init__(self, spec: TrialSpec, device: torch.device, recorded: LossesBefore | None) -> None:
        self.spec, self.device = spec, device
        self.stories: list[StoryLoss] = []
        self.tasks: list[ItemScore] = []
        self._recorded = recorded
        self._pretrained = models.pretrained(spec.base_model)
        self.figures: dict[str, float | int | None] = {}
        self._peaks: dict[str, int] = {}

    def of(
        self, network: Any, texts: batches.Data, tokenizer: Any, pad_id: int, meter: MemoryMeter, when: When
    ) -> None:
        """Evaluate a model; `figures`, `stories` and `tasks` hold what is measured of it, until an error too.

        Args:
            network: evaluated, and left as it was.
            texts: of the trial.
            tokenizer: of the model.
            pad_id: token that stands where there is none.
            meter: whose peak is that of the texts. Questions are not tracked: a peak is of training and its losses.
            when: before training, or after it.

        Raises:
            Diverged: a loss is not finite.
        """
        loss = self._mean_loss(network, texts.held_out, pad_id, meter, when, "held-out")
        general = self._mean_loss(network, texts.general, pad_id, meter, when, "general")
        if when == "before":
            self.figures |= {"eval_loss_before": loss, "general_loss_before": general}
            self.figures["task_score_before"] = self._score(network, tokenizer, pad_id, when)
            return
        if loss is not None:
            self.figures |= {
                "eval_loss": loss,
                "eval_perplexity": math.exp(loss) if loss < _LARGEST_EXPONENT else None,
                "evaluated_stories": len(texts.held_out),
                "judged_tokens": sum(example.completion_tokens for example in texts.held_out),
            }
        if general is not None:
            self.figures["forgetting"] = general - self.figures["general_loss_before"]  # type: ignore[operator]  # set above
        self.figures["task_score"] = self._score(network, tokenizer, pad_id, when)

    def _mean_loss(
        self,
        network: Any,
        texts: Sequence[batches.Example],
        pad_id: int,
        meter: MemoryMeter,
        when: When,
        kind: Literal["held-out", "general"],
    ) -> float | None:
        """Mean loss over the tokens of texts; null without texts, or with random weights."""
        if not texts:
            return None
        losses = loss_before.reusable(self._recorded, texts, kind) if when == "before" else None
        if losses is None:
            meter.restart()
            tracking = functools.partial(meter.tracking, breakdown=False)
            with compilation.uncompiled(self.spec):
                losses = evaluation.story_losses(network, texts, self.spec, pad_id, self.device, tracking)
            # That of the evaluation after training, once there is one: not every trial measures before.
            self._peaks[when] = max(meter.peak(), self._peaks.get(when, 0))
            self.figures["peak_evaluate_bytes"] = self._peaks[when]
        if not self._pretrained:
            return None  # the loss of random weights is meaningless
        loss = evaluation.token_mean(losses)
        if loss is None or not math.isfinite(loss):
            raise Diverged(f"loss on {kind} texts is {loss} {when} training")
        self.stories += [StoryLoss(story_id=i, when=when, loss=x, tokens=n, kind=kind) for i, x, n in losses]
        return loss

    def _score(self, network: Any, tokenizer: Any, pad_id: int, when: When) -> float | None:
        """Mean score of the tasks; null without any, or with random weights."""
        if not self.spec.evaluate_tasks or not self._pretrained:
            return None
        known = () if self._recorded is None or when == "after" else self._recorded.tasks
        scores = list(known) or self._answered(network, tokenizer, pad_id, when)
        self.tasks += scores
        return tasks.mean(scores)

    def _answered(self, network: Any, tokenizer: Any, pad_id: int, when: When) -> list[ItemScore]:
        def losses(examples: Sequence[batches.Example]) -> list[tuple[str, float, int]]:
            measured = evaluation.story_losses(network, examples, self.spec, pad_id, self.device)
            if not all(math.isfinite(loss) for _, loss, _ in measured):
                raise Diverged(f"loss of an answer is not finite {when} training")
            return measured

        with compilation.uncompiled(self.spec):
            return tasks.scores(self.spec, tokenizer, network, losses, when)
