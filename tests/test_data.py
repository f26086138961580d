"""Tokenised and collated: what carries loss, what is held out, and in which order it comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import InputError
from harness.sources import stories
from harness.sources.stories import Story
from harness.spec import DatasetSpec, PromptSpec, TrialSpec
from harness.training import batches, checkpoints

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
    loaded = batches.load(small(datasets=[stories_file(tmp_path, rows)]), tokenizer)
    for example in (*loaded.train, *loaded.held_out):
        supervised = [i for i in example.labels if i != batches.IGNORED]
        text = tokenizer.decode(supervised)
        assert text.startswith("story ")
        assert text.endswith("<|end|>")
        assert len(text) == len("story 0<|end|>")
    everything = batches.load(small(datasets=[stories_file(tmp_path, rows)], train_on_inputs=True), tokenizer)
    assert all(len(e) - 1 == sum(label != batches.IGNORED for label in e.labels) for e in everything.train)


def test_bundled_texts() -> None:
    whole = {s.instruction: s.completion for s in stories.read(DatasetSpec(path="storyteller"))}
    openings = stories.read(DatasetSpec(path="storyteller-openings"))
    assert (len(whole), len(openings)) == (240, 60)
    assert all(whole[s.instruction].startswith(s.completion) for s in openings)
    passages = stories.general()
    assert len({passage for passage, _ in passages}) == 64
    assert all(15 <= len(text.split()) <= 90 for _, text in passages)


def test_general_text_is_judged_without_a_prompt(tokenizer: Any) -> None:
    (_, text), *_ = stories.general()
    example = batches.general(tokenizer)[0]
    assert tokenizer.decode(example.input_ids) == text
    assert sum(label != batches.IGNORED for label in example.labels) == len(example) - 1


def test_held_out_stories_depend_on_neither_seed_nor_row_order(small: Small, tokenizer: Any, tmp_path: Path) -> None:
    rows = [(f"synopsis {i}", f"story {i}") for i in range(30)]
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
    order = batches.training_order(examples, 2 * len(examples), front=8, seed=1)
    lengths = sorted((len(e) for e in order), reverse=True)
    assert [len(e) for e in order[:8]] == lengths[:8]
    assert [len(e) for e in order[8:]] != lengths[8:], "the rest is shuffled"
    counts = {e.story_id: 0 for e in examples}
    for example in order:
        counts[example.story_id] += 1
    assert set(counts.values()) == {2}
    assert order == batches.training_order(examples, 2 * len(examples), front=8, seed=1)
    assert order != batches.training_order(examples, 2 * len(examples), front=8, seed=2)


def test_samples_follow_from_whichever_length_is_given(small: Small) -> None:
    assert batches.total_samples(small(train_samples=7), 100) == 7
    assert batches.total_samples(small(train_samples=None, max_steps=3), 100) == 3 * 4
    assert batches.total_samples(small(train_samples=None, num_epochs=1.5), 100) == 150
    assert batches.total_samples(small(train_samples=None), 100) == 100


def test_padding_is_known_by_the_mask_and_the_end_token_is_learnt(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "as in the bundled model"
    end = tokenizer.eos_token_id
    short, long = batches.Example("a", (5, 6, end), 1), batches.Example("b", (5, 6, 7, 8, end), 3)
    batch = batches.collate([short, long], end, CPU)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    ignored = batches.IGNORED
    assert batch.inputs["labels"].tolist() == [[ignored, 6, end, ignored, ignored], [ignored] * 3 + [8, end]]
    assert (batch.samples, batch.tokens, batch.supervised_tokens, batch.padded_tokens) == (2, 8, 4, 10)


def test_prompts_by_format_by_chat_template_and_plain(tokenizer: Any) -> None:
    lesson = PromptSpec(
        system_prompt="Tell.", format="<|user|>\n {instruction} </s>", no_input_format="<|user|> {instruction} </s>"
    )
    assert batches.render_prompt(story(lesson, system="Tell."), tokenizer) == ("Tell.\n<|user|> a dog </s>", True)
    with_input = batches.render_prompt(story(lesson, input="brown"), tokenizer)
    assert with_input == ("<|user|>\n a dog </s>", True)
    placed = PromptSpec(format="[{system}] {instruction}")
    assert batches.render_prompt(story(placed, system="Tell."), tokenizer)[0] == "[Tell.] a dog"
    plain, _ = batches.render_prompt(story(system="Tell."), tokenizer)
    assert plain.startswith("Tell.\n")
    assert "a dog" in plain

    class Chat:
        chat_template = "there is one"

        def apply_chat_template(self, turns: Any, **options: Any) -> str:
            assert options == {"tokenize": False, "add_generation_prompt": True}
            return "|".join(f"{t['role']}:{t['content']}" for t in turns)

    assert batches.render_prompt(story(system="Tell."), Chat()) == ("system:Tell.|user:a dog", False)
    assert batches.render_prompt(story(), Chat()) == ("user:a dog", False)
