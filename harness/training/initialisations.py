"""Initialisations of LoRA for which a layer and its weights are not enough: by passes over the training data, or by the
weights as they were before they were quantised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from harness.errors import InputError
from harness.training import quantisers
from harness.training.batches import IGNORED, Example, collate

_NAME = "default"
"""Of the adapter, by peft."""
_MOST_EXAMPLES = 256
"""Training examples that are passed over at most: as many as peft's documentation gives for CorDA."""
_MOST_PASSES = 20
"""Over them, until EVA's directions no longer change."""
_TOKENS_PER_RANK = 2
"""In a batch that is decomposed, which must have as many tokens as directions are wanted, or more."""

Inputs = dict[str, torch.Tensor]


def check(network: Any, how: str) -> None:
    """Refuse layers that an initialisation cannot be of; on the device `meta` too.

    Args:
        network: with adapters.
        how: its name: eva, corda or loftq.

    Raises:
        InputError: a layer is not linear, or has fewer directions than the rank; or layers have ranks of their own.
    """
    from peft.tuners.lora import LoraLayer

    if how != "loftq" and network.peft_config[_NAME].rank_pattern:  # peft (0.21) has the passes give all lora_r
        raise InputError(
            f"init_lora_weights {how} with rank_pattern: it gives each layer lora_r; leave rank_pattern out"
        )
    for name, layer in network.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if _NAME not in layer.lora_A:
            raise InputError(f"init_lora_weights {how}: {name} is not linear; leave it out of lora_target_modules")
        first: Any = layer.lora_A[_NAME]
        last: Any = layer.lora_B[_NAME]
        inputs, outputs = first.in_features, last.out_features
        most = inputs if how == "eva" else min(inputs, outputs)
        if (rank := layer.r[_NAME]) > most:
            raise InputError(f"init_lora_weights {how}: {name} has {most} directions, and lora_r is {rank}; use less")


def layers(network: Any) -> dict[str, Any]:
    """Linear layers with LoRA, by the names that they have in the base model."""
    from peft.tuners.lora import LoraLayer

    named = network.get_base_model().named_modules()
    return {name: each for name, each in named if isinstance(each, LoraLayer) and _NAME in each.lora_A}


def eva(network: Any, examples: Sequence[Example], pad_id: int, device: torch.device, *, size: int) -> None:
    """Explained variance adaptation (arXiv:2410.07170): A are the directions in which a layer's inputs vary most.

    Each layer keeps its rank: peft's `rho` is 1. B is zero as ever.

    Args:
        network: with adapters.
        examples: to pass over.
        pad_id: with what shorter ones are padded.
        device: of the model.
        size: examples of a batch.

    Raises:
        InputError: the data have too few tokens that carry loss, or the directions of too few agree.
    """
    from peft import EvaConfig, initialize_lora_eva_weights

    config = network.peft_config[_NAME]
    groups = _groups(examples[:_MOST_EXAMPLES], size, config.r)
    passes = _Passes([collate(group, pad_id, device).inputs for group in groups])
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    try:
        initialize_lora_eva_weights(
            network,
            passes,
            forward_fn=_forward,
            prepare_model_inputs_fn=_judged,
            prepare_layer_inputs_fn=_inputs_of_judged,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    finally:  # loaded again, the adapter has its values from its file
        config.init_lora_weights, config.eva_config = True, None


class _Passes(Iterable[Inputs]):
    """Batches that are passed over again and again, though not for ever. peft repeats what one iterator gives."""

    def __init__(self, batches: list[Inputs]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Inputs]:
        for _ in range(_MOST_PASSES):
            yield from self._batches
        raise InputError(
            f"init_lora_weights eva: the directions of the data still change after {_MOST_PASSES} passes over "
            f"{len(self)} batches; use a lower lora_r, or more stories"
        )


def _forward(model: Any, inputs: Inputs) -> Any:
    """Without the loss, which nobody asks for."""
    return model(**{name: each for name, each in inputs.items() if name != "labels"})


def _judged(inputs: Inputs, _: Any) -> tuple[torch.Tensor, int]:
    """Positions of a batch that carry loss, among all of them."""
    judged = inputs["attention_mask"].bool() & (inputs["labels"] != IGNORED)
    return judged.flatten().nonzero().squeeze(1), judged.numel()


def _inputs_of_judged(given: Any, judged: tuple[torch.Tensor, int], name: str) -> torch.Tensor:
    """What a layer is given at these positions, a row each; some models give their layers all positions in one row."""
    first = given[0] if isinstance(given, tuple | list) else given
    rows: torch.Tensor = first.reshape(-1, first.shape[-1])
    positions, count = judged
    if len(rows) != count:
        raise InputError(
            f"init_lora_weights eva: {name} is given {len(rows)} inputs for {count} tokens; leave it out of "
            "lora_target_modules"
        )
    return rows[positions]


def _groups(examples: Sequence[Example], size: int, rank: int) -> list[list[Example]]:
    """Micro-batches, joined until each has enough tokens that carry loss."""
    least = _TOKENS_PER_RANK * rank
    groups: list[list[Example]] = []
    tokens = least
    for start in range(0, len(examples), size):
        if tokens >= least:
            groups.append([])
            tokens = 0
        group = examples[start : start + size]
        groups[-1] += group
        tokens += sum(label != IGNORED for example in group for label in example.labels)
    if tokens < least and len(groups) > 1:
        last = groups.pop()
        groups[-1] += last
    elif tokens < least:
        raise InputError(
            f"init_lora_weights eva: the stories have {tokens} tokens that carry loss, and rank {rank} takes "
            f"{least}; use a lower lora_r, or more stories"
        )
    return groups


def corda(network: Any, examples: Sequence[Example], pad_id: int, device: torch.device) -> None:
    """Context-oriented decomposition adaptation (arXiv:2406.05223): A and B are the part of a weight that matters most
    for the data, and it is taken out of the weight.

    Args:
        network: with adapters.
        examples: to pass over.
        pad_id: with what shorter ones are padded.
        device: of the model.
    """
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    adapted = layers(network)
    config = copy.copy(network.peft_config[_NAME])
    config.target_modules = {f"{name}.base_layer" for name in adapted}
    config.exclude_modules = None
    config.corda_config = CordaConfig()

    def run() -> None:
        with network.disable_adapter():
            for example in examples[:_MOST_EXAMPLES]:  # one at a time: peft takes the tokens of a batch of one
                network(**collate([example], pad_id, device).inputs)

    preprocess_corda(network.get_base_model(), config, run_model=run)
    for layer in adapted.values():
        weights = [layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight]
        types = [weight.dtype for weight in weights]
        layer.corda_init(_NAME, "corda")
        for weight, dtype in zip(weights, types, strict=True):
            weight.data = weight.data.to(dtype)


def loftq(network: Any, original: Callable[[], Any]) -> None:
    """LoRA-fine-tuning-aware quantisation (arXiv:2310.08659) in one iteration: A and B are the best of their rank at
    what quantising has taken from a weight.

    Peft's function reads bitsandbytes' 4-bit weights on a card alone, and leaves the adapter's scale out.

    Args:
        network: with adapters over quantised layers.
        original: loads the base as it was.

    Raises:
        InputError: none of the layers with adapters is quantised.
    """
    from transformers.pytorch_utils import Conv1D

    before, seen = original(), False
    for name, layer in layers(network).items():
        quantised, source = layer.get_base_layer(), before.get_submodule(name)
        if not _is_quantised(quantised):
            continue  # nothing was taken from it; its adapter begins as ever
        seen = True
        lora_a, lora_b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        weight = source.weight.T if isinstance(source, Conv1D) else source.weight  # quantisers turn it
        weight = weight.to(lora_a.device, torch.float32)
        lost = (weight - quantisers.dequantised(quantised).float()) / layer.scaling[_NAME]
        left, singular, right = torch.linalg.svd(lost, full_matrices=False)
        rank = len(lora_a)
        root = singular[:rank].sqrt()
        lora_b.copy_(left[:, :rank] * root)
        lora_a.copy_(root[:, None] * right[:rank])
    if not seen:
        raise InputError("init_lora_weights loftq: no layer with an adapter is quantised; use default")


def _is_quantised(module: Any) -> bool:
    plain = type(getattr(module, "weight", None)) is torch.nn.Parameter and module.weight.is_floating_point()
    return not plain or quantisers.of_torchao(module.weight)
