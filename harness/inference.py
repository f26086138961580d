"""A trained model at work: the base alone, the base under its adapter, and the two merged; timed, judged and heard."""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from harness import data, environment, evaluate_model, half_matmul, model, model_source, stories
from harness.data import Example
from harness.errors import InputError
from harness.memory import MemoryMeter
from harness.results import Answer, Inference, Model, Request, Served
from harness.spec import TrialSpec
from harness.stories import Story
from harness.story_metrics import StoryMetrics

MODELS: tuple[Model, ...] = get_args(Model)

_COMPARED = 4
"""Held-out stories whose logits are compared."""
_PROMPTS = 2
"""Held-out stories whose prompts are timed in each round."""
_NEW_TOKENS = 32
"""New tokens of a timed request, the first among them."""
_WARM_UP = 4
"""New tokens of the request after loading that is not timed."""

Say = Callable[[tuple[int, int, str]], None]
"""Told how many loads are done, of how many, and what is being done now."""


class Workshop:
    """What all models of a trial need: its stories, its tokenizer, and how its models are made.

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
        self.pretrained = model_source.resolve(spec.base_model).pretrained
        self.tokenizer = model.load_tokenizer(spec, trust_remote_code=trust_remote_code)
        self.pad_id = model.pad_id(self.tokenizer)
        self._adapter = adapter
        self._trust_remote_code = trust_remote_code

    @functools.cached_property
    def held_out(self) -> tuple[Example, ...]:
        """The held-out stories as the trial was judged by them."""
        return data.load(self.spec, self.tokenizer).held_out

    @functools.cached_property
    def texts(self) -> dict[str, Story]:
        """All stories by their ids."""
        return {story.id: story for dataset in self.spec.datasets for story in stories.read(dataset)}

    def make(self, name: Model) -> tuple[Any, TrialSpec]:
        """One of the models, ready to answer, and its spec: adapters merge into 16 bit what was quantised.

        Raises:
            InputError: the adapter does not fit its base.
        """
        gc.collect()  # the former one goes first: there is room for one
        at = model.unquantised(self.spec) if name == "merged" else self.spec
        network = model.base(at, self.device, trust_remote_code=self._trust_remote_code)
        if name != "base":
            network = model.with_saved_adapter(network, self._adapter)
        if name == "merged":
            network = network.merge_and_unload(safe_merge=True)
        network.config.use_cache = True
        return network.eval(), at

    def losses(self, network: Any, at: TrialSpec) -> list[tuple[str, float, int]]:
        """Held-out stories as `evaluate_model.story_losses` has them; none where the weights are random."""
        if not self.pretrained:
            return []
        return evaluate_model.story_losses(network, self.held_out, at, self.pad_id, self.device)

    @torch.no_grad()
    def logits(self, network: Any, at: TrialSpec) -> torch.Tensor:
        """Logits at the completions of some held-out stories, fp32 of shape (positions, vocabulary)."""
        found = []
        for example in self.held_out[:_COMPARED]:
            batch = data.collate([example], self.pad_id, self.device)
            labels = batch.inputs.pop("labels")[0]
            with model.autocast(at, self.device):
                logits = network(**batch.inputs).logits[0]
            found.append(logits[labels != data.IGNORED].float().cpu())
        return torch.cat(found) if found else torch.empty(0, 0)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest |one − other|; 0 where there is nothing."""
    return float((one - other).abs().max()) if one.numel() else 0.0


# ------------------------------------------------------------------------------------ at work


def measure(workshop: Workshop, *, rounds: int, told: int, most_tokens: int, say: Say) -> Inference:
    """Time, judge and hear the three models.

    They are loaded one after another, in every round anew and beginning with another one: whatever drifts meets all.
    Memory is followed in the first round, in a request that is not timed.

    Args:
        workshop: of the trial.
        rounds: in each, every model answers the same timed requests.
        told: held-out synopses of which the base and the merged model each tell a story.
        most_tokens: of such a story.
        say: told how far it is.

    Raises:
        InputError: the trial held out no stories, or its adapter does not fit.
    """
    if not workshop.held_out:
        raise InputError("the trial held out no stories to ask about; train it with val_set_size above 0")
    served: dict[Model, Served] = {}
    requests: list[Request] = []
    answers: list[Answer] = []
    logits: dict[Model, torch.Tensor] = {}
    for number in range(rounds):
        shift = number % len(MODELS)
        for position, name in enumerate((*MODELS[shift:], *MODELS[:shift])):
            say((number * len(MODELS) + position, rounds * len(MODELS), f"{name}, round {number + 1}"))
            if number == 0:
                network, at, served[name] = _followed(workshop, name)
                answers += _answers(workshop, name, network, at, told, most_tokens)
                if name != "base":
                    logits[name] = workshop.logits(network, at)
            else:
                network, at = workshop.make(name)
            requests += _requests(workshop, network, name, number)
            del network
    apart = largest_difference(logits["merged"], logits["unmerged"])
    return Inference(
        environment=environment.current(environment.resolve_device(workshop.device.type)),
        models=(
            served["base"],
            served["unmerged"],
            served["merged"].model_copy(update={"logit_difference": apart}),
        ),
        requests=tuple(requests),
        answers=tuple(answers),
    )


def _followed(workshop: Workshop, name: Model) -> tuple[Any, TrialSpec, Served]:
    """A model, loaded and asked once under the tracker, which sees the scales of quantised layers too."""
    meter = MemoryMeter(workshop.device, None)
    meter.tracker.component = "weights"
    with meter.phase(split=True):
        network, at = workshop.make(name)
    meter.adopt_model(network, [])
    loaded = meter.tracker.total
    with meter.phase(split=False):
        for _ in _tokens(network, workshop.held_out[0], workshop.device, _NEW_TOKENS):
            pass
    found = Served(
        model=name, precision=model.weights_format(at), model_bytes=loaded, peak_inference_bytes=meter.peak()
    )
    return network, at, found


def _requests(workshop: Workshop, network: Any, name: Model, number: int) -> Iterator[Request]:
    """The timed requests of a round, after one that is not: the first after loading is slower."""
    for _ in _tokens(network, workshop.held_out[0], workshop.device, _WARM_UP):
        pass
    for example in workshop.held_out[:_PROMPTS]:
        answered = _tokens(network, example, workshop.device, _NEW_TOKENS)
        moments = [time.perf_counter(), *(time.perf_counter() for _ in answered)]
        seconds = [after - before for before, after in itertools.pairwise(moments)]
        yield Request(
            model=name,
            round=number,
            story_id=example.story_id,
            prompt_tokens=example.completion_start,
            prefill_seconds=seconds[0],
            token_seconds=tuple(seconds[1:]),
        )


@torch.no_grad()
def _tokens(network: Any, example: Example, device: torch.device, count: int) -> Iterator[int]:
    """Greedy new tokens after a story's prompt, always as many: an early end would time something else."""
    inputs = torch.tensor([example.input_ids[: example.completion_start]], device=device)
    cache = None
    for _ in range(count):
        out = network(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        inputs = out.logits[:, -1:].argmax(dim=-1)
        yield int(inputs)  # which waits for the device


# ------------------------------------------------------------------------------------ stories


def _answers(
    workshop: Workshop, name: Model, network: Any, at: TrialSpec, told: int, most_tokens: int
) -> Iterator[Answer]:
    """Losses of all held-out stories, and for the first ones the story that base and merged model tell instead."""
    examples = {example.story_id: example for example in workshop.held_out}
    for position, (story_id, loss, tokens) in enumerate(workshop.losses(network, at)):
        heard: dict[str, Any] = {}
        if position < told and name != "unmerged":
            example, story = examples[story_id], workshop.texts[story_id]
            pieces: list[str] = []
            prompt = example.input_ids[: example.completion_start]
            tell(workshop, network, prompt, pieces.append, most_tokens=most_tokens)
            heard = _told(story.instruction, story.completion, "".join(pieces))
        yield Answer(model=name, story_id=story_id, loss=loss, tokens=tokens, **heard)


def _told(synopsis: str, reference: str, story: str) -> dict[str, Any]:
    """A generated story beside the one that was held out, with its figures, as an `Answer` has them."""
    figures = StoryMetrics(keep_in_memory=True).compute(predictions=[story], references=[reference])
    return {
        "synopsis": synopsis,
        "reference": reference,
        "story": story,
        **{figure: values[0] for figure, values in figures.items()},
    }


def question(workshop: Workshop, synopsis: str | None) -> tuple[str, Sequence[int]]:
    """A synopsis, the first held-out one where none is given, and the tokens of its prompt, as it was learnt.

    Raises:
        InputError: none is given and none was held out.
    """
    if synopsis is not None:
        prompt = workshop.spec.datasets[0].type
        return synopsis, data.prompt_ids(Story(synopsis, "", prompt.system_prompt, None, prompt), workshop.tokenizer)
    if not workshop.held_out:
        raise InputError("the trial held out no stories; give a --synopsis")
    first = workshop.held_out[0]
    return workshop.texts[first.story_id].instruction, first.input_ids[: first.completion_start]


def tell(
    workshop: Workshop,
    network: Any,
    prompt: Sequence[int],
    hear: Callable[[str], None],
    *,
    most_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Generate a story.

    Args:
        workshop: of the trial.
        network: one of its models.
        prompt: tokens after which the story begins.
        hear: told each piece of text as it comes.
        most_tokens: after which the story is cut.
        temperature: 0: the most likely token each time.
        seed: of the choice, above temperature 0.
    """
    from transformers import GenerationConfig, TextStreamer

    class _Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                hear(text)

    tokenizer = workshop.tokenizer
    # The model's own settings stay out: they may punish repetition, or sample.
    settings = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    network.generation_config = GenerationConfig(
        max_new_tokens=most_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=workshop.pad_id, **settings
    )
    inputs = torch.tensor([list(prompt)], device=workshop.device)
    torch.manual_seed(seed)
    network.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        streamer=_Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
