"""`loss: liger` and `loss: cce`: what kernels are given, what is refused before anything trains, what they hold."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model

from harness.errors import InputError
from harness.predict import peak
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, fused_loss, inspection, loss, model, without_logits
from harness.training.live_tensors import LiveTensors

Small = Callable[..., TrialSpec]

LOSSES = ("liger", "cce")


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch in the place of the kernels, which need a card; the name of the one that was called, for each call."""
    called: list[str] = []

    def kernel(
        name: str, inputs: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        called.append(name)
        return F.cross_entropy(F.linear(inputs, weight, bias).float(), targets, ignore_index=-100, reduction="sum")

    monkeypatch.setattr(fused_loss, "KERNELS", {name: functools.partial(kernel, name) for name in LOSSES})
    return called


def loaded(small: Small, tmp_path: Path, architecture: str = "llama", **keys: Any) -> tuple[Any, TrialSpec]:
    config = keys.pop("config", {})
    spec = small(
        base_model=tiny_model(tmp_path, architecture, config=config), sequence_length=256, micro_batch_size=2, **keys
    )
    return model.load(spec.model_copy(update={"loss": "full"}), torch.device("cpu")), spec


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", {}),
        ("llama", {"adapter": "none"}),
        ("qwen2", {"adapter": "none", "config": {"tie_word_embeddings": True}}),
        ("opt", {}),
        ("llama", {"adapter": "prompt_tuning", "adapter_options": {"num_virtual_tokens": 5}}),
    ],
)
def test_its_loss_and_gradients_are_those_of_all_logits(
    architecture: str, keys: dict[str, Any], small: Small, tmp_path: Path, by_torch: list[str]
) -> None:
    network, spec = loaded(small, tmp_path, architecture, precision="fp32", **keys)
    data = batches.load(spec, checkpoints.load_tokenizer(spec))
    inputs = batches.collate(data.train[:2], 0, torch.device("cpu")).inputs

    def of(name: str) -> tuple[float, list[torch.Tensor]]:
        network.zero_grad()
        torch.manual_seed(0)
        _, taken = loss.forward(network, network, inputs, spec.model_copy(update={"loss": name}))
        taken.backward()
        return float(taken), [p.grad.clone() for p in network.parameters() if p.grad is not None]

    full, expected = of("full")
    assert not by_torch
    fused, gradients = of("liger")
    assert fused == pytest.approx(full, rel=1e-5)
    for a, b in zip(expected, gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6)
    network.eval()
    with torch.no_grad():
        each = loss.by_example(network, inputs, spec.model_copy(update={"loss": "liger"}))
        whole = loss.by_example(network, inputs, spec)
    torch.testing.assert_close(torch.stack(each), torch.stack(whole), rtol=1e-5, atol=1e-5)
    assert by_torch == ["liger"] * 3, "all positions at once in training, an example at a time otherwise"


def test_outputs_of_a_decoder_are_in_the_type_of_the_head(by_torch: list[str]) -> None:
    """As under autocast, which computes norms in fp32."""
    causal, hidden = torch.nn.Module(), torch.randn(1, 5, 32, requires_grad=True)
    causal.get_output_embeddings = lambda: torch.nn.Linear(32, 8, bias=False, dtype=torch.bfloat16)  # type: ignore[assignment]
    fused_loss.losses(hidden, torch.arange(5)[None], causal=causal, loss="cce").backward()
    assert by_torch == ["cce"]
    assert hidden.grad is not None
    assert hidden.grad.dtype is torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_refused_on_a_cpu_before_anything_starts(name: str, small: Small, tmp_path: Path) -> None:
    spec = small(base_model=tiny_model(tmp_path), loss=name)
    message = rf"loss {name} on a CPU: its kernels are of CUDA cards; use loss: chunked, or device: cuda"
    with pytest.raises(InputError, match=message):
        inspection.inspect([("a", spec)])
    with pytest.raises(InputError, match=message):
        peak.predict(spec, "cpu")


def test_a_package_that_is_not_there_is_named_with_its_extra(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"cut-cross-entropy is not installed; pip install 'finetune-harness\[cce\]'"):
        fused_loss.refuse_missing(small(loss="cce"))
    fused_loss.refuse_missing(small(loss="chunked"))


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("llama", {"lora_target_modules": ["all-linear", "lm_head"]}, "takes a plain head, and that of LlamaForCausal"),
        ("llama", {"lora_modules_to_save": ["lm_head"]}, "is ModulesToSaveWrapper; use loss: chunked"),
        ("llama", {"precision": "fp32", "loss": "cce"}, "multiplies in 16 bit, and the head is fp32"),
        ("gemma2", {"config": {"final_logit_softcapping": 5.0}}, "has final_logit_softcapping after its head"),
        ("granite", {"config": {"logits_scaling": 4.0}}, "has logits_scaling after its head, which the kernel leaves"),
        ("own_code", {}, "computes its logits all at once; use loss: full"),
    ],
)
def test_a_head_that_the_kernel_does_not_take_is_refused(
    architecture: str, keys: dict[str, Any], message: str, small: Small, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path, architecture, config=keys.pop("config", None))
    spec = small(base_model=folder, **{"loss": "liger", "precision": "bf16"} | keys)
    with pytest.raises(InputError, match=message):
        model.skeleton(spec, trust_remote_code=True)


def test_large_outputs_of_a_decoder_are_compared_too(small: Small, tmp_path: Path) -> None:
    network, _ = loaded(small, tmp_path, precision="fp16")
    causal = without_logits.base_of(network)
    causal.model.norm.weight.data.fill_(1000.0)  # a hundred times as much is more than fp16 has
    fused_loss.refuse_other_code(causal, "liger")


def test_a_bias_of_the_head_is_for_liger_alone(small: Small, tmp_path: Path) -> None:
    network, _ = loaded(small, tmp_path, precision="bf16")
    causal = without_logits.base_of(network)
    causal.lm_head = torch.nn.Linear(32, 8, dtype=torch.bfloat16)
    fused_loss.refuse_if_impossible(causal, "liger")
    with pytest.raises(InputError, match="takes no bias, which the head of LlamaForCausalLM has; use loss: liger"):
        fused_loss.refuse_if_impossible(causal, "cce")


def test_shards_of_a_head_are_refused(small: Small) -> None:
    with pytest.raises(ValueError, match="sharding full_shard with loss cce, whose kernel takes the whole head"):
        small(loss="cce", sharding="full_shard", num_processes=2)


@pytest.mark.parametrize(
    ("architecture", "config", "plain"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}, False),
        ("granite", {"logits_scaling": 4.0}, False),
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("granite", {"logits_scaling": 1.0}, True),
        ("llama", {}, True),
        ("opt", {}, True),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_code_between_head_and_logits_is_noticed_by_its_values(
    architecture: str, config: dict[str, Any], plain: bool, precision: str, small: Small, tmp_path: Path
) -> None:
    network, _ = loaded(small, tmp_path, architecture, config=config, precision=precision)
    causal, before = without_logits.base_of(network), torch.random.get_rng_state()
    if plain:
        fused_loss.refuse_other_code(causal, "liger")
    else:
        with pytest.raises(InputError, match="does more to its logits than to multiply by its head; use loss: chunked"):
            fused_loss.refuse_other_code(causal, "liger")
    assert causal.training
    assert torch.equal(torch.random.get_rng_state(), before), "what is trained does not depend on the check"


def test_a_trained_head_has_its_gradient_in_training_alone(small: Small, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"sequence_length": 256, "train_samples": 8, "micro_batch_size": 4, "val_set_size": 8}
    keys["base_model"] = tiny_model(tmp_path, config={"vocab_size": 200_000, "tie_word_embeddings": False})
    keys |= {"loss": "liger", "precision": "bf16", "optimizer": "sgd", "attention": "eager"}
    of_head = 200_000 * 32

    frozen, trained = (peak.predict(small(adapter=adapter, **keys), "cuda") for adapter in ("ia3", "none"))
    assert trained.peak_evaluate_bytes == pytest.approx(frozen.peak_evaluate_bytes, abs=of_head / 4)
    # An older card makes the gradient of each part apart, in bf16 and in fp32.
    older = peak.predict(small(adapter="none", **keys), "cuda", capability=(7, 5))
    assert older.peak_memory_bytes - trained.peak_memory_bytes == pytest.approx((2 + 4) * of_head, rel=0.3)


def test_the_tracker_of_memory_sees_what_a_kernel_compiles(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cut-cross-entropy compiles a sort of its own, within the backward pass."""
    made: Any = types.ModuleType("cut_cross_entropy")
    made.cce = types.ModuleType("cut_cross_entropy.cce")
    made.cce.sort_logit_avg = torch.compile(lambda means: torch.argsort(means), fullgraph=True)

    class Sorted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(inputs)
            return inputs.sum()

        @staticmethod
        def backward(ctx: Any, scale: torch.Tensor) -> torch.Tensor:
            (inputs,) = ctx.saved_tensors
            made.cce.sort_logit_avg(inputs[0].float())
            return torch.ones_like(inputs) * scale

    made.linear_cross_entropy = lambda inputs, *_, **__: Sorted.apply(inputs)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", made)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy.cce", made.cce)
    hidden = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    with LiveTensors("cpu", None):
        fused_loss.KERNELS["cce"](hidden, torch.randn(8, 8), torch.arange(4), None).backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_card_holds_no_logits_of_all_positions(name: str, adapter: str, small: Small, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"vocab_size": 8192, "tie_word_embeddings": False}
    keys = {"sequence_length": 384, "train_samples": 8, "micro_batch_size": 4, "val_set_size": 8, "precision": "bf16"}
    keys |= {"base_model": tiny_model(tmp_path, config=shape), "adapter": adapter}
    predicted = {each: peak.predict(small(loss=each, **keys), "cuda") for each in ("full", "chunked", name)}
    saved = predicted["full"].peak_memory_bytes - predicted[name].peak_memory_bytes
    # bf16 logits, their copy in fp32, its logarithms or gradient in fp32, and a gradient in bf16.
    of_logits = 4 * 383 * 8192
    assert 8 * of_logits < saved < 13 * of_logits
    assert predicted[name].peak_memory_bytes < predicted["chunked"].peak_memory_bytes
    assert predicted[name].peak_evaluate_bytes is not None
    assert predicted["full"].peak_evaluate_bytes is not None
    assert predicted[name].peak_evaluate_bytes < predicted["full"].peak_evaluate_bytes / 2


def test_it_counts_as_another_trial(small: Small) -> None:
    assert len({small(loss=name).id for name in ("full", "chunked", *LOSSES)}) == 4
    assert small(loss="cce", loss_chunk_size=64).id == small(loss="cce").id
