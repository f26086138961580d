"""An adapter merged into its base: a complete folder that transformers loads by itself, and what that changed."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict

from harness import data, evaluate_model, half_matmul, model, model_source
from harness.data import Example
from harness.environment import resolve_device
from harness.metrics import METRICS, show_bytes
from harness.spec import TrialSpec

_COMPARED = 4
"""Held-out stories whose logits are compared."""


class Merged(BaseModel):
    """What a merge made and changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dtype: str
    """Of the merged weights."""
    weights_bytes: int
    """Of the merged weights as saved."""
    largest_logit_difference: float
    """Largest |merged − unmerged| over positions and vocabulary, the unmerged model at its training precision."""
    losses: dict[str, tuple[float, ...]]
    """Nats per completion token of each held-out story: `base`, `unmerged`, `merged`; empty for random weights."""


def merge(
    spec: TrialSpec, adapter: Path, folder: Path, figures: Mapping[str, float], *, trust_remote_code: bool = False
) -> Merged:
    """Merge an adapter into its base and write weights, config, tokenizer and a card.

    A base that was quantised for training is loaded in 16 bit here; the merged model is compared with the unmerged one
    at the precision that it was trained at, so that what the exchange costs is seen.

    Args:
        spec: how the adapter was trained.
        adapter: its folder, in peft's format.
        folder: where the model is written; whoever calls moves it to its place when it is whole.
        figures: of the trial, for the card.
        trust_remote_code: let a model from the hub run its own code.

    Raises:
        InputError: the adapter does not fit its base.
        OSError: something cannot be read or written.
    """
    half_matmul.install()
    device = torch.device(resolve_device(spec.device))
    tokenizer = model.load_tokenizer(spec, trust_remote_code=trust_remote_code)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    held_out = data.load(spec, tokenizer).held_out
    pretrained = model_source.resolve(spec.base_model).pretrained
    losses: dict[str, tuple[float, ...]] = {}

    def judge(name: str, network: Any, at: TrialSpec) -> torch.Tensor:
        network.eval()
        if pretrained and held_out:
            losses[name] = tuple(
                loss for _, loss, _ in evaluate_model.story_losses(network, held_out, at, pad_id, device)
            )
        return _logits(network, held_out[:_COMPARED], at, pad_id, device)

    network = model.base(spec, device, trust_remote_code=trust_remote_code)
    judge("base", network, spec)
    network = model.with_saved_adapter(network, adapter)
    unmerged = judge("unmerged", network, spec)
    plain = model.unquantised(spec)
    if plain != spec:
        del network
        gc.collect()
        network = model.with_saved_adapter(model.base(plain, device, trust_remote_code=trust_remote_code), adapter)
    network = network.merge_and_unload(safe_merge=True)
    merged = judge("merged", network, plain)
    folder.mkdir(parents=True)
    network.config.use_cache = True
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = Merged(
        dtype=str(network.dtype).removeprefix("torch."),
        weights_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        largest_logit_difference=float((merged - unmerged).abs().max()) if held_out else 0.0,
        losses=losses,
    )
    (folder / "README.md").write_text(_card(spec, found, figures), encoding="utf-8")
    (folder / "merge.json").write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return found


@torch.no_grad()
def _logits(
    network: Any, examples: Sequence[Example], spec: TrialSpec, pad_id: int, device: torch.device
) -> torch.Tensor:
    """Logits of completion positions in fp32, of shape (positions, vocabulary)."""
    found = []
    for example in examples:
        batch = data.collate([example], pad_id, device)
        labels = batch.inputs.pop("labels")[0]
        with model.autocast(spec, device):
            logits = network(**batch.inputs).logits[0]
        found.append(logits[labels != data.IGNORED].float().cpu())
    return torch.cat(found) if found else torch.empty(0, 0)


def _card(spec: TrialSpec, found: Merged, figures: Mapping[str, float]) -> str:
    """A model card: where it comes from, how it was trained, what was measured."""
    given = {key: value for key, value in spec.canonical().items() if value is not None}
    front = {"base_model": spec.base_model, "library_name": "transformers", "pipeline_tag": "text-generation"}
    shown = [f"| {METRICS[name].name} | {METRICS[name].show(value)} |" for name, value in figures.items()]
    mean = {name: sum(values) / len(values) for name, values in found.losses.items()}
    shown += [f"| mean loss per story, {name} | {value:.4f} nats |" for name, value in mean.items()]
    shown += [
        f"| largest difference of logits, merged from unmerged | {found.largest_logit_difference:.3g} |",
        f"| weights | {show_bytes(found.weights_bytes)}, {found.dtype} |",
    ]
    table = "\n".join(shown)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {spec.base_model}, merged\n\n"
        "A LoRA adapter merged into its base model by harness.\n\n"
        f"| measured | |\n|---|---|\n{table}\n\n## Configuration\n\n"
        f"```yaml\n{yaml.safe_dump(given, sort_keys=False, allow_unicode=True)}```\n"
    )
