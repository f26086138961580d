"""Adapters of every origin after training: evaluated as they were trained, and merged as peft computes them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from peft import LoraConfig, get_peft_model
from test_launch import Watch
from tiny_models import CHAT, EMBEDDINGS, byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import harness
from harness.adapters import benchmark, generation, merge, trained
from harness.adapters.session import AdapterSession
from harness.environment import current
from harness.errors import InputError
from harness.grids.grid import Grid, Trial
from harness.launch.inline import InlineLauncher
from harness.results.store import Store
from harness.runner.grid_run import run_grid
from harness.spec.trial import TrialSpec
from harness.training import model

TRIALS: dict[str, dict[str, Any]] = {
    "upcast": {"precision": "nf4", "upcast_unquantized": True},
    "bf16 adapters": {"precision": "bf16", "adapter_dtype": "bf16"},
    "stored in 4 bit": {"precision": "nf4"},
    "stored in 8 bit": {"precision": "int8"},
}
IDS = torch.randint(5, 260, (2, 40), generator=torch.Generator().manual_seed(3))
Kept = Callable[..., tuple[trained.TrainedAdapter, torch.Tensor]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models: tied or not, and as they are published in 8 and 4 bit."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("tied", "untied"):
        tiny_model(folder / name, config={"tie_word_embeddings": name == "tied"})
    formats = {
        "stored in 4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "stored in 8 bit": BitsAndBytesConfig(load_in_8bit=True),
    }
    for name, quantisation in formats.items():
        network = AutoModelForCausalLM.from_pretrained(
            folder / "untied", dtype=torch.bfloat16, quantization_config=quantisation
        )
        network.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def results(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained adapters."""
    folder = tmp_path_factory.mktemp("results")
    given = SMALL | {"val_set_size": 4, "save_adapter": True, "learning_rate": 1e-2}
    trials = []
    for name, keys in TRIALS.items():
        base = bases / (name if name.startswith("stored") else "untied")
        trials.append(Trial(TrialSpec.model_validate(given | keys | {"base_model": str(base)}), name, None, None))
    with InlineLauncher() as launcher:
        run_grid(Grid("g", "G", "list", tuple(trials)), Store(folder / "g"), launcher, Watch())
    return folder


@pytest.fixture
def kept(bases: Path, tmp_path: Path) -> Kept:
    """Makes an adapter as other tools keep them, by peft alone: how it was trained, and the logits that it has."""

    def make(
        base: str = "tied",
        *,
        tokens: int | None = None,
        save: dict[str, Any] | None = None,
        spec: dict[str, Any] | None = None,
        **options: Any,
    ) -> tuple[trained.TrainedAdapter, torch.Tensor]:
        network = AutoModelForCausalLM.from_pretrained(bases / base)
        if tokens is not None:
            network.resize_token_embeddings(tokens)
        config = LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | options))
        adapted = get_peft_model(network, config).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        adapted.save_pretrained(tmp_path / "adapter", **(save or {}))
        given = SMALL | {"base_model": str(bases / base), "val_set_size": 4} | (spec or {})
        source = trained.TrainedAdapter(TrialSpec.model_validate(given), tmp_path / "adapter", "x", {})
        with torch.no_grad():
            return source, adapted(IDS).logits

    return make


# ------------------------------------------------------------------------------------ as it was trained


@pytest.mark.parametrize("label", TRIALS)
def test_evaluated_models_are_those_of_the_trial(label: str, results: Path) -> None:
    """Of the size that it recorded, and with its losses."""
    source = trained.find_adapter(results, label)
    inference = benchmark.measure(source, rounds=1, generated_stories=0, most_tokens=1, on_progress=lambda at: None)
    size = {each.model: each.model_bytes for each in inference.models}
    assert size["base"] == source.row["memory_weights_bytes"]
    assert size["unmerged"] - size["base"] == source.row["adapter_bytes"]
    of_trials = Store(results / "g").read("stories").to_pandas()
    mine = of_trials[(of_trials["trial_id"] == source.row["trial_id"]) & (of_trials["kind"] == "held-out")]
    for name, when in (("base", "before"), ("unmerged", "after")):
        known = mine[mine["when"] == when].set_index("story_id")["loss"].to_dict()
        answers = {a.story_id: a.loss for a in inference.answers if a.model == name}
        # Products in int8 are rounded otherwise under the tracker of a trial.
        assert answers == pytest.approx(known, abs=1e-6 if source.spec.precision != "int8" else 1e-3)


def test_a_checkpoint_that_is_stored_in_few_bits_is_unpacked_to_be_merged(
    results: Path, bases: Path, tmp_path: Path
) -> None:
    for label in ("stored in 4 bit", "stored in 8 bit"):
        result = merge.merge(trained.find_adapter(results, label), tmp_path / label)
        assert result["merge_error"] <= 8 * result["rounding"]
        assert result["losses"]["merged"] == pytest.approx(result["losses"]["unmerged"], abs=0.05)
        network = AutoModelForCausalLM.from_pretrained(tmp_path / label, dtype="auto")
        assert {each.dtype for each in network.parameters()} == {torch.bfloat16}
        assert "quantization_config" not in json.loads((tmp_path / label / "config.json").read_text())


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt_tuning", "prefix_tuning", "p_tuning"])
def test_what_is_generated_is_what_was_asked_for(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over a base whose own settings sample, and end early."""
    base = tiny_model(tmp_path / "base")
    settings = {"do_sample": True, "temperature": 1.5, "max_length": 20}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings))
    options = {"num_virtual_tokens": 4} if "tuning" in method else {}
    keys = {"base_model": base, "adapter": method, "adapter_options": options, "val_set_size": 4}
    spec = TrialSpec.model_validate(SMALL | keys)
    model.load(spec, torch.device("cpu")).save_pretrained(tmp_path / "adapter")
    session = AdapterSession(spec, tmp_path / "adapter")
    monkeypatch.setattr(AdapterSession, "end_ids", [])  # no token ends a text
    prompt = session.question(session.held_out[0]).prompt
    for name in ("base", "unmerged"):
        network, _ = session.make(name)
        first, second = (_generated(session, network, prompt, seed=seed) for seed in (0, 1))
        assert first == second == _likeliest(network, prompt)
        assert first != _generated(session, network, prompt, temperature=2.0)


def test_a_prompt_that_was_learnt_is_not_evaluated_for_it_is_not_merged(tmp_path: Path) -> None:
    keys = {"adapter": "prompt_tuning", "adapter_options": {"num_virtual_tokens": 4}}
    spec = TrialSpec.model_validate(SMALL | keys)
    model.load(spec, torch.device("cpu")).save_pretrained(tmp_path)
    row = {"environment_id": current("cpu").id}
    adapter = trained.RecordedAdapter(spec, tmp_path, "prompts", {}, row, tmp_path)
    with pytest.raises(InputError, match=r"^prompts: evaluate compares .* there is none: .*`harness generate` works"):
        benchmark.measure(adapter, rounds=1, generated_stories=0, most_tokens=1, on_progress=lambda at: None)


def _generated(session: AdapterSession, network: Any, prompt: Sequence[int], **options: Any) -> list[int]:
    texts: list[torch.Tensor] = []
    generate = network.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "generate", lambda **given: texts.append(generate(**given)))
        generation.generate_story(session, network, prompt, lambda piece: None, most_tokens=30, **options)
    return [int(token) for token in texts[0][0, len(prompt) :]]


@torch.no_grad()
def _likeliest(network: Any, prompt: Sequence[int]) -> list[int]:
    """The 30 tokens after a prompt that a model finds most likely, each by a forward pass of its own."""
    text = list(prompt)
    for _ in range(30):
        ids = torch.tensor([text])
        text.append(int(network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].argmax()))
    return text[len(prompt) :]


# ------------------------------------------------------------------------------------ adapters of plain peft


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize(
    "given",
    [
        {"save": {"save_embedding_layers": True}},
        {"tokens": EMBEDDINGS + 8},
        {"tokens": EMBEDDINGS - 10},
        {"tokens": EMBEDDINGS + 8, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"tokens": EMBEDDINGS + 8, "trainable_token_indices": [270, 275]},
    ],
    ids=str,
)
def test_adapters_that_bring_embeddings_are_merged(
    base: str, given: dict[str, Any], kept: Kept, tmp_path: Path
) -> None:
    source, logits = kept(base, **given)
    merge.merge(source, tmp_path / "m")
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(IDS).logits
    assert torch.allclose(ours, logits, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"save": {"safe_serialization": False}}, "no adapter_model.safetensors there; adapter_model.bin may run code"),
        ({"lora_bias": True}, "^peft does not merge it into these weights"),
        (
            {"tokens": 280, "modules_to_save": ["embed_tokens"], "save": {"save_embedding_layers": False}},
            "trained with 280 tokens, the base has 272, .*save_embedding_layers=True",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_merged_says_what_would_do(
    given: dict[str, Any], message: str, kept: Kept, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        merge.merge(kept(**given)[0], tmp_path / "m")
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------ what is said of it


def notes_of(source: trained.TrainedAdapter, out: Path) -> list[str]:
    """What is said while an adapter is merged; its card says the same."""
    notes: list[str] = []
    merge.merge(source, out, on_note=notes.append)
    card = (out / "README.md").read_text()
    assert all(f"\n- {note}\n" in card for note in notes)
    return notes


def test_another_base_is_named(kept: Kept, bases: Path, tmp_path: Path) -> None:
    source, _ = kept()
    assert notes_of(source, tmp_path / "one") == []
    file = source.folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "someone/TIED"}))
    assert notes_of(source, tmp_path / "two") == [], "wherever it is"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "someone/else"}))
    (note,) = notes_of(source, tmp_path / "three")
    assert note == f"the adapter names the base that it was trained on someone/else, and is merged into {bases}/tied"


def test_no_data_are_needed(kept: Kept, bases: Path, tmp_path: Path) -> None:
    source, logits = kept(spec={"datasets": [{"path": str(tmp_path / "gone.jsonl")}]})
    (note,) = notes_of(source, tmp_path / "m")
    assert note.startswith("no losses are measured, and logits are compared on other text: dataset ")
    with torch.no_grad():
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "m")(IDS).logits, logits, atol=1e-5)
    figures = json.loads((tmp_path / "m/merge.json").read_text())
    assert (figures["losses"], figures["tokens"]) == ({}, [])
    assert 0 < figures["rounding"] < 1e-4
    source, _ = kept(spec={"val_set_size": 0})
    (note,) = notes_of(source, tmp_path / "none-held-out")
    assert note.endswith("the trial held out no stories")


def test_the_tokenizer_that_came_with_an_adapter_is_written(kept: Kept, tmp_path: Path) -> None:
    """With its chat template and the tokens that it adds, if they have embeddings."""
    source, _ = kept(tokens=EMBEDDINGS + 8, spec={"adapter": "none"})
    own = byte_tokenizer(chat_template=CHAT)
    own.add_tokens([f"<|{number}|>" for number in range(EMBEDDINGS + 8 - len(own))])
    own.save_pretrained(source.folder)
    assert notes_of(source, tmp_path / "m") == []
    written = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (written.chat_template, len(written)) == (CHAT, EMBEDDINGS + 8)
    assert "An adapter (lora) merged" in (tmp_path / "m/README.md").read_text(), "whatever the training file says"
    own.add_tokens(["<|one more|>"])
    own.save_pretrained(source.folder)
    (note,) = notes_of(source, tmp_path / "base's")
    assert note == (
        "the model gets the tokenizer of its base, not that of the adapter: it has the token 280, and the model has "
        "embeddings for 280"
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "base's").chat_template is None


def test_python_warns(kept: Kept, tmp_path: Path) -> None:
    source, _ = kept(spec={"val_set_size": 0})
    given = {key: value for key, value in source.spec.canonical().items() if value is not None}
    (tmp_path / "train.json").write_text(json.dumps(given | {"val_set_size": 0}))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        harness.merge_lora(tmp_path / "train.json", source.folder, tmp_path / "m")
    assert any("the trial held out no stories" in str(each.message) for each in warned)


# ------------------------------------------------------------------------------------ where it is put


def test_a_place_that_cannot_be_taken_is_refused_before_anything_is_loaded(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = kept()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(merge, "run_isolated", None)
    with pytest.raises(InputError, match=r"^\. is the current folder, .*; give --out merged$"):
        merge.merge(source, Path())
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(InputError, match=r"volume is a mount point, .*; give --out .*volume/merged$"):
        merge.merge(source, tmp_path / "volume")


def test_a_link_to_an_empty_folder_leads_to_the_model(kept: Kept, tmp_path: Path) -> None:
    source, _ = kept()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    merge.merge(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/model.safetensors").is_file()
