"""How long a training is: its steps and rates against transformers' Trainer, and what training files say of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments
from trials import run

from harness.errors import InputError
from harness.grids import grid
from harness.predict import peak
from harness.spec import length
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, model, order

Small = Callable[..., TrialSpec]

CPU = torch.device("cpu")
ROWS = 10
EIGHT_A_STEP: dict[str, Any] = {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "train_samples": None}


def sizes(available: int = ROWS, **keys: Any) -> list[int]:
    spec = TrialSpec.model_validate({"base_model": "random:tiny"} | EIGHT_A_STEP | keys)
    return length.step_sizes(spec, available)


@pytest.fixture
def ten(small: Small, tmp_path: Path) -> Small:
    """Makes specs of ten stories of different lengths, eight to a step."""
    rows = [{"synopsis": f"story {i}", "short_story": f"{i} " + "word " * (5 + 7 * i % 31)} for i in range(ROWS)]
    file = tmp_path / "ten.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda **keys: small(**{"datasets": [{"path": str(file)}], "val_set_size": 0} | EIGHT_A_STEP | keys)


# ------------------------------------------------------------------------------------ how many


def test_steps_run_across_epochs_unless_these_end_with_one() -> None:
    assert sizes(num_epochs=3.0) == [8, 8, 8, 6]
    assert sizes(num_epochs=3.0, epoch_end="step") == [8, 2, 8, 2, 8, 2]
    assert sizes(num_epochs=3.0, epoch_end="carry") == [8, 10, 10], "the last two are left out"
    assert sizes(11, num_epochs=3.0, epoch_end="carry") == [8, 11, 11]
    assert sizes(16, num_epochs=2.0) == sizes(16, num_epochs=2.0, epoch_end="step") == [8] * 4
    assert sizes(16, num_epochs=2.0, epoch_end="carry") == [8] * 4


def test_the_length_is_given_in_each_of_three_ways() -> None:
    for epoch_end, steps in {"continue": [8, 8, 8], "step": [8, 2, 8], "carry": [8, 10, 10]}.items():
        assert sizes(max_steps=3, epoch_end=epoch_end) == steps
    for epoch_end, steps in {"continue": [8, 8, 3], "step": [8, 2, 8, 1], "carry": [8, 10, 1]}.items():
        assert sizes(train_samples=19, epoch_end=epoch_end) == steps
    assert sizes(100, num_epochs=0.25) == [8, 8, 8, 1]
    assert sizes(100, num_epochs=0.25, epoch_end="step") == [8] * 4, "a quarter of 13 steps, rounded up"
    assert sizes(100) == sizes(100, epoch_end="step") == [8] * 12 + [4]


def test_an_epoch_ends_after_so_many_steps_at_most() -> None:
    for epoch_end in ("step", "carry"):
        assert sizes(26, num_epochs=2.0, epoch_end=epoch_end, max_steps_per_epoch=2) == [8] * 4
    assert sizes(num_epochs=3.0, epoch_end="carry", max_steps_per_epoch=1000) == [8, 10, 10], "no target"
    with pytest.raises(ValueError, match=r"max_steps_per_epoch with epoch_end continue.*; use epoch_end: step or"):
        sizes(max_steps_per_epoch=2)


@pytest.mark.parametrize("epoch_end", ["continue", "step", "carry"])
def test_dividing_a_batch_changes_no_step(epoch_end: str) -> None:
    ways = [
        sizes(
            n, num_epochs=2.0, epoch_end=epoch_end, micro_batch_size=m, gradient_accumulation_steps=a, num_processes=p
        )
        for n in (10, 11, 15)
        for m, a, p in ((2, 4, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))
    ]
    assert ways == [way for way in ways[::5] for _ in range(5)]


def test_an_epoch_without_a_step_is_refused(ten: Small) -> None:
    spec = ten(gradient_accumulation_steps=8, epoch_end="carry", num_epochs=4.0)
    with pytest.raises(InputError, match=r"epoch_end carry: 10 examples make no optimizer step of 16; use a smaller"):
        order.check_schedules(spec, ROWS)


def test_schedules_are_checked_against_the_steps_that_there_are(ten: Small) -> None:
    adalora = {"adapter": "adalora", "adapter_options": {"tinit": 2, "tfinal": 2}, "num_epochs": 3.0}
    order.check_schedules(ten(**adalora, epoch_end="step"), ROWS)  # of six steps
    with pytest.raises(InputError, match="leave no step of 4"):
        order.check_schedules(ten(**adalora), ROWS)


def test_a_single_pass_has_the_id_that_it_had(ten: Small) -> None:
    assert ten(epoch_end="step").id == ten().id == ten(num_epochs=1.0).id
    assert ten(epoch_end="step", num_epochs=2.0).id != ten(num_epochs=2.0).id
    assert ten(epoch_end="carry").id != ten().id


# ------------------------------------------------------------------------------------ which


@pytest.mark.parametrize("grouped", [False, True])
def test_each_epoch_has_every_story_once(ten: Small, grouped: bool) -> None:
    spec = ten(epoch_end="step", num_epochs=3.0, group_by_length=grouped)
    examples = batches.load(spec, checkpoints.load_tokenizer(spec)).train
    steps = order.optimizer_steps(spec, examples)
    assert [len(step) for step in steps] == sizes(num_epochs=3.0, epoch_end="step")
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert {e.story_id for e in (*first, *second)} == {e.story_id for e in examples}
    longest = sorted(map(len, examples), reverse=True)
    assert sorted(map(len, steps[0]), reverse=True) == longest[:8], "the longest of all come first"
    assert [e.story_id for e in steps[2]] != [e.story_id for e in steps[4]], "each epoch has an order of its own"
    single = ten(group_by_length=grouped)
    ends = single.model_copy(update={"epoch_end": "step"})
    assert order.optimizer_steps(ends, examples) == order.optimizer_steps(single, examples)
    assert {len(step) for step in order.timed_steps(spec, examples)} == {8}


# ------------------------------------------------------------------------------------ as transformers


class _Rows(Dataset[dict[str, Any]]):
    def __init__(self, steps: list[list[batches.Example]]) -> None:
        self.examples = [example for step in steps for example in step]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"example": self.examples[index]}


class _Passes(Sampler[int]):
    """One pass after another over rows that are given for all of them."""

    def __init__(self, rows: int) -> None:
        self.taken, self.rows = 0, rows

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        start, self.taken = self.taken, min(self.rows, self.taken + ROWS)
        return iter(range(start, self.taken))


class _InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> _Passes:
        return _Passes(len(self.train_dataset))  # type: ignore[arg-type]  # it has a length


def by_transformers(spec: TrialSpec, folder: Path) -> list[tuple[float, float]]:
    """Loss and learning rate of each step by transformers' own Trainer, on the same examples in the same order."""
    torch.manual_seed(spec.seed)
    tokenizer = checkpoints.load_tokenizer(spec)
    steps = order.optimizer_steps(spec, batches.load(spec, tokenizer).train)
    trainer = _InOrder(
        model=model.load(spec, CPU),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=spec.micro_batch_size,
            gradient_accumulation_steps=spec.gradient_accumulation_steps,
            num_train_epochs=spec.num_epochs or 1,
            max_steps=spec.max_steps or -1,
            warmup_steps=spec.warmup_ratio,  # below 1, it is a ratio
            learning_rate=spec.learning_rate,
            lr_scheduler_type=spec.lr_scheduler,
            optim=spec.optimizer,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=spec.seed,
        ),
        train_dataset=_Rows(steps),
        data_collator=lambda rows: batches.collate([r["example"] for r in rows], tokenizer.pad_token_id, CPU).inputs,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [(entry["loss"], entry["learning_rate"]) for entry in logged]


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"num_epochs": 3.0}, 6),
        ({"num_epochs": 2.4}, 5),
        ({"num_epochs": 3.0, "lr_scheduler": "cosine", "warmup_ratio": 0.3}, 6),
        ({"max_steps": 5, "lr_scheduler": "constant"}, 5),
    ],
)
def test_steps_losses_and_rates_are_those_of_transformers(
    ten: Small, tmp_path: Path, keys: dict[str, Any], steps: int
) -> None:
    """The last step of an epoch has the two stories that are left."""
    spec = ten(epoch_end="step", learning_rate=5e-3, **keys)
    record = run(spec)
    assert record.status == "ok", record.error
    assert [step.samples for step in record.steps] == [8, 2, 8, 2, 8, 2][:steps]
    losses, rates = zip(*by_transformers(spec, tmp_path / "out"), strict=True)
    assert [step.learning_rate for step in record.steps] == pytest.approx(rates)
    assert [step.loss for step in record.steps] == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize(
    "keys",
    [
        {"epoch_end": "step"},
        {"epoch_end": "carry"},
        {"epoch_end": "step", "sample_packing": True},
        {"epoch_end": "step", "num_processes": 2, "gradient_accumulation_steps": 2},
    ],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
def test_what_a_step_of_another_size_holds_is_predicted(ten: Small, keys: dict[str, Any]) -> None:
    spec = ten(num_epochs=2.0, **keys)
    predicted = peak.predict(spec, "cpu")
    longest = max(map(len, batches.load(spec, checkpoints.load_tokenizer(spec)).train))
    assert predicted.positions > 4 * longest, "the time of a step is that of a full one, not of one of two stories"
    if spec.num_processes == 1:
        record = run(spec)
        assert record.status == "ok", record.error
        assert predicted.peak_memory_bytes == pytest.approx(record.metrics["peak_memory_bytes"], rel=0.001)


# ------------------------------------------------------------------------------------ training files


OF_TRL = (
    "model_name_or_path: random:tiny\ndataset_name: rows.jsonl\nnum_train_epochs: 3\n"
    "per_device_train_batch_size: 2\ngradient_accumulation_steps: 4\n"
)
OF_LLAMA_FACTORY = OF_TRL.replace("dataset_name: rows.jsonl", "stage: sft\nfinetuning_type: lora\ndataset: rows")
OF_AXOLOTL = (
    "base_model: random:tiny\ndatasets: [{path: rows.jsonl, type: alpaca}]\nnum_epochs: 3\nmicro_batch_size: 2\n"
    "gradient_accumulation_steps: 4\nlearning_rate: 0.0002\n"
)
OF_TORCHTUNE = """
model: {_component_: torchtune.models.llama3_2.llama3_2_1b}
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: tokenizer.model}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: model}
dataset: {_component_: torchtune.datasets.alpaca_dataset}
optimizer: {_component_: torch.optim.AdamW, lr: 0.0002}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
epochs: 3
batch_size: 2
gradient_accumulation_steps: 4
"""


def of_file(folder: Path, text: str) -> TrialSpec:
    (folder / "dataset_info.json").write_text('{"rows": {"file_name": "rows.jsonl"}}', encoding="utf-8")
    file = folder / "file.yml"
    file.write_text(text, encoding="utf-8")
    return grid.load(file).trials[0].spec


@pytest.mark.parametrize("text", [OF_TRL, OF_LLAMA_FACTORY, OF_AXOLOTL], ids=["TRL", "LLaMA-Factory", "Axolotl"])
def test_epochs_of_a_file_have_the_steps_of_transformers(text: str, tmp_path: Path) -> None:
    spec = of_file(tmp_path, text)
    assert (spec.val_set_size, length.step_sizes(spec, ROWS)) == (0, [8, 2, 8, 2, 8, 2])


def test_epochs_of_a_file_have_the_steps_of_torchtune(tmp_path: Path) -> None:
    spec = of_file(tmp_path, OF_TORCHTUNE)
    assert (spec.val_set_size, length.step_sizes(spec, ROWS)) == (0, [8, 10, 10])
    beyond = of_file(tmp_path, OF_TORCHTUNE + "max_steps_per_epoch: 1000\n")
    assert length.step_sizes(beyond, ROWS) == [8, 10, 10], "no epoch has as many"
    limited = of_file(tmp_path, OF_TORCHTUNE + "max_steps_per_epoch: 2\n")
    assert length.step_sizes(limited, 100) == [8] * 6
