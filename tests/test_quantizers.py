"""Weights of torchao and HQQ: what adapters learn over them, what they take, and what is refused."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_models import tiny_model
from trials import run

from harness._util.messages import explain
from harness.dialects import axolotl
from harness.dialects.rules import read
from harness.errors import InputError
from harness.grids.levels import SPEC_KEYS
from harness.predict import fixes, peak
from harness.spec.keys import FORMATS
from harness.spec.trial import TrialSpec
from harness.training import model, quantisers

pytest.importorskip("torchao")
pytest.importorskip("hqq")

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")

KINDS = {
    "torchao": {"precision": "int8", "quantizer": "torchao"},
    "hqq 8": {"precision": "int8", "quantizer": "hqq"},
    "hqq 4": {"precision": "int4", "quantizer": "hqq"},
}
CHECKPOINTING = {"gradient_checkpointing": True}
BYTES = {"torchao": 1 + 5 / 64, "hqq 8": 1 + 4 / 64, "hqq 4": 0.5 + 4 / 64}
"""Of a weight: fp32 scales and int8 zeros of rows (of 64 weights here), or 16-bit scales and zeros of groups of 64."""


@pytest.fixture
def with_biases(tmp_path: Path) -> str:
    """A model folder whose linear layers have 64 inputs each, the same number of outputs, and some a bias."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    return str(tiny_model(tmp_path, "qwen2", config=shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, CHECKPOINTING, {"use_dora": True}, {"compute_dtype": "fp16"}], ids=str)
def test_predicted_is_measured(kind: str, options: dict[str, Any], small: Small) -> None:
    spec = small(sequence_length=192, train_samples=8, val_set_size=1.0, **KINDS[kind], **options)
    record = run(spec)
    assert record.status == "ok", record.error
    predicted = peak.predict(spec, "cpu")
    assert predicted.peak_memory_bytes == pytest.approx(record.metrics["peak_memory_bytes"], rel=1e-3)
    for_a_moment = 3 * 4 * 64 * 128 if spec.use_dora else 4096  # DoRA's norms are of merged weights
    assert predicted.peak_load_bytes == pytest.approx(record.metrics["peak_load_bytes"], rel=0.005, abs=for_a_moment)
    assert predicted.peak_evaluate_bytes == pytest.approx(record.metrics["peak_evaluate_bytes"], rel=0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_take_the_bytes_of_their_format(kind: str, small: Small, with_biases: str) -> None:
    def weights(**keys: Any) -> float:
        held = peak.predict(small(base_model=with_biases, train_samples=4, **keys), "cpu").breakdown
        return held["memory_weights_bytes"]

    linear = 2 * 7 * 64 * 64
    assert weights(precision="bf16") - weights(**KINDS[kind]) == pytest.approx((2 - BYTES[kind]) * linear, abs=512)


@pytest.mark.parametrize("keys", [{"precision": "nf4"}, {"precision": "int8"}, *KINDS.values()], ids=str)
def test_biases_are_predicted_in_their_type(keys: dict[str, Any], small: Small, with_biases: str) -> None:
    spec = small(base_model=with_biases, **keys)
    loaded, predicted = (
        {name: weight.dtype for name, weight in network.named_parameters() if name.endswith(".bias")}
        for network in (model.load(spec, torch.device("cpu")), model.skeleton(spec))
    )
    assert loaded
    assert predicted == loaded


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_what_they_learn_over_dequantised_weights(kind: str, small: Small, with_biases: str) -> None:
    """In fp32, so that what differs is rounding alone; the plain model has the weights that the other computes with."""
    tokens = torch.arange(40).reshape(2, 20)
    gradients, results = [], []
    quantised = small(base_model=with_biases, compute_dtype="fp32", **KINDS[kind])
    weights: dict[str, torch.Tensor] = {}
    for spec in (quantised, small(base_model=with_biases, precision="fp32")):
        torch.manual_seed(0)
        network = model.load(spec, CPU)
        for name, module in network.named_modules():
            if name.endswith("base_layer") and spec is quantised:
                weights[name] = quantisers.dequantised(module)
            elif name in weights:
                rounded = (module.weight - weights[name]).abs().max()
                assert 0 < rounded < 0.2 * module.weight.abs().max()
                module.weight.data = weights[name]
            elif "lora_B" in name and hasattr(module, "weight"):  # zero at first, which leaves nothing for lora_A
                module.weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        output = network(input_ids=tokens, labels=tokens)
        output.loss.backward()
        results.append(output.logits)
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    assert len(weights) == 14
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    for name, gradient in gradients[1].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_fall_and_records_name_the_format(kind: str, small: Small, with_biases: str) -> None:
    record = run(small(base_model=with_biases, learning_rate=1e-2, train_samples=24, **KINDS[kind]))
    assert record.status == "ok", record.error
    assert record.steps[-1].loss < record.steps[0].loss
    assert set(record.base_formats) == {KINDS[kind]["precision"], "bf16"}
    assert record.spec.quantizer == KINDS[kind]["quantizer"]


def test_copies_of_torchaos_weights_are_held_for_the_backward_pass(small: Small, with_biases: str) -> None:
    """Its product keeps each weight in 16 bit, with checkpointing those of one layer at a time; HQQ unpacks again."""

    def activations(kind: str, **keys: Any) -> float:
        spec = small(base_model=with_biases, micro_batch_size=1, sequence_length=16, **KINDS[kind], **keys)
        return peak.predict(spec, "cpu", full_length=True).breakdown["memory_activations_bytes"]

    one_layer = 2 * 7 * 64 * 64
    assert activations("torchao") - activations("hqq 8") > one_layer
    assert activations("torchao", **CHECKPOINTING) - activations("hqq 8", **CHECKPOINTING) < one_layer


def test_ids_name_the_quantizer_where_weights_are_quantised(small: Small) -> None:
    assert small(precision="int8", quantizer="bitsandbytes").id == small(precision="int8").id
    assert small(precision="int8", quantizer="hqq").id != small(precision="int8").id
    assert small(precision="bf16", quantizer="hqq").id == small(precision="bf16").id
    others = {"upcast_unquantized": True, "precision": "int8", "quantizer": "torchao"}
    assert small(**others).id == small(**others | {"upcast_unquantized": False}).id


@pytest.mark.parametrize(("precision", "quantizer"), [*itertools.product(("int8", "int4", "nf4", "fp4"), FORMATS)])
def test_formats_that_a_quantizer_lacks_are_refused(precision: str, quantizer: str, small: Small) -> None:
    if precision in FORMATS[quantizer]:
        assert small(precision=precision, quantizer=quantizer).precision == precision
        return
    with pytest.raises(ValueError, match=f"precision {precision} with quantizer {quantizer}, which has .*: use that"):
        small(precision=precision, quantizer=quantizer)


def test_weights_of_torchao_are_of_one_process(small: Small) -> None:
    with pytest.raises(
        ValueError, match=r"num_processes 2 with quantizer torchao: .*use quantizer: bitsandbytes or hqq"
    ):
        small(num_processes=2, **KINDS["torchao"])
    assert small(num_processes=2, **KINDS["hqq 4"]).num_processes == 2
    assert small(num_processes=2, precision="bf16", quantizer="torchao").num_processes == 2


@pytest.mark.parametrize(("precision", "capability"), [("fp8", "8.9"), ("nvfp4", "10.0")])
def test_formats_of_cards_are_known_and_refused(precision: str, capability: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrialSpec(base_model="random:tiny", precision=precision)  # type: ignore[arg-type]  # what is refused
    line = explain(caught.value, TrialSpec)
    assert f"precision: {precision} is of cards of compute capability {capability} or newer" in line
    assert "did you mean" not in line


@pytest.mark.parametrize("keys", [{"lora_bias": "all"}, {"double_quantization": True}, {"adapter": "none"}], ids=str)
def test_what_goes_with_no_quantised_base_goes_with_int4_neither(keys: dict[str, Any], small: Small) -> None:
    with pytest.raises(ValueError, match="int4"):
        small(precision="int4", quantizer="hqq", **keys)


@pytest.mark.parametrize("library", ["torchao", "hqq"])
def test_a_library_that_is_missing_is_one_line(library: str, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    spec = small(precision="int8", quantizer=library)
    for build in (lambda: model.skeleton(spec), lambda: model.base(spec, CPU)):
        with pytest.raises(InputError, match=rf"pip install 'finetune-harness\[{library}\]'"):
            build()


def test_fixes_name_a_library_that_has_their_format(small: Small) -> None:
    for keys in (*KINDS.values(), {"precision": "bf16", "quantizer": "hqq"}):
        spec = small(**keys)
        for change in fixes._precisions(spec, "cuda"):
            TrialSpec.model_validate(spec.model_dump() | dict(change.keys))


def test_axolotls_backends() -> None:
    file = {"base_model": "m", "adapter": "lora", "peft": {"backend": "torchao", "weight_dtype": "int8"}}
    reader, _ = read(axolotl.DIALECT, file, SPEC_KEYS)
    assert (reader.values["precision"], reader.values["quantizer"]) == ("int8", "torchao")
    assert not reader.unsupported
