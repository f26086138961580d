"""Compiled layers: the same training, with memory that is really held, and time of compilation apart."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trials

from harness import environment
from harness.errors import InputError
from harness.predict import peak
from harness.record import Job, Record, Visit
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, compilation, half_matmul, model, order, trial
from harness.training.memory import MemoryMeter
from harness.training.step import Trainer

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")
FEW: dict[str, Any] = {"lora_target_modules": ["q_proj"], "train_samples": 8}
"""Adapters on one layer of each: to compile a linear layer with an adapter takes a second or two."""
DENSE = FEW | {"gradient_checkpointing": True, "sample_packing": True, "loss": "chunked"}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")


def of_step(spec: TrialSpec) -> tuple[list[torch.Tensor], dict[str, int], compilation.Compilations]:
    """Gradients of a micro-batch after the first one, its peak by the tracker and by the allocator's own events above
    what was held before, and what was compiled.
    """
    torch.manual_seed(spec.seed)
    meter = MemoryMeter(CPU, None, compiled=spec.torch_compile)
    with compilation.counted(spec, "cpu", empty_cache=False) as compiled:
        tokenizer = checkpoints.load_tokenizer(spec)
        with meter.phase(breakdown=True):
            network: Any = model.load(spec, CPU)
            meter.adopt_model(network, model.adapters(network, spec))
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
    peaks = {"tracker": meter.tracker.peak - held, "allocator": highest_allocated(profile), "flops": meter.tracker.flops}
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
def whole() -> tuple[Record, Record, Record]:
    """A trial, the same compiled, and a visit that times it."""
    from conftest import SMALL

    plain = TrialSpec.model_validate(SMALL | FEW)
    compiled = plain.model_copy(update={"torch_compile": True})
    visit = Job(grid="test", spec=compiled, label="test", visit=Visit(block=0, seconds=0.5))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        half_matmul.install()
        timed = trial.run(visit, environment=environment.current("cpu"))
        return trials.run(plain), trials.run(compiled), timed


def test_a_compiled_trial_trains_alike(whole: tuple[Record, Record, Record]) -> None:
    plain, compiled, _ = whole
    assert compiled.status == "ok", compiled.error
    for ours, theirs in zip(compiled.steps, plain.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    before, after = plain.metrics["peak_memory_bytes"], compiled.metrics["peak_memory_bytes"]
    assert after is not None
    assert before is not None
    assert 0.5 * before < after < before, "fused operations keep less"
    assert compiled.metrics["flops_per_token"] == plain.metrics["flops_per_token"]


def test_compilation_is_a_figure_of_its_own(whole: tuple[Record, Record, Record]) -> None:
    plain, compiled, timed = whole
    seconds = compiled.metrics["compile_seconds"]
    assert seconds is not None
    assert 0.5 * compiled.steps[0].seconds < seconds < compiled.steps[0].seconds, "from an empty cache"
    assert compiled.metrics["recompilations"] == 1, "the first layer's input has no gradient"
    assert plain.metrics.get("compile_seconds") is None
    timed_seconds = [step.seconds for step in timed.steps]
    assert timed_seconds
    assert max(timed_seconds) < 0.2 * seconds


def test_a_budget_holds_for_what_compiled_layers_allocate(small: Small) -> None:
    """The spec that the fixture has compiled, in a graph that torch's compiler finds in its cache."""
    record = trials.run(small(**FEW, torch_compile=True, memory_budget=5_000_000))
    assert record.status == "oom", record.error
    assert record.phase in ("forward", "backward")


def test_what_cannot_be_compiled_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"does not say which its layers are; use torch_compile: false$"):
        compilation.compile_layers(torch.nn.Linear(2, 2))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"^torch_compile needs a compiler \(no-such-compiler, or what CXX names\)"):
        with compilation.counted(TrialSpec(base_model="random:tiny", torch_compile=True), "cpu", empty_cache=True):
            pass


def test_compiled_steps_are_not_predicted(small: Small) -> None:
    with pytest.raises(peak.Unpredictable, match=r"^torch_compile: what compiled layers keep in memory"):
        peak.predict(small(torch_compile=True), "cuda")


def test_nothing_imports_the_compiler_without_the_key() -> None:
    code = "import sys, harness.training.trial; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
