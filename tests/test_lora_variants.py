"""Variants of LoRA by options of peft: what is asked for is what is trained, with its term of the loss, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trials import run

from harness.errors import InputError
from harness.predict import peak
from harness.spec.trial import TrialSpec
from harness.training import inspection, loss, model

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")
STRONG_KASA = {"kasa_config": {"beta": 0.1, "gamma": 0.1}}


@pytest.mark.parametrize(
    ("options", "keys", "text"),
    [
        ({"use_qalora": True, "qalora_group_size": 8}, {}, "over GPTQ's checkpoints alone"),
        ({"kasa_config": {}}, {"precision": "nf4"}, r"plain LoRA in its place on .*q_proj, a Linear4bit; leave kasa_"),
        ({"monteclora_config": {}}, {"precision": "int8"}, "a Linear8bitLt; leave monteclora_config out"),
        ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, {"precision": "nf4"}, "leave use_bdlora out"),
        ({"kasa_config": {}}, {"precision": "int8", "quantizer": "torchao"}, "and those of .* are quantised"),
        ({"kasa_config": {}}, {"use_dora": True, "precision": "nf4"}, "use_dora and kasa_config: LoRA has one of them"),
        ({"eva_config": {"rho": 2.0}}, {"init_lora_weights": "eva"}, "use init_lora_weights alone"),
        ({"loftq_config": {"loftq_iter": 5}}, {"init_lora_weights": "loftq", "precision": "nf4"}, "alone"),
        ({"arrow_config": {}}, {}, "between adapters that were trained before"),
        ({"monteclora_config": {}}, {"gradient_checkpointing": True}, "computed again draws other noise"),
        ({"kasa_config": {}}, {"num_processes": 2, "sharding": "full_shard"}, "use sharding: none"),
        (
            {"kasa_config": {}},
            {"base_model": "random:smollm2-135m", "lora_target_modules": ["lm_head"]},
            "kasa_config: it takes a part out of the weight of lm_head, which another layer has too",
        ),
    ],
)
def test_what_would_be_plain_lora_or_something_else_is_refused(
    options: dict[str, Any], keys: dict[str, Any], text: str, small: Small
) -> None:
    if "quantizer" in keys:
        pytest.importorskip(keys["quantizer"])
    with pytest.raises(InputError, match=text) as error:
        inspection.inspect([("trial", small(adapter_options=options, **keys))])
    assert "\n" not in str(error.value)


def test_a_variant_is_trained_where_peft_has_it(small: Small) -> None:
    for options in (STRONG_KASA, {"velora_config": {}}):
        network = model.load(small(adapter_options=options), CPU)
        assert network.base_model.model.model.layers[0].self_attn.q_proj.lora_variant


@pytest.mark.parametrize(
    "keys",
    [
        {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"loss": "chunked"},
    ],
)
def test_kasa_trains_with_its_term_however_a_batch_is_cut(keys: dict[str, Any], small: Small) -> None:
    batch = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "adapter_options": STRONG_KASA}
    whole, cut = run(small(**batch)), run(small(**batch | keys))
    for a, b in zip(whole.steps, cut.steps, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)
        assert b.auxiliary_loss == pytest.approx(a.auxiliary_loss, rel=1e-4)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)


def test_the_term_is_that_of_the_paper(small: Small) -> None:
    """Equations 9 to 11 of arXiv:2412.06071."""
    spec = small(adapter_options={"kasa_config": {"beta": 0.5, "gamma": 0.25}}, precision="bf16")
    network = model.load(spec, CPU)
    expected = 0.0
    for name, matrix in network.named_parameters():
        if ".lora_diag." in name:
            expected += 0.5 * float(matrix.square().sum())
        elif ".lora_A." in name or ".lora_B." in name:
            rows = matrix if ".lora_A." in name else matrix.T
            expected += 0.25 * torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows))).item()
    record = run(spec)
    assert record.status == "ok", record.error
    assert record.steps[0].auxiliary_loss == pytest.approx(expected, rel=0.2)  # of other random numbers
    assert record.metrics["peak_memory_bytes"] == pytest.approx(peak.predict(spec, "cpu").peak_memory_bytes, rel=0.005)


def test_monteclora_trains_with_its_term(small: Small) -> None:
    """Its weight counts, and what it changes are the widths of its noise, which nothing else of a step does alone."""
    terms, gradients = [], []
    for weight in (1e-3, 1.0):
        config = {"kl_loss_weight": weight, "buffer_size": 2, "use_entropy": False}
        torch.manual_seed(0)
        network = model.load(small(adapter_options={"monteclora_config": config}, lora_target_modules=["q_proj"]), CPU)
        outputs = network(input_ids=torch.arange(8)[None])
        term = loss.auxiliary(network, outputs)
        assert term is not None
        term.backward()
        widths = [each for name, each in network.named_parameters() if "std_prior" in name]
        terms.append(term.item())
        gradients.append(sum(float(each.grad.norm()) for each in widths if each.grad is not None))
    assert terms[1] == pytest.approx(1000 * terms[0], rel=1e-3)
    assert gradients[1] == pytest.approx(1000 * gradients[0], rel=1e-3)
    assert gradients[0] > 0
