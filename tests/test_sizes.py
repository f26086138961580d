"""How large models and their adapters are said to be: as if unquantised, and what is saved of the adapter alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.spec.trial import TrialSpec
from harness.training import model, saved_adapters

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")
BUNDLED = 134_515_008
LAYERS = 4_884_480
"""Parameters of LoRA of rank 16 on all its linear layers but the head."""


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"precision": "nf4"},
        {"precision": "int8"},
        {"precision": "int4", "quantizer": "hqq"},
    ],
)
def test_quantised_weights_count_as_what_they_stand_for(keys: dict[str, Any]) -> None:
    if keys.get("quantizer") == "hqq":
        pytest.importorskip("hqq")
    spec = TrialSpec.model_validate({"base_model": "random:smollm2-135m", "lora_r": 16, **keys})
    sizes = model.sizes(model.skeleton(spec), spec)
    assert sizes["total_parameters"] == BUNDLED + LAYERS
    assert sizes["trainable_parameters"] == LAYERS
    assert sizes["adapter_share"] == pytest.approx(LAYERS / BUNDLED)


def test_quantised_weights_with_values_count_so_too(small: Small) -> None:
    counts = {
        precision: model.sizes(model.load(spec, CPU), spec)["total_parameters"]
        for precision in ("fp32", "nf4", "int8")
        for spec in [small(precision=precision)]
    }
    assert len({*counts.values()}) == 1, counts


@pytest.mark.parametrize("targets", [["all-linear", "lm_head"], ["q_proj", "embed_tokens"]])
def test_the_embeddings_of_the_base_are_none_of_an_adapter_on_them(
    targets: list[str], small: Small, tmp_path: Path
) -> None:
    spec = small(lora_target_modules=targets)
    network = model.load(spec, CPU)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name or ".lora_embedding_B." in name:
            torch.nn.init.normal_(parameter)
    trained = sum(parameter.numel() for parameter in model.trainable(network))
    sizes = model.sizes(network, spec)
    assert sizes["adapter_bytes"] == 4 * trained
    assert sizes["adapter_share"] == pytest.approx(trained / ((sizes["total_parameters"] or 0) - trained))
    saved_adapters.write(network, spec, tmp_path)
    on_disk = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(each.numel() * each.element_size() for each in on_disk.values()) == sizes["adapter_bytes"]
    loaded = saved_adapters.load(model.base(spec, CPU), tmp_path)
    tokens = torch.arange(12)[None]
    network.eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, network(input_ids=tokens).logits)


def test_frozen_projections_are_a_share_of_the_base_alone(small: Small) -> None:
    spec = small(adapter="vera")
    network = model.load(spec, CPU)
    sizes = model.sizes(network, spec)
    base = model.sizes(model.base(spec, CPU), small(adapter="none"))["total_parameters"] or 0
    frozen = 256 * (128 + 128)  # two projections for all layers, as wide as the widest
    trained = sizes["trainable_parameters"] or 0
    assert sizes["adapter_share"] == pytest.approx((frozen + trained) / base)
