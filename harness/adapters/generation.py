"""Generates stories from a synopsis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from harness.adapters.session import AdapterSession
from harness.errors import InputError
from harness.sources.stories import Chat, Passage, Story
from harness.training import limits, prompts


def prompt_of(session: AdapterSession, synopsis: str | None) -> tuple[str, Sequence[int]]:
    """A synopsis (the first held-out one where none is given), and the tokens of its prompt as in training.

    Of a text without a prompt, the synopsis is its beginning; of a chat, what the user says.

    Raises:
        InputError: none is given and none was held out.
    """
    if synopsis is not None and session.kind is Passage:
        return synopsis, prompts.token_ids(synopsis, session.tokenizer)
    if synopsis is not None:
        prompt = session.spec.datasets[0].type
        rendered = prompts.render(Story(synopsis, "", prompt.system_prompt, None, prompt), session.tokenizer)
        if session.kind is Chat and not prompt.add_special_tokens:
            return synopsis, session.tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
        return synopsis, prompts.token_ids(rendered.text, session.tokenizer)
    if not session.held_out:
        raise InputError("the trial held out no stories; give a --synopsis")
    first = session.question(session.held_out[0])
    return first.text, first.prompt


def generate_story(
    session: AdapterSession,
    network: Any,
    prompt: Sequence[int],
    on_text: Callable[[str], None],
    *,
    most_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Generate a story.

    Args:
        session: of the adapter.
        network: one of its models.
        prompt: tokens after which the story begins.
        on_text: called with each piece of text as it comes.
        most_tokens: after which the story is cut.
        temperature: 0: the most likely token each time.
        seed: of sampling, above temperature 0.

    Raises:
        InputError: the model has no positions for so many tokens.
    """
    from transformers import GenerationConfig, TextStreamer

    class _Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    limits.check_generation(network, len(prompt), most_tokens)
    tokenizer = session.tokenizer
    # Not the model's own settings: they may penalise repetition, or sample.
    settings = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=most_tokens,
        eos_token_id=session.end_ids or None,
        pad_token_id=session.pad_id(network),
        **settings,
    )
    # peft (0.21) hands it on to what is in the base model, which for methods of prompts is not what generates.
    for each in {network, network.get_base_model() if hasattr(network, "get_base_model") else network}:
        each.generation_config = config
    inputs = torch.tensor([list(prompt)], device=session.device)
    torch.manual_seed(seed)
    network.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        streamer=_Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
