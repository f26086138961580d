"""The loss before training: measured once for each base, format and data, and the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FEW, SMALL
from test_launch import go
from test_launch import grid_of as named

from harness.environment import current
from harness.grids.grid import Grid
from harness.launch.inline import InlineLauncher
from harness.record import Job, LossesBefore, StoryLoss
from harness.results.store import Store
from harness.runner.loss_before import RecordedLosses
from harness.sources import fingerprints, stories
from harness.spec.trial import TrialSpec
from harness.training import batches, checkpoints, evaluation, half_matmul, loss_before, model, trial

CPU = torch.device("cpu")
Make = Callable[..., TrialSpec]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder, with biases that are not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes, **heads)).bfloat16()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("models") / "biased"
    network.save_pretrained(folder)
    checkpoints.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def made(base: Path) -> Make:
    """Makes a small spec over that model; keywords override."""
    half_matmul.install()
    given = SMALL | {"base_model": str(base), "eval_sequence_length": 256}
    return lambda **overrides: TrialSpec.model_validate(given | overrides)


def grid_of(**specs: TrialSpec) -> Grid:
    """A grid whose contents are known, as those of `harness run` are."""
    return named(**specs).with_contents(fingerprints.of)


def _losses(spec: TrialSpec) -> list[tuple[str, float, int]]:
    torch.manual_seed(spec.seed)
    tokenizer = checkpoints.load_tokenizer(spec)
    held_out = batches.load(spec, tokenizer).held_out
    return evaluation.story_losses(model.load(spec, CPU), held_out, spec, checkpoints.pad_id(tokenizer, None), CPU)


TRAINING: dict[str, dict[str, Any]] = {
    "rank": {"lora_r": 64},
    "scale": {"use_rslora": True, "lora_alpha": 99},
    "dropout": {"lora_dropout": 0.1},
    "few layers": {"lora_target_modules": ["q_proj", "v_proj"]},
    "embeddings and head": {"lora_target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "default layers": {"lora_target_linear": False},
    "biases": {"lora_bias": "all"},
    "seed and optimizer": {"seed": 7, "optimizer": "sgd", "weight_decay": 0.1, "learning_rate": 1.0},
    "lengths": {"sequence_length": 200, "train_samples": 8, "gradient_accumulation_steps": 1, "train_on_inputs": True},
    "checkpointing": {"gradient_checkpointing": True},
}
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "nf4": {"precision": "nf4", "double_quantization": True},
    "int8": {"precision": "int8"},
}


@pytest.mark.parametrize("form", FORMATS)
def test_equal_keys_are_equal_losses(made: Make, form: str) -> None:
    plain = made(**FORMATS[form])
    expected = _losses(plain)
    for what, change in TRAINING.items():
        if "lora_bias" in change and form in ("nf4", "int8"):  # not trained there
            continue
        other = made(**FORMATS[form] | change)
        assert other.untrained_key == plain.untrained_key, what
        assert _losses(other) == expected, what


def test_what_bears_on_the_loss_has_a_key_of_its_own(made: Make) -> None:
    changes: list[dict[str, Any]] = [
        {}, *list(FORMATS.values())[1:], {"precision": "nf4"}, {"adapter": "none"}, {"micro_batch_size": 1},
        {"use_dora": True}, {"use_dora": True, "lora_target_modules": ["q_proj"]}, {"attention": "eager"},
        {"eval_sequence_length": 200}, {"val_set_size": 3.0}, {"min_completion_tokens": 17}, {"excess_length": "drop"},
        {"datasets": [{"path": FEW, "type": {"system_prompt": "Tell."}}]}, {"base_model": "random:tiny"},
        {"num_processes": 2}, {"measure_forgetting": True}, {"memory_budget": 2**30}, {"device": "cpu"},
    ]  # fmt: skip
    assert len({made(**change).untrained_key for change in changes}) == len(changes)
    assert made(adapter="none", lora_r=8).untrained_key == made(adapter="none").untrained_key


_OF_THE_RUN = {"label", "started_at", "trial_seconds", "load_seconds", "peak_process_bytes"}


def _is_time(name: str) -> bool:
    return "seconds" in name or "per_second" in name or name in _OF_THE_RUN


@pytest.mark.parametrize("form", ["fp32", "nf4"])
def test_a_trial_that_reuses_them_has_the_same_row(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    first = made(**FORMATS[form], measure_forgetting=True)
    second = made(**FORMATS[form], measure_forgetting=True, lora_r=8, seed=1)
    passages = stories.general()[:3]
    monkeypatch.setattr(stories, "general", lambda samples: passages)
    measured: list[int] = []
    measure = evaluation.story_losses

    def counted(network: Any, examples: Any, *rest: Any) -> Any:
        measured.append(len(examples))
        return measure(network, examples, *rest)

    monkeypatch.setattr(evaluation, "story_losses", counted)
    launcher = InlineLauncher()
    go(grid_of(a=first), Store(tmp_path / "both"), launcher)
    assert measured == [2, 3, 2, 3], "before and after, stories and passages"
    measured.clear()
    go(grid_of(b=second), Store(tmp_path / "both"), launcher)
    assert measured == [2, 3], "after alone"
    go(grid_of(b=second), Store(tmp_path / "alone"), launcher)
    rows, losses = {}, {}
    for name in ("both", "alone"):
        store = Store(tmp_path / name)
        (rows[name],) = [row for row in store.read("trials").to_pylist() if row["label"] == "b"]
        assert rows[name]["status"] == "ok", rows[name]["error"]
        losses[name] = [s for s in store.read("stories").to_pylist() if s["trial_id"] == rows[name]["trial_id"]]
    assert losses["both"] == losses["alone"]
    assert rows["both"]["eval_loss_before"] is not None
    assert rows["both"]["peak_evaluate_bytes"] is not None
    for column, value in rows["alone"].items():
        if not _is_time(column):
            assert rows["both"][column] == value, column


def test_only_losses_of_the_same_model_in_this_environment_count(made: Make, tmp_path: Path) -> None:
    store, launcher = Store(tmp_path), InlineLauncher()
    (record,) = go(grid_of(a=made()), store, launcher).records
    job = record.model_copy(update={"spec": made(lora_r=8)})
    other_model = record.model_copy(update={"spec": made(micro_batch_size=1)})
    recorded = RecordedLosses()
    (losses,) = recorded.of(job, store, launcher).values()
    assert [s["loss"] for s in losses["stories"]] == [s.loss for s in record.stories if s.when == "before"]
    assert not recorded.of(other_model, store, launcher)
    for changed in ({"data_fingerprint": 12 * "0"}, {"base_fingerprint": 12 * "0"}):
        assert not recorded.of(job.model_copy(update=changed), store, launcher), "other data, another base"
    unknown = {"data_fingerprint": None, "base_fingerprint": None}
    assert not recorded.of(job.model_copy(update=unknown), store, launcher), "nobody knows whether they are the same"
    recorded.add(record.model_copy(update={"spec": other_model.spec}))
    assert recorded.of(other_model, store, launcher), "what was recorded since"
    another = record.environment.model_copy(update={"cpu_name": "another"})
    other = Store(tmp_path / "other")
    other.write(record.model_copy(update={"environment": another}))
    failed = {"status": "diverged", "phase": "forward", "error": "no", "error_type": "X"}
    before = {name: record.metrics[name] for name in ("eval_loss_before", "trial_seconds")}
    other.write(record.model_copy(update=failed | {"metrics": before}))
    assert not RecordedLosses().of(job, other, launcher)


def _recorded(examples: tuple[batches.Example, ...]) -> LossesBefore:
    rows = [
        StoryLoss(story_id=e.story_id, when="before", loss=float(n), tokens=e.completion_tokens)
        for n, e in enumerate(examples)
    ]
    return LossesBefore(stories=tuple(reversed(rows)))


def test_other_texts_are_measured_anew(made: Make) -> None:
    spec = made()
    texts = batches.load(spec, checkpoints.load_tokenizer(spec)).held_out
    recorded = _recorded(texts)
    assert loss_before.reusable(None, texts, "held-out") is None
    assert loss_before.reusable(recorded, texts, "held-out") == [
        (e.story_id, float(n), e.completion_tokens) for n, e in enumerate(texts)
    ]
    assert loss_before.reusable(recorded, texts, "general") is None
    assert loss_before.reusable(recorded, texts[:1], "held-out") is None
    shorter = (
        batches.Example(texts[0].story_id, texts[0].input_ids[:-1], ((texts[0].completions[0][0], len(texts[0]) - 1),)),
        *texts[1:],
    )
    assert loss_before.reusable(recorded, shorter, "held-out") is None


def test_the_environment_decides(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job may go to machines of several kinds, and takes what was measured on its own."""
    spec = made()
    texts = batches.load(spec, checkpoints.load_tokenizer(spec)).held_out
    here = current("cpu")
    recorded = _recorded(texts).model_dump(mode="json")
    for name, reused in ((here.id, True), ("another", False)):
        job = Job(grid="g", spec=spec, label="x")
        record = trial.run(job, environment=here, losses_before={name: recorded})
        before = [s.loss for s in record.stories if s.when == "before"]
        assert (before == [0.0, 1.0]) == reused
        assert (record.metrics["eval_loss_before"] < 2) == reused  # type: ignore[operator]  # it is there
