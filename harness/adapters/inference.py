"""The inference benchmark in its process: speed, memory and loss of base, unmerged and merged model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from harness import environment
from harness.adapters.generation import generate_story
from harness.adapters.session import MODELS, AdapterSession, largest_difference
from harness.adapters.story_metrics import StoryMetrics
from harness.errors import InputError
from harness.record import Answer, InferenceRecord, Model, ModelFootprint, Request
from harness.spec.trial import TrialSpec
from harness.training import limits, model
from harness.training.memory import MemoryMeter

_PROMPTS = 2
"""Held-out stories whose prompts are timed in each round."""
_NEW_TOKENS = 32
"""New tokens of a timed request, the first among them."""
_WARM_UP = 4
"""New tokens of the request after loading that is not timed."""
OnProgress = Callable[[tuple[int, int, str]], None]
"""Called with (loads done, loads in all, what is next)."""


def measure(
    session: AdapterSession, *, rounds: int, generated_stories: int, most_tokens: int, on_progress: OnProgress
) -> InferenceRecord:
    """Measure the three models.

    Every round loads them again, one after another, and starts with another one: a drift of the machine affects all.
    Memory is tracked in the first round, in a request that is not timed.

    Args:
        session: of the adapter.
        rounds: in each, every model answers the same timed requests.
        generated_stories: held-out synopses for which the base and the merged model each generate a story.
        most_tokens: of such a story.
        on_progress: called as the benchmark proceeds.

    Raises:
        InputError: the trial held out no stories, or its adapter does not fit.
    """
    if not session.held_out:
        raise InputError("the trial held out no stories to ask about; train it with val_set_size above 0")
    footprints: dict[Model, ModelFootprint] = {}
    requests: list[Request] = []
    answers: list[Answer] = []
    logits: dict[Model, torch.Tensor] = {}
    for number in range(rounds):
        shift = number % len(MODELS)
        for position, name in enumerate((*MODELS[shift:], *MODELS[:shift])):
            on_progress((number * len(MODELS) + position, rounds * len(MODELS), f"{name}, round {number + 1}"))
            if number == 0:
                network, at, footprints[name] = _footprint(session, name)
                answers += _answers(session, name, network, at, generated_stories, most_tokens)
                if name != "base":
                    logits[name] = session.logits(network, at)
            else:
                network, at = session.make(name)
            requests += _requests(session, network, name, number)
            del network
    difference = largest_difference(logits["merged"], logits["unmerged"])
    return InferenceRecord(
        environment=environment.current(environment.resolve_device(session.device.type)),
        models=(
            footprints["base"],
            footprints["unmerged"],
            footprints["merged"].model_copy(update={"logit_difference": difference}),
        ),
        requests=tuple(requests),
        answers=tuple(answers),
    )


def _footprint(session: AdapterSession, name: Model) -> tuple[Any, TrialSpec, ModelFootprint]:
    """A model loaded under the tracker, which sees quantisation scales too, and its memory in one request."""
    meter = MemoryMeter(session.device, None)
    meter.tracker.component = "weights"
    with meter.phase(breakdown=True):
        network, at = session.make(name)
    meter.adopt_model(network, [])
    longest = max(len(session.question(example).prompt) for example in session.held_out[:_PROMPTS])
    limits.check_generation(network, longest, _NEW_TOKENS)
    loaded = meter.tracker.total
    with meter.phase(breakdown=False):
        for _ in _tokens(network, session.question(session.held_out[0]).prompt, session.device, _NEW_TOKENS):
            pass
    footprint = ModelFootprint(
        model=name, precision=model.weights_format(at), model_bytes=loaded, peak_inference_bytes=meter.peak()
    )
    return network, at, footprint


def _requests(session: AdapterSession, network: Any, name: Model, number: int) -> Iterator[Request]:
    """The timed requests of a round, after an untimed one: the first after loading is slower."""
    for _ in _tokens(network, session.question(session.held_out[0]).prompt, session.device, _WARM_UP):
        pass
    for example in session.held_out[:_PROMPTS]:
        prompt = session.question(example).prompt
        answered = _tokens(network, prompt, session.device, _NEW_TOKENS)
        moments = [time.perf_counter(), *(time.perf_counter() for _ in answered)]
        seconds = [after - before for before, after in itertools.pairwise(moments)]
        yield Request(
            model=name,
            round=number,
            story_id=example.story_id,
            prompt_tokens=len(prompt),
            prefill_seconds=seconds[0],
            token_seconds=tuple(seconds[1:]),
        )


@torch.no_grad()
def _tokens(network: Any, prompt: tuple[int, ...], device: torch.device, count: int) -> Iterator[int]:
    """Greedy new tokens after a prompt. Their number is fixed: an early end would be another workload."""
    inputs = torch.tensor([prompt], device=device)
    cache = None
    for _ in range(count):
        out = network(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        inputs = out.logits[:, -1:].argmax(dim=-1)
        yield int(inputs)  # synchronises with the device


def _answers(
    session: AdapterSession, name: Model, network: Any, at: TrialSpec, generated_stories: int, most_tokens: int
) -> Iterator[Answer]:
    """Losses of all held-out stories; for the first ones also the story that base and merged model generate."""
    examples = {example.story_id: example for example in session.held_out}
    for position, (story_id, loss, tokens) in enumerate(session.losses(network, at)):
        story_fields: dict[str, Any] = {}
        if position < generated_stories and name != "unmerged":
            question = session.question(examples[story_id])
            pieces: list[str] = []
            generate_story(session, network, question.prompt, pieces.append, most_tokens=most_tokens)
            story_fields = _story_fields(question.text, question.reference, "".join(pieces))
        yield Answer(model=name, story_id=story_id, loss=loss, tokens=tokens, **story_fields)


def _story_fields(synopsis: str, reference: str, story: str) -> dict[str, Any]:
    """Fields of an `Answer`: a generated story, the held-out one, and the metrics of the two."""
    figures = StoryMetrics(keep_in_memory=True).compute(predictions=[story], references=[reference])
    return {
        "synopsis": synopsis,
        "reference": reference,
        "story": story,
        **{name: values[0] for name, values in figures.items()},
    }
