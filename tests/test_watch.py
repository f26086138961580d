"""Training loops that are not harness's: what is measured of them, and where it is kept."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from peft import LoraConfig, get_peft_model
from test_cli import ROOT, Ask
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import harness as library
from harness.errors import InputError
from harness.grids.grid import load
from harness.results.store import Store
from harness.training import batches, checkpoints, order
from harness.training.live_tensors import LiveTensors
from harness.watching import loop as watching_loop

WIDTHS = [64, 64, 64, 96, 64, 64]


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).train()


def texts(width: int) -> dict[str, torch.Tensor]:
    """Two examples, the second of them padded by eight; the first eight tokens are a prompt."""
    ids = torch.randint(0, 300, (2, width))
    mask = torch.ones_like(ids)
    mask[1, -8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loop(model: Any, widths: list[int], at_step: Callable[[int], None] = lambda step: None) -> list[float]:
    """A plain training of two micro-batches a step; the mean loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    means = []
    for step, width in enumerate(widths):
        at_step(step)
        losses = []
        for _ in range(2):
            loss = model(**texts(width)).loss
            (loss / 2).backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        means.append(sum(losses) / 2)
    return means


def rows(folder: Path) -> list[dict[str, Any]]:
    return Store(folder).read("trials").to_pylist()


def test_a_plain_loop(tmp_path: Path) -> None:
    model = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with library.watch(model, "mine", results=tmp_path / "mine") as watched:
        losses = loop(model, WIDTHS)
    (row,) = rows(tmp_path / "mine")
    assert watched.record is not None
    assert watched.record.trial_id == row["trial_id"]
    assert (row["label"], row["status"], row["watched"]) == ("mine (watched)", "ok", True)
    assert row["optimizer_steps"] == len(WIDTHS)
    steps = Store(tmp_path / "mine").read("steps").to_pandas().sort_values("step")
    assert steps["loss"].tolist() == pytest.approx(losses, rel=1e-6)
    assert steps["tokens"].tolist() == [2 * (2 * width - 8) for width in WIDTHS]
    assert steps["padded_tokens"].tolist() == [4 * width for width in WIDTHS]
    assert steps["supervised_tokens"].tolist() == [2 * (2 * width - 8 - 2 * 8) for width in WIDTHS]
    assert steps["samples"].unique().tolist() == [4]
    # What was seen of its configuration; the rest is null.
    seen = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"], "micro_batch_size": 2,
            "gradient_accumulation_steps": 2, "optimizer": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1,
            "precision": "fp32", "max_steps": 6, "gradient_checkpointing": False}  # fmt: skip
    assert {key: row[key] for key in seen} == seen
    assert row["seed"] is row["lr_scheduler"] is row["train_on_inputs"] is None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert row["trainable_parameters"] == trained
    assert row["memory_adapters_bytes"] == row["memory_gradients_bytes"] == 4 * trained
    parts = sum(p.requires_grad for p in model.parameters())
    assert row["memory_optimizer_bytes"] == 8 * trained + 4 * parts, "a counter each"
    frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    assert row["memory_weights_bytes"] == 4 * sum(each.numel() for each in frozen)
    assert row["flops_per_token"] > 2 * row["total_parameters"] * 0.5


def test_what_is_frozen_may_be_given_to_the_optimizer_too(tmp_path: Path) -> None:
    """As most programs for adapters do: torch passes it over."""
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with library.watch(model, results=tmp_path / "w") as watched:
        for _ in range(3):
            model(**texts(64)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert watched.record is not None
    assert len(watched.record.steps) == 3


def test_a_step_that_goes_on_after_an_evaluation_is_not_timed(tmp_path: Path) -> None:
    """Of seven micro-batches in steps of two, the last one of an epoch waits for the next epoch."""
    optimizer = torch.optim.AdamW((model := tiny()).parameters(), lr=1e-3)
    with library.watch(model, results=tmp_path / "w") as watched:
        for _ in range(2):
            model.train()
            for number in range(1, 8):
                model(**texts(64)).loss.backward()
                if number % 2 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                model(**texts(64))
            time.sleep(1.5)
    assert watched.record is not None
    slow = [step for step in watched.record.steps if step.seconds > 1.5]
    assert [(step.step, step.disturbed) for step in slow] == [(4, True)]


def test_the_peak_is_that_of_a_tracker_on_every_step(tmp_path: Path) -> None:
    """The widest micro-batch comes after the tracked steps, and is tracked all the same."""
    with library.watch(model := tiny(), results=tmp_path / "w"):
        loop(model, WIDTHS)
    (row,) = rows(tmp_path / "w")
    del model
    gc.collect()
    model, tracker = tiny(), LiveTensors("cpu")
    tracker.adopt([*model.parameters(), *model.buffers()], "weights")
    with tracker:
        loop(model, WIDTHS)
    assert row["peak_memory_bytes"] == pytest.approx(tracker.peak, rel=0.001)
    steps = Store(tmp_path / "w").read("steps").to_pandas().sort_values("step")
    assert steps["tracked"].tolist() == [True, True, False, True, False, False]
    with library.watch(narrow := tiny(), results=tmp_path / "n"):
        loop(narrow, [64] * 6)
    assert rows(tmp_path / "n")[0]["peak_memory_bytes"] < 0.9 * row["peak_memory_bytes"]


def test_timed_steps(tmp_path: Path) -> None:
    with library.watch(model := tiny(), results=tmp_path / "w") as watched:
        loop(model, [64] * 12)
    assert watched.record is not None
    quiet = [s for s in watched.record.steps if not s.tracked and not s.disturbed]
    metrics = watched.record.metrics
    assert metrics["timed_steps"] == len(quiet) if len(quiet) >= 3 else metrics["tokens_per_second"] is None
    if len(quiet) >= 3:
        expected = sum(s.tokens for s in quiet) / sum(s.seconds for s in quiet)
        assert metrics["tokens_per_second"] == pytest.approx(expected)


def test_a_loop_that_fails_is_a_row_and_leaves_the_model_alone(tmp_path: Path) -> None:
    def fail(step: int) -> None:
        if step == 3:
            raise RuntimeError("no more data")

    model = tiny()
    with pytest.raises(RuntimeError, match="no more data"), library.watch(model, results=tmp_path / "w"):
        loop(model, WIDTHS, fail)
    (row,) = rows(tmp_path / "w")
    assert (row["status"], row["error_type"], row["error"]) == ("failed", "RuntimeError", "no more data")
    assert row["optimizer_steps"] == 3
    assert row["tokens_per_second"] is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_failure_within_a_tracked_step(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(IndexError), library.watch(model, results=tmp_path / "w"):
        model(input_ids=torch.full((1, 8), 1000), labels=torch.zeros(1, 8, dtype=torch.int64))
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert [(row["status"], row["phase"]) for row in rows(tmp_path / "w")] == [("failed", "forward")]


def test_an_interrupt_ends_it_well(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), library.watch(model := tiny(), results=tmp_path / "w"):
        loop(model, WIDTHS, interrupt)
    assert [(row["status"], row["optimizer_steps"]) for row in rows(tmp_path / "w")] == [("ok", 4)]


def test_evaluation_and_other_optimizers_are_no_steps(tmp_path: Path) -> None:
    model, other = tiny(), torch.nn.Linear(4, 4)
    of_other = torch.optim.SGD(other.parameters(), lr=1.0)

    def between(step: int) -> None:
        model.eval()
        model(**texts(200))
        model.train()
        with torch.no_grad():
            model(**texts(200))
        other(torch.ones(4)).sum().backward()
        of_other.step()

    with library.watch(model, results=tmp_path / "w") as watched:
        loop(model, [64] * 4, between)
    assert watched.record is not None
    assert [s.padded_tokens for s in watched.record.steps] == [256] * 4
    assert watched.record.spec.optimizer == "adamw_torch"


def test_two_optimizers_make_one_step(tmp_path: Path) -> None:
    model = tiny()
    heads = torch.optim.SGD(model.lm_head.parameters(), lr=1e-2)
    body = torch.optim.AdamW(model.model.parameters(), lr=1e-3)
    with library.watch(model, results=tmp_path / "w") as watched:
        for _ in range(4):
            model(**texts(64)).loss.backward()
            for optimizer in (body, heads):
                optimizer.step()
                optimizer.zero_grad()
    assert watched.record is not None
    assert [s.samples for s in watched.record.steps] == [2] * 4
    assert watched.record.spec.optimizer == "adamw_torch"


def test_arithmetic_that_a_model_enters_by_itself(tmp_path: Path) -> None:
    """As accelerate does, which wraps `forward`: hooks of the model are outside of it."""
    model = tiny()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with library.watch(model, results=tmp_path / "w") as watched:
        loop(model, [64] * 3)
    assert watched.record is not None
    assert watched.record.spec.precision == "bf16-mixed"


def test_what_comes_between_steps_is_not_measured(tmp_path: Path) -> None:
    other = tiny(5).eval()

    def judge(step: int) -> None:
        if step:
            with torch.no_grad():
                other(input_ids=torch.ones(8, 512, dtype=torch.int64))

    for name, between in (("alone", lambda step: None), ("judged", judge)):
        torch.manual_seed(0)
        with library.watch(model := tiny(), name, results=tmp_path / "w"):
            loop(model, WIDTHS, between)
    alone, judged = rows(tmp_path / "w")
    assert judged["flops_per_token"] == alone["flops_per_token"]
    held = [row["peak_memory_bytes"] for row in (alone, judged)]
    assert held[0] == held[1]
    parts = [row["memory_activations_bytes"] for row in (alone, judged)]
    assert parts[0] == parts[1]


def test_arguments_by_position(tmp_path: Path) -> None:
    """Padding is none of the tokens, however the mask is given; peft's models have another order of arguments."""
    adapted = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    batch = texts(64)
    for name, model in (("plain", tiny()), ("adapted", adapted)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        with library.watch(model, name, results=tmp_path / "w") as watched:
            for _ in range(3):
                model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert watched.record is not None
        assert [s.tokens for s in watched.record.steps] == [120] * 3


def test_copies_and_files_of_a_watched_model(tmp_path: Path) -> None:
    """A teacher that is copied from it is another model, and so is what is loaded."""
    model = tiny()
    copies: list[Any] = []

    def copy_it(step: int) -> None:
        if step == 1:
            torch.save(model, tmp_path / "model.pt")
            copies.append(copy.deepcopy(model))
            copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
        for each in copies:
            each(**texts(128))

    with library.watch(model, results=tmp_path / "w") as watched:
        loop(model, [64] * 5, copy_it)
    for each in copies:
        each(**texts(256)).loss.backward()
    assert watched.record is not None
    assert [(s.samples, s.padded_tokens) for s in watched.record.steps] == [(4, 256)] * 5
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


@pytest.mark.parametrize("end", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_the_first_that_ended_well_is_the_baseline(end: BaseException, tmp_path: Path) -> None:
    """What did not fit is compared with nothing; a loop that is watched again, for longer, stays the baseline."""

    def stop(step: int) -> None:
        if step == 4:
            raise end

    with pytest.raises(type(end)), library.watch(model := tiny(), "batch 8", results=tmp_path / "w"):
        loop(model, WIDTHS, stop)
    names = ["batch 4", "batch 2"] if isinstance(end, RuntimeError) else ["batch 4", "batch 8"]
    for name in names:
        with library.watch(model := tiny(), name, results=tmp_path / "w"):
            loop(model, WIDTHS if name == "batch 8" else [32] * 5)
    compared = library.load(tmp_path / "w").comparisons
    other = "batch 2" if isinstance(end, RuntimeError) else "batch 4"
    assert set(compared["technique"]) == {f"{other} (watched)"}


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is no folder that can be written"):
        library.watch(tiny(), results=tmp_path / "file/w")


def test_repeats_of_one_training_are_rows_of_their_own(tmp_path: Path) -> None:
    for repeat in (0, 1):
        with library.watch(model := tiny(repeat), "mine", results=tmp_path / "w", repeat=repeat):
            loop(model, [64] * 3)
    with (
        pytest.warns(UserWarning, match="mine takes the place of an earlier row"),
        library.watch(model := tiny(), "mine", results=tmp_path / "w", repeat=1),
    ):
        loop(model, [64] * 3)
    assert sorted(row["repeat"] for row in rows(tmp_path / "w")) == [0, 1]


def test_a_loop_has_the_name_that_it_was_given(ask: Ask, tmp_path: Path) -> None:
    with library.watch(model := tiny(), "mine", results=tmp_path / "results/loops"):
        loop(model, [64] * 3)
    code, shown, _ = ask("show", "mine")
    assert code == 0
    assert "loops / mine (watched)" in shown
    assert "mine (watched)" in ask("show", "mine (watched)")[1]
    assert "mine (watched)" in ask("ls", "results/loops")[1], "a folder, as `report` takes it"
    code, _, errors = ask("recommend", "results/loops")
    assert code == 2
    assert "only watched loops ended well, which are not recommended" in errors


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """It ends as diverged; a micro-batch where nothing is supervised, whose mean is not a number, counts for none."""
    model = tiny()
    batch = texts(64)
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}

    def steps(after: float) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            model(**batch).loss.backward()
            model(**nothing)
            optimizer.step()
        with torch.no_grad():
            model.lm_head.weight.fill_(after)
        model(**batch).loss.backward()
        optimizer.step()

    with library.watch(model, "fine", results=tmp_path / "w"):
        steps(after=0.0)
    with library.watch(model, "bad", results=tmp_path / "w"):
        steps(after=float("nan"))
    by_label = {row["label"]: row for row in rows(tmp_path / "w")}
    fine, bad = by_label["fine (watched)"], by_label["bad (watched)"]
    assert (fine["status"], bad["status"], bad["error_type"]) == ("ok", "diverged", "Diverged")
    assert bad["error"] == "loss of step 4 is nan"
    of_steps = Store(tmp_path / "w").read("steps").to_pandas().set_index("trial_id")["loss"]
    assert of_steps.isna().groupby(level=0).sum().to_dict() == {fine["trial_id"]: 0, bad["trial_id"]: 1}


def test_losses_of_processes_that_divide_by_the_tokens_of_all() -> None:
    """As transformers' Trainer does: each has its part of the sum."""
    of_a_process = watching_loop._MicroBatch(1, 12, 10, 12, (1, 12), torch.tensor(40), torch.tensor(0.5))
    assert watching_loop._mean_loss([of_a_process, of_a_process]) == pytest.approx(0.5 * 40 / 10)


@pytest.mark.parametrize("attached_by", ["peft", "transformers"])
def test_adapters_of_other_names_attached_later(attached_by: str, tmp_path: Path) -> None:
    model = tiny()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    with library.watch(model, results=tmp_path / "w") as watched:
        if attached_by == "transformers":
            model.add_adapter(config, "mine")
            model.requires_grad_(False)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
            loop(model, [64] * 3)
        else:
            loop(get_peft_model(model, config, adapter_name="mine"), [64] * 3)
    assert watched.record is not None
    metrics = watched.record.metrics
    trained = 2 * 2 * 4 * (32 + 32)
    assert metrics["trainable_parameters"] == trained
    assert metrics["memory_adapters_bytes"] == metrics["memory_gradients_bytes"] == 4 * trained
    assert (watched.record.spec.lora_r, metrics["adapter_bytes"]) == (4, 4 * trained)
    base = sum(parameter.numel() for parameter in tiny().parameters())
    assert metrics["total_parameters"] == base + trained
    assert metrics["adapter_share"] == pytest.approx(trained / base)


def test_labels_that_are_not_of_tokens(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForSequenceClassification(config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with library.watch(model, results=tmp_path / "w") as watched:
        for _ in range(3):
            model(input_ids=torch.ones(2, 16, dtype=torch.int64), labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
    assert watched.record is not None
    assert [step.supervised_tokens for step in watched.record.steps] == [32] * 3


def test_nothing_to_measure(tmp_path: Path) -> None:
    unseen = pytest.warns(UserWarning, match="no optimizer step of this model was seen")
    with unseen, library.watch(tiny(), results=tmp_path / "w"):
        pass
    assert not (tmp_path / "w").exists()
    frozen = tiny().requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        library.watch(frozen)
    with pytest.raises(InputError, match="give 2 or more"):
        library.watch(tiny(), tracked_steps=1)
    with pytest.raises(InputError, match=r"spec: .*lora_rr"):
        library.watch(tiny(), spec={"base_model": "random:tiny", "lora_rr": 4})
    with pytest.raises(InputError, match="without input_ids"), library.watch(tiny(), results=tmp_path / "w") as watched:
        watched._loop.model(inputs_embeds=torch.ones(1, 8, 32))


def test_a_watched_loop_with_the_trials_of_a_grid(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training by a plain loop over the same examples: peak, first losses, and the page shows both."""
    grid = tmp_path / "g.yml"
    keys = SMALL | {"device": "cpu", "train_samples": 24, "learning_rate": 1e-3, "lr_scheduler": "constant"}
    grid.write_text(json.dumps({"name": "g", "base": keys, "vary": {"lora_r": [8]}, "visits": 0}))
    code, _, errors = ask("run", "g.yml", "--engine", "inline", "--no-predict")
    assert code == 0, errors
    _, before, _ = ask("report", "results/g")
    spec = next(each.spec for each in load(grid).trials if each.baseline)
    tokenizer = checkpoints.load_tokenizer(spec)
    data = batches.load(spec, tokenizer)
    folder = checkpoints.checkpoint_folder(spec.base_model)
    torch.manual_seed(spec.seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets)).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    with library.watch(model, "by hand", results=tmp_path / "results/g", spec=spec) as watched:
        for examples in order.optimizer_steps(spec, data.train):
            micro_batches = list(
                batches.micro_batches(examples, spec, checkpoints.pad_id(tokenizer, None), model.device)
            )
            for batch in micro_batches:
                (model(**batch.inputs).loss / len(micro_batches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert watched.record is not None
    by_label = {row["label"]: row for row in rows(tmp_path / "results/g")}
    mine, grids = by_label["by hand (watched)"], by_label["baseline"]
    assert mine["peak_memory_bytes"] == pytest.approx(grids["peak_memory_bytes"], rel=0.01)
    assert mine["trainable_parameters"] == grids["trainable_parameters"]
    assert mine["flops_per_token"] == pytest.approx(grids["flops_per_token"], rel=0.02)
    assert mine["baseline_id"] == grids["baseline_id"]
    assert (mine["data_fingerprint"], mine["base_fingerprint"]) == (
        grids["data_fingerprint"],
        grids["base_fingerprint"],
    )
    losses = Store(tmp_path / "results/g").read("steps").to_pandas()
    firsts = {name: losses[(losses["trial_id"] == row["trial_id"]) & (losses["step"] == 1)].iloc[0]
              for name, row in (("mine", mine), ("grids", grids))}  # fmt: skip
    assert firsts["mine"]["tokens"] == firsts["grids"]["tokens"]
    assert firsts["mine"]["loss"] == pytest.approx(firsts["grids"]["loss"], abs=1e-3)
    code, _, errors = ask("report", "results/g")
    assert code == 0, errors
    page = (tmp_path / "reports/g/report.md").read_text()
    assert "by hand (watched)" in page
    assert "loops of other programs, that were watched: by hand (watched)" in page
    assert "by hand" not in before
    loaded = library.load(tmp_path / "results/g")
    assert "by hand (watched)" in set(loaded.comparisons["technique"])
    assert ask("compare", "results/g", "results/g")[0] == 0


class _Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 300, (64,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def _fail(*_: Any) -> None:
    raise RuntimeError("the first time")


def test_transformers_trainer(ask: Ask, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
        learning_rate=3e-4, lr_scheduler_type="cosine", adam_beta2=0.95, seed=7, report_to=[], use_cpu=True,
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callback = library.WatchCallback("Trainer", results=tmp_path / "t")
    model = tiny()
    trainer = Trainer(model, arguments, train_dataset=_Rows(), callbacks=[callback])
    hook = model.register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="the first time"):
        trainer.train()
    hook.remove()
    with pytest.warns(UserWarning, match="Trainer did not end, and nothing is recorded"):
        trainer.train()  # of the training that failed nothing is left
    (row,) = rows(tmp_path / "t")
    seen = {"learning_rate": 3e-4, "lr_scheduler": "cosine", "adam_beta2": 0.95, "seed": 7, "micro_batch_size": 2,
            "gradient_accumulation_steps": 2, "optimizer_steps": 6, "adapter": "none",
            "max_grad_norm": 1.0}  # fmt: skip
    assert {key: row[key] for key in seen} == seen
    steps = Store(tmp_path / "t").read("steps").to_pandas().sort_values("step")
    logged = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert steps["loss"].tolist() == pytest.approx(logged, abs=2e-4)
    assert steps["samples"].tolist() == [4] * 6
    norms = [each["grad_norm"] for each in trainer.state.log_history if "loss" in each]
    assert steps["grad_norm"].tolist() == pytest.approx(norms)
    rates = [each["learning_rate"] for each in trainer.state.log_history if "loss" in each]
    assert steps["learning_rate"].tolist() == pytest.approx(rates, rel=1e-6)
    code, _, errors = ask("report", "t", "--output", "r")
    assert code == 0, errors


def test_a_trainer_that_stopped_leaves_the_next_one_alone(tmp_path: Path) -> None:
    """As in a notebook whose cell is run again: all of it is new."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip

    def train(model: Any, **options: Any) -> None:
        callbacks = [library.WatchCallback("cell", results=tmp_path / "t")]
        Trainer(model, arguments, train_dataset=_Rows(), callbacks=callbacks, **options).train()

    stopped = tiny()
    stopped.model.layers[1].register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="the first time"):
        train(stopped)
    gone = weakref.ref(stopped)
    del stopped
    model = tiny()
    own = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.3)
    with pytest.warns(UserWarning, match="cell did not end"):
        train(model, optimizers=(own, None))
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    gc.collect()
    assert gone() is None
    (row,) = rows(tmp_path / "t")
    seen = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.3, "lr_scheduler": "linear"}
    assert {key: row[key] for key in seen} == pytest.approx(seen)


@pytest.mark.parametrize(("given", "known"), [("linear", None), ("constant", "constant")])
def test_a_schedule_over_an_optimizer_without_one_is_not_known(given: str, known: str | None, tmp_path: Path) -> None:
    """transformers applies both, and a grid cannot."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=2, optim="schedule_free_sgd",
        lr_scheduler_type=given, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callbacks = [library.WatchCallback("free", results=tmp_path / "t")]
    Trainer(tiny(), arguments, train_dataset=_Rows(), callbacks=callbacks).train()
    (row,) = rows(tmp_path / "t")
    assert (row["optimizer"], row["lr_scheduler"]) == ("schedule_free_sgd", known)


TWO = """
import sys, torch
from test_watch import loop, tiny
from torch.nn.parallel import DistributedDataParallel
import harness
def main(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = tiny()
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(rank)
    with harness.watch(model, "two", results=f"{folder}/w"):
        loop(wrapped, [64] * 5)
    del wrapped, model  # torch (2.13) waits for ever now and then where they outlive the group
    torch.distributed.destroy_process_group()
if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), 2)
"""


def test_several_processes_make_one_row(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "two.py"), str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = rows(tmp_path / "w")
    assert row["num_processes"] == 2
    steps = Store(tmp_path / "w").read("steps").to_pandas()
    assert steps["samples"].tolist() == [8] * 5
    assert steps["tokens"].tolist() == [4 * (2 * 64 - 8)] * 5
