"""The training step against transformers' Trainer, and against itself under other micro-batchings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trials
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerCallback, TrainingArguments

from harness.errors import InputError
from harness.spec.keys import LOW_RANK_OPTIMIZERS
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, model, order
from harness.training.step import Diverged, Trainer

CPU = torch.device("cpu")
Small = Callable[..., TrialSpec]


def prepared(spec: TrialSpec) -> tuple[Any, list[batches.Example], int]:
    """The model of a spec with its seeded adapters, its examples in training order, its pad id."""
    torch.manual_seed(spec.seed)
    tokenizer = checkpoints.load_tokenizer(spec)
    stories = batches.load(spec, tokenizer)
    steps = order.optimizer_steps(spec, stories.train)
    return model.load(spec, CPU), [example for step in steps for example in step], tokenizer.pad_token_id


def train(spec: TrialSpec) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Loss of each step, and the trained weights."""
    network, examples, pad = prepared(spec)
    size = spec.effective_batch_size
    groups = [examples[i : i + size] for i in range(0, len(examples), size)]
    trainer = Trainer(network, spec, CPU, len(groups))
    losses = [trainer.step(list(batches.micro_batches(group, spec, pad, CPU))).loss for group in groups]
    return losses, {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}


def test_gradients_that_overflow_in_fp16_are_taken_again(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is an update, at its own rate: other trainers skip those until the scale of the loss is found."""
    spec = small(precision="fp16-mixed", adapter="none", lr_scheduler="linear", max_steps=3)
    first, scaler = trials.run(spec), torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(scaler, init_scale=2.0**60))
    overflown = trials.run(spec)
    assert overflown.status == "ok", overflown.error
    assert overflown.metrics["optimizer_steps"] == len(overflown.steps) == len(first.steps) > 1
    for a, b in zip(first.steps, overflown.steps, strict=True):
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=0.02)
        assert b.learning_rate == a.learning_rate
    for name in ("peak_memory_bytes", "flops_per_token"):
        assert overflown.metrics[name] == first.metrics[name]


@pytest.mark.parametrize(
    "keys", [{"lora_modules_to_save": ["lm_head"]}, {"adapter": "ln_tuning"}], ids=["a whole layer", "ln_tuning"]
)
def test_weights_of_the_base_are_not_trained_in_fp16(keys: dict[str, Any], small: Small) -> None:
    with pytest.raises(InputError, match=r"precision fp16: .* use precision: bf16, or train no weights of the base"):
        model.skeleton(small(precision="fp16", **keys))


class _Rows(Dataset[dict[str, Any]]):
    def __init__(self, examples: list[batches.Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"example": self.examples[index]}


class _InOrder(HuggingFaceTrainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class _Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.seen.append(float(logs["loss"]))


def reference_losses(spec: TrialSpec, folder: Path) -> list[float]:
    """Loss of each step by transformers' own Trainer: same model, data order and configuration."""
    network, examples, pad = prepared(spec)
    losses = _Losses()
    trainer = _InOrder(
        model=network,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=spec.micro_batch_size,
            gradient_accumulation_steps=spec.gradient_accumulation_steps,
            num_train_epochs=1,
            learning_rate=spec.learning_rate,
            lr_scheduler_type=spec.lr_scheduler,
            warmup_steps=0,
            max_grad_norm=spec.max_grad_norm,
            weight_decay=spec.weight_decay,
            optim=spec.optimizer,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=spec.seed,
        ),
        train_dataset=_Rows(examples),
        data_collator=lambda rows: batches.collate([r["example"] for r in rows], pad, CPU).inputs,
        callbacks=[losses],
    )
    trainer.train()
    return losses.seen


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_losses_equal_those_of_the_transformers_trainer(
    small: Small, tmp_path: Path, adapter: str, accumulation: int
) -> None:
    spec = small(
        adapter=adapter,
        gradient_accumulation_steps=accumulation,
        train_samples=24,
        learning_rate=5e-3,
        weight_decay=0.1,
        lr_scheduler="cosine",
        sequence_length=384,
    )
    ours, _ = train(spec)
    theirs = reference_losses(spec, tmp_path)
    assert len(ours) == 24 // (2 * accumulation)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0], "it learns"


def test_micro_batching_changes_nothing_but_memory_and_time(small: Small) -> None:
    runs = [
        train(small(micro_batch_size=m, gradient_accumulation_steps=4 // m, sequence_length=384)) for m in (4, 2, 1)
    ]
    (losses, weights), *others = runs
    for other_losses, other_weights in others:
        assert other_losses == pytest.approx(losses, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "optimizer",
    [
        *(
            "adamw_torch",
            "adamw_bnb_8bit",
            "paged_adamw_8bit",
            "paged_adamw_32bit",
            "lion_8bit",
            "sgd",
            "adafactor",
            "muon",
        ),
        *("stable_adamw", "schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"),
        *("galore_adamw", "apollo_adamw", "adamw_torch_8bit", "adamw_torch_4bit"),
    ],
)
def test_optimizers_train(small: Small, optimizer: str) -> None:
    rate = 1.0 if optimizer.endswith("sgd") else 1e-2
    adapter = "none" if optimizer in LOW_RANK_OPTIMIZERS else "lora"
    losses, _ = train(small(optimizer=optimizer, adapter=adapter, learning_rate=rate, lora_r=16, train_samples=24))
    assert losses[-1] < losses[0]


def test_every_optimizer_of_the_spec_is_known_to_transformers() -> None:
    from typing import get_args

    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    from harness.spec.keys import Optimizer, Scheduler

    assert set(get_args(Optimizer)) - {"muon", "lora_fa"} <= {name.value for name in OptimizerNames}
    assert set(get_args(Scheduler)) <= {name.value for name in SchedulerType}


def test_fp16_scales_its_loss_and_trains(small: Small) -> None:
    losses, _ = train(small(precision="fp16", train_samples=24, learning_rate=1e-2, lora_r=16))
    assert losses[-1] < losses[0]


def test_clipping_limits_the_update(small: Small) -> None:
    def moved(limit: float) -> float:
        _, weights = train(
            small(max_grad_norm=limit, optimizer="sgd", learning_rate=1.0, train_samples=4, adapter="none")
        )
        network, *_ = prepared(small(adapter="none"))
        start = dict(network.named_parameters())
        return float(sum((w - start[n]).pow(2).sum() for n, w in weights.items()) ** 0.5)

    assert moved(1e-3) == pytest.approx(1e-3, rel=0.01)
    assert moved(0) > 1e-2


def test_a_loss_that_is_not_finite_ends_training(small: Small) -> None:
    with pytest.raises(Diverged, match="loss is"):
        train(small(learning_rate=1e30))
