"""An adapter merged into its base: a complete folder that transformers loads by itself, and what that changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from pydantic import BaseModel, ConfigDict

from harness._util.messages import one_line
from harness._util.redact import redact_home
from harness._util.units import show_bytes
from harness.adapters.session import MODELS, AdapterSession, largest_difference
from harness.adapters.trained import kind
from harness.errors import InputError
from harness.grids.yaml_file import spec_to_yaml
from harness.metrics import METRICS
from harness.record import Model
from harness.spec.trial import TrialSpec
from harness.training import model

_ROUNDINGS = 8
"""A merge may be off by this many times what one rounding of every weight changes; tiny and bundled models, of every
precision and kind of adapter, are off by 2 at most."""


class Merged(BaseModel):
    """What a merge made and changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dtype: str
    """Of the merged weights."""
    weights_bytes: int
    """Of the merged weights as saved."""
    largest_logit_difference: float
    """Largest |merged − unmerged| over positions and vocabulary, the unmerged model at its training precision."""
    merge_error: float
    """The same from the unmerged model over the 16-bit base of a quantised one: what merging alone changes."""
    rounding: float
    """What one rounding of every merged weight changes, as measured: |perturbed − merged| at its largest."""
    losses: dict[str, tuple[float, ...]]
    """Nats per completion token of each held-out story: `base`, `unmerged`, `merged`; empty for random weights."""
    tokens: tuple[int, ...]
    """Completion tokens of each held-out story."""
    notes: tuple[str, ...] = ()
    """What its user should know, a line each."""


def merge(
    spec: TrialSpec,
    adapter: Path,
    folder: Path,
    figures: Mapping[str, float],
    *,
    allow_difference: bool = False,
    trust_remote_code: bool = False,
    known: Sequence[str] = (),
    on_note: Callable[[str], None] = lambda note: None,
) -> Merged:
    """Merge an adapter into its base and write weights, config, tokenizer and a card.

    A base that was quantised for training is loaded in 16 bit here; the merged model is compared with the unmerged one
    at its training precision, so that the cost of the exchange shows.

    Args:
        spec: how the adapter was trained.
        adapter: its folder, in peft's format.
        folder: where the model is written; the caller moves it to its place when it is whole.
        figures: of the trial, for the card.
        allow_difference: write a model that is off by more than rounding too.
        trust_remote_code: let a model from the hub run its own code.
        known: what its user knows already, for the card.
        on_note: called with what else the user should know.

    Raises:
        InputError: the adapter does not fit its base, or the merged model is off by more than rounding.
        OSError: something cannot be read or written.
    """
    session = AdapterSession(spec, adapter, trust_remote_code=trust_remote_code)
    own = _notes(session)
    for note in own:
        on_note(note)
    losses: dict[str, tuple[float, ...]] = {}
    tokens: tuple[int, ...] = ()
    logits: dict[Model, torch.Tensor] = {}
    network: Any = None
    for name in MODELS:
        del network  # before the next one is loaded
        network, at = session.make(name)
        of_stories = session.losses(network, at)
        losses[name], tokens = tuple(loss for _, loss, _ in of_stories), tuple(count for _, _, count in of_stories)
        if name != "base":
            logits[name] = session.logits(network, at)
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder)
    session.tokenizer.save_pretrained(folder)
    dtype = str(network.dtype).removeprefix("torch.")
    rounding = largest_difference(_with_another_rounding(session, network, at), logits["merged"])
    del network
    # A quantised base is exchanged by merging, which changes logits by design: that is reported, not judged.
    unmerged = logits["unmerged"] if at == spec else session.logits(*session.make("unmerged", unquantised=True))
    merged = Merged(
        dtype=dtype,
        weights_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        largest_logit_difference=largest_difference(logits["merged"], logits["unmerged"]),
        merge_error=largest_difference(logits["merged"], unmerged),
        rounding=rounding,
        losses=losses if all(losses.values()) else {},
        tokens=tokens,
        notes=tuple(redact_home(note) for note in (*known, *own)),
    )
    if not (allow_difference or merged.merge_error <= _ROUNDINGS * merged.rounding):  # not a number: off too
        raise InputError(
            f"merged, logits are off by up to {merged.merge_error:.3g}, and rounding to {merged.dtype} explains "
            f"{merged.rounding:.3g}: nothing was written; --allow-difference writes the model all the same"
        )
    (folder / "README.md").write_text(_card(spec, kind(adapter), merged, figures), encoding="utf-8")
    (folder / "merge.json").write_text(merged.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return merged


@torch.no_grad()
def _with_another_rounding(session: AdapterSession, network: Any, at: TrialSpec) -> torch.Tensor:
    """Logits of a model whose weights are each moved by as much as its arithmetic rounds them by; for good."""
    coarsest = 2.0**-10 if at.tf32 and session.device.type == "cuda" else 0.0
    generator = torch.Generator(session.device).manual_seed(0)
    for weight in network.parameters():
        formats = {weight.dtype, model.compute_dtype(at) or weight.dtype}
        bound = max(coarsest, *(torch.finfo(each).eps for each in formats))
        weight.addcmul_(weight, torch.empty_like(weight).uniform_(-bound, bound, generator=generator))
    return session.logits(network, at)


def _notes(session: AdapterSession) -> list[str]:
    """What the user of a merged model should know of its measurement and its tokenizer."""
    lines = []
    if session.passed_over is not None:
        lines.append(f"the model gets the tokenizer of its base, not that of the adapter: {session.passed_over}")
    if session.pretrained and session.lacks_stories is not None:
        lines.append(f"no losses are measured, and logits are compared on other text: {session.lacks_stories}")
    return [one_line(note) for note in lines]


def _card(spec: TrialSpec, method: str, merged: Merged, figures: Mapping[str, float]) -> str:
    """A model card: where it comes from, how it was trained, what was measured."""
    front = {"base_model": spec.base_model, "library_name": "transformers", "pipeline_tag": "text-generation"}
    rows = [f"| {METRICS[name].name} | {METRICS[name].show(value)} |" for name, value in figures.items()]
    mean = {name: numpy.average(values, weights=merged.tokens) for name, values in merged.losses.items()}
    rows += [f"| loss, {name} | {value:.4f} nats |" for name, value in mean.items()]
    rows += [
        f"| largest difference of logits, merged from unmerged | {merged.largest_logit_difference:.3g} |",
        f"| weights | {show_bytes(merged.weights_bytes)}, {merged.dtype} |",
    ]
    table = "\n".join(rows)
    notes = "\n".join(["", *(f"- {note}" for note in merged.notes), ""]) if merged.notes else ""
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {spec.base_model}, merged\n\n"
        f"An adapter ({method}) merged into its base model by harness.\n{notes}\n"
        f"| measured | |\n|---|---|\n{table}\n\n## Configuration\n\n"
        f"```yaml\n{spec_to_yaml(spec)}```\n"
    )
