"""Optimizers of other libraries, and updates within the backward pass."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from tiny_models import tiny_model
from trials import run

from harness.environment import current
from harness.errors import InputError
from harness.grids import grid
from harness.predict import peak
from harness.record import Job
from harness.results import schema
from harness.spec.keys import SCHEDULE_FREE_OPTIMIZERS, TORCHAO_OPTIMIZERS, Optimizer
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, inspection, model, optimizers, order, trial
from harness.training.live_tensors import parts
from harness.training.step import Trainer

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")
ALONE = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
"""What an update within the backward pass needs."""


def prepared(spec: TrialSpec) -> tuple[Any, list[list[batches.Batch]]]:
    """A model before its steps, and the steps."""
    torch.manual_seed(spec.seed)
    tokenizer = checkpoints.load_tokenizer(spec)
    examples = batches.load(spec, tokenizer).train
    network = model.load(spec, CPU)
    steps = [
        list(batches.micro_batches(step, spec, tokenizer.pad_token_id, CPU))
        for step in order.optimizer_steps(spec, examples)
    ]
    return network, steps


def trained(spec: TrialSpec) -> tuple[Any, Trainer, list[list[batches.Batch]]]:
    """A model after its steps, its trainer and the steps."""
    network, steps = prepared(spec)
    trainer = Trainer(network, spec, CPU, len(steps))
    for step in steps:
        trainer.step(step)
    return network, trainer, steps


# ------------------------------------------------------------------------------------ of libraries


@pytest.mark.parametrize(
    ("optimizer", "of_each"), [("stable_adamw", 2), ("schedule_free_adamw", 2), ("schedule_free_sgd", 1)]
)
def test_state_of_adapters(optimizer: str, of_each: int, small: Small) -> None:
    network, trainer, _ = trained(small(optimizer=optimizer))
    weights = sum(p.numel() for p in model.trainable(network))
    assert sum(each.numel() for each in trainer.optimizer_state()) == of_each * weights


@pytest.mark.parametrize("optimizer", ["galore_adamw", "apollo_adamw"])
def test_state_of_projected_gradients(optimizer: str, small: Small, tmp_path: Path) -> None:
    """Two moments of a matrix m x n, m >= n, are of m x 128 projections; embeddings, head and norms have whole ones."""
    size = {"hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 1, "tie_word_embeddings": False}
    folder = tiny_model(tmp_path, config=size)
    network, trainer, _ = trained(small(base_model=folder, adapter="none", optimizer=optimizer))
    state = trainer.optimizer.state
    named = dict(network.named_parameters())
    for name, rows in (("gate_proj", 192), ("down_proj", 192), ("q_proj", 160)):
        (weight,) = (p for n, p in named.items() if name in n)
        assert sorted(state[weight]["exp_avg"].shape) == sorted((rows, 128)), name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert state[named[name]]["exp_avg"].shape == named[name].shape


@pytest.mark.long
@pytest.mark.parametrize(("optimizer", "bits"), [("adamw_torch_8bit", 8), ("adamw_torch_4bit", 4)])
def test_quantised_state_of_torchao(optimizer: str, bits: int, small: Small, tmp_path: Path) -> None:
    """Each of two moments has codes, a scale to 256 and a table of what codes mean; that of a small weight none."""
    pytest.importorskip("torchao")
    keys = {"base_model": tiny_model(tmp_path), "adapter": "none", "learning_rate": 1e-3}
    spec, plain = small(**keys, optimizer=optimizer), run(small(**keys))
    record = run(spec)
    assert record.status == "ok", record.error
    network, trainer, _ = trained(spec)
    sizes = [p.numel() for p in network.parameters()]
    assert max(sizes) >= 4096 > min(sizes)
    of_each = [n * bits // 8 + 4 * (n // 256 + 2**bits) if n >= 4096 and n % 256 == 0 else 4 * n for n in sizes]
    held = [part for state in trainer.optimizer_state() for part in parts(state)]
    assert sum(part.untyped_storage().nbytes() for part in held) == 2 * sum(of_each)
    assert record.metrics["memory_optimizer_bytes"] == pytest.approx(2 * sum(of_each), rel=0.005)
    for ours, theirs in zip(record.steps, plain.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.02)
        assert ours.learning_rate == pytest.approx(theirs.learning_rate)
    assert record.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=0.01)
    assert record.metrics["eval_loss"] < record.metrics["eval_loss_before"]
    measured = record.metrics["peak_memory_bytes"]
    assert peak.predict(spec, "cpu").peak_memory_bytes == pytest.approx(measured, rel=0.005)


def test_what_torchaos_update_holds_for_a_moment_counts(small: Small, tmp_path: Path) -> None:
    """Of large weights and few tokens it is the peak: state is unpacked, and packed again."""
    pytest.importorskip("torchao")
    folder = tiny_model(tmp_path, config={"hidden_size": 256, "head_dim": 64, "intermediate_size": 512})
    few = {"sequence_length": 160, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "train_samples": 4}
    spec = small(base_model=folder, adapter="none", optimizer="adamw_torch_8bit", val_set_size=0.0, **few)
    measured = run(spec).metrics["peak_memory_bytes"]
    assert peak.predict(spec, "cpu").peak_memory_bytes == pytest.approx(measured, rel=0.005)


def test_what_optimizers_do_not_go_with(small: Small) -> None:
    with pytest.raises(ValueError, match="use one above 0"):
        small(optimizer="schedule_free_adamw", adam_beta1=0.0)
    with pytest.raises(ValueError, match=r"optimizer galore_adamw with adapter lora, .*use adapter: none"):
        small(optimizer="galore_adamw")


@pytest.mark.parametrize("optimizer", sorted(SCHEDULE_FREE_OPTIMIZERS))
def test_averages_are_evaluated_and_kept(optimizer: str, small: Small, tmp_path: Path) -> None:
    """As the library does by hand: it trains at other weights than those that it is to be judged by."""
    spec = small(optimizer=optimizer, learning_rate=1e-2, save_adapter=True, lr_scheduler="constant", train_samples=24)
    record = trial.run(Job(grid="test", spec=spec, label="test"), environment=current("cpu"), folder=tmp_path)
    assert record.status == "ok", record.error
    (file,) = tmp_path.rglob("adapter_model.safetensors")
    kept = load_file(file)
    network, trainer, _ = trained(spec)
    at_gradients = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
    trainer.optimizer.eval()  # type: ignore[attr-defined]
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(kept[name.replace(".default", "")], weight.detach())
    assert any(not torch.equal(at_gradients[n], p) for n, p in network.named_parameters() if n in at_gradients)


@pytest.mark.parametrize("optimizer", sorted(SCHEDULE_FREE_OPTIMIZERS))
def test_schedule_free_optimizers_train_as_their_library_says(optimizer: str, small: Small) -> None:
    """At a constant rate after a warm-up of their own, under the default schedule too."""
    import schedulefree

    spec = small(optimizer=optimizer, warmup_steps=3, learning_rate=1e-2, gradient_accumulation_steps=1)
    assert spec.lr_scheduler == "linear"
    network, steps = prepared(spec)
    trainer = Trainer(network, spec, CPU, len(steps))
    ours = [trainer.step(step) for step in steps]

    network, _ = prepared(spec)
    weights = model.trainable(network)
    kind, options = {
        "schedule_free_adamw": (schedulefree.AdamWScheduleFree, {"warmup_steps": 3}),
        "schedule_free_radam": (schedulefree.RAdamScheduleFree, {}),
        "schedule_free_sgd": (schedulefree.SGDScheduleFree, {"warmup_steps": 3}),
    }[optimizer]
    library = kind(weights, lr=1e-2, **options)
    library.train()
    assert len(steps) == 8
    for (batch,), result in zip(steps, ours, strict=True):
        loss = network(**batch.inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, spec.max_grad_norm)
        library.step()
        library.zero_grad()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.learning_rate == library.param_groups[0]["scheduled_lr"]
    rates = [result.learning_rate for result in ours]
    if optimizer != "schedule_free_radam":  # whose warm-up follows from its betas
        assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, *[1e-2] * 6])


def test_rows_say_the_schedule_that_was_trained(small: Small, tmp_path: Path) -> None:
    """A grid of optimizers has one base: its schedule is not that of optimizers that have none."""
    file = tmp_path / "g.yml"
    base = SMALL | {"lr_scheduler": "linear"}
    file.write_text(json.dumps({"name": "g", "base": base, "vary": {"optimizer": ["schedule_free_adamw"]}}))
    by_label = {trial.label: trial.spec for trial in grid.load(file).trials if not trial.twin}
    plain, free = by_label["baseline"], by_label["optimizer=schedule_free_adamw"]
    assert free.id == free.model_copy(update={"lr_scheduler": "constant"}).id
    assert plain.id != plain.model_copy(update={"lr_scheduler": "constant"}).id
    row = schema.trial_row(run(free))
    assert (row["status"], row["optimizer"], row["lr_scheduler"]) == ("ok", "schedule_free_adamw", "constant")
    assert schema.spec_of(row).id == row["spec_id"] == free.id


def test_a_warm_up_of_an_optimizers_own_may_be_one_step(small: Small) -> None:
    """It begins above zero; a schedule's begins at zero, and would train nothing."""
    one = {"warmup_steps": 1, "max_steps": 1, "train_samples": None}
    order.check_schedules(small(optimizer="schedule_free_adamw", **one), 8)
    with pytest.raises(InputError, match="its learning rate is 0"):
        order.check_schedules(small(**one), 8)


def test_a_warm_up_that_nothing_has_makes_no_other_trial(small: Small) -> None:
    for without in ({"lr_scheduler": "constant"}, {"optimizer": "schedule_free_radam"}):
        ids = {small(**without, **keys).id for keys in ({}, {"warmup_steps": 4}, {"warmup_ratio": 0.1})}
        assert len(ids) == 1, without
    assert small(warmup_steps=0).id == small().id
    for having in ({}, {"lr_scheduler": "constant_with_warmup"}, {"optimizer": "schedule_free_sgd"}):
        ids = {small(**having, **keys).id for keys in ({}, {"warmup_steps": 4}, {"warmup_ratio": 0.1})}
        assert len(ids) == 3, having


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_keys_that_an_optimizer_does_not_take_make_no_other_trial(adapter: str, small: Small) -> None:
    of_adapter = {"lora": {"lora_fa"}, "none": {*get_args(Optimizer)} - {"lora_fa"}}[adapter]
    network = model.skeleton(small(adapter=adapter))

    def options(spec: TrialSpec) -> list[dict[str, Any]]:
        groups = optimizers.make(network, spec, 0).param_groups
        return [{name: value for name, value in group.items() if name != "params"} for group in groups]

    for optimizer in sorted(of_adapter):
        if optimizer in TORCHAO_OPTIMIZERS and importlib.util.find_spec("torchao") is None:
            continue
        plain = small(adapter=adapter, optimizer=optimizer)
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            other = small(adapter=adapter, optimizer=optimizer, **{key: 0.5})
            assert (other.id != plain.id) == (options(other) != options(plain)), (optimizer, key)


def test_what_is_not_installed_is_one_line(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"a: optimizer stable_adamw: optimi is not installed; pip install"):
        inspection.inspect([("a", small(optimizer="stable_adamw"))])


# ------------------------------------------------------------------------------------ within the backward pass


@pytest.mark.long
@pytest.mark.parametrize(
    ("optimizer", "keys"),
    [
        ("adamw_torch", {}),
        ("sgd", {"learning_rate": 0.1}),
        ("adamw_bnb_8bit", {}),
        ("adagrad", {"weight_decay": 0.1}),
        ("muon", {"gradient_checkpointing": True}),
        ("schedule_free_adamw", {"lr_scheduler": "constant"}),
        ("adamw_torch_8bit", {}),
    ],
)
def test_updates_within_the_backward_pass(optimizer: str, keys: dict[str, Any], small: Small, tmp_path: Path) -> None:
    """The same training, without the gradients of all weights at once."""
    size = {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 512}
    keys = {"base_model": tiny_model(tmp_path, config=size), "precision": "fp32", "train_samples": 8} | ALONE | keys
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"{i} " * 20}) for i in range(20)))
    keys |= {"adapter": "none", "optimizer": optimizer, "sequence_length": 16, "micro_batch_size": 1}
    keys |= {"datasets": [{"path": str(texts), "type": "completion"}], "min_completion_tokens": 4}
    specs = [small(**keys, optimizer_in_backward=on) for on in (False, True)]
    plain, within = (run(spec) for spec in specs)
    assert within.status == "ok", within.error
    for a, b in zip(plain.steps, within.steps, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
        assert b.learning_rate == a.learning_rate
    assert within.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=1e-5)
    saved = plain.metrics["peak_memory_bytes"] - within.metrics["peak_memory_bytes"]
    gradients = 4 * plain.metrics["trainable_parameters"]
    assert saved >= 0.7 * gradients  # activations are now what the peak has most of
    assert saved <= gradients or optimizer.startswith("schedule_free")  # whose update of all weights has copies of all
    measured = within.metrics["peak_memory_bytes"]
    assert peak.predict(specs[1], "cpu").peak_memory_bytes == pytest.approx(measured, rel=0.005)


def test_what_needs_all_gradients_is_refused(small: Small) -> None:
    for keys, reason in (
        ({"gradient_accumulation_steps": 2}, "use gradient_accumulation_steps: 1"),
        ({"max_grad_norm": 1.0}, "use max_grad_norm: 0"),
        ({"num_processes": 2}, "use num_processes: 1"),
        ({"precision": "fp16-mixed"}, "bf16 or fp32"),
        ({"optimizer": "apollo_adamw", "adapter": "none"}, "use galore_adamw"),
    ):
        with pytest.raises(ValueError, match=reason):
            small(**ALONE | keys, optimizer_in_backward=True)
