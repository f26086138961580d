"""Tokenised and collated: what carries loss, what is held out, and in which order it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import InputError
from harness.sources import stories
from harness.sources.files import read_file
from harness.sources.stories import Story
from harness.spec.datasets import DatasetSpec, PromptSpec
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, order, prompts
from harness.training.prompts import Prompt

Small = Callable[..., TrialSpec]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return checkpoints.load_tokenizer(TrialSpec(base_model="random:tiny"))


def story(prompt: PromptSpec | None = None, **values: Any) -> Story:
    texts = {"instruction": "a dog", "completion": "It ran.", "system": None, "input": None} | values
    return Story(prompt=prompt or PromptSpec(), **texts)


def stories_file(folder: Path, rows: list[tuple[str, str]]) -> DatasetSpec:
    file = folder / "stories.jsonl"
    file.write_text("".join(json.dumps({"synopsis": a, "short_story": b}) + "\n" for a, b in rows))
    return DatasetSpec(path=str(file))


def test_loss_is_taken_on_the_story_and_its_end_alone(small: Small, tokenizer: Any, tmp_path: Path) -> None:
    rows = [(f"synopsis {i}", f"story {i}") for i in range(4)]
    short: dict[str, Any] = {"datasets": [stories_file(tmp_path, rows)], "min_completion_tokens": 8}
    loaded = batches.load(small(**short), tokenizer)
    for example in (*loaded.train, *loaded.held_out):
        supervised = [i for i in example.labels if i != batches.IGNORED]
        text = tokenizer.decode(supervised)
        assert text.startswith("story ")
        assert text.endswith("<|end|>")
        assert len(text) == len("story 0<|end|>")
    everything = batches.load(small(**short, train_on_inputs=True), tokenizer)
    assert all(len(e) - 1 == sum(label != batches.IGNORED for label in e.labels) for e in everything.train)


def test_bundled_texts() -> None:
    whole = {s.instruction: s.completion for s in stories.read(DatasetSpec(path="storyteller")).stories}
    openings = stories.read(DatasetSpec(path="storyteller-openings")).stories
    assert (len(whole), len(openings)) == (240, 60)
    assert all(whole[s.instruction].startswith(s.completion) for s in openings)
    passages = stories.general()
    assert len({passage for passage, _ in passages}) == 64
    assert all(15 <= len(text.split()) <= 90 for _, text in passages)


def test_general_text_is_judged_without_a_prompt(tokenizer: Any) -> None:
    (_, text), *_ = stories.general()
    example = batches.general(tokenizer, 64)[0]
    assert tokenizer.decode(example.input_ids) == text
    assert sum(label != batches.IGNORED for label in example.labels) == len(example) - 1


def test_some_general_passages_are_of_all_kinds(tokenizer: Any) -> None:
    kinds = [row["kind"] for row in read_file(stories.GENERAL)]
    order = [passage for passage, _ in stories.general()]
    for samples in (1, 16, 63, 64):
        numbers = [order.index(example.story_id) for example in batches.general(tokenizer, samples)]
        assert len({*numbers}) == samples
        assert numbers == sorted(numbers)
        for kind in {*kinds}:
            expected = samples * kinds.count(kind) / len(kinds)
            assert abs(sum(kinds[number] == kind for number in numbers) - expected) < 1


def test_held_out_stories_depend_on_neither_seed_nor_row_order(small: Small, tokenizer: Any, tmp_path: Path) -> None:
    rows = [(f"synopsis {i}", f"story of a fox, {i}") for i in range(30)]
    (tmp_path / "b").mkdir()
    there = stories_file(tmp_path, rows)
    turned = stories_file(tmp_path / "b", [*reversed(rows), rows[0]])  # and a row twice
    one = batches.load(small(datasets=[there], val_set_size=5), tokenizer)
    other = batches.load(small(datasets=[turned], val_set_size=5, seed=9), tokenizer)
    assert one.held_out == other.held_out
    assert len(one.held_out) == 5
    for loaded in (one, other):
        assert not {e.story_id for e in loaded.held_out} & {e.story_id for e in loaded.train}
    fraction = batches.load(small(datasets=[there], val_set_size=0.2), tokenizer)
    assert len(fraction.held_out) == 6
    assert not batches.load(small(datasets=[there], val_set_size=0), tokenizer).held_out


@pytest.mark.parametrize("excess", ["truncate", "drop"])
def test_stories_too_short_to_be_judged_are_passed_over_and_trained_on(
    small: Small, tokenizer: Any, tmp_path: Path, excess: str
) -> None:
    rows = [(f"synopsis {i}", "x" * (40 if i % 2 else 14)) for i in range(20)]  # and the end token: 41 and 15
    spec = small(datasets=[stories_file(tmp_path, rows)], val_set_size=6, excess_length=excess)
    loaded = batches.load(spec, tokenizer)
    first = [e.story_id for e in batches.load(spec.model_copy(update={"min_completion_tokens": 1}), tokenizer).held_out]
    assert [e.completion_tokens for e in loaded.held_out] == [41] * 6
    assert {e.story_id for e in loaded.held_out} & {*first}, "still the first ones by hash"
    assert loaded.short > 0
    assert loaded.dropped == 0
    assert len(loaded.train) == 14
    assert sum(e.completion_tokens == 15 for e in loaded.train) == 10, "none of them is lost"
    few = batches.load(spec.model_copy(update={"val_set_size": 15.0}), tokenizer)
    assert (len(few.held_out), few.short, len(few.train)) == (10, 10, 10), "those there are"


def test_a_story_that_the_evaluated_length_cuts_short_is_not_judged(
    small: Small, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [("p" * (20 * i), "x" * 40) for i in range(1, 9)]
    starts = {e.story_id: len(e.prompt) for e in batches.load(
        small(datasets=[stories_file(tmp_path, rows)], val_set_size=0, sequence_length=999), tokenizer
    ).train}  # fmt: skip
    length = sorted(starts.values())[3] + 16
    spec = small(datasets=[stories_file(tmp_path, rows)], val_set_size=4, eval_sequence_length=length)
    loaded = batches.load(spec, tokenizer)
    assert {e.story_id for e in loaded.held_out} == {s for s, start in starts.items() if start + 16 <= length}
    assert min(e.completion_tokens for e in loaded.held_out) == 16


_SHORT = [(f"a{i}", "b" * (3 + i % 5)) for i in range(20)]
_LATE = [("a" * (10 * i), "b" * 100) for i in range(1, 21)]
_BOTH = [("a" * (10 * i), "b" * i) for i in range(1, 31)]


@pytest.mark.parametrize(
    ("rows", "given", "reason", "ways"),
    [
        (_SHORT, {}, "none of 20 has that many (the longest completion has 8)", ["min_completion_tokens: 7", "0"]),
        (_SHORT, {"val_set_size": 1}, "none of 20", ["min_completion_tokens: 8", "0"]),
        (_LATE, {"eval_sequence_length": 64}, "64 1 of 20 has", ["eval_sequence_length: 129", "val_set_size: 1"]),
        (_LATE, {"eval_sequence_length": 50}, "50 none of 20", ["eval_sequence_length: 129", "0"]),
        (_LATE, {"eval_sequence_length": 64, "excess_length": "drop"}, "none", ["eval_sequence_length: 214", "0"]),
        (_BOTH, {"eval_sequence_length": 120}, "none", ["eval_sequence_length: 269", "min_completion_tokens: 2", "0"]),
        (_SHORT, {"eval_sequence_length": 8}, "none", ["min_completion_tokens: 8 with eval_sequence_length: ", "0"]),
    ],
)  # fmt: skip
def test_too_little_to_judge_is_refused_with_what_would_do(
    small: Small, tokenizer: Any, tmp_path: Path, rows: Any, given: dict[str, Any], reason: str, ways: list[str]
) -> None:
    """Each way that the message offers is one."""
    values = {"val_set_size": 8, "sequence_length": 999, "datasets": [stories_file(tmp_path, rows)]} | given
    with pytest.raises(InputError) as refusal:
        batches.load(small(**values), tokenizer)
    text = str(refusal.value)
    assert text.isprintable()
    assert f"val_set_size {values['val_set_size']} asks for {values['val_set_size']} held-out stories with 16" in text
    assert reason in text
    offered = re.split(", | or ", text.split("; give ")[1])
    assert len(offered) == len(ways)
    for way, expected in zip(offered, ways, strict=True):
        assert expected in way
        changed = {key: int(value) for key, value in re.findall(r"(\w+): (\d+)", way)}
        loaded = batches.load(small(**values | changed), tokenizer)
        assert len(loaded.held_out) >= (values | changed)["val_set_size"] / 2 or "with" in way
        assert bool(loaded.held_out) == (changed != {"val_set_size": 0})


def test_a_small_share_is_one_story_at_least(small: Small, tokenizer: Any, tmp_path: Path) -> None:
    rows = [(f"synopsis {i}", "x" * 40) for i in range(20)]
    loaded = batches.load(small(datasets=[stories_file(tmp_path, rows)], val_set_size=0.01), tokenizer)
    assert len(loaded.held_out) == 1


@pytest.mark.parametrize(("excess", "kept", "truncated", "dropped"), [("truncate", 2, 1, 1), ("drop", 1, 0, 2)])
def test_long_examples_are_counted(
    small: Small, tokenizer: Any, tmp_path: Path, excess: str, kept: int, truncated: int, dropped: int
) -> None:
    # Short; long story; prompt alone too long.
    dataset = stories_file(tmp_path, [("a", "b"), ("a", "b" * 500), ("a" * 500, "b")])
    spec = small(datasets=[dataset], val_set_size=0, excess_length=excess, sequence_length=100)
    loaded = batches.load(spec, tokenizer)
    assert (len(loaded.train), loaded.truncated, loaded.dropped) == (kept, truncated, dropped)
    assert all(len(e) <= 100 for e in loaded.train)


def test_excess_can_be_refused(small: Small, tokenizer: Any, tmp_path: Path) -> None:
    dataset = stories_file(tmp_path, [("a", "b" * 500)])
    with pytest.raises(InputError, match="excess_length: truncate"):
        batches.load(small(datasets=[dataset], val_set_size=0, excess_length="raise"), tokenizer)
    with pytest.raises(InputError, match="nothing to train on"):
        batches.load(small(datasets=[dataset], val_set_size=1), tokenizer)


def test_longest_come_first_and_each_epoch_has_every_story(small: Small, tokenizer: Any) -> None:
    examples = batches.load(small(sequence_length=8192, val_set_size=0), tokenizer).train
    shuffled = order.training_order(examples, 2 * len(examples), size=4, seed=1)
    lengths = sorted((len(e) for e in shuffled), reverse=True)
    assert [len(e) for e in shuffled[:8]] == lengths[:8]
    assert [len(e) for e in shuffled[8:]] != lengths[8:], "the rest is shuffled"
    counts = {e.story_id: 0 for e in examples}
    for example in shuffled:
        counts[example.story_id] += 1
    assert set(counts.values()) == {2}
    assert shuffled == order.training_order(examples, 2 * len(examples), size=4, seed=1)
    assert shuffled != order.training_order(examples, 2 * len(examples), size=4, seed=2)


def test_examples_of_similar_length_come_together(small: Small, tokenizer: Any) -> None:
    examples = batches.load(small(sequence_length=8192, val_set_size=0), tokenizer).train
    size, samples = 4, 2 * len(examples)
    shuffled = order.training_order(examples, samples, size, seed=1)
    grouped = order.training_order(examples, samples, size, seed=1, grouped=True)
    assert sorted(e.story_id for e in grouped) == sorted(e.story_id for e in shuffled)
    assert grouped[: 2 * size] == shuffled[: 2 * size], "the longest come first either way"

    def padding(order: list[batches.Example]) -> float:
        steps = [[len(e) for e in order[start : start + size]] for start in range(0, samples, size)]
        return 1 - sum(map(sum, steps)) / sum(max(step) * len(step) for step in steps)

    assert padding(grouped) < 0.35 * padding(shuffled)
    assert [len(e) for e in grouped] != sorted((len(e) for e in grouped), reverse=True), "the rest in several parts"
    assert grouped != order.training_order(examples, samples, size, seed=2, grouped=True)


def test_grouped_examples_are_timed_together(small: Small, tokenizer: Any) -> None:
    """On the same lengths as without: what is compared is what the grouping saves."""
    specs = [
        small(sequence_length=8192, val_set_size=0, micro_batch_size=2, gradient_accumulation_steps=2,
              train_samples=40, group_by_length=on)
        for on in (False, True)
    ]  # fmt: skip
    examples = batches.load(specs[0], tokenizer).train
    plain, grouped = (order.timed_steps(spec, examples) for spec in specs)
    assert [len(step) for step in grouped] == [len(step) for step in plain]
    lengths = [[len(e) for step in steps for e in step] for steps in (plain, grouped)]
    assert sorted(lengths[0]) == sorted(lengths[1])
    assert lengths[1] == sorted(lengths[1], reverse=True)


def test_padding_is_known_by_the_mask_and_the_end_token_is_learnt(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "as in the bundled model"
    end = tokenizer.eos_token_id
    short, long = batches.Example("a", (5, 6, end), ((1, 3),)), batches.Example("b", (5, 6, 7, 8, end), ((3, 5),))
    batch = batches.collate([short, long], end, CPU)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    ignored = batches.IGNORED
    assert batch.inputs["labels"].tolist() == [[ignored, 6, end, ignored, ignored], [ignored] * 3 + [8, end]]
    assert (batch.samples, batch.tokens, batch.supervised_tokens, batch.padded_tokens) == (2, 8, 4, 10)


def test_prompts_by_format_by_chat_template_and_plain(tokenizer: Any) -> None:
    lesson = PromptSpec(
        system_prompt="Tell.", format="<|user|>\n {instruction} </s>", no_input_format="<|user|> {instruction} </s>"
    )
    assert prompts.render(story(lesson, system="Tell."), tokenizer).text == "Tell.\n<|user|> a dog </s>"
    assert prompts.render(story(lesson, input="brown"), tokenizer).text == "<|user|>\n a dog </s>"
    other = PromptSpec(format="{instruction}!", system_format="[{system}] ")
    assert prompts.render(story(other, system="Tell."), tokenizer).text == "[Tell.] a dog!"
    assert prompts.render(story(other), tokenizer).text == "a dog!"
    placed = PromptSpec(format="[{system}] {instruction}")
    assert prompts.render(story(placed, system="Tell."), tokenizer).text == "[Tell.] a dog"
    plain = prompts.render(story(system="Tell."), tokenizer).text
    assert plain.startswith("Tell.\n")
    assert "a dog" in plain

    class Chat:
        chat_template = "there is one"

        def apply_chat_template(self, turns: Any, **options: Any) -> str:
            assert options == {"tokenize": False, "add_generation_prompt": True}
            return "|".join(f"{t['role']}:{t['content']}" for t in turns)

    assert prompts.render(story(system="Tell."), Chat()) == Prompt("system:Tell.|user:a dog", by_template=True)
    assert prompts.render(story(), Chat()) == Prompt("user:a dog", by_template=True)
    assert prompts.render(story(input="brown"), Chat()).text == "user:a dog\n\nbrown"
    assert prompts.render(story(PromptSpec(input_separator=": "), input="brown"), Chat()).text == "user:a dog: brown"
