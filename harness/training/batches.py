"""Turns stories into examples (split, tokenised, fitted) and examples into batches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.errors import InputError
from harness.sources import models, splits, stories
from harness.sources.stories import Chat, Passage, Row, Story
from harness.spec.trial import TrialSpec
from harness.training import chat, distributed, prompts

IGNORED = -100
"""Label of a position that carries no loss."""

_KEYS = (
    "base_model",
    "folder",
    "datasets",
    "test_datasets",
    "sequence_length",
    "eval_sequence_length",
    "excess_length",
    "skip_empty_rows",
    "train_on_inputs",
    "val_set_size",
    "held_out_part",
    "min_completion_tokens",
    "measure_forgetting",
    "general_samples",
    "chat_template",
    "special_tokens",
)
"""Spec keys that `load` depends on."""


@dataclass(frozen=True)
class Example:
    """One tokenised story, text or chat."""

    story_id: str
    input_ids: tuple[int, ...]
    completions: tuple[tuple[int, int], ...]
    """Where loss is taken: first index and the one after the last of each completion, in order. The first token has
    nothing to be predicted from."""
    supervise_prompt: bool = False
    """Whether the rest carries loss too."""
    system_folded: bool = False
    """Whether the system text stands in the user's turn."""
    tools_left_out: bool = False
    """Whether the chat template does not show the tools of the chat."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def completion_tokens(self) -> int:
        """Tokens behind the loss of the completions."""
        return sum(end - start for start, end in self.completions)

    @property
    def prompt(self) -> tuple[int, ...]:
        """What the last completion follows."""
        return self.input_ids[: self.completions[-1][0]]

    @property
    def labels(self) -> list[int]:
        """The ids where loss is taken, else `IGNORED`."""
        spans = ((1, len(self)),) if self.supervise_prompt else self.completions
        labels = [IGNORED] * len(self)
        for start, end in spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    def cut(self, length: int) -> Example:
        """Its first `length` tokens."""
        within = tuple((start, min(end, length)) for start, end in self.completions if start < length)
        return replace(self, input_ids=self.input_ids[:length], completions=within)

    def length_with(self, tokens: int) -> int:
        """The least length that has so many completion tokens."""
        for start, end in self.completions:
            if tokens <= end - start:
                return start + tokens
            tokens -= end - start
        return len(self)


@dataclass(frozen=True)
class Data:
    """Examples to train and to evaluate on, and what became of the other rows."""

    train: tuple[Example, ...]
    """In an order independent of seed and file order."""
    held_out: tuple[Example, ...]
    """Each with `min_completion_tokens` or more."""
    general: tuple[Example, ...]
    """The bundled general text, where forgetting is measured."""
    wanted: int
    """Stories that were to be held out."""
    skipped: int
    """Rows without text."""
    copies: int
    """Rows of held-out stories beyond the first of each, which are not trained on."""
    truncated: int
    """Training stories that were cut."""
    truncated_held_out: int
    dropped: int
    """Training stories that were left out."""
    short: int
    """Stories that were passed over when those held out were chosen."""
    unused: int = 0
    """Stories that are neither held out here nor trained on: the data hold them out, or others are compared on them."""

    @property
    def folded(self) -> int:
        """Examples whose system text stands in the user's turn."""
        return sum(example.system_folded for example in (*self.train, *self.held_out))

    @property
    def without_tools(self) -> int:
        """Examples whose chat template does not show their tools."""
        return sum(example.tools_left_out for example in (*self.train, *self.held_out))

    @property
    def metrics(self) -> dict[str, int]:
        """The counts by the names of their metrics."""
        return {
            "training_stories": len(self.train),
            "skipped_rows": self.skipped,
            "truncated_examples": self.truncated + self.truncated_held_out,
            "truncated_held_out": self.truncated_held_out,
            "dropped_examples": self.dropped,
            "held_out_copies": self.copies,
            "short_stories": self.short,
            "folded_prompts": self.folded,
        }

    def describe(self, spec: TrialSpec) -> str:
        """What is trained on, what is held out, and what became of the other rows: one line."""
        length = spec.sequence_length
        too_long = "longer than" if spec.excess_length == "drop" else "no completion token within"
        reasons = {
            f"cut to {length} tokens": self.truncated,
            f"of those held out cut to {evaluated_length(spec)} tokens": self.truncated_held_out,
            f"left out ({too_long} {length} tokens)": self.dropped,
            "left out (copies of held-out ones)": self.copies,
            "neither trained nor evaluated on (held out by the data, or compared on)": self.unused,
            f"skipped ({_why_skipped(spec)})": self.skipped,
        }
        rows = len(self.train) + len(self.held_out) + self.dropped + self.copies + self.skipped + self.unused
        fewer = f" of {self.wanted} asked for" if len(self.held_out) < self.wanted else ""
        kept = f"{rows} stories: {len(self.held_out)} held out{fewer}, {len(self.train)} to train on"
        lost = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        return f"{kept}; {lost}" if lost else kept


def _why_skipped(spec: TrialSpec) -> str:
    alternate = any(dataset.type.alternating_turns for dataset in (*spec.datasets, *(spec.test_datasets or ())))
    return "empty, or turns that do not alternate" if alternate else "empty"


def key(spec: TrialSpec) -> str:
    """Equal for specs whose data are the same."""
    return json.dumps(spec.model_dump(mode="json", include={*_KEYS}), sort_keys=True)


def load(spec: TrialSpec, tokenizer: Any) -> Data:
    """Read, split, render and tokenise the stories of a spec.

    Where the data themselves hold out stories, those to evaluate on are the first of these, as many as `val_set_size`
    counts, or all where it is a fraction; none of them is trained on. Else the split is by hash of the text: the same
    stories are held out for every seed and order of rows. Those with too few completion tokens to be judged are passed
    over, and, of the latter kind, trained on.

    Raises:
        InputError: nothing is left to train on, no story has enough completion tokens, `excess_length: raise` meets a
            long example, or the model's chat template refuses a prompt.
    """
    read = stories.read_all(spec)
    rows = sorted(read.stories, key=lambda s: s.id)
    given = splits.distinct(read.held_out)
    candidates = given or splits.distinct(rows)
    wanted = splits.counts(read).held_out(spec.val_set_size)
    held_out = _choose_held_out(candidates, wanted, spec, tokenizer)
    compared_on = set[str]()
    if spec.held_out_part == "tuning":
        compared_on = {example.story_id for example in held_out.examples}
        others = [story for story in candidates if story.id not in compared_on]
        if len(others) < len(compared_on):
            raise InputError(
                f"held_out_part tuning: {len(compared_on)} of {len(candidates)} stories that can be held out are "
                f"compared on, and as many others are asked for; use val_set_size: {len(candidates) // 2} or less"
            )
        held_out = _choose_held_out(others, wanted, spec, tokenizer)
    held_out_ids = {example.story_id for example in held_out.examples}
    left_out_ids = {story.id for story in given} or held_out_ids | compared_on
    whole = [_tokenise(s, tokenizer, spec.train_on_inputs) for s in rows if s.id not in left_out_ids]
    train = _fit(whole, spec.sequence_length, spec.excess_length)
    if not train.examples:
        raise _nothing_to_train_on(whole, spec)
    measured = spec.measure_forgetting and models.pretrained(spec.base_model)
    return Data(
        train.examples,
        held_out.examples,
        general=tuple(general(tokenizer, spec.general_samples)) if measured else (),
        wanted=wanted,
        skipped=read.skipped,
        copies=len(rows) - len(whole) - (0 if given else len(held_out_ids | compared_on)),
        truncated=train.truncated,
        truncated_held_out=held_out.truncated,
        dropped=train.dropped,
        short=held_out.dropped,
        unused=len(read.held_out) - len(held_out_ids) if given else len(compared_on),
    )


def _nothing_to_train_on(examples: Sequence[Example], spec: TrialSpec) -> InputError:
    if not any(example.completions for example in examples):
        roles = ", ".join(dict.fromkeys(role for d in spec.datasets for role in d.type.roles_to_train))
        return InputError(
            f"nothing to train on: no chat of {spec.dataset_paths} has a turn that may carry loss; roles_to_train is "
            f"{roles}: give other roles with it, or the names that roles have in the data with roles"
        )
    examples = [example for example in examples if example.completions]
    if spec.excess_length == "drop":
        kept, least = "no training story, since excess_length is drop", min(map(len, examples))
    else:
        kept, least = "no completion token of any training story", min(e.length_with(1) for e in examples)
    return InputError(f"sequence_length {spec.sequence_length} leaves {kept}; use sequence_length: {least} or more")


def evaluated_length(spec: TrialSpec) -> int:
    """Longest held-out example in tokens."""
    return spec.eval_sequence_length or spec.sequence_length


def general(tokenizer: Any, samples: int) -> list[Example]:
    """Passages of the bundled general text, without a prompt: the loss is over each token but the first."""
    texts = {passage: tuple(tokenizer(text)["input_ids"]) for passage, text in stories.general(samples)}
    return [Example(passage, ids, ((1, len(ids)),)) for passage, ids in texts.items()]


@dataclass(frozen=True)
class _Fitted:
    examples: tuple[Example, ...]
    truncated: int
    dropped: int


def _fit(examples: list[Example], length: int, excess: str) -> _Fitted:
    """Truncate, drop or refuse examples of more than `length` tokens, as `excess_length` says."""
    fits = [_fit_one(example, length, excess) for example in examples]
    fitted = [each for each in fits if each is not None]
    # One that is left, of those that were longer, was cut.
    truncated = sum(len(one) > len(other) for one, other in zip(examples, fits, strict=True) if other is not None)
    return _Fitted(tuple(fitted), truncated, len(examples) - len(fitted))


def _fit_one(example: Example, length: int, excess: str) -> Example | None:
    """The example within `length` tokens; null where it is to be left out, or no completion token would be left."""
    if not example.completions:
        return None
    if len(example) <= length:
        return example
    if excess == "raise":
        raise InputError(
            f"a story has {len(example)} tokens and sequence_length is {length}; "
            "use excess_length: truncate or drop, or a longer sequence_length"
        )
    if excess == "drop":
        return None
    cut = example.cut(length)
    return cut if cut.completions else None


def _choose_held_out(candidates: Sequence[Row], wanted: int, spec: TrialSpec, tokenizer: Any) -> _Fitted:
    """The first `wanted` stories that can be judged, or all of them where they are fewer; `dropped` are those passed
    over.

    Raises:
        InputError: there is none, or not half as many as wanted because `eval_sequence_length` cuts them short.
    """
    length = evaluated_length(spec)
    chosen: list[Example] = []
    truncated = passed_over = 0
    for story in candidates:
        if len(chosen) == wanted:
            break
        whole = _tokenise(story, tokenizer, False)
        example = _fit_one(whole, length, spec.excess_length)
        if example is None or example.completion_tokens < spec.min_completion_tokens:
            passed_over += 1
            continue
        truncated += len(example) < len(whole)
        chosen.append(example)
    if 2 * len(chosen) < wanted:
        _refuse_too_few([_tokenise(story, tokenizer, False) for story in candidates], len(chosen), wanted, spec)
    return _Fitted(tuple(chosen), truncated, passed_over)


def _refuse_too_few(examples: Sequence[Example], there: int, wanted: int, spec: TrialSpec) -> None:
    """Refuse an evaluation of `there` stories in place of `wanted`, unless it is all that the stories offer.

    Raises:
        InputError: it names what would do.
    """
    least, length = spec.min_completion_tokens, evaluated_length(spec)

    def lengths(tokens: int) -> list[int]:
        """The least `eval_sequence_length` of each story that has so many completion tokens, shortest first."""
        able = [e for e in examples if e.completion_tokens >= tokens]
        # Where longer stories are dropped, one counts once all of it fits.
        return sorted(len(e) if spec.excess_length == "drop" else e.length_with(tokens) for e in able)

    enough = lengths(least)
    if 0 < there == len(enough):
        return
    ways = [f"eval_sequence_length: {enough[min(wanted, len(enough)) - 1]}"] if enough else []
    fitted = _fit(list(examples), length, spec.excess_length).examples
    within = sorted((e.completion_tokens for e in fitted), reverse=True)[:wanted]
    if within and (2 * len(within) >= wanted or len(within) == len(lengths(within[-1]))):
        ways.append(f"min_completion_tokens: {within[-1]}")
    longest = max(e.completion_tokens for e in examples)
    if not longest:
        raise _nothing_to_train_on(examples, spec)
    if not ways:
        ways.append(f"min_completion_tokens: {longest} with eval_sequence_length: {lengths(longest)[-1]}")
    ways.append(f"val_set_size: {there}" if there else "val_set_size: 0 (no evaluation)")
    raise InputError(
        f"val_set_size {spec.val_set_size:g} asks for {wanted} held-out stories with {least} completion tokens or more "
        f"(min_completion_tokens), and within eval_sequence_length {length} {there or 'none'} of {len(examples)} "
        f"{'has' if there < 2 else 'have'} that many (the longest completion has {longest}); "
        f"give {', '.join(ways[:-1])} or {ways[-1]}"
    )


def _tokenise(row: Row, tokenizer: Any, supervise_prompt: bool) -> Example:
    if isinstance(row, Story):
        return _tokenise_story(row, tokenizer, supervise_prompt)
    if isinstance(row, Chat):
        return _tokenise_chat(row, tokenizer, supervise_prompt)
    return _tokenise_passage(row, tokenizer)


def _tokenise_story(story: Story, tokenizer: Any, supervise_prompt: bool) -> Example:
    prompt = prompts.render(story, tokenizer)
    end = chat.end_of_turn(tokenizer) if prompt.by_template else None
    tokenise = prompts.joined if story.prompt.tokenize_jointly else prompts.apart
    ids, border = tokenise(prompt.text, story.completion, tokenizer, end)
    return Example(story.id, tuple(ids), ((max(1, border), len(ids)),), supervise_prompt, prompt.system_folded)


def _tokenise_chat(row: Chat, tokenizer: Any, supervise_prompt: bool) -> Example:
    tokens = chat.tokenise(row, tokenizer, everything=supervise_prompt)
    every = supervise_prompt and not tokens.parts_left_out
    return Example(row.id, tokens.ids, tokens.completions, every, tokens.system_folded, tokens.tools_left_out)


def _tokenise_passage(passage: Passage, tokenizer: Any) -> Example:
    """The whole text is the completion: only its first token has nothing to be predicted from."""
    ids = prompts.ended(prompts.token_ids(passage.completion, tokenizer), tokenizer)
    return Example(passage.id, tuple(ids), ((1, len(ids)),) if len(ids) > 1 else ())


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its device, and its counts."""

    inputs: dict[str, Any]
    """`input_ids`, `attention_mask`, `labels`: int64 of shape (examples, longest example). Of a packed micro-batch:
    `input_ids`, `position_ids`, `labels` of shape (1, tokens), and `example_lengths`, a tuple of integers."""
    samples: int
    tokens: int
    supervised_tokens: int
    padded_tokens: int


def collate(examples: Sequence[Example], pad_id: int, device: torch.device, length: int | None = None) -> Batch:
    """Pad to `length`, or to the longest example, on the right. The mask marks padding, not the id: a tokenizer may pad
    with its end token, which carries loss.
    """
    width = length or max(map(len, examples))

    def stack(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64)

    labels = [e.labels for e in examples]
    inputs = {
        "input_ids": stack([list(e.input_ids) for e in examples], pad_id),
        "attention_mask": stack([[1] * len(e) for e in examples], 0),
        "labels": stack(labels, IGNORED),
    }
    return Batch(
        inputs={name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()},
        samples=len(examples),
        tokens=sum(map(len, examples)),
        supervised_tokens=sum(label != IGNORED for row in labels for label in row),
        padded_tokens=width * len(examples),
    )


def pack(examples: Sequence[Example], device: torch.device) -> Batch:
    """One row of all examples, one after another. Their positions say where each begins, and the model keeps their
    attention apart. The first token of each has nothing to be predicted from.
    """
    inputs = {
        "input_ids": [i for e in examples for i in e.input_ids],
        "position_ids": [position for e in examples for position in range(len(e))],
        "labels": [label for e in examples for label in (IGNORED, *e.labels[1:])],
    }
    tokens = sum(map(len, examples))
    tensors = {name: torch.tensor([row]).to(device, non_blocking=True) for name, row in inputs.items()}
    return Batch(
        inputs={**tensors, "example_lengths": tuple(map(len, examples))},
        samples=len(examples),
        tokens=tokens,
        supervised_tokens=sum(label != IGNORED for label in inputs["labels"]),
        padded_tokens=tokens,
    )


def micro_batches(examples: Sequence[Example], spec: TrialSpec, pad_id: int, device: torch.device) -> Iterator[Batch]:
    """This rank's slice of consecutive micro-batches of at most `micro_batch_size` examples.

    Each rank gets equally many, since ranks go through a step together; the last one may have no loss.
    """
    size, length = spec.micro_batch_size, spec.sequence_length if spec.pad_to_sequence_len else None

    def batch(group: Sequence[Example]) -> Batch:
        return pack(group, device) if spec.sample_packing else collate(group, pad_id, device, length)

    groups = [examples[start : start + size] for start in range(0, len(examples), size)]
    own = distributed.rank_slice(groups)
    for group in own:
        yield batch(group)
    for _ in range(math.ceil(len(groups) / distributed.world_size()) - len(own)):
        yield _without_loss(batch(groups[0]))


def _without_loss(batch: Batch) -> Batch:
    """The same micro-batch with all labels ignored and all counts zero."""
    inputs = batch.inputs | {"labels": torch.full_like(batch.inputs["labels"], IGNORED)}
    return Batch(inputs, samples=0, tokens=0, supervised_tokens=0, padded_tokens=0)
