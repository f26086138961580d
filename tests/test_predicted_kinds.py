"""Predictions for models and options of many kinds, against measurements on this CPU where there can be any."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import torch
from trials import run

from harness.predict import int8_on_cuda, peak
from harness.spec import TrialSpec
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
