"""Exact figures of memory: the tracker, and whole trials."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trials
from tiny_models import tiny_model

from harness.predict import loaded_model
from harness.predict.cards import AMPERE
from harness.predict.trace import Live
from harness.record import Record
from harness.sources.models import ARCHITECTURES
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, evaluation, model
from harness.training.live_tensors import LiveTensors, OutOfBudget
from harness.training.memory import MemoryMeter
from harness.training.out_of_memory import out_of_memory

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from peaks import combinations, faults  # the benchmark has more of them

Small = Callable[..., TrialSpec]


def run(spec: TrialSpec) -> Record:
    record = trials.run(spec)
    assert record.status == "ok", record.error
    return record


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """The first trial of a process makes constants that libraries keep; in a run each trial has its own process."""
    run(TrialSpec(base_model="random:tiny", precision="fp32", sequence_length=256, max_steps=1, val_set_size=1))


def figures(spec: TrialSpec) -> dict[str, Any]:
    return run(spec).metrics


def test_tracker_follows_storage_from_creation_to_release() -> None:
    tracker = LiveTensors("cpu")
    with tracker:
        a = torch.zeros(1000)  # 4000 B
        view = a.view(10, 100)  # the same storage
        b = a + 1
        assert tracker.total == 8000
        del a
        assert tracker.total == 8000, "the view keeps the storage"
        del view, b
    assert tracker.total == 0
    assert tracker.peak == 8000


def test_tracker_follows_a_storage_that_shrinks_and_grows() -> None:
    """As a gathered weight's does, within the mode or before it."""
    tracker = LiveTensors("cpu", budget=9000)
    with tracker:
        a = torch.zeros(1000)
        storage = a.untyped_storage()
        storage.resize_(0)
        assert (tracker.total, tracker.peak) == (0, 4000)
        storage.resize_(8000)
        assert (tracker.total, tracker.live["activations"], tracker.peak) == (8000, 8000, 8000)
        with pytest.raises(OutOfBudget, match="8000 held, 2000 requested"):
            storage.resize_(10000)
    storage.resize_(100)
    assert tracker.total == 8000, "outside the mode"
    with tracker:
        assert tracker.total == 100
    del a, storage
    assert tracker.total == 0


def test_tracker_sees_what_autograd_keeps_and_creates() -> None:
    weight = torch.ones(500, 500, requires_grad=True)
    tracker = LiveTensors("cpu")
    with tracker:
        hidden = torch.ones(500, 500) @ weight  # operand 1 MB is kept for backward, output 1 MB
        loss = hidden.relu().sum()
        loss.backward()
        del hidden, loss
        assert tracker.total == 1_000_000, "only the gradient is left"
        tracker.adopt([weight.grad], "gradients")  # type: ignore[list-item]  # set by backward
    assert tracker.live["gradients"] == 1_000_000
    assert tracker.live["activations"] == 0


def test_budget_error_has_held_and_requested_bytes() -> None:
    tracker = LiveTensors("cpu", budget=10_000)
    with tracker:
        held = torch.zeros(2000)
        with pytest.raises(OutOfBudget) as caught:
            held + 1
    assert (caught.value.reached, caught.value.requested) == (8000, 8000)


def test_alpha_changes_no_byte(small: Small) -> None:
    one, other = (figures(small(lora_alpha=alpha)) for alpha in (4, 128))
    names = [n for n in one if n.startswith(("memory_", "peak_memory", "peak_evaluate", "peak_load"))]
    assert len(names) >= 8
    assert {n: one[n] for n in names} == {n: other[n] for n in names}


def test_rank_costs_sixteen_bytes_per_parameter(small: Small) -> None:
    # In the second micro-batch of a step gradients are there while activations peak.
    low, high = (figures(small(lora_r=r)) for r in (4, 8))
    added = high["trainable_parameters"] - low["trainable_parameters"]
    assert added == low["trainable_parameters"] > 0
    parts = ("memory_weights_bytes", "memory_adapters_bytes", "memory_gradients_bytes", "memory_optimizer_bytes")
    assert sum(high[n] - low[n] for n in parts) == 16 * added


def test_eight_bit_optimizer_keeps_two_bytes_per_parameter(small: Small) -> None:
    spec = {"adapter": "none", "precision": "fp32"}
    full, eight = (figures(small(optimizer=o, **spec)) for o in ("adamw_torch", "adamw_bnb_8bit"))
    count = full["trainable_parameters"]
    assert full["memory_optimizer_bytes"] == pytest.approx(8 * count, rel=0.01)
    # The tiny model's small matrices keep 32-bit state, as bitsandbytes does below 4096 elements.
    assert 2 * count < eight["memory_optimizer_bytes"] < 4 * count


def test_components_add_up_to_the_peak(small: Small) -> None:
    metrics = figures(small())
    assert sum(v for n, v in metrics.items() if n.startswith("memory_")) == metrics["peak_memory_bytes"]


def test_checkpointing_lowers_activations(small: Small) -> None:
    kept, recomputed = (figures(small(gradient_checkpointing=c, sequence_length=512)) for c in (False, True))
    assert recomputed["memory_activations_bytes"] < 0.8 * kept["memory_activations_bytes"]
    assert recomputed["flops_per_token"] > 1.2 * kept["flops_per_token"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A shape whose linears are whole blocks of 64, and larger than everything else."""
    config = ARCHITECTURES["tiny"] | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    file: Path = tmp_path_factory.mktemp("shape") / "wide.json"
    file.write_text(json.dumps(config))
    return f"random:{file}"


def test_weight_bytes_are_those_of_the_format(small: Small, wide: str) -> None:
    hidden, kv, inner, layers, vocabulary = 256, 128, 512, 2, 512
    linear = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    rows = layers * (2 * hidden + 2 * kv + 2 * inner + hidden)
    other = vocabulary * hidden + (2 * layers + 1) * hidden
    oracle = {
        "fp32": 4 * (linear + other),
        "bf16": 2 * (linear + other),
        "int8": linear + 4 * rows + 2 * other,
        "nf4": linear * 0.5625 + 2 * other,
    }
    measured = {}
    for precision in oracle:
        measured[precision] = figures(small(base_model=wide, precision=precision))["memory_weights_bytes"]
    assert measured["nf4"] < measured["int8"] < measured["bf16"] < measured["fp32"]
    for precision, size in oracle.items():
        # What is left are the tables of rotary positions, and of the 16 values of nf4, per layer.
        assert 0 <= measured[precision] - size < 4096, precision
    double = figures(small(base_model=wide, precision="nf4", double_quantization=True))["memory_weights_bytes"]
    assert double - 2 * other == pytest.approx(linear * 0.516, rel=0.05)


@pytest.mark.parametrize(
    ("error", "requested"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1.0 GiB free."), 5 * 2**29),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), None),
        (RuntimeError("CUDA driver error: out of memory"), None),
        (RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"), 20 * 2**20),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), 4096),
        (MemoryError("std::bad_alloc"), None),
        (MemoryError("Unable to allocate 1.00 GiB for an array"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_out_of_memory_is_recognised_in_every_library(error: Exception, requested: int | None) -> None:
    oom = out_of_memory(error, MemoryMeter(torch.device("cpu"), None))
    assert oom is not None
    assert oom["oom_requested_bytes"] == requested


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left"), KeyError("x")]
)
def test_other_errors_are_not_out_of_memory(error: Exception) -> None:
    assert out_of_memory(error, MemoryMeter(torch.device("cpu"), None)) is None


def test_a_budget_on_a_card_is_the_allocators_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own function is called, up to the driver: it requires the number of the card."""
    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: limits.append(given), raising=False)
    MemoryMeter(torch.device("cuda"), 40)
    assert limits == [(0.4, 1)]


@pytest.mark.parametrize("spec", combinations(6), ids=lambda spec: spec.id)
def test_the_peak_is_the_highest_of_all_steps(spec: TrialSpec) -> None:
    """Whatever the lengths, the micro-batches and the seed: recorded to the byte, chosen beforehand, predicted."""
    assert faults(spec) == []


def test_an_evaluation_is_tracked_where_it_holds_most(small: Small) -> None:
    spec = small(val_set_size=9.0, micro_batch_size=2, eval_sequence_length=600)
    texts = sorted(batches.load(spec, checkpoints.load_tokenizer(spec)).held_out, key=len)  # the heaviest come last
    assert len(texts[0]) < len(texts[-1])
    cpu = torch.device("cpu")
    network = model.load(spec, cpu)
    whole, heaviest = LiveTensors("cpu"), LiveTensors("cpu")
    with whole:
        evaluation.story_losses(network, texts, spec, 0, cpu)
    entered: list[LiveTensors] = []

    def tracking() -> LiveTensors:
        entered.append(heaviest)
        return heaviest

    evaluation.story_losses(network, texts, spec, 0, cpu, tracking)
    assert heaviest.peak == whole.peak
    assert 1 < len(entered) < 5


def _recorded_load_peak(spec: TrialSpec) -> int:
    """As a trial records it."""
    meter = MemoryMeter(torch.device("cpu"), None)
    with meter.phase(breakdown=True):
        network = model.load(spec, torch.device("cpu"))
        meter.adopt_model(network, model.adapters(network))
    return meter.peak()


_WIDE = ARCHITECTURES["tiny"] | {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, "vocab_size": 4096}
LOADED: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "nf4": {"precision": "nf4"},
    "bf16-mixed, all weights": {"precision": "bf16-mixed", "adapter": "none"},
    "nf4, the rest in fp32": {"precision": "nf4", "upcast_unquantized": True},
    "int8, the rest in fp32": {"precision": "int8", "upcast_unquantized": True},
    "adapters in bf16": {"precision": "bf16", "adapter_dtype": "bf16", "lora_r": 64},
    "DoRA": {"precision": "bf16", "use_dora": True, "lora_target_modules": ["down_proj"]},
    "DoRA, int8": {"precision": "int8", "use_dora": True},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", LOADED)
def test_what_loading_holds_is_predicted(case: str, tied: bool, small: Small, tmp_path: Path) -> None:
    """Of a checkpoint in bf16, whose weights are there in both types while they are converted."""
    (tmp_path / "wide.json").write_text(json.dumps(_WIDE | {"tie_word_embeddings": tied}))
    spec = small(base_model=f"random:{tmp_path / 'wide.json'}", **LOADED[case])
    model.load(spec, torch.device("cpu"))  # makes the checkpoint
    with loaded_model.loaded(spec, "cpu", AMPERE) as fake:
        assert Live().run(fake.trace).size == pytest.approx(_recorded_load_peak(spec), rel=0.002)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_loading_a_folder_holds_is_predicted(
    kind: str, precision: str, stored: torch.dtype, small: Small, tmp_path: Path
) -> None:
    """Whose weights are in another type than those that harness makes, and of GPT-2 in another shape and order."""
    sizes = {"gpt2": {"n_embd": 64}, "llama": {"hidden_size": 64}}[kind]
    spec = small(base_model=tiny_model(tmp_path, kind, dtype=stored, config=sizes), precision=precision)
    with loaded_model.loaded(spec, "cpu", AMPERE) as fake:
        assert Live().run(fake.trace).size == pytest.approx(_recorded_load_peak(spec), rel=0.005)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_what_quantising_transposed_layers_holds_is_predicted(precision: str, small: Small, tmp_path: Path) -> None:
    """GPT-2's are copied before they are quantised."""
    sizes = {"n_embd": 256, "n_positions": 1024}
    spec = small(base_model=tiny_model(tmp_path, "gpt2", dtype=torch.bfloat16, config=sizes), precision=precision)
    with loaded_model.loaded(spec, "cpu", AMPERE) as fake:
        assert Live().run(fake.trace).size == pytest.approx(_recorded_load_peak(spec), rel=0.005)
