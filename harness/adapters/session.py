"""One adapter, ready for use: its stories, its tokenizer, and its base, unmerged and merged model."""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from harness import environment
from harness.errors import InputError
from harness.record import Model
from harness.sources import models, stories
from harness.sources.stories import Chat, Passage, Row, Story
from harness.spec.trial import TrialSpec
from harness.training import (
    adapter_methods,
    batches,
    chat,
    checkpoints,
    evaluation,
    half_matmul,
    limits,
    model,
    saved_adapters,
)
from harness.training.batches import Example

MODELS: tuple[Model, ...] = get_args(Model)
_COMPARED = 4
"""Stories whose logits are compared."""
_BEGINNING = 32
"""Most tokens of a text without a prompt that stand for one; of a short text half of them."""

_KINDS: dict[str, type[Row]] = {"instruction": Story, "chat": Chat, "text": Passage}
"""What rows are by a declared `kind`."""


@dataclass(frozen=True)
class Question:
    """What a model is asked with a held-out story."""

    text: str
    """A synopsis, the user's last turn, or the beginning of a text."""
    prompt: tuple[int, ...]
    """Tokens after which the model goes on."""
    reference: str
    """How the story goes on."""


class AdapterSession:
    """The stories, the tokenizer and the models of one adapter.

    Args:
        spec: how the adapter was trained.
        adapter: its folder, in peft's format.
        trust_remote_code: let a model from the hub run its own code.

    Raises:
        InputError: the model or its stories cannot be had.
    """

    def __init__(self, spec: TrialSpec, adapter: Path, *, trust_remote_code: bool = False) -> None:
        half_matmul.install()
        self.spec = spec
        self.device = torch.device(environment.resolve_device(spec.device))
        self.pretrained = models.pretrained(spec.base_model)
        self._adapter = adapter
        self._trust_remote_code = trust_remote_code
        self.passed_over: str | None = None
        """Why the tokenizer in the adapter's folder is not used; null: it is, or there is none."""
        self.tokenizer = self._own_tokenizer() or checkpoints.load_tokenizer(spec, trust_remote_code=trust_remote_code)

    def _own_tokenizer(self) -> Any:
        """The tokenizer that the adapter was kept with, where its tokens have embeddings; else null."""
        if not self.pretrained or not (self._adapter / "tokenizer_config.json").is_file():
            return None
        own, code = None, self._trust_remote_code
        try:
            own = checkpoints.load_tokenizer(self.spec, trust_remote_code=code, folder=self._adapter)
        except InputError as error:
            self.passed_over = str(error)
            return None
        of_base = checkpoints.vocabulary(self.spec, trust_remote_code=code)
        rows = saved_adapters.vocabulary(self._adapter) or of_base
        largest = max(own.get_vocab().values())
        if largest < rows:
            return own
        self.passed_over = f"it has the token {largest}, and the model has embeddings for {rows}"
        return None

    @functools.cached_property
    def held_out(self) -> tuple[Example, ...]:
        """The held-out stories that the trial was evaluated on."""
        return self._stories.held_out

    @functools.cached_property
    def lacks_stories(self) -> str | None:
        """Why there are no stories to measure losses on; null: there are."""
        try:
            return None if self.held_out else "the trial held out no stories"
        except InputError as error:
            return str(error)

    @functools.cached_property
    def _stories(self) -> batches.Data:
        return batches.load(self.spec, self.tokenizer)

    @functools.cached_property
    def texts(self) -> dict[str, Row]:
        """All stories by their ids."""
        read = stories.read_all(self.spec)
        return {story.id: story for story in (*read.stories, *read.held_out)}

    def question(self, example: Example) -> Question:
        """What is asked with a held-out story: of a chat its last trained turn, of a text how it goes on."""
        row = self.texts[example.story_id]
        if isinstance(row, Passage):
            count = min(_BEGINNING, max(1, len(example) // 2))
            ids = example.input_ids
            return Question(self._decode(ids[:count]), ids[:count], self._decode(ids[count:]))
        if isinstance(row, Chat):  # an example that was cut has fewer turns than the row
            start, end = example.completions[-1]
            text = chat.instruction_before(row, len(example.completions))
            return Question(text, example.prompt, self._decode(example.input_ids[start:end]).strip())
        return Question(row.instruction, example.prompt, row.completion)

    def _decode(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @functools.cached_property
    def kind(self) -> type[Row]:
        """What the rows are."""
        declared = self.spec.datasets[0].type.kind
        if declared in _KINDS:
            return _KINDS[declared]
        try:
            return type(next(iter(self.texts.values())))
        except InputError:  # a synopsis needs no data, which may be gone since
            return Story

    @property
    def end_ids(self) -> list[int]:
        """Tokens at which a generated text ends: the tokenizer's own, and that of a chat's turns."""
        ends = (self.tokenizer.eos_token_id, None if self.kind is Passage else chat.end_of_turn(self.tokenizer))
        return list(dict.fromkeys(end for end in ends if end is not None))

    def make(self, name: Model, *, unquantised: bool = False) -> tuple[Any, TrialSpec]:
        """One of the models, ready to answer, and its spec.

        Args:
            name: which.
            unquantised: over the 16-bit base of a quantised one, as the merged model is in any case.

        Raises:
            InputError: the adapter does not fit its base.
        """
        gc.collect()  # the previous model is freed first: memory is sized for one
        code = self._trust_remote_code
        if name == "merged" or unquantised:
            network, at = model.unquantised_base(self.spec, self.device, trust_remote_code=code)
        else:
            network, at = model.base(self.spec, self.device, trust_remote_code=code), self.spec
        saved_adapters.fit_vocabulary(network, self._adapter)
        if name != "base":
            network = saved_adapters.load(network, self._adapter)
        if name == "unmerged":
            adapter_methods.set_dtype(network, at)
        if name == "merged":
            network = saved_adapters.merged(network)
        network.config.use_cache = True
        return network.eval(), at

    def pad_id(self, network: Any) -> int:
        """Id for padding of one of the models."""
        return checkpoints.pad_id(self.tokenizer, limits.of_model(network).embeddings)

    def losses(self, network: Any, at: TrialSpec) -> list[tuple[str, float, int]]:
        """Held-out stories as `evaluation.story_losses` gives them; none where the weights are random, or there are no
        stories.
        """
        if not self.pretrained or self.lacks_stories:
            return []
        return evaluation.story_losses(network, self.held_out, at, self.pad_id(network), self.device)

    @functools.cached_property
    def _compared(self) -> Sequence[Example]:
        """Held-out stories, else others, else some of the general text that is bundled."""
        try:
            return (self.held_out or self._stories.train)[:_COMPARED]
        except InputError:
            passages = batches.general(self.tokenizer, _COMPARED)
            return [passage.cut(batches.evaluated_length(self.spec)) for passage in passages]

    @torch.no_grad()
    def logits(self, network: Any, at: TrialSpec) -> torch.Tensor:
        """Logits at the completions of some texts: fp32 of shape (positions, vocabulary)."""
        logits, pad_id = [], self.pad_id(network)
        for example in self._compared:
            batch = batches.collate([example], pad_id, self.device)
            labels = batch.inputs.pop("labels")[0]
            with model.autocast(at, self.device):
                output = network(**batch.inputs).logits[0]
            logits.append(output[labels != batches.IGNORED].float().cpu())
        return torch.cat(logits)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest |one − other|."""
    return float((one - other).abs().max())
