"""`sample_packing`: examples in one row learn what they learn in rows of their own, without padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from transformers import masking_utils
from trials import run

from harness.errors import InputError
from harness.predict import peak
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, inspection, loss, model, order, packing
from harness.training.order import kinds

Small = Callable[..., TrialSpec]

CPU = torch.device("cpu")
REFUSED = {"bloom", "gpt_oss", "mamba", "opt", "own_code", "qwen3_next"}
"""Without positions, masks of positions, or with a state that runs along a row."""
LENGTHS = (190, 40, 121)


def stories(spec: TrialSpec) -> list[batches.Example]:
    """Three of different lengths, whose every token carries loss."""
    tokenizer = checkpoints.load_tokenizer(spec, trust_remote_code=True)
    train = batches.load(spec, tokenizer).train
    return [example.cut(length) for example, length in zip(train, LENGTHS, strict=False)]


def losses(network: Any, examples: list[batches.Example], *, packed: bool) -> list[float]:
    """Of each story, in nats."""
    batch = batches.pack(examples, CPU) if packed else batches.collate(examples, 0, CPU)
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "labels"}
    logits, labels = network(**packing.inputs(network.get_base_model(), inputs)).logits, batch.inputs["labels"]
    if not packed:
        return [float(loss.summed_cross_entropy(*each)) for each in zip(logits.split(1), labels.split(1), strict=True)]
    lengths = [len(example) for example in examples]
    rows = zip(logits.split(lengths, dim=1), labels.split(lengths, dim=1), strict=True)
    return [float(loss.summed_cross_entropy(*each)) for each in rows]


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stories_of_a_row_do_not_see_each_other(
    architecture: str, attention: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path, architecture, config={"use_cache": True})
    keys = {"precision": "fp32", "train_on_inputs": True, "sequence_length": 192, "attention": attention}
    spec = small(base_model=folder, **keys, sample_packing=True)
    if architecture in REFUSED:
        with pytest.raises(InputError, match=r"sample_packing: .* use sample_packing: false"):
            model.load(spec, CPU, trust_remote_code=True)
        return
    network = model.load(spec, CPU, trust_remote_code=True).eval()
    examples = stories(spec)
    with torch.no_grad():
        apart, packed = (losses(network, examples, packed=each) for each in (False, True))
        assert packed == pytest.approx(apart, rel=1e-5)
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
        monkeypatch.setattr(
            packing, "inputs", lambda causal, given: {k: given[k] for k in ("input_ids", "position_ids")}
        )
        first, *later = losses(network, examples, packed=True)
    assert first == pytest.approx(apart[0], rel=1e-5)
    assert all(a != pytest.approx(b, rel=1e-5) for a, b in zip(later, apart[1:], strict=True)), "in one"


def test_the_first_token_of_a_story_carries_no_loss(small: Small) -> None:
    examples = [batches.Example("a", (1, 2, 3), ((0, 3),)), batches.Example("b", (4, 5), ((0, 2),))]
    batch = batches.pack(examples, CPU)
    assert batch.inputs["labels"].tolist() == [[batches.IGNORED, 2, 3, batches.IGNORED, 5]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert (batch.samples, batch.tokens, batch.padded_tokens, batch.supervised_tokens) == (2, 5, 5, 3)


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("gemma2", {}),  # with windows
        ("gemma2", {"precision": "nf4", "gradient_checkpointing": True}),
        ("llama", {"loss": "chunked", "loss_chunk_size": 50}),
        ("llama", {"adapter": "none", "optimizer": "adafactor"}),
    ],
    ids=str,
)
def test_it_trains_as_rows_of_their_own_do_and_is_predicted(
    architecture: str, keys: dict[str, Any], small: Small, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path, architecture)
    keys = {"sequence_length": 320, "micro_batch_size": 4, "learning_rate": 1e-3} | keys
    specs = [small(base_model=folder, sample_packing=on, **{"precision": "fp32"} | keys) for on in (False, True)]
    apart, packed = (run(spec) for spec in specs)
    assert packed.status == "ok", packed.error
    assert [step.loss for step in packed.steps] == pytest.approx([step.loss for step in apart.steps], rel=1e-4)
    assert [s.grad_norm for s in packed.steps] == pytest.approx([s.grad_norm for s in apart.steps], rel=1e-3)
    assert packed.metrics["eval_loss"] == pytest.approx(apart.metrics["eval_loss"], rel=1e-4)
    for one, other in zip(packed.steps, apart.steps, strict=True):
        assert (one.samples, one.tokens, one.supervised_tokens) == (
            other.samples,
            other.tokens,
            other.supervised_tokens,
        )
        assert one.padded_tokens == one.tokens
    assert sum(step.padded_tokens for step in apart.steps) > sum(step.tokens for step in apart.steps)
    predicted = peak.predict(specs[1], "cpu")
    assert predicted.peak_memory_bytes == pytest.approx(packed.metrics["peak_memory_bytes"], rel=1e-3)


def test_grouped_examples_are_trained_and_predicted(small: Small, tmp_path: Path) -> None:
    keys = {"base_model": tiny_model(tmp_path), "sequence_length": 512, "micro_batch_size": 4, "train_samples": 40}
    plain, grouped = (small(**keys, group_by_length=on) for on in (False, True))
    records = [run(spec) for spec in (plain, grouped)]
    shares = [sum(s.tokens for s in r.steps) / sum(s.padded_tokens for s in r.steps) for r in records]
    assert sum(s.tokens for s in records[0].steps) == sum(s.tokens for s in records[1].steps)
    assert shares[1] > shares[0]
    measured = records[1].metrics["peak_memory_bytes"]
    assert peak.predict(grouped, "cpu").peak_memory_bytes == pytest.approx(measured, rel=1e-3)


def test_how_a_batch_is_cut_does_not_matter(small: Small, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    cuts = [
        small(base_model=folder, precision="fp32", sample_packing=True, micro_batch_size=size,
              gradient_accumulation_steps=times, sequence_length=320)
        for size, times in ((4, 1), (2, 2), (1, 4))
    ]  # fmt: skip
    first, *others = ([step.loss for step in run(spec).steps] for spec in cuts)
    assert all(each == pytest.approx(first, rel=1e-5) for each in others)


def test_it_holds_what_its_tokens_need(small: Small, tmp_path: Path) -> None:
    """A full loss in fp32 holds three arrays of a number for each position and entry of the vocabulary; the mask of a
    long row takes a part of what is saved.
    """
    entries = 2**16
    keys = {"base_model": tiny_model(tmp_path, config={"vocab_size": entries}), "precision": "fp32"}
    keys |= {"micro_batch_size": 4, "sequence_length": 8192, "train_samples": 4}
    specs = [small(**keys, sample_packing=on) for on in (False, True)]
    examples = batches.load(specs[0], checkpoints.load_tokenizer(specs[0])).train
    apart, packed = (
        max(kind.examples * kind.width for step in order.optimizer_steps(spec, examples) for kind in kinds(step, spec))
        for spec in specs
    )
    assert packed < 0.95 * apart
    less = peak.predict(specs[0], "cpu").peak_memory_bytes - peak.predict(specs[1], "cpu").peak_memory_bytes
    assert less == pytest.approx(3 * 4 * entries * (apart - packed), rel=0.15)


def test_packed_examples_need_no_mask_of_the_row(small: Small, tmp_path: Path) -> None:
    """Where nothing is padded, packing holds what rows of their own do, and the outputs of attention once more."""
    keys = {"base_model": tiny_model(tmp_path), "precision": "bf16", "sequence_length": 256, "train_samples": 8}
    keys |= {"micro_batch_size": 4}
    ways = ({"pad_to_sequence_len": False}, {"sample_packing": True})
    apart, packed = (peak.predict(small(**keys, **way), "cuda", full_length=True).peak_memory_bytes for way in ways)
    positions, hidden, layers, two_bytes = 4 * 256, 32, 2, 2
    assert 0 <= packed - apart <= 1.1 * positions * hidden * layers * two_bytes


@pytest.mark.parametrize("architecture", ["opt", "mixtral"])
def test_what_cannot_be_kept_apart_is_refused_before_anything_starts(
    architecture: str, small: Small, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path, architecture, config={"output_router_logits": True})
    with pytest.raises(InputError, match=r"packed: sample_packing: .* use sample_packing: false"):
        inspection.inspect([("packed", small(base_model=folder, sample_packing=True))])


def test_padding_and_no_padding_exclude_each_other(small: Small) -> None:
    with pytest.raises(ValueError, match="keep one"):
        small(sample_packing=True, pad_to_sequence_len=True)
    alone = [small(micro_batch_size=1, sample_packing=on).id for on in (False, True)]
    assert alone[0] == alone[1], "one example is a row of its own"
