"""What becomes of the rows is said, and what a model, its tokenizer or a schedule cannot do is refused beforehand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    CHAT,
    EMBEDDINGS,
    IGNORES_SYSTEM,
    PAD,
    REFUSES_ALL,
    REFUSES_SYSTEM,
    WITH_BEGINNING,
    byte_tokenizer,
    tiny_model,
)
from transformers import AutoModelForCausalLM, get_scheduler
from trials import run

from harness.adapters import generation
from harness.adapters.session import AdapterSession
from harness.cli.inspection import inspect_trials
from harness.errors import InputError
from harness.grids import preflight
from harness.grids.grid import Grid, Trial
from harness.predict import peak
from harness.results import schema
from harness.sources import stories
from harness.sources.stories import Story
from harness.spec.datasets import PromptSpec
from harness.spec.keys import Scheduler
from harness.spec.length import step_sizes
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, inspection, limits, order, prompts

Small = Callable[..., TrialSpec]
SYSTEM = "Tell a short tale."


def data_of(folder: Path, rows: Sequence[tuple[Any, Any]], **prompt: Any) -> list[dict[str, Any]]:
    """The `datasets` of a spec: a file of synopses and stories."""
    file = folder / "stories.jsonl"
    file.write_text("".join(json.dumps({"synopsis": a, "short_story": b}) + "\n" for a, b in rows))
    return [{"path": str(file), "type": prompt}]


def long_enough(count: int, length: int = 40) -> list[tuple[str, str]]:
    return [(f"synopsis {i}", f"{i:02}" + "x" * (length - 2)) for i in range(count)]


def inspected(*specs: TrialSpec) -> inspection.Inspection:
    return inspection.inspect([(f"trial {number}", spec) for number, spec in enumerate(specs, start=1)])


def refusal(*specs: TrialSpec) -> str:
    """The line with which an inspection refuses specs."""
    with pytest.raises(InputError) as refused:
        inspected(*specs)
    text = str(refused.value)
    assert text.isprintable()
    return text


# ------------------------------------------------------------------------------------ rows


def test_each_row_is_counted_once(small: Small, tmp_path: Path) -> None:
    rows = [
        *long_enough(12),
        *long_enough(12)[:6],
        ("a", "b" * 200),
        ("a" * 200, "b" * 40),
        ("", "b"),
        (None, "b"),
        ("a", " "),
    ]
    spec = small(datasets=data_of(tmp_path, rows), skip_empty_rows=True, val_set_size=8, sequence_length=120)
    data = batches.load(spec, byte_tokenizer())
    held_out = {example.story_id for example in data.held_out}
    twice = {s.id for s in stories.read_all(spec).stories[12:18]}
    assert data.copies == len(held_out & twice) > 0
    assert (data.skipped, data.dropped) == (3, 1)
    assert data.truncated + data.truncated_held_out == 1
    assert len(data.train) + len(data.held_out) + data.copies + data.dropped + data.skipped == len(rows)
    assert data.describe(spec).startswith(f"{len(rows)} stories: 8 held out, {len(data.train)} to train on; ")
    for part in (
        "1 left out (no completion token within 120 tokens)",
        "3 skipped (empty)",
        f"{data.copies} left out (copies",
    ):
        assert part in data.describe(spec)
    record = run(spec.model_copy(update={"train_samples": 4}))
    counted = {
        name: record.metrics[name]
        for name in ("training_stories", "skipped_rows", "held_out_copies", "dropped_examples")
    }
    assert [*counted.values()] == [len(data.train), 3, data.copies, 1]


def test_cut_examples_are_counted_apart(small: Small, tmp_path: Path) -> None:
    spec = small(
        datasets=data_of(tmp_path, long_enough(20, 100)), val_set_size=4, eval_sequence_length=90, sequence_length=80
    )
    data = batches.load(spec, byte_tokenizer())
    assert (data.truncated, data.truncated_held_out) == (16, 4)
    assert data.metrics["truncated_examples"] == 20
    assert data.describe(spec).endswith("; 16 cut to 80 tokens, 4 of those held out cut to 90 tokens")


def test_fewer_held_out_than_asked_for_are_named(small: Small, tmp_path: Path) -> None:
    rows = [*long_enough(3), *((f"s{i}", "short") for i in range(9))]
    spec = small(datasets=data_of(tmp_path, rows), val_set_size=6)
    assert inspected(spec).data == ("data: 12 stories: 3 held out of 6 asked for, 9 to train on",)


def test_no_held_out_story_left_is_refused_beforehand(small: Small, tmp_path: Path) -> None:
    rows = [(f"{i:02}" + "p" * 150, "x" * 60) for i in range(20)]
    spec = small(datasets=data_of(tmp_path, rows), val_set_size=4, sequence_length=100)
    text = refusal(spec)
    assert text.startswith("trial 1: val_set_size 4 asks for 4 held-out stories")
    ways = re.findall(r"eval_sequence_length: (\d+)", text)
    assert ways, text
    assert len(batches.load(spec.model_copy(update={"sequence_length": int(ways[0])}), byte_tokenizer()).held_out) >= 2


@pytest.mark.parametrize(("excess", "reason"), [("truncate", "no completion token"), ("drop", "excess_length is drop")])
def test_no_training_story_left_is_refused_with_a_length_that_would_do(
    small: Small, tmp_path: Path, excess: str, reason: str
) -> None:
    spec = small(
        datasets=data_of(tmp_path, long_enough(4, 90)), val_set_size=0, sequence_length=20, excess_length=excess
    )
    text = refusal(spec)
    assert reason in text
    least = int(re.findall(r"use sequence_length: (\d+) or more", text)[0])
    assert batches.load(spec.model_copy(update={"sequence_length": least}), byte_tokenizer()).train
    with pytest.raises(InputError, match=reason):
        batches.load(spec.model_copy(update={"sequence_length": least - 1}), byte_tokenizer())


EMPTY = ["", "  \n", None, float("nan")]


@pytest.mark.parametrize("empty", EMPTY, ids=repr)
def test_empty_rows_are_refused_or_skipped(small: Small, tmp_path: Path, empty: Any) -> None:
    rows = [*long_enough(8), (empty, "x" * 40), ("synopsis", empty)]
    spec = small(datasets=data_of(tmp_path, rows))
    trials = (Trial(spec, "baseline", None, None),)
    with pytest.raises(InputError, match=r"row 9: 'synopsis' is .*skip_empty_rows: true"):
        preflight.preflight(Grid("g", "g", "list", trials))
    skipping = spec.model_copy(update={"skip_empty_rows": True})
    preflight.preflight(Grid("g", "g", "list", (Trial(skipping, "baseline", None, None),)))
    assert inspected(skipping).data == ("data: 10 stories: 2 held out, 6 to train on; 2 skipped (empty)",)
    assert re.match(r"trial 2: .*skip_empty_rows: true", refusal(skipping, spec))


def test_rows_that_hold_no_text_are_refused_all_the_same(small: Small, tmp_path: Path) -> None:
    for rows, reason in (
        ([("a", 7)], "'short_story' is 7; it must be text, written in quotes$"),
        ([("", "b")], "each of its 1 rows has"),
    ):
        spec = small(datasets=data_of(tmp_path, rows), skip_empty_rows=True, val_set_size=0)
        with pytest.raises(InputError, match=reason):
            stories.read_all(spec)


def test_one_line_for_each_outcome(small: Small, tmp_path: Path) -> None:
    datasets = data_of(tmp_path, [(f"s{i}", "x" * (20 + 2 * i)) for i in range(30)])
    lengths = [200, 400, 60, 65, 70, 75, 80]
    lines = inspected(*(small(datasets=datasets, sequence_length=n, eval_sequence_length=200) for n in lengths)).data
    assert lines[0] == "data of trial 1: 30 stories: 2 held out, 28 to train on"
    assert [line.split(":")[0] for line in lines[1:4]] == [f"data of trial {number}" for number in (3, 4, 5)]
    assert "cut to 60 tokens" in lines[1]
    assert lines[4:] == ("data of 2 more differ; harness show tells the counts of each trial",)


# ------------------------------------------------------------------------------------ prompts


def story(system: str | None = SYSTEM, **prompt: Any) -> Story:
    return Story("a dog", "It ran.", system, None, PromptSpec(**prompt))


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, IGNORES_SYSTEM])
def test_a_template_without_a_system_turn_gets_it_in_the_users(small: Small, tmp_path: Path, template: str) -> None:
    base = tiny_model(tmp_path / "model", chat_template=template)
    spec = small(base_model=base, datasets=data_of(tmp_path, long_enough(10), system_prompt=SYSTEM), train_samples=4)
    tokenizer = checkpoints.load_tokenizer(spec)
    rendered = prompts.render(story(), tokenizer)
    folded = f"<|user|>{SYSTEM}\n\na dog</s><|assistant|>"
    assert rendered == prompts.Prompt(folded, by_template=True, system_folded=True)
    assert not prompts.render(story(system=None), tokenizer).system_folded
    (warning,) = inspected(spec).warnings
    assert re.search("chat template has no system turn; the system text of 10 prompts begins the user's turn$", warning)
    record = run(spec)
    assert (record.status, record.metrics["folded_prompts"]) == ("ok", 10)
    # What is generated continues the same prompt as in training.
    session = AdapterSession(spec, tmp_path)
    _, generated = generation.prompt_of(session, session.texts[session.held_out[0].story_id].instruction)
    first = session.held_out[0]
    assert [*generated] == [*first.prompt]


def test_a_template_with_a_system_turn_keeps_it(small: Small, tmp_path: Path) -> None:
    rendered = prompts.render(story(), byte_tokenizer(chat_template=CHAT))
    assert rendered == prompts.Prompt(f"<|system|>{SYSTEM}</s><|user|>a dog</s><|assistant|>", by_template=True)


def test_a_template_that_refuses_every_prompt_is_one_line(small: Small, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "model", chat_template=REFUSES_ALL)
    spec = small(base_model=base, datasets=data_of(tmp_path, long_enough(10)))
    assert re.fullmatch(
        r"trial 1: .*refuses a prompt \(No chat with this model\); give one with format .*", refusal(spec)
    )


@pytest.mark.parametrize("adds_beginning", [False, True])
@pytest.mark.parametrize(
    ("template", "prompt", "own"),
    [
        (None, {}, 0),
        (CHAT, {}, 0),
        (WITH_BEGINNING, {}, 1),
        (None, {"format": "<s>{system} {instruction}"}, 1),
        (None, {"format": "{instruction}"}, 0),
    ],
)
def test_a_prompt_begins_once(template: str | None, prompt: dict[str, Any], own: int, adds_beginning: bool) -> None:
    tokenizer = byte_tokenizer(chat_template=template, adds_beginning=adds_beginning)
    ids = prompts.token_ids(prompts.render(story(**prompt), tokenizer).text, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == max(own, adds_beginning)
    assert ids.index(tokenizer.bos_token_id) == 0 if own or adds_beginning else True


# ------------------------------------------------------------------------------------ models

POSITIONS = 16
NAMES = {"gpt2": "n_positions", "gptj": "n_positions"}


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"own_code"}))
def test_positions_end_where_the_model_fails(tmp_path: Path, architecture: str) -> None:
    config = (
        {} if architecture in ("bloom", "mamba") else {NAMES.get(architecture, "max_position_embeddings"): POSITIONS}
    )
    base = tiny_model(tmp_path, architecture, config=config, with_tokenizer=False)
    network = AutoModelForCausalLM.from_pretrained(base).eval()
    seen = limits.of_model(network)
    assert seen.embeddings == EMBEDDINGS
    for length in (POSITIONS, POSITIONS + 1):
        tokens = torch.ones(1, length, dtype=torch.int64)
        try:
            network(input_ids=tokens, attention_mask=tokens)
            runs = True
        except (IndexError, RuntimeError):
            runs = False
        assert runs == (seen.positions is None or length <= seen.positions)


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "opt"])
def test_texts_longer_than_the_positions_are_refused_beforehand(
    small: Small, tmp_path: Path, architecture: str
) -> None:
    name = NAMES.get(architecture, "max_position_embeddings")
    base = tiny_model(tmp_path / "model", architecture, config={name: 96})
    spec = small(
        base_model=base, datasets=data_of(tmp_path, long_enough(8, 20)), sequence_length=512, train_samples=4,
        attention="eager" if architecture == "gptj" else "sdpa",  # of which GPT-J has none
    )  # fmt: skip
    assert not inspected(spec).warnings, "short texts fit, whatever the key says"
    assert run(spec).status == "ok"
    long = spec.model_copy(update={"datasets": small(datasets=data_of(tmp_path, long_enough(8, 120))).datasets})
    text = refusal(long)
    assert re.search(r"sequence_length 512: a training example has \d+ tokens, and .* has positions for 96; ", text)
    assert text.endswith("use sequence_length: 96 or less")
    assert run(long).error_type == "InputError"
    fits = long.model_copy(update={"sequence_length": 96})
    assert not inspected(fits).warnings
    assert run(fits).status == "ok"
    assert "eval_sequence_length 100: a held-out example has 100" in refusal(
        fits.model_copy(update={"eval_sequence_length": 100})
    )
    forgets = refusal(fits.model_copy(update={"measure_forgetting": True}))
    assert re.search(r"a general text has \d+ tokens, .*use measure_forgetting: false$", forgets)


def test_computed_positions_go_on_with_a_warning(small: Small, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "model", config={"max_position_embeddings": 32})
    spec = small(base_model=base, datasets=data_of(tmp_path, long_enough(8)), train_samples=4)
    (warning,) = inspected(spec).warnings
    assert re.search(r"an example has \d+ tokens, and the model was made for 32 \(max_position_embeddings\)$", warning)
    assert run(spec).status == "ok"


def test_generation_ends_where_positions_do(tmp_path: Path) -> None:
    base = tiny_model(tmp_path, "gpt2", config={"n_positions": 32}, with_tokenizer=False)
    network = AutoModelForCausalLM.from_pretrained(base)
    limits.check_generation(network, 20, 12)
    with pytest.raises(InputError, match=r"13 new tokens after a prompt of 20: .* positions for 32; ask for 12 tokens"):
        limits.check_generation(network, 20, 13)
    with pytest.raises(InputError, match="give a shorter prompt"):
        limits.check_generation(network, 40, 1)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_padding_without_an_embedding_is_replaced(small: Small, tmp_path: Path, adapter: str) -> None:
    tokens = len(byte_tokenizer())
    given = {"datasets": data_of(tmp_path, [*long_enough(6, 40), *long_enough(6, 60)]), "adapter": adapter}
    outside, inside = (
        small(base_model=tiny_model(tmp_path / name, config={"vocab_size": size}), **given)
        for name, size in (("outside", tokens - 1), ("inside", tokens))
    )
    tokenizer = checkpoints.load_tokenizer(outside)
    assert tokenizer.convert_tokens_to_ids(PAD) == tokenizer.pad_token_id == tokens - 1
    assert checkpoints.pad_id(tokenizer, tokens - 1) == tokenizer.eos_token_id
    assert checkpoints.pad_id(tokenizer, tokens) == tokens - 1
    assert not inspected(outside).warnings
    assert {run(outside).status, run(inside).status} == {"ok"}


def test_text_without_an_embedding_is_refused_beforehand(small: Small, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "model", config={"vocab_size": 100})
    spec = small(base_model=base, datasets=data_of(tmp_path, long_enough(8)))
    text = refusal(spec)
    assert re.search(
        r"the texts have the token \d+, and the model has embeddings for 100 \(its tokenizer has 262 tok", text
    )
    assert run(spec).error_type == "InputError"


def test_a_folder_without_a_tokenizer_is_refused_and_planned_for_in_bytes(small: Small, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "model", with_tokenizer=False)
    spec = small(base_model=base, datasets=data_of(tmp_path, long_enough(8)))
    assert re.search(r"has no tokenizer that can be loaded \(.*\); put tokenizer\.json and", refusal(spec))
    assert peak.predict(spec, "cpu").peak_memory_bytes > 0


# ------------------------------------------------------------------------------------ steps

RATIOS = (0.0, 0.01, 0.3, 0.5, 0.99)


@pytest.mark.parametrize("name", get_args(Scheduler))
def test_steps_without_a_learning_rate_are_refused(small: Small, name: str) -> None:
    """As the schedules of transformers are, for each number of steps."""
    for steps in (1, 2, 3, 10):
        for ratio in RATIOS:
            spec = small(lr_scheduler=name, warmup_ratio=ratio, train_samples=None, max_steps=steps)
            if any(rates_of(spec, steps)):
                order.check_schedules(spec, 100)
                continue
            with pytest.raises(InputError, match="warmup_ratio") as refused:
                order.check_schedules(spec, 100)
            ways = dict(re.findall(r"(warmup_ratio|max_steps): ([\d.]+)", str(refused.value)))
            assert "warmup_ratio" in ways
            for key, value in ways.items():
                given = {key: float(value) if key == "warmup_ratio" else int(value)}
                changed = spec.model_copy(update=given)
                order.check_schedules(changed, 100)
                assert any(rates_of(changed, len(step_sizes(changed, 100))))


def rates_of(spec: TrialSpec, steps: int) -> list[float]:
    """Learning rates of the steps; none where the schedule cannot be followed."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=spec.learning_rate)
    warm_up = -(-spec.warmup_ratio * steps // 1)
    schedule = get_scheduler(spec.lr_scheduler, optimizer, num_warmup_steps=int(warm_up), num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        try:
            schedule.step()
        except ZeroDivisionError:
            return []
    return rates


def test_the_number_of_steps_follows_from_the_data(small: Small, tmp_path: Path) -> None:
    few = small(datasets=data_of(tmp_path, long_enough(6)), train_samples=None, warmup_ratio=0.1)
    assert "warmup_ratio 0.1 of 1 optimizer step (4 examples in effective batches of 4)" in refusal(few)
    assert refusal(few).endswith("use warmup_ratio: 0, or train_samples: 5 or more")
    assert not inspected(few.model_copy(update={"num_epochs": 2.0})).warnings
    assert not inspected(few.model_copy(update={"gradient_accumulation_steps": 1})).warnings


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_the_loss_scaler_cannot_unscale_are_refused(small: Small, bias: str) -> None:
    given: dict[str, Any] = {"precision": "fp16", "lora_bias": bias}
    with pytest.raises(ValueError, match=f"lora_bias {bias} with precision fp16: .*precision: fp16-mixed or bf16"):
        small(**given)
    for allowed in ({"lora_bias": "none"}, {"precision": "fp16-mixed"}, {"precision": "bf16"}, {"adapter": "none"}):
        small(**given | allowed)
    # A row from before reads.
    values = small(**given | {"precision": "bf16"}).model_dump(mode="json") | {"precision": "fp16"}
    assert schema.parse_spec(values | {"datasets": json.dumps(values["datasets"])}).lora_bias == bias


@pytest.mark.parametrize("precision", ["fp16-mixed", "bf16"])
def test_biases_train_at_what_the_refusal_offers(small: Small, tmp_path: Path, precision: str) -> None:
    base = tiny_model(tmp_path / "model", "qwen2")
    spec = small(
        base_model=base,
        lora_bias="all",
        precision=precision,
        train_samples=4,
        datasets=data_of(tmp_path, long_enough(8)),
    )
    assert run(spec).status == "ok"


def test_biases_that_a_model_does_not_have_are_warned_of(small: Small, tmp_path: Path) -> None:
    """SmolLM2 and Llama have none: that training is the baseline's, whatever its row is called."""
    (line,) = inspected(small(lora_bias="all")).warnings
    assert line == "lora_bias all: random:tiny has no biases; it trains as with lora_bias: none"
    base = tiny_model(tmp_path / "model", "qwen2")  # in its attention alone
    with_some = small(base_model=base, lora_bias="lora_only", lora_target_linear=False, lora_target_modules=["q_proj"])
    assert not inspected(with_some).warnings
    (line,) = inspected(with_some.model_copy(update={"lora_target_modules": ("up_proj",)})).warnings
    assert "has no biases in layers that get an adapter; it trains as with lora_bias: none" in line


def test_a_run_is_refused_with_exit_code_2_before_it_starts(ask: Any, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", "gpt2", config={"n_positions": 64})
    datasets = json.dumps(data_of(tmp_path, long_enough(8, 80)))
    head = f"name: g\nvisits: 0\nbase:\n  base_model: model\n  datasets: {datasets}\n  val_set_size: 2\n"
    (tmp_path / "g.yml").write_text(head)
    code, _, error = ask("run", "g.yml")
    assert code == 2
    assert re.search(
        r"^harness: baseline: sequence_length 512: .* use sequence_length: 64 or less$", error, re.MULTILINE
    )
    assert not (tmp_path / "results").exists()


def test_what_the_data_hold_is_printed(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = tiny_model(tmp_path / "model", chat_template=IGNORES_SYSTEM)
    spec = small(base_model=base, datasets=data_of(tmp_path, long_enough(8, 80), system_prompt=SYSTEM))
    inspect_trials([Trial(spec, "baseline", None, None)], False)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "data: 8 stories: 2 held out, 6 to train on"
    assert second.endswith("the system text of 8 prompts begins the user's turn")
