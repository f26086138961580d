"""Predictions for models and options of many kinds, against measurements on this CPU where there can be any."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import torch
from tiny_models import EMBEDDINGS, byte_tokenizer, tiny_model
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from trials import run

from harness.predict import int8_on_cuda, peak, predictor
from harness.spec.trial import TrialSpec
from harness.training import model
from harness.training.live_tensors import LiveTensors

Small = Callable[..., TrialSpec]

QUICK: dict[str, Any] = {"sequence_length": 192, "train_samples": 8, "val_set_size": 1.0}


def assert_predicted_is_measured(spec: TrialSpec) -> None:
    record = run(spec)
    assert record.status == "ok", record.error
    assert peak.predict(spec, "cpu").peak_memory_bytes == pytest.approx(record.metrics["peak_memory_bytes"], rel=1e-3)


# ------------------------------------------------------------------------------------ quantised weights


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp4"])
def test_dora_over_quantised_weights(precision: str, small: Small) -> None:
    assert_predicted_is_measured(small(precision=precision, use_dora=True, **QUICK))


def _kernels_of_bitsandbytes(backend: str) -> dict[str, Any]:
    """The Python around bitsandbytes' kernels, by name, with a library in which every kernel returns 0."""
    kernels: dict[str, Any] = {}

    def register_kernel(name: str, backend: str) -> Callable[[Any], Any]:
        return lambda function: kernels.setdefault(name.partition("::")[2], function)

    folder = Path(bitsandbytes.__file__).parent / "backends"
    library = mock.MagicMock()
    library.cigemmlt_32.return_value = 0
    with (
        mock.patch("bitsandbytes._ops.register_kernel", register_kernel),
        mock.patch("bitsandbytes.cextension.lib", library),
        mock.patch("bitsandbytes.functional.CUBLAS_Context"),
        mock.patch("bitsandbytes.functional._cuda_device_of", contextlib.nullcontext),  # a mock would keep tensors
        mock.patch("torch._C._cuda_getCurrentRawStream", return_value=0, create=True),
    ):
        source = (folder / backend / "ops.py").read_text()
        exec(compile(source, backend, "exec"), {"__name__": backend, "__package__": f"bitsandbytes.backends.{backend}"})  # noqa: S102 - of an installed library
    return kernels


@contextlib.contextmanager
def _operations_of_cuda() -> Iterator[None]:
    """Within, bitsandbytes' operations are those of CUDA; what their kernels write is not computed."""
    kernels = _kernels_of_bitsandbytes("default") | _kernels_of_bitsandbytes("cuda")

    def operation(kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return kernel(*args, **kwargs)

        call.default = call  # type: ignore[attr-defined]
        return call

    functions = bitsandbytes.autograd._functions
    with (
        mock.patch.object(torch.ops, "bitsandbytes", SimpleNamespace(**{k: operation(v) for k, v in kernels.items()})),
        mock.patch.object(functions, "MatMul8bitFp", functions.MatMul8bitLt),
    ):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inner", "columns", "bias"), [(64, 512, True), (512, 64, False)])
def test_int8_on_cuda_allocates_what_its_code_does(inner: int, columns: int, bias: bool, dtype: torch.dtype) -> None:
    """Forward and backward of a layer; wide outputs peak at the product, wide inputs where they are quantised."""

    def peaks(emulation: contextlib.AbstractContextManager[None]) -> list[int]:
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear8bitLt(inner, columns, bias=bias, has_fp16_weights=False, threshold=6.0)
        layer.weight.data = torch.ones(columns, inner, dtype=torch.int8)
        layer.weight.CB, layer.weight.SCB = layer.weight.data, torch.ones(columns)
        inputs = torch.ones(2, 96, inner, dtype=dtype, requires_grad=True)
        tracker = LiveTensors("cpu")
        tracker.adopt([layer.weight, layer.weight.SCB, inputs], "weights")
        with emulation, tracker:
            result = layer(inputs)
            seen = [tracker.peak, tracker.total]
            result.backward(torch.empty_like(result))
            return [*seen, tracker.peak]

    emulated = peaks(int8_on_cuda.emulate())
    assert emulated == peaks(_operations_of_cuda())
    assert emulated != peaks(contextlib.nullcontext())


def test_adapters_over_quantised_weights_copy_no_inputs_under_autocast_on_cuda(small: Small) -> None:
    """peft leaves the conversion to autocast there, and makes an fp32 copy first over 16-bit weights."""

    def activations(precision: str, **keys: Any) -> int:
        spec = small(precision=precision, sequence_length=512, **keys)
        return peak.predict(spec, "cuda").breakdown["memory_activations_bytes"]

    assert activations("nf4") < 0.98 * activations("bf16")
    assert activations("nf4", autocast=False) >= activations("bf16", autocast=False)


# ------------------------------------------------------------------------------------ optimizers


@pytest.mark.parametrize(
    "optimizer",
    [
        *("adagrad", "adafactor", "rmsprop", "paged_ademamix_32bit", "paged_lion_8bit", "muon"),
        *("stable_adamw", "schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"),
        *("galore_adamw", "apollo_adamw", "adamw_torch_8bit", "adamw_torch_4bit"),
    ],
)
def test_optimizers_with_state_beyond_adams(optimizer: str, small: Small, tmp_path: Path) -> None:
    """Weights of more than 100,000 numbers, from which on state is paged, and few tokens: the update counts."""
    folder = tiny_model(tmp_path, config={"hidden_size": 256, "head_dim": 64, "intermediate_size": 512})
    steps = {"train_samples": 12} if optimizer == "schedule_free_radam" else {}  # it warms up by doing nothing
    keys = QUICK | {"gradient_accumulation_steps": 1, "adapter": "none"} | steps
    spec = small(base_model=folder, optimizer=optimizer, **keys)
    assert_predicted_is_measured(spec)
    on_cuda = peak.predict(spec, "cuda").breakdown["memory_optimizer_bytes"]
    on_cpu = peak.predict(spec, "cpu").breakdown["memory_optimizer_bytes"]
    assert (on_cuda < 0.5 * on_cpu) == optimizer.startswith("paged")


# ------------------------------------------------------------------------------------ kinds of models

_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = _SHAPE | {
    "num_key_value_heads": 4,
    "vocab_size": EMBEDDINGS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_EYES = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32, "intermediate_size": 64}
_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
KINDS: dict[str, dict[str, Any]] = {
    "mistral": _TEXT | {"sliding_window": 32},
    "phi3": _TEXT | {"sliding_window": 400},
    "olmoe": _TEXT | {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_5_vl": {"text_config": _TEXT | _ROTARY, "vision_config": _EYES | {"fullatt_block_indexes": [0]}},
    "llava": {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _SHAPE | {"image_size": 28,
        "patch_size": 14, "model_type": "clip_vision_model"}, "image_token_index": 5},
}  # fmt: skip


@pytest.fixture
def kind(tmp_path: Path) -> Callable[[str], str]:
    """Makes a folder of a tiny model of a kind."""

    def make(name: str) -> str:
        config = AutoConfig.for_model(name, **KINDS[name])
        model._class_for(config).from_config(config).save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        return str(tmp_path)

    return make


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [192, 448])
def test_kinds_of_models(name: str, length: int, small: Small, kind: Callable[[str], str]) -> None:
    """Windows shorter and longer than the examples, experts, and models of images that are trained on text."""
    padded = {"sequence_length": length, "pad_to_sequence_len": length > 192}
    assert_predicted_is_measured(small(base_model=kind(name), precision="bf16", **QUICK | padded))


def test_what_raises_in_a_replay_is_one_line_with_the_operation(
    small: Small, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) + torch.ones(3, 7))
    logging.disable(logging.NOTSET)
    predictor._quiet()
    try:
        answer = predictor._predict(small().model_dump_json(), "cpu", peak.AMPERE, {})
    finally:
        logging.disable(logging.NOTSET)
    assert re.fullmatch(r"aten\.add\.Tensor: [^\n]+", answer["error"])
    assert "Traceback" not in "".join(capfd.readouterr())
