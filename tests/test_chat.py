"""Chats, and texts without a prompt, as tokens with labels: what carries loss, by which template; what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_checks import refusal
from tiny_models import CHAT, IGNORES_SYSTEM, REFUSES_ALL, REFUSES_SYSTEM, WITH_BEGINNING, byte_tokenizer, tiny_model
from trials import run

from harness.adapters import generation, inference
from harness.adapters.session import AdapterSession
from harness.cli import beforehand
from harness.errors import InputError
from harness.grids import preflight
from harness.grids.grid import Grid, Trial
from harness.sources import models, splits, stories
from harness.sources.stories import Chat, Passage, Row, Rows, Story
from harness.spec.datasets import PromptSpec
from harness.spec.trial import TrialSpec
from harness.training import batches, chat, chat_templates, checkpoints, inspection, model
from harness.training.batches import IGNORED, Example

Small = Callable[..., TrialSpec]

# Templates as models have them, in few words. `<|assistant|>` and others are tokens of the tests' tokenizer.
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|system|>Be helpful.</s>{{ '\\n' }}{% endif %}"
    "<|{{ m['role'] }}|>{{ '\\n' + m['content'] }}</s>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}"
)
TRIMS = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m['role'] }}<|user|>{{ '\\n\\n' }}{{ m['content'] | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|user|>assistant<|user|>{{ '\\n\\n' }}{% endif %}"
)
HAS_MARKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DROPS_THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ '\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% set answer = m['content'].split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1] if '</think>' in m['content'] else '' %}"
    "{% if loop.index0 > ns.last %}<think>{{ '\\n' + thought.strip() + '\\n' }}</think>{{ '\\n\\n' }}{% endif %}"
    "{{ answer }}{% else %}{{ m['content'] }}{% endif %}</s>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}"
)
HAS_TOOLS = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}</s>{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}<|user|><response>{{ m['content'] }}</response></s>"
    "{% else %}<|{{ m['role'] }}|>{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}"
    "<call>{{ c['function'] | tojson }}</call>{% endfor %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS_BEFORE_THE_LAST_USER = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}[T]{{ tools | tojson }}[/T]{% endif %}[U]{{ m['content'] }}[/U]"
    "{% elif m['role'] == 'tool' %}[R]{{ m['content'] }}[/R]"
    "{% elif m['tool_calls'] %}[C]{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}</s>"
    "{% else %}{{ ' ' + m['content'] }}</s>{% endif %}{% endfor %}"
)
IGNORES_TOOLS = CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")

WEATHER = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Ulm"}}}


def turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """User and assistant take turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def chat_of(messages: Sequence[dict[str, Any]], *, trained_from: int = 0, tools: Any = (), **prompt: Any) -> Chat:
    return Chat(tuple(messages), PromptSpec(**prompt), tuple(tools), trained_from)


def example_of(row: Row, tokenizer: Any, *, everything: bool = False) -> Example:
    return batches._tokenise(row, tokenizer, everything)


def learnt(row: Row, tokenizer: Any) -> list[str]:
    """The texts of the turns that carry loss, and with a check of the labels of all tokens."""
    example = example_of(row, tokenizer)
    inside = {n for span in example.completions for n in range(*span)}
    assert [n in inside for n in range(len(example))] == [label != IGNORED for label in example.labels]
    assert all(label in (token, IGNORED) for token, label in zip(example.input_ids, example.labels, strict=True))
    return [tokenizer.decode(example.input_ids[start:end]) for start, end in example.completions]


def rendered(row: Chat, tokenizer: Any) -> list[int]:
    """The tokens of the template's own rendering."""
    tools = list(row.tools) or None
    return list(tokenizer.apply_chat_template(list(row.messages), tools=tools, return_dict=True)["input_ids"])


def with_rows(
    monkeypatch: pytest.MonkeyPatch, rows: Sequence[Row], held_out: Sequence[Row] = (), skipped: int = 0
) -> None:
    """The data of every spec."""
    monkeypatch.setattr(stories, "read_all", lambda spec: Rows(tuple(rows), skipped, tuple(held_out)))


def chats(count: int, **prompt: Any) -> list[Chat]:
    """Long enough to be judged."""
    return [
        chat_of(turns(f"how are you, {n}?", "I am well, thank you.", "and now?", f"as before, {n}"), **prompt)
        for n in range(count)
    ]


# ------------------------------------------------------------------------------------ what carries loss

FOUR = turns("Hi", "Hello  you\n", "Bye", "Ciao")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Hello  you\n</s>", "Ciao</s>"]),
        (TRIMS, ["Hello  you</s>", "Ciao</s>"]),
        (HAS_MARKS, ["Hello  you\n</s>", "Ciao</s>"]),
        (DROPS_THINKING, ["Hello  you\n</s>", "<think>\n\n</think>\n\nCiao</s>"]),
        (HAS_TOOLS, ["Hello  you\n</s>", "Ciao</s>"]),
        (TOOLS_BEFORE_THE_LAST_USER, [" Hello  you\n</s>", " Ciao</s>"]),
        (CHAT, ["Hello  you\n</s>", "Ciao</s>"]),
        (WITH_BEGINNING, ["Hello  you\n</s>", "Ciao</s>"]),
        (None, ["Hello  you\n</s>", "Ciao</s>"]),
    ],
)
@pytest.mark.parametrize("adds_beginning", [False, True])
def test_loss_is_on_the_assistants_turns_alone(template: Any, expected: list[str], adds_beginning: bool) -> None:
    tokenizer = byte_tokenizer(chat_template=template, adds_beginning=adds_beginning)
    row = chat_of(FOUR)
    assert learnt(row, tokenizer) == expected
    ids = list(example_of(row, tokenizer).input_ids)
    assert ids.count(0) == (adds_beginning or template in (TRIMS, WITH_BEGINNING)), "<s> stands there once"
    if template is not None:
        whole = rendered(row, tokenizer)
        assert ids[len(ids) - len(whole) :] == whole
    everything = example_of(row, tokenizer, everything=True)
    assert everything.labels == [IGNORED, *ids[1:]]


MARKED = chat_templates.TEMPLATES | {"has_marks": HAS_MARKS, "plain": chat_templates.PLAIN}


@pytest.mark.parametrize("name", sorted(MARKED))
def test_marks_and_prefixes_and_comparison_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unmarked = re.sub(r"\{% (end)?generation %\}", "", MARKED[name])
    by_marks, by_prefixes = (byte_tokenizer(chat_template=text) for text in (MARKED[name], unmarked))
    for messages in (FOUR, turns("a", "b"), turns("a", "b", "a", "b", "a", "b", system="S")):
        if name in ("gemma", "mistral") and messages[0]["role"] == "system":
            messages = messages[1:]
        row = chat_of(messages)
        marked = example_of(row, by_marks)
        assert len(marked.completions) == len(messages) // 2
        assert marked == example_of(row, by_prefixes)
        with monkeypatch.context() as patch:
            patch.setattr(chat._Rendering, "_by_prefixes", lambda *_: None)
            assert marked == example_of(row, by_prefixes)


def test_every_template_is_its_familys_format() -> None:
    messages = turns("Hi", "Hello", "Bye", "Ciao", system="S")
    folded = [{"role": "user", "content": "S\n\nHi"}, *messages[2:]]
    each = {  # the beginning, and one turn
        "chatml": ("", "<|im_start|>{}\n{}<|im_end|>\n"),
        "llama3": ("<s>", "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"),
        "phi_3": ("", "<|{}|>\n{}<|end|>\n"),
        "phi_4": ("", "<|im_start|>{}<|im_sep|>{}<|im_end|>"),
        "zephyr": ("", "<|{}|>\n{}</s>\n"),
    }
    expected = {
        name: begins + "".join(turn.format(m["role"], m["content"]) for m in messages)
        for name, (begins, turn) in each.items()
    } | {
        "alpaca": "<s>S\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
        "### Instruction:\nBye\n\n### Response:\nCiao</s>",
        "gemma": "<s><start_of_turn>user\nS\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nCiao<end_of_turn>\n",
        "mistral": "<s>[INST] S\n\nHi[/INST] Hello</s>[INST] Bye[/INST] Ciao</s>",
        "vicuna": "<s>S USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT: Ciao</s>",
    }
    assert expected.keys() == chat_templates.TEMPLATES.keys()
    for name, text in expected.items():
        tokenizer = byte_tokenizer(chat_template=chat_templates.TEMPLATES[name])
        example = example_of(chat_of(messages), tokenizer)
        assert tokenizer.decode(example.input_ids) == text, name
        assert example.system_folded == (name in ("gemma", "mistral"))
        begun = tokenizer.apply_chat_template(folded[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(folded, tokenize=False)
        assert whole.startswith(begun), f"what {name} generates goes on as in training"
        (start, _), *_ = example_of(chat_of(folded), tokenizer).completions
        assert tokenizer.decode(example_of(chat_of(folded), tokenizer).input_ids[:start]) == begun


def test_a_chat_without_a_template_is_a_story_without_one() -> None:
    for tokenizer in (byte_tokenizer(), byte_tokenizer(adds_beginning=True), checkpoints.byte_tokenizer()):
        for system in (None, "Be brief."):
            story = Story("a dog", "It ran.", system, None, PromptSpec())
            one, other = (
                example_of(row, tokenizer) for row in (story, chat_of(turns("a dog", "It ran.", system=system)))
            )
            assert (one.input_ids, one.completions) == (other.input_ids, other.completions)


def test_thinking_is_trained_on_where_the_template_shows_it() -> None:
    tokenizer = byte_tokenizer(chat_template=DROPS_THINKING)
    row = chat_of(turns("Hi", "<think>\nhm\n</think>\n\nHello", "Bye", "<think>\nso\n</think>\n\nCiao"))
    assert learnt(row, tokenizer) == ["Hello</s>", "<think>\nso\n</think>\n\nCiao</s>"]
    assert list(example_of(row, tokenizer).input_ids) == rendered(row, tokenizer)


TALK = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "Still?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
]


def test_tools_and_their_calls_are_as_the_template_has_them() -> None:
    tokenizer = byte_tokenizer(chat_template=HAS_TOOLS)
    row = chat_of(TALK, tools=[WEATHER])
    called = f"<call>{json.dumps(CALL['function'])}</call></s>"
    assert learnt(row, tokenizer) == [called, "It rains.</s>", f"I look.{called}"]
    assert list(example_of(row, tokenizer).input_ids) == rendered(row, tokenizer)
    assert json.dumps(WEATHER) in tokenizer.decode(example_of(row, tokenizer).input_ids)
    # Where the prefixes fail, since the tools move with the last user turn.
    moving = byte_tokenizer(chat_template=TOOLS_BEFORE_THE_LAST_USER)
    assert learnt(chat_of(TALK[:5] + turns("?", "So")[1:], tools=[WEATHER]), moving) == [
        f"[C]{json.dumps(CALL['function'])}</s>",
        " It rains.</s>",
        " So</s>",
    ]


def test_trained_are_the_roles_and_turns_that_are_given() -> None:
    for template in (CHATML, HAS_MARKS, DROPS_THINKING):
        tokenizer = byte_tokenizer(chat_template=template)
        last = learnt(chat_of(FOUR), tokenizer)[1]
        assert learnt(chat_of(FOUR, trained_from=2), tokenizer) == [last]
        assert learnt(chat_of(FOUR, roles_to_train=["user"]), tokenizer) == ["Hi</s>", "Bye</s>"]
        assert learnt(chat_of(FOUR, roles_to_train=["user"], trained_from=1), tokenizer) == ["Bye</s>"]
        both = learnt(chat_of(FOUR, roles_to_train=["user", "assistant"]), tokenizer)
        assert both == ["Hi</s>", *learnt(chat_of(FOUR), tokenizer)[:1], "Bye</s>", last]
    row = chat_of(turns("a", "b", system="S"), roles_to_train="system")
    assert learnt(row, byte_tokenizer(chat_template=CHATML)) == ["S</s>"]
    tooled = chat_of(TALK, roles_to_train=["tool"], tools=[WEATHER])
    assert learnt(tooled, byte_tokenizer(chat_template=HAS_TOOLS)) == ["rain</response></s>"]


def test_turns_without_weight_are_left_out_of_the_loss() -> None:
    """In OpenAI's format."""
    weighed = [FOUR[0], FOUR[1] | {"weight": 0}, FOUR[2], FOUR[3] | {"weight": 1}]
    for template in (CHATML, HAS_MARKS, DROPS_THINKING):
        tokenizer = byte_tokenizer(chat_template=template)
        assert learnt(chat_of(weighed), tokenizer) == learnt(chat_of(FOUR, trained_from=2), tokenizer)
    assert chat_of([*FOUR[:3], FOUR[3] | {"weight": 0}]).completion == FOUR[1]["content"], "the last that is trained on"
    tokenizer = byte_tokenizer(chat_template=CHATML)
    every = learnt(chat_of(FOUR, roles_to_train=["user", "assistant"]), tokenizer)
    assert learnt(chat_of(weighed, roles_to_train="all"), tokenizer) == [every[0], *every[2:]]
    with_inputs = example_of(chat_of(weighed), tokenizer, everything=True)
    assert with_inputs == example_of(chat_of(weighed, roles_to_train="all"), tokenizer), "train_on_inputs: true"


def test_all_roles_are_every_token_of_a_chat_and_of_what_answers_a_prompt() -> None:
    tokenizer = byte_tokenizer(chat_template=CHAT)
    row = chat_of(FOUR, roles_to_train="all")
    example = example_of(row, tokenizer)
    assert example.completions == ((1, len(example)),)
    assert list(example.input_ids) == rendered(row, tokenizer)
    assert learnt(chat_of(FOUR, roles_to_train="all", trained_from=3), tokenizer) == learnt(
        chat_of(FOUR, trained_from=3), tokenizer
    )


def test_all_of_what_answers_a_prompt_has_the_heads_of_its_turns_and_what_is_between_them() -> None:
    """As TRL trains on `prompt` and `completion` of turns."""
    tokenizer = byte_tokenizer(chat_template=CHATML)
    for answered, expected in (
        (1, "Hello  you\n</s>\n<|user|>\nBye</s>\n<|assistant|>\nCiao</s>\n"),
        (2, "<|user|>\nBye</s>\n<|assistant|>\nCiao</s>\n"),
        (3, "Ciao</s>\n"),
    ):
        assert learnt(chat_of(FOUR, roles_to_train="all", trained_from=answered), tokenizer) == [expected]


def test_a_chat_may_begin_with_what_its_template_begins_with() -> None:
    """As Axolotl and TRL have it."""
    for template, begins in ((CHATML, False), (WITH_BEGINNING, True)):
        tokenizer = byte_tokenizer(chat_template=template, adds_beginning=True)
        row = chat_of(FOUR, add_special_tokens=False)
        assert list(example_of(row, tokenizer).input_ids) == rendered(row, tokenizer)
        assert (example_of(row, tokenizer).input_ids[0] == tokenizer.bos_token_id) == begins
        assert learnt(row, tokenizer) == learnt(chat_of(FOUR), tokenizer)


def test_a_prompt_and_its_completion_may_be_tokenised_as_one_text() -> None:
    tokenizer = checkpoints.load_tokenizer(TrialSpec(base_model=models.BUNDLED))
    apart, jointly = (
        example_of(Story("Why?\nAnswer: ", "It is so.", None, None, prompt), tokenizer)
        for prompt in (PromptSpec(format="{instruction}"), PromptSpec(format="{instruction}", tokenize_jointly=True))
    )
    assert tokenizer.decode(apart.input_ids) == tokenizer.decode(jointly.input_ids)
    learnt_of = [tokenizer.decode([i for i in each.labels if i != IGNORED]) for each in (apart, jointly)]
    assert learnt_of == ["It is so.<|im_end|>", " It is so.<|im_end|>"]
    assert len(jointly) == len(apart) - 1


@pytest.mark.parametrize("content", [None, "I look."])
def test_a_call_that_the_template_leaves_out_is_refused_whatever_the_tool_is_called(content: str | None) -> None:
    talk = [{"role": "user", "content": "How is the weather?"}, {"role": "assistant", "content": content}]
    calls = {"tool_calls": [CALL]}
    with pytest.raises(InputError, match="does not show the calls of tools in a turn of the role 'assistant'"):
        example_of(chat_of([talk[0], talk[1] | calls]), byte_tokenizer(chat_template=CHAT))
    one_alone = HAS_TOOLS.replace("in m['tool_calls'] or []", "in (m['tool_calls'] or [])[:1]")
    assert one_alone != HAS_TOOLS
    twice = {"tool_calls": [CALL, {"type": "function", "function": {"name": "weather", "arguments": {"place": "How"}}}]}
    with pytest.raises(InputError, match="does not show the calls of tools"):
        example_of(chat_of([talk[0], talk[1] | twice]), byte_tokenizer(chat_template=one_alone))
    assert example_of(chat_of([talk[0], talk[1] | twice]), byte_tokenizer(chat_template=HAS_TOOLS))


def test_tools_whose_names_are_words_of_the_chat_are_missed_too() -> None:
    row = chat_of(turns("How is the weather?", "Fine."), tools=[WEATHER])
    assert example_of(row, byte_tokenizer(chat_template=CHAT)).tools_left_out
    assert not example_of(row, byte_tokenizer(chat_template=HAS_TOOLS)).tools_left_out


def test_marks_that_are_not_on_each_turn_are_not_relied_on() -> None:
    last_alone = HAS_MARKS.replace(
        "{% if m['role'] == 'assistant' %}", "{% if m['role'] == 'assistant' and loop.last %}"
    )
    assert learnt(chat_of(FOUR), byte_tokenizer(chat_template=last_alone)) == ["Hello  you\n</s>", "Ciao</s>"]


def test_a_turn_without_an_end_token_ends_with_the_space_after_it() -> None:
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    tokenizer = byte_tokenizer(chat_template=bare + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert learnt(chat_of(turns("Hi", "Hello", "Bye", "Ciao ")), tokenizer) == ["Hello\n\n", "Ciao \n\n"]


def test_the_end_token_is_known_where_the_chat_until_then_is_refused() -> None:
    refuses = "{% if messages[-1]['role'] == 'user' %}{{ raise_exception('Answer first') }}{% endif %}" + CHATML
    row = chat_of(FOUR, roles_to_train=["user"])
    assert learnt(row, byte_tokenizer(chat_template=refuses)) == ["Hi</s>", "Bye</s>"]


def test_the_first_token_has_nothing_to_be_predicted_from() -> None:
    tokenizer = byte_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    assert learnt(chat_of(FOUR, roles_to_train=["user", "assistant"]), tokenizer)[0] == "i</s>"


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, IGNORES_SYSTEM])
def test_a_system_turn_begins_the_users_where_there_is_none(template: str) -> None:
    tokenizer = byte_tokenizer(chat_template=template)
    row = chat_of(turns("Hi", "Hello", "Bye", "Ciao", system="Be brief."))
    example = example_of(row, tokenizer)
    assert tokenizer.decode(example.input_ids).startswith("<|user|>Be brief.\n\nHi</s><|assistant|>Hello</s>")
    assert example.system_folded
    assert learnt(row, tokenizer) == ["Hello</s>", "Ciao</s>"]
    assert learnt(chat_of(row.messages, trained_from=3), tokenizer) == ["Ciao</s>"], "numbers are those of the data"
    assert not example_of(chat_of(row.messages[1:]), tokenizer).system_folded
    with pytest.raises(InputError, match=r"roles_to_train: the chat template has no system turn; leave system out"):
        example_of(chat_of(row.messages, roles_to_train=["system"]), tokenizer)


def test_a_system_turn_that_the_template_has_stays_there() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    example = example_of(chat_of(turns("a", "b", system="S")), tokenizer)
    assert tokenizer.decode(example.input_ids).startswith("<|system|>\nS</s>\n<|user|>\na</s>")
    assert not example.system_folded
    without = example_of(chat_of(turns("a", "b")), tokenizer)
    assert tokenizer.decode(without.input_ids).startswith("<|system|>Be helpful.</s>"), "the template's own"


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (
            REFUSES_ALL,
            chat_of(FOUR),
            r"refuses a chat of 4 turns \(No chat with this model\); use another chat_template",
        ),
        (
            IGNORES_TOOLS,
            chat_of(TALK[:1] + TALK[2:4]),
            r"does not show a turn of the role 'tool'; use another chat_temp",
        ),
        (CHAT, chat_of([TALK[0], TALK[5]]), "does not show the calls of tools in a turn of the role 'assistant'; use"),
        (
            CHAT,
            chat_of(FOUR, format="Q: {instruction}"),
            "format .* is of prompts, and the rows are chats; use chat_templ",
        ),
    ],
)
def test_what_a_template_does_not_take_is_one_line(template: str, row: Chat, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        example_of(row, byte_tokenizer(chat_template=template))
    assert str(refused.value).isprintable()


def test_a_tokenizer_without_offsets_has_the_same_tokens_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for template in (CHATML, HAS_MARKS, DROPS_THINKING, WITH_BEGINNING):
        tokenizer = byte_tokenizer(chat_template=template, adds_beginning=True)
        fast = example_of(chat_of(FOUR), tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(type(tokenizer), "is_fast", False)
            assert example_of(chat_of(FOUR), tokenizer) == fast


# ------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("adds_beginning", [False, True])
def test_a_text_carries_loss_on_all_but_its_first_token(adds_beginning: bool) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML, adds_beginning=adds_beginning)
    example = example_of(Passage("Rain fell.", PromptSpec()), tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s>" * adds_beginning + "Rain fell.</s>"
    assert example.labels == [IGNORED, *example.input_ids[1:]]
    begins_itself = example_of(Passage("<s>Rain fell.", PromptSpec()), tokenizer)
    assert begins_itself.input_ids.count(0) == 1


def test_a_text_that_ends_itself_gets_no_second_end() -> None:
    tokenizer = byte_tokenizer()
    for row in (Passage("Rain fell.</s>", PromptSpec()), Story("a dog", "It ran.</s>", None, None, PromptSpec())):
        assert example_of(row, tokenizer).input_ids.count(tokenizer.eos_token_id) == 1


def test_a_pair_ends_as_a_turn_of_the_template_does() -> None:
    tokenizer = byte_tokenizer(chat_template=CHAT.replace("</s>", "<|system|>"))
    asked, answered = turns("Why?", "So.")
    (of_turns,) = learnt(chat_of([asked, answered]), tokenizer)
    assert learnt(Story("Why?", "So.", None, None, PromptSpec()), tokenizer) == [of_turns] == ["So.<|system|>"]
    own = PromptSpec(format="Q: {instruction}")
    assert learnt(Story("Why?", "So.", None, None, own), tokenizer) == ["So.</s>"], "no turn"


def test_bare_prompts_stand_as_they_are_and_turns_are_chats() -> None:
    """As TRL takes columns `prompt` and `completion`."""
    tokenizer, bare = byte_tokenizer(chat_template=CHAT), PromptSpec(format="{instruction}")
    example = example_of(Story("The sky is", " blue.", None, None, bare), tokenizer)
    assert tokenizer.decode(example.input_ids) == "The sky is blue.</s>"
    asked, answered = turns("Why?", "So.")
    assert learnt(chat_of([asked, answered], trained_from=1, format=bare.format), tokenizer) == ["So.</s>"]


# ------------------------------------------------------------------------------------ all rows of a spec


@pytest.mark.parametrize("base", ["random:tiny", "bundled", CHATML, HAS_MARKS, None], ids=lambda b: str(b)[:12])
def test_every_shape_becomes_examples(
    base: str | None, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story("a dog", "It ran away, and nobody saw it.", None, None, PromptSpec())
    mixed = [*chats(6), story, *(Passage(f"Rain fell on day {n} of the year.", PromptSpec()) for n in range(5))]
    with_rows(monkeypatch, [*mixed, mixed[0]], skipped=2)
    if base == "bundled":
        name = models.BUNDLED
    else:
        name = base if base == "random:tiny" else tiny_model(tmp_path / "model", chat_template=base)
    spec = small(base_model=name, val_set_size=3, min_completion_tokens=4)
    tokenizer = checkpoints.load_tokenizer(spec)
    data = batches.load(spec, tokenizer)
    assert (len(data.held_out), len(data.train) + data.copies, data.dropped) == (3, 10, 0)
    assert data.describe(spec).startswith(f"15 stories: 3 held out, {len(data.train)} to train on; ")
    rows = {row.id: row for row in mixed}
    for example in (*data.train, *data.held_out):
        row = rows[example.story_id]
        taught = tokenizer.decode([label for label in example.labels if label != IGNORED], skip_special_tokens=True)
        if isinstance(row, Chat):
            answers = [m["content"] for m in row.messages if m["role"] == "assistant"]
            assert taught == "".join(answers)
            assert tokenizer.decode(example.prompt).count(row.messages[2]["content"]) == 1
        else:
            assert taught == row.completion or (isinstance(row, Passage) and row.completion.endswith(taught))
        assert example.input_ids[example.completions[-1][1] - 1] == tokenizer.eos_token_id


def test_a_long_chat_is_cut_and_one_without_a_trained_turn_is_left_out(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = chat_of([*turns("Hi"), {"role": "narrator", "content": "x" * 20}])
    long = chat_of(turns("a", "b" * 50, "c" * 40, "d" * 400))
    with_rows(monkeypatch, [*chats(4), asks, long])
    tokenizer = checkpoints.byte_tokenizer()
    spec = small(val_set_size=0, sequence_length=200)
    data = batches.load(spec, tokenizer)
    assert (len(data.train), data.dropped, data.truncated) == (5, 1, 1)
    (cut,) = (example for example in data.train if example.story_id == long.id)
    assert len(cut) == 200
    assert [end - start for start, end in cut.completions] == [51, 200 - cut.completions[1][0]]
    two = batches.load(spec.model_copy(update={"sequence_length": cut.completions[1][0]}), tokenizer)
    (shorter,) = (example for example in two.train if example.story_id == long.id)
    assert len(shorter.completions) == 1, "the second answer is beyond the length"
    with_rows(monkeypatch, [asks, chat_of(turns("Hi"))])
    for val_set_size in (0.0, 1.0):
        with pytest.raises(
            InputError, match=r"no chat of .* has a turn that may carry loss; roles_to_train is assistant"
        ):
            batches.load(spec.model_copy(update={"val_set_size": val_set_size}), tokenizer)


def test_tools_that_a_template_does_not_show_are_a_warning(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat_of(row.messages, tools=[WEATHER]) for row in chats(8)]
    with_rows(monkeypatch, rows)
    spec = small(base_model=tiny_model(tmp_path / "a", chat_template=CHAT))
    (warning,) = inspection.inspect([("t", spec)]).warnings
    assert warning.endswith("its chat template does not show the tools of 8 chats, which are trained on without them")
    shows = small(base_model=tiny_model(tmp_path / "b", chat_template=HAS_TOOLS))
    assert not inspection.inspect([("t", shows)]).warnings


# ------------------------------------------------------------------------------------ rows that the data hold out


@pytest.mark.parametrize(("wanted", "held_out"), [(3.0, 3), (50.0, 7), (0.1, 7), (0.0, 0)])
def test_rows_that_the_data_hold_out_are_evaluated_on(
    small: Small, monkeypatch: pytest.MonkeyPatch, wanted: float, held_out: int
) -> None:
    everything = chats(20)
    given = everything[12:19]
    with_rows(monkeypatch, [*everything[:14], everything[0]], [*given, given[0]])
    spec = small(val_set_size=wanted, min_completion_tokens=4)
    data = batches.load(spec, checkpoints.byte_tokenizer())
    ids = sorted(row.id for row in given)
    assert [example.story_id for example in data.held_out] == ids[:held_out], "the first by their ids"
    assert (len(data.train), data.copies, data.wanted) == (13, 2, held_out)
    assert not {example.story_id for example in data.train} & {*ids}
    assert data.unused == 8 - held_out
    assert f"23 stories: {held_out} held out, 13 to train on; 2 left out (copies of held-out ones), " in data.describe(
        spec
    )
    assert data.describe(spec).endswith(
        f"{8 - held_out} neither trained nor evaluated on (held out by the data, or compared on)"
    )
    counts = splits.counts(stories.read_all(spec))
    assert (counts.others, counts.given, counts.held_out(wanted), counts.trained_on(wanted)) == (12, 7, held_out, 12)


def test_counts_before_a_run_are_those_of_the_run(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chats(10)
    with_rows(monkeypatch, rows[:3], rows[3:])
    spec = small(base_model=tiny_model(tmp_path / "model"), val_set_size=9.0, min_completion_tokens=4)
    grid = Grid("g", "g", "list", (Trial(spec, "baseline", None, None),))
    preflight.preflight(grid)  # 9 of 3 rows to train on would leave none
    assert beforehand._held_out(grid) == len(batches.load(spec, checkpoints.load_tokenizer(spec)).held_out) == 7
    with_rows(monkeypatch, rows[:3], rows)
    for refuse in (lambda: preflight.preflight(grid), lambda: batches.load(spec, checkpoints.load_tokenizer(spec))):
        with pytest.raises(InputError, match=r"each row is one of the 10 that the data hold out; give other rows"):
            refuse()
    with_rows(monkeypatch, rows)
    assert beforehand._held_out(grid) == 9


# ------------------------------------------------------------------------------------ templates and tokens of a spec


def test_a_chat_template_by_name_or_as_text_replaces_the_models_own(small: Small, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "model", chat_template=CHAT)
    for given, text in (("zephyr", chat_templates.TEMPLATES["zephyr"]), (CHATML, CHATML), (None, CHAT)):
        assert checkpoints.load_tokenizer(small(base_model=base, chat_template=given)).chat_template == text
    assert checkpoints.load_tokenizer(small(chat_template="zephyr")).chat_template is None, "weights are random"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("chatlm", r"unknown chat_template 'chatlm'; did you mean chatml\?.*phi_4.*Jinja text has \{\{"),
        ("{% for m in messages %}{{ m['content'] }}", r"chat_template is no Jinja: line 1: .*use one of chatml"),
        ("{{ messages | nofilter }}", r"chat_template is no Jinja: .*nofilter"),
    ],
)
def test_an_unknown_chat_template_is_refused_beforehand(small: Small, tmp_path: Path, given: str, reason: str) -> None:
    base = tiny_model(tmp_path / "model")
    assert re.search(f"^trial 1: {reason}", refusal(small(base_model=base, chat_template=given)))
    valid = small(base_model=base, chat_template="zephyr")
    assert re.search(f"^trial 2: {reason}", refusal(valid, small(base_model=base, chat_template=given)))
    if "unknown" in reason:
        assert re.search(reason, refusal(small(chat_template=given))), "random weights or not"


def test_special_tokens_are_tokens_of_the_vocabulary(small: Small, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "model")
    given = {"eos_token": "<|user|>", "pad_token": "</s>", "bos_token": "q"}
    spec = small(base_model=base, special_tokens=given)
    tokenizer = checkpoints.load_tokenizer(spec)
    assert {role: getattr(tokenizer, role) for role in given} == given
    own = byte_tokenizer()
    assert len(tokenizer) == len(own)
    assert tokenizer.eos_token_id == own.convert_tokens_to_ids("<|user|>")
    assert learnt(Story("a", "b", None, None, PromptSpec()), tokenizer) == ["b<|user|>"]
    # Padding is masked: what has no embedding is not added.
    padded = checkpoints.load_tokenizer(small(base_model=base, special_tokens={"pad_token": "<|new|>"}))
    assert (padded.pad_token, len(padded)) == (own.pad_token, len(own))
    text = refusal(small(base_model=base, special_tokens={"eos_token": "<|usr|>"}))
    assert re.search(r"eos_token '<\|usr\|>' is not in the vocabulary of .*; use one that is, like '<\|user\|>'$", text)
    assert refusal(spec, small(base_model=base, special_tokens={"eos_token": "<|usr|>"})).startswith("trial 2: special")
    quiet = checkpoints.load_tokenizer(small(special_tokens={"eos_token": "<|im_end|>", "unk_token": "<unk>"}))
    assert (quiet.eos_token, len(quiet)) == ("<|end|>", len(checkpoints.byte_tokenizer()))


# ------------------------------------------------------------------------------------ trained and asked


def test_chats_are_trained_on_evaluated_and_asked(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_rows(monkeypatch, chats(12, kind="chat"))
    base = tiny_model(tmp_path / "model", chat_template=CHAT)
    spec = small(base_model=base, chat_template="zephyr", train_samples=12, learning_rate=1e-2, min_completion_tokens=4)
    record = run(spec)
    assert record.status == "ok"
    assert record.metrics["training_stories"] == 10
    assert record.metrics["eval_loss"] < record.metrics["eval_loss_before"]
    model.load(spec, torch.device("cpu")).save_pretrained(tmp_path / "adapter")
    session = AdapterSession(spec, tmp_path / "adapter")
    first = session.held_out[0]
    asked = session.question(first)
    number = re.findall(r"\d+", session.texts[first.story_id].messages[0]["content"])[0]
    assert (asked.text, asked.reference) == ("and now?", f"as before, {number}")
    assert session.tokenizer.decode(asked.prompt).endswith("<|user|>\nand now?</s>\n<|assistant|>\n")
    assert session.question(first.cut(first.completions[1][0])).text == f"how are you, {number}?"
    text, prompt = generation.prompt_of(session, "Tell me.")
    assert (text, session.tokenizer.decode(prompt)) == ("Tell me.", "<|user|>\nTell me.</s>\n<|assistant|>\n")
    network, at = session.make("base")
    pieces: list[str] = []
    generation.generate_story(session, network, asked.prompt, pieces.append, most_tokens=4)
    answers = list(inference._answers(session, "base", network, at, 1, 4))
    assert (answers[0].synopsis, answers[0].reference, answers[0].story) == (
        asked.text,
        asked.reference,
        "".join(pieces),
    )
    assert next(inference._requests(session, network, "base", 0)).prompt_tokens == len(asked.prompt)


def test_a_generated_turn_ends_where_the_templates_does(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends_otherwise = CHAT.replace("</s>", "<|system|>")
    base = tiny_model(tmp_path / "model", chat_template=ends_otherwise)
    own = byte_tokenizer().convert_tokens_to_ids("<|system|>")
    pair = Story("a", "b", None, None, PromptSpec())
    for row, ends in ((chats(1)[0], [1, own]), (pair, [1, own]), (Passage("a", PromptSpec()), [1])):
        with_rows(monkeypatch, [row])
        assert AdapterSession(small(base_model=base), tmp_path).end_ids == ends


def test_a_text_is_asked_how_it_goes_on(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_rows(monkeypatch, [Passage(f"{n:02} " + "abcdefg " * 10, PromptSpec()) for n in range(6)])
    session = AdapterSession(small(base_model=tiny_model(tmp_path / "model", chat_template=CHAT)), tmp_path)
    asked = session.question(session.held_out[0])
    assert len(asked.prompt) == 32
    assert asked.text + asked.reference == session.texts[session.held_out[0].story_id].completion
    assert generation.prompt_of(session, None) == (asked.text, asked.prompt)
    _, prompt = generation.prompt_of(session, "01 abc")
    assert session.tokenizer.decode(prompt) == "01 abc", "no turn of a chat"
