"""Compiled layers: the same training, with memory that is really held, and time of compilation apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trials
from conftest import SMALL
from torch._dynamo.utils import counters

from harness import environment
from harness.errors import InputError
from harness.grids import grid, preflight
from harness.predict import peak
from harness.record import Job, Record, Visit
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, compilation, half_matmul, model, order, trial
from harness.training.live_tensors import OutOfBudget
from harness.training.memory import MemoryMeter
from harness.training.step import Trainer

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")
FEW: dict[str, Any] = {"lora_target_modules": ["q_proj"], "train_samples": 8}
"""Adapters on one layer of each: to compile a linear layer with an adapter takes a second or two."""
DENSE = FEW | {"gradient_checkpointing": True, "sample_packing": True, "loss": "chunked"}


@pytest.fixture(scope="module", autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is compiled with a cache is compiled once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield


def of_step(
    spec: TrialSpec, budget: int | None = None
) -> tuple[list[torch.Tensor], dict[str, int], compilation.Compilations]:
    """Gradients of a micro-batch after the first one, its peak by the tracker and by the allocator's own events above
    what was held before, and what was compiled.
    """
    torch.manual_seed(spec.seed)
    meter = MemoryMeter(CPU, budget, compiled=spec.torch_compile)
    with compilation.counted(spec, "cpu", empty_cache=False) as compiled:
        tokenizer = checkpoints.load_tokenizer(spec)
        with meter.phase(breakdown=True):
            network: Any = model.load(spec, CPU)
            meter.adopt_model(network, model.adapters(network))
        meter.tracker.component = "activations"
        if spec.torch_compile:
            compilation.compile_layers(network)
        step, *_ = order.optimizer_steps(spec, batches.load(spec, tokenizer).train)
        trainer = Trainer(network, spec, CPU, 1)
        trainer.update = lambda *terms: None  # type: ignore[assignment, method-assign, return-value]  # gradients stay
        micro_batches = list(batches.micro_batches(step, spec, tokenizer.pad_token_id, CPU))
        for _ in range(2):  # gradients are new in the first one
            with meter.phase(breakdown=True):
                held, meter.tracker.flops = meter.tracker.total, 0
                trainer.tracked_step(micro_batches, meter.tracker)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            trainer.step(micro_batches)
    peaks = {
        "tracker": meter.tracker.peak - held,
        "allocator": highest_allocated(profile),
        "flops": meter.tracker.flops,
    }
    return [parameter.grad for parameter in model.trainable(network)], peaks, compiled


def highest_allocated(profile: Any) -> int:
    """Most bytes that torch's allocator held at a time, above what it held at first."""
    sizes, waiting = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            sizes.append((event.start_time_ns, event.typed[1].alloc_size))
    held = highest = 0
    for _, size in sorted(sizes, key=lambda each: each[0]):
        held += size
        highest = max(highest, held)
    return highest


@pytest.mark.long
def test_gradients_are_the_plain_ones_and_memory_is_what_the_allocator_held(small: Small) -> None:
    plain, plain_peaks, nothing = of_step(small(**DENSE))
    compiled, peaks, done = of_step(small(**DENSE, torch_compile=True))
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert peaks["tracker"] == pytest.approx(peaks["allocator"], abs=64)
    assert peaks["flops"] == pytest.approx(plain_peaks["flops"], rel=0.05), "recomputed products count"
    assert done.graphs
    assert done.seconds > 0
    assert not nothing.graphs


@pytest.fixture(scope="module")
def whole() -> tuple[Record, Record]:
    """A trial, and the same compiled."""
    plain = TrialSpec.model_validate(SMALL | FEW)
    return trials.run(plain), trials.run(plain.model_copy(update={"torch_compile": True}))


@pytest.mark.long
def test_a_compiled_trial_trains_alike(whole: tuple[Record, Record]) -> None:
    plain, compiled = whole
    assert compiled.status == "ok", compiled.error
    for ours, theirs in zip(compiled.steps, plain.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    before, after = plain.metrics["peak_memory_bytes"], compiled.metrics["peak_memory_bytes"]
    assert after is not None
    assert before is not None
    assert 0.5 * before < after < before, "fused operations keep less"
    assert compiled.metrics["flops_per_token"] == plain.metrics["flops_per_token"]


def test_compilation_is_a_figure_of_its_own(whole: tuple[Record, Record]) -> None:
    plain, compiled = whole
    seconds = compiled.metrics["compile_seconds"]
    assert seconds is not None
    assert 0.5 * compiled.steps[0].seconds < seconds < compiled.steps[0].seconds, "from an empty cache"
    assert compiled.metrics["recompilations"] == 1, "the first layer's input has no gradient"
    assert plain.metrics.get("compile_seconds") is None


def test_steps_are_timed_after_compilation(whole: tuple[Record, Record]) -> None:
    half_matmul.install()
    counters["inductor"].clear()
    visit = Job(grid="test", spec=whole[1].spec, label="test", visit=Visit(block=0, seconds=0.5))
    record = trial.run(visit, environment=environment.current("cpu"))
    assert counters["inductor"]["fxgraph_cache_hit"] > 0, "what its trial compiled is there"
    seconds = record.metrics["compile_seconds"]
    assert seconds is not None
    assert record.steps
    assert max(step.seconds for step in record.steps) < seconds


def test_a_budget_holds_for_what_compiled_layers_allocate(small: Small) -> None:
    """Somewhere between the weights and the peak it is a fused kernel that asks for too much."""
    stopped_in = set[str]()
    for budget in range(2_100_000, 2_700_000, 100_000):
        with pytest.raises(OutOfBudget) as stopped:
            of_step(small(**DENSE, torch_compile=True), budget=budget)
        stopped_in |= {entry.name for entry in stopped.traceback}
    assert "allocated" in stopped_in


def test_what_cannot_be_compiled_is_refused_in_one_line(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"does not say which its layers are; use torch_compile: false$"):
        compilation.compile_layers(torch.nn.Linear(2, 2))
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing = r"torch_compile needs a compiler \(no-such-compiler, or what CXX names\), which is not here; install it"
    record = trials.run(small(torch_compile=True))
    assert record.error is not None
    assert re.match(missing, record.error)
    (tmp_path / "grid.yml").write_text("base: {base_model: random:tiny, torch_compile: true, device: cpu}\n")
    with pytest.raises(InputError, match=missing):
        preflight.preflight(grid.load(tmp_path / "grid.yml"))


def test_the_peak_of_compiled_layers_is_predicted(whole: tuple[Record, Record]) -> None:
    record = whole[1]
    predicted = peak.predict(record.spec, "cpu")
    for name in ("peak_memory_bytes", "peak_evaluate_bytes", "memory_activations_bytes", "memory_optimizer_bytes"):
        value = getattr(predicted, name, None) or predicted.breakdown[name]
        assert value == pytest.approx(record.metrics[name], rel=0.005), name
    again = peak.predict(record.spec, "cpu")
    assert again.peak_memory_bytes == predicted.peak_memory_bytes, "the model that is there has compiled layers still"
    plain = peak.predict(record.spec.model_copy(update={"torch_compile": False}), "cpu")
    assert plain.peak_memory_bytes > 1.05 * predicted.peak_memory_bytes
    with pytest.raises(peak.Unpredictable, match=r"^torch_compile: what compiled layers keep on a card"):
        peak.predict(record.spec, "cuda")


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        DENSE,
        FEW | {"adapter": "none", "precision": "bf16", "base_model": "random:tiny"},
        FEW | {"lora_dropout": 0.1, "precision": "nf4"},
    ],
    ids=["checkpointing", "full fine-tuning", "nf4"],
)
def test_peaks_of_other_compiled_layers_are_predicted(small: Small, changes: dict[str, Any]) -> None:
    record = trials.run(small(**changes, torch_compile=True))
    assert record.status == "ok", record.error
    predicted = peak.predict(record.spec, "cpu")
    assert predicted.peak_memory_bytes == pytest.approx(record.metrics["peak_memory_bytes"], rel=0.005)


def test_nothing_imports_the_compiler_without_the_key() -> None:
    code = "import sys, harness.training.trial; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
