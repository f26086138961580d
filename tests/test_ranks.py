"""A trial over several processes trains as one does, and ends as one row whatever happens to a rank."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_launch import Acts, Watch, go, grid_of, workers
from test_results import record

from harness.launch.launcher import Launcher
from harness.launch.local import LocalLauncher
from harness.predict import peak
from harness.predict.prediction import Prediction
from harness.record import Record
from harness.results.store import Store
from harness.sources import models
from harness.spec.trial import TrialSpec
from harness.training import checkpoints, processes

Small = Callable[..., TrialSpec]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with LocalLauncher() as started:
        yield started


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose head has weights of its own, in three layers: an odd number of everything."""
    folder = tmp_path_factory.mktemp("untied")
    changed = {"tie_word_embeddings": False, "num_hidden_layers": 3, "vocab_size": 301}
    checkpoints._random_checkpoint(models.ARCHITECTURES["tiny"] | changed, folder)
    checkpoints.byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_two_processes_are_one_with_twice_the_micro_batch(
    small: Small, tmp_path: Path, launcher: Launcher, untied: str, adapter: str
) -> None:
    """Step by step, the last one too, which has no micro-batch for the second rank; sharded or not."""
    same = {"train_samples": 13, "adapter": adapter, "save_adapter": adapter == "lora", "base_model": untied}
    # Of an embedding that has an adapter, the adapter alone is kept: the base has the rest.
    same |= {"lora_target_modules": ["q_proj", "down_proj", "embed_tokens"]} if adapter == "lora" else {}
    same |= {"gradient_checkpointing": adapter == "lora", "loss": "full" if adapter == "lora" else "chunked"}
    together = same | {"micro_batch_size": 1, "num_processes": 2}
    grid = grid_of(
        alone=small(micro_batch_size=2, **same),
        both=small(**together),
        full=small(sharding="full_shard", **together),
        gradients=small(sharding="shard_grad_op", **together),
    )
    alone, *others = go(grid, Store(tmp_path), launcher).records
    assert alone.status == "ok", alone.error
    for other in others:
        assert other.status == "ok", other.error
        assert [s.loss for s in other.steps] == pytest.approx([s.loss for s in alone.steps], rel=1e-5)
        assert [s.grad_norm for s in other.steps] == pytest.approx([s.grad_norm for s in alone.steps], rel=1e-3)
        assert [s.samples for s in other.steps] == [4, 4, 4, 1]
        for name in ("tokens", "supervised_tokens"):
            assert [getattr(s, name) for s in other.steps] == [getattr(s, name) for s in alone.steps], (
                "no example twice"
            )
        for name in ("trained_tokens", "trainable_parameters", "total_parameters"):
            assert other.metrics[name] == alone.metrics[name]
        assert of("peak", other) < of("peak", alone), "half the micro-batch"
        assert other.metrics["flops_per_token"] == pytest.approx(alone.metrics["flops_per_token"], rel=0.1)
        predicted = peak.predict(other.spec, "cpu")
        # In the last step, of one example, the second rank computes for nothing.
        counted = other.metrics["flops_per_token"] * 13 / 14
        assert predicted.flops / predicted.positions == pytest.approx(counted, rel=0.01)
        assert_peak(other, predicted)
        losses = [(s.when, s.story_id, s.loss) for s in other.stories]
        assert losses == [(s.when, s.story_id, pytest.approx(s.loss, rel=1e-4)) for s in alone.stories]
    assert len(alone.stories) == 4
    replicated, *shardings = others
    assert of("weights", replicated) == of("weights", alone), "of one process, not of both"
    for sharded in shardings:
        for component in ("weights", "adapters", "gradients", "optimizer"):
            # Half, and a row of a weight with an odd number of them.
            assert of(component, sharded) == pytest.approx(of(component, alone) / 2, rel=0.02)
    full, gradients = shardings
    assert of("activations", full) < of("activations", gradients), "layers are resharded between the passes"
    learnt = [r.adapter_id and load_file(tmp_path / "adapters" / r.adapter_id / WEIGHTS) for r in (alone, *others)]
    assert all(learnt) == any(learnt) == (adapter == "lora")
    for weights in filter(None, learnt):
        assert weights.keys() == learnt[0].keys()
        assert {n.rsplit(".", 1)[-1] for n in weights if "embed_tokens" in n} == {
            "lora_embedding_A",
            "lora_embedding_B",
        }
        for name, weight in weights.items():
            torch.testing.assert_close(weight, learnt[0][name], rtol=1e-2, atol=1e-4)


WEIGHTS = "adapter_model.safetensors"


def test_the_usual_formats_are_sharded(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    """Weights of 16 bit with adapters of 32, of which most have fewer rows than there are processes."""
    together = {
        "num_processes": 3,
        "precision": "bf16",
        "lora_r": 2,
        "train_samples": 13,
        "gradient_accumulation_steps": 1,
    }
    grid = grid_of(replicated=small(**together), sharded=small(sharding="full_shard", **together))
    replicated, sharded = go(grid, Store(tmp_path), launcher).records
    assert (replicated.status, sharded.status) == ("ok", "ok"), sharded.error
    assert [s.loss for s in sharded.steps] == pytest.approx([s.loss for s in replicated.steps], rel=1e-3)
    assert of("weights", sharded) == pytest.approx(of("weights", replicated) / 3, rel=0.05)
    predicted = peak.predict(sharded.spec, "cpu")
    assert_peak(sharded, predicted)


GATHERED = 80_000
"""Bytes of what these small models gather at once: the embedding or the head, with adapters."""


def assert_peak(measured: Record, predicted: Prediction) -> None:
    """As predicted; sharded ranks may hold a buffer more, which gloo lets go of a moment late (LOG.md)."""
    late = GATHERED if measured.spec.sharding != "none" else 0
    most_late = {"peak_memory_bytes": late, "memory_activations_bytes": late}
    for name, size in ({"peak_memory_bytes": predicted.peak_memory_bytes} | predicted.breakdown).items():
        slack = 0.005 * size + (0 if name == "peak_memory_bytes" else 4096)
        assert size - slack <= (measured.metrics[name] or 0) <= size + slack + most_late.get(name, 0), name


def of(component: str, record: Record) -> int:
    """Bytes of it at a trial's peak, or the peak itself."""
    name = "peak_memory_bytes" if component == "peak" else f"memory_{component}_bytes"
    return int(record.metrics[name] or 0)


def family() -> list[psutil.Process]:
    return [child for worker in workers() for child in worker.children(recursive=True)]


def test_a_dead_rank_ends_the_trial_and_all_its_processes(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    members: list[psutil.Process] = []

    def kill_last() -> None:
        members.extend(family())
        members[-1].kill()

    def kill_worker() -> None:
        members.extend(family())
        workers()[0].kill()

    endless = {"num_processes": 2, "train_samples": 1_000_000}
    grid = grid_of(rank=small(**endless), worker=small(seed=1, **endless), after=small(seed=2, num_processes=2))
    began = time.monotonic()
    summary = go(grid, Store(tmp_path), launcher, Acts("optimizer", {"rank": kill_last, "worker": kill_worker}))
    assert time.monotonic() - began < 60
    ends = {r.label: (r.status, r.error_type, r.phase) for r in summary.records}
    assert ends.pop("after") == ("ok", None, None)
    assert {end[:2] for end in ends.values()} == {("killed", "SIGKILL")}
    assert len(members) == 4
    _, alive = psutil.wait_procs(members, timeout=15)
    assert not alive
    assert not workers()


def test_one_rank_out_of_memory_is_the_trial_out_of_memory(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    """The other ranks see no more than its end."""
    record: Record
    (record,) = go(
        grid_of(o=small(num_processes=2)), Store(tmp_path), LocalLauncher(child=second_has_no_memory)
    ).records
    assert (record.status, record.error_type, record.phase) == ("oom", "MemoryError", "forward")
    assert not workers()
    assert (
        go(grid_of(f=small(num_processes=2, learning_rate=1e30)), Store(tmp_path), launcher, Watch()).records[0].status
        == "diverged"
    )


def second_has_no_memory(job: str, options: dict[str, Any], channel: Any) -> None:
    from harness.training import distributed, step, worker

    original = step.Trainer.step

    def greedy(self: Any, batches: Any) -> Any:
        if distributed.rank() == 1:
            self.on_phase("forward")
            raise MemoryError("std::bad_alloc")
        return original(self, batches)

    step.Trainer.step = greedy  # type: ignore[method-assign]  # of a process that ends with this
    worker.main(job, options, channel)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "num_processes 1: there are no processes to shard over; use sharding: none"),
        ({"num_processes": 2, "precision": "nf4"}, "precision nf4: quantised weights are not sharded; use bf16"),
        (
            {"num_processes": 2, "precision": "bf16", "lora_bias": "all"},
            "use lora_bias: none, or precision: bf16-mixed",
        ),
        ({"num_processes": 2, "optimizer": "adamw_bnb_8bit"}, "use one of adagrad, adamw_torch, adamw_torch_fused, "),
    ],
)
def test_what_cannot_be_sharded(small: Small, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small(sharding="full_shard", **given)


def test_memory_is_that_of_the_heaviest_and_energy_of_all(small: Small) -> None:
    def of(**figures: float) -> Record:
        return record(small(num_processes=2), metrics=figures)

    light = of(
        peak_memory_bytes=5, memory_weights_bytes=3, peak_process_bytes=90, joules_per_token=1.0, tokens_per_second=7.0
    )
    heavy = of(
        peak_memory_bytes=6, memory_weights_bytes=2, peak_process_bytes=80, joules_per_token=2.0, tokens_per_second=7.0
    )
    assert processes.combine([light, heavy]).metrics == {
        "peak_memory_bytes": 6, "memory_weights_bytes": 2, "peak_process_bytes": 90, "joules_per_token": 3.0,
        "tokens_per_second": 7.0,
    }  # fmt: skip


def test_gradients_are_reduced_once_a_step(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    """For any number of micro-batches, and with different neurons dropped in each rank."""
    grid = grid_of(one=small(num_processes=2, gradient_accumulation_steps=4, lora_dropout=0.5))
    (trained,) = go(grid, Store(tmp_path), LocalLauncher(child=counting)).records
    assert trained.status == "ok", trained.error
    log = (tmp_path / "logs" / f"{trained.trial_id}.log").read_text()
    assert re.findall(r"reduced (\d+) dropout differs", log) == [str(1 + step) for step in range(len(trained.steps))]


def counting(job: str, options: dict[str, Any], channel: Any) -> None:
    """A worker whose first rank prints how many micro-batches have reduced their gradients."""
    from harness.training import distributed, step, worker

    gradient_sync, update = distributed.gradient_sync, step.Trainer.update
    reduced = []

    def counted(model: Any, *, last: bool) -> Any:
        context = gradient_sync(model, last=last)
        reduced.append(isinstance(context, contextlib.nullcontext))
        return context

    def printing(self: Any, loss: float) -> Any:
        seeds = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        torch.distributed.all_gather(seeds, torch.tensor([torch.initial_seed()]))
        if distributed.rank() == 0:
            print(f"reduced {sum(reduced)} {'dropout differs' if seeds[0] != seeds[1] else ''}", flush=True)
        return update(self, loss)

    distributed.gradient_sync = counted  # type: ignore[assignment]  # of a process that ends with this
    step.Trainer.update = printing  # type: ignore[method-assign]  # as above
    worker.main(job, options, channel)


def test_the_runner_alone_handles_an_interrupt(small: Small, tmp_path: Path, launcher: Launcher) -> None:
    def interrupt() -> None:
        for process in family():
            process.send_signal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    grid = grid_of(one=small(num_processes=2), two=small(num_processes=2, seed=1))
    summary = go(grid, Store(tmp_path), launcher, Acts("backward", {"one": interrupt}))
    assert [record.status for record in summary.records] == ["ok"]
    assert summary.left == 1
