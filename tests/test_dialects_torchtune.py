"""Training files of torchtune: what each becomes, what is refused, and with which words."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.dialects import references, torchtune
from harness.dialects.rules import Reader, read
from harness.dialects.training_file import interpret
from harness.grids.levels import make_spec, normalised
from harness.spec.trial import FACTS, TrialSpec

FILES = {file.stem: file for file in sorted((Path(__file__).parent / "training_files" / "torchtune").glob("*.yaml"))}
OWN = tuple(key for key, facts in FACTS.items() if facts.given)
REFUSED = {
    "llama2_7b_full_low_memory": ("enable_activation_offloading",),
    "llama3_8b_full_of_meta": ("checkpointer",),
    "qwen2_5_3b_lora_packed": ("enable_activation_offloading", "dataset.packed"),
    "llama3_3_70b_full_distributed": ("tensor_parallel_dim", "fsdp_cpu_offload", "enable_fp8_training", "optimizer"),
}
OTHER_TASKS = {
    "llama3_1_8b_lora_dpo": "preferences",
    "mistral_7b_ppo": "reinforcement learning",
    "llama3_2_3b_full_grpo": "reinforcement learning",
    "llama3_2_1b_distillation": "distillation",
    "llama3_2_1b_qat_lora": "quantisation",
    "llama3_2_vision_11b_lora": "images",
    "evaluation": "evaluation",
    "generation": "generation",
    "quantization": "quantisation",
}
ACCEPTED = sorted(FILES.keys() - REFUSED.keys() - OTHER_TASKS.keys())
EVERYWHERE = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def document(name: str) -> dict[str, Any]:
    """A file of the corpus."""
    content: dict[str, Any] = yaml.safe_load(FILES[name].read_text(encoding="utf-8"))
    return content


def minimal() -> dict[str, Any]:
    """The least that torchtune trains by: full fine-tuning of Llama 3.2 on Alpaca."""
    return {
        "model": {"_component_": "torchtune.models.llama3_2.llama3_2_1b"},
        "tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "llama/tokenizer.model"},
        "checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": "llama"},
        "dataset": {"_component_": "torchtune.datasets.alpaca_dataset"},
        "optimizer": {"_component_": "torch.optim.AdamW"},
        "loss": {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss"},
        "batch_size": 2,
    }


def lora(**arguments: Any) -> dict[str, Any]:
    """A file with adapters."""
    model = {"_component_": "torchtune.models.llama3_2.lora_llama3_2_1b", "lora_attn_modules": ["q_proj", "v_proj"]}
    return minimal() | {"model": model | arguments, "dtype": "bf16"}


def reading(content: dict[str, Any]) -> Reader:
    """What became of a file; it has no key that torchtune does not."""
    reader, strangers = read(torchtune.DIALECT, content, OWN)
    assert not strangers
    return reader


def accepted(content: dict[str, Any]) -> Reader:
    """The same of one that is taken over as it stands."""
    reader = reading(content)
    assert not reader.unsupported
    assert not reader.other_tasks
    return reader


def refusal(content: dict[str, Any], key: str) -> str:
    """Why a key is not supported; the rest of the file is."""
    reader = reading(content)
    assert {*reader.unsupported} == {key}
    return reader.unsupported[key]


def spec(reader: Reader) -> TrialSpec:
    """The spec, as a grid's `base`."""
    return make_spec(normalised(reader.values, "base"), "base")


# ------------------------------------------------------------------------------------------------------ the corpus


def test_two_thirds_are_taken_over_as_they_stand() -> None:
    assert len(FILES) >= 18
    assert len(ACCEPTED) >= len(FILES) * 2 / 3
    assert REFUSED.keys() | OTHER_TASKS.keys() <= FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_each_is_recognised(name: str) -> None:
    assert torchtune.is_one(document(name))


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_file_becomes_a_spec(name: str) -> None:
    reader = accepted(document(name))
    assert spec(reader).base_model.startswith("models/")
    assert reader.values["datasets"]


@pytest.mark.parametrize("name", [*ACCEPTED, *REFUSED])
def test_every_key_is_accounted_for(name: str) -> None:
    reader = reading(document(name))
    left_out = {key.split(".")[0].split("[")[0] for key in reader.unsupported}
    assert reader.given.keys() <= reader.mapped.keys() | reader.no_effect.keys() | left_out


@pytest.mark.parametrize("name", REFUSED)
def test_all_reasons_are_in_one_message(name: str) -> None:
    with pytest.raises(ValueError, match=r"^torchtune: ") as error:
        interpret(document(name), OWN)
    text = str(error.value)
    assert "\n" not in text
    assert all(f"{key}: " in text for key in REFUSED[name])
    assert {*reading(document(name)).unsupported} == {*REFUSED[name]}


@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_of_a_refused_file_is_a_spec(name: str) -> None:
    training_file = interpret(document(name), OWN, without_unsupported=True)
    assert training_file.tool == "torchtune"
    assert training_file.without.keys() == {*REFUSED[name]}
    make_spec(normalised(training_file.values, "base"), "base")


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_other_tasks_are_refused_whatever_is_left_out(name: str) -> None:
    with pytest.raises(ValueError, match=OTHER_TASKS[name]) as error:
        interpret(document(name), OWN, without_unsupported=True)
    assert "\n" not in str(error.value)
    assert "checkpoint_files" not in str(error.value)  # of a component only its name


EXPECTED: dict[str, dict[str, Any]] = {
    "llama3_2_1b_full_single_device": {
        "adapter": "none", "precision": "bf16", "optimizer": "paged_adamw_8bit", "learning_rate": 2e-5,
        "weight_decay": 0.01, "lr_scheduler": "constant", "micro_batch_size": 4, "gradient_accumulation_steps": 1,
        "num_epochs": 1.0, "max_grad_norm": 0.0, "train_on_inputs": True, "sequence_length": 131_072, "device": "auto",
    },
    "llama3_1_8b_full_distributed": {
        "base_model": "models/Meta-Llama-3.1-8B-Instruct", "sequence_length": 8192, "num_epochs": 3.0,
        "optimizer": "adamw_torch_fused", "gradient_checkpointing": True, "num_processes": 1,
    },
    "llama3_2_3b_full_on_instructions": {
        "base_model": "models/Llama-3.2-3B", "seed": 42, "adam_beta2": 0.95, "weight_decay": 0.1, "max_grad_norm": 1.0,
        "lr_scheduler": "cosine", "warmup_steps": 100, "num_epochs": 2.0, "train_on_inputs": False,
    },
    "llama3_2_1b_lora_single_device": {
        "adapter": "lora", "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.0, "precision": "bf16",
        "lora_target_modules": tuple(EVERYWHERE), "lr_scheduler": "cosine", "warmup_steps": 100,
        "learning_rate": 3e-4, "weight_decay": 0.01, "gradient_accumulation_steps": 8,
    },
    "llama3_1_8b_lora_distributed": {
        "lora_target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"), "lora_dropout": 0.05,
        "max_steps_per_epoch": 500, "num_epochs": 2.0, "max_grad_norm": 1.0, "sequence_length": 4096,
    },
    "llama3_1_8b_qlora_single_device": {
        "precision": "nf4", "double_quantization": True, "compute_dtype": "bf16", "lora_r": 8, "lora_alpha": 16,
    },
    "llama3_8b_dora_single_device": {"use_dora": True, "precision": "bf16", "lora_r": 16},
    "llama3_8b_qdora_single_device": {"use_dora": True, "precision": "nf4", "compute_dtype": "fp32"},
    "llama2_7b_lora_single_device": {
        "lora_target_modules": ("q_proj", "v_proj"), "optimizer": "adamw_torch", "sequence_length": 4096,
        "train_on_inputs": True, "gradient_accumulation_steps": 64,
    },
    "llama2_7b_qlora_single_device": {"optimizer": "adamw_8bit", "weight_decay": 0.01, "precision": "nf4"},
    "mistral_7b_lora_single_device": {"lora_target_modules": (*EVERYWHERE, "lm_head"), "num_epochs": 3.0},
    "phi3_mini_lora_single_device": {
        "lora_target_modules": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "sequence_length": 4096,
    },
    "qwen3_4b_lora_single_device": {"chat_template": "chatml", "max_steps_per_epoch": 50, "sequence_length": 2048},
    "gemma_2b_full_distributed": {
        "max_steps_per_epoch": 25, "num_epochs": 3.0, "seed": 1, "train_on_inputs": False, "optimizer": "adamw_torch",
    },
    "llama3_2_3b_lora_on_a_cpu": {
        "device": "cpu", "precision": "fp32", "optimizer": "sgd", "learning_rate": 0.01, "weight_decay": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_keys_of_the_spec(name: str) -> None:
    trained = spec(accepted(document(name)))
    assert {key: getattr(trained, key) for key in EXPECTED[name]} == EXPECTED[name]


DATASETS: dict[str, list[dict[str, Any]]] = {
    "llama3_1_8b_full_distributed": [{"path": "tatsu-lab/alpaca", "split": "train[:95%]", "type": "alpaca"}],
    "llama3_2_3b_full_on_instructions": [
        {
            "path": "data/support.json", "ds_type": "json", "split": "train",
            "type": {"kind": "instruction", "field_instruction": "question", "field_output": "answer"},
            "system_prompt": "You answer questions of customers.",
        }
    ],
    "llama3_1_8b_lora_distributed": [
        {
            "path": "data/chats.json", "ds_type": "json", "split": "train", "type": "sharegpt",
            "field_messages": "conversations",
        }
    ],
    "qwen3_4b_lora_single_device": [
        {
            "path": "data/train.parquet", "ds_type": "parquet", "split": "train", "type": "chat_template",
            "field_messages": "messages",
        }
    ],
    "code_llama2_7b_full_on_text": [
        {"path": f"corpus/part{n}.txt", "ds_type": "text", "split": "train", "type": "completion", "field_text": "text"}
        for n in (1, 2)
    ],
    "llama3_2_3b_lora_on_a_cpu": [
        {
            "path": "EleutherAI/wikitext_document_level", "name": "wikitext-2-v1", "split": "validation",
            "type": "completion", "field_text": "page",
        }
    ],
    "gemma_2b_lora_single_device": [
        {
            "path": "data/questions.csv", "ds_type": "csv",
            "type": {"kind": "instruction", "field_instruction": "input", "field_output": "output"},
            "format": "Question: {instruction}\nAnswer: ",
        }
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_of_a_file(name: str) -> None:
    assert reading(document(name)).values["datasets"] == DATASETS[name]


def test_several_datasets_are_concatenated() -> None:
    trained = spec(accepted(document("llama3_8b_lora_two_datasets")))
    assert [dataset.path for dataset in trained.datasets] == ["vicgalle/alpaca-gpt4", "liweili/c4_200m"]
    assert [dataset.split for dataset in trained.datasets] == ["train[:5%]", "train[:1%]"]


# ------------------------------------------------------------------------------------------------ torchtune's defaults


def test_defaults_are_torchtunes() -> None:
    trained = spec(accepted(minimal()))
    assert (trained.adapter, trained.precision, trained.lr_scheduler) == ("none", "fp32", "constant")
    assert (trained.learning_rate, trained.weight_decay, trained.optimizer) == (1e-3, 1e-2, "adamw_torch")
    assert (trained.max_grad_norm, trained.num_epochs, trained.gradient_accumulation_steps) == (0.0, 1.0, 1)
    assert trained.train_on_inputs  # as Alpaca's builder has it
    assert (trained.device, trained.seed, trained.gradient_checkpointing) == ("auto", 0, False)
    assert trained.val_set_size == 0, "all rows are trained on"


def test_defaults_of_a_builder_with_adapters() -> None:
    trained = spec(accepted(lora()))
    assert (trained.lora_r, trained.lora_alpha, trained.lora_dropout, trained.use_dora) == (8, 16, 0.0, False)
    assert trained.lora_target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("component", "name", "rate", "decay"),
    [
        ("torch.optim.AdamW", "adamw_torch", 1e-3, 1e-2),
        ("torch.optim.Adam", "adamw_torch", 1e-3, 0.0),
        ("torch.optim.SGD", "sgd", 1e-3, 0.0),
        ("torch.optim.RMSprop", "rmsprop", 1e-2, 0.0),
        ("bitsandbytes.optim.AdamW8bit", "adamw_8bit", 1e-3, 1e-2),
        ("bitsandbytes.optim.PagedAdamW", "paged_adamw_32bit", 1e-3, 1e-2),
        ("bitsandbytes.optim.Lion8bit", "lion_8bit", 1e-4, 0.0),
        ("torchao.optim.AdamW8bit", "adamw_torch_8bit", 1e-3, 1e-2),
        ("torchao.optim.AdamW4bit", "adamw_torch_4bit", 1e-3, 1e-2),
    ],
)
def test_optimizers_at_their_own_defaults(component: str, name: str, rate: float, decay: float) -> None:
    trained = spec(accepted(minimal() | {"optimizer": {"_component_": component}}))
    assert (trained.optimizer, trained.learning_rate, trained.weight_decay) == (name, rate, decay)
    assert trained.adam_beta2 == (0.99 if "lion" in name else 0.999)


# ------------------------------------------------------------------------------------------------ notes and refusals


def test_differences_from_torchtune_are_named() -> None:
    given = accepted(lora(quantize_base=True))
    assert (spec(given).adapter_dtype, spec(given).loss) == ("bf16", "chunked")
    mapped = given.mapped
    assert "torchao" in mapped["model"]
    assert "cuts nothing" in mapped["tokenizer"]
    assert "not on biases" not in mapped["optimizer"]
    assert "not on biases" in accepted(minimal()).mapped["optimizer"]
    assert "Alpaca alone" in mapped["dataset"]


def test_a_tokenizer_that_marks_no_turns() -> None:
    bare = {"_component_": "torchtune.models.llama2.llama2_tokenizer", "prompt_template": None}
    instructions = {"_component_": "torchtune.datasets.instruct_dataset", "source": "org/data"}
    with_template = {"_component_": "torchtune.models.llama2.llama2_tokenizer"}
    for tokenizer, expected in ((bare, "{instruction}"), (with_template, None)):
        dataset = spec(accepted(minimal() | {"tokenizer": tokenizer, "dataset": instructions})).datasets[0]
        assert dataset.type.format == expected
    assert "Alpaca alone" not in accepted(minimal() | {"tokenizer": bare}).mapped["dataset"]
    chat = {
        "_component_": "torchtune.datasets.chat_dataset", "source": "org/chats",
        "conversation_column": "turns", "conversation_style": "openai",
    }  # fmt: skip
    assert "marks none" in accepted(minimal() | {"tokenizer": bare, "dataset": chat}).mapped["dataset"]


def test_a_prompt_template_becomes_a_format() -> None:
    template = {"system": ["<s>", "</s>"], "user": ["Q{", "}"], "assistant": ["A: ", ""]}
    tokenizer = {"_component_": "torchtune.models.llama3.llama3_tokenizer", "prompt_template": template}
    dataset = {"_component_": "torchtune.datasets.samsum_dataset", "new_system_prompt": "Be brief."}
    reader = accepted(minimal() | {"tokenizer": tokenizer, "dataset": dataset})
    prompt = spec(reader).datasets[0].type
    assert prompt.format is not None
    assert prompt.format.format(system="Be brief.", instruction="Why?") == "<s>Be brief.</s>Q{Why?}A: "
    assert (prompt.field_instruction, prompt.field_output) == ("dialogue", "summary")
    template["assistant"] = ["A: ", "<end>"]
    assert "prompt_template" in refusal(minimal() | {"tokenizer": tokenizer}, "tokenizer.prompt_template")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("dtype", "fp16", "dtype: fp16"),
        ("shuffle", False, "shuffle: false"),
        ("compile", {"model": False, "loss": True}, "compile: "),
        ("device", "mps", "device: mps"),
        ("resume_from_checkpoint", True, "resume_from_checkpoint: true"),
        ("fsdp", {"cpu_offload": True}, "fsdp: "),
        ("clip_grad_norm", "much", "clip_grad_norm: much"),
        ("epochs", 1.5, "epochs: 1.5"),
        ("max_steps_per_epoch", 0, "max_steps_per_epoch: 0"),
        ("batch_size", "${size}", "batch_size: ${size}"),
        ("seed", -1, "seed: -1"),
        ("collate_fn", "mine.collate", "collate_fn: mine.collate"),
        ("optimizer", {"_component_": "torchao.optim.AdamWFp8"}, "optimizer: torchao.optim.AdamWFp8"),
        ("lr_scheduler", {"_component_": "mine.decay"}, "lr_scheduler: mine.decay"),
        ("loss", {"_component_": "mine.Loss"}, "loss: mine.Loss"),
        ("dataset", {"_component_": "mine.dataset"}, "dataset: mine.dataset"),
        ("model", {"_component_": "mine.model"}, "model: mine.model"),
    ],
)
def test_a_value_without_counterpart_is_refused(key: str, value: Any, named: str) -> None:
    text = refusal(minimal() | {key: value}, key)
    assert text.startswith(named)
    assert "(" in text  # what would do


@pytest.mark.parametrize(
    ("key", "argument", "value"),
    [
        ("optimizer", "momentum", 0.9),
        ("optimizer", "betas", [0.9]),
        ("optimizer", "lr", "fast"),
        ("model", "attn_dropout", 0.1),
        ("model", "mixture", 4),
        ("dataset", "packed", True),
        ("dataset", "filter_fn", "mine.short"),
        ("dataset", "masking_strategy", "train_on_some"),
        ("dataset", "revision", "v2"),
        ("tokenizer", "truncation_type", "left"),
        ("tokenizer", "prompt_template", "mine.Template"),
        ("tokenizer", "max_seq_len", 4),
        ("loss", "label_smoothing", 0.1),
    ],
)
def test_an_argument_without_counterpart_is_refused(key: str, argument: str, value: Any) -> None:
    content = minimal()
    content[key] = content[key] | {argument: value}
    assert refusal(content, f"{key}.{argument}").startswith(f"{key}.{argument}: ")


def test_what_needs_two_arguments_to_be_refused() -> None:
    adam = {"_component_": "torch.optim.Adam", "weight_decay": 0.1}
    assert "coupled" in refusal(minimal() | {"optimizer": adam}, "optimizer.weight_decay")
    waves = {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_cycles": 2}
    assert "half a wave" in refusal(minimal() | {"lr_scheduler": waves}, "lr_scheduler.num_cycles")
    half = {"_component_": "torchtune.modules.get_cosine_schedule_with_warmup", "num_cycles": "0.5"}
    assert spec(accepted(minimal() | {"lr_scheduler": half})).warmup_steps == 0


def test_loss_on_the_last_turn_alone() -> None:
    """It is that on the answer, where there is one; of a chat it has no counterpart."""
    last = {"_component_": "torchtune.datasets.alpaca_dataset", "masking_strategy": "train_on_last"}
    assert not spec(accepted(minimal() | {"dataset": last})).train_on_inputs
    chat = last | {"_component_": "torchtune.datasets.slimorca_dataset"}
    assert "train_on_last" in refusal(minimal() | {"dataset": chat}, "dataset.masking_strategy")


def test_a_file_in_fp16_goes_on_in_bf16() -> None:
    training_file = interpret(minimal() | {"dtype": "fp16"}, OWN, without_unsupported=True)
    assert training_file.values["precision"] == "bf16"


def test_a_folder_is_named_without_its_last_slash() -> None:
    checkpointer = {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": "models/llama/"}
    assert spec(accepted(minimal() | {"checkpointer": checkpointer})).base_model == "models/llama"


@pytest.mark.parametrize("key", ["model", "dataset", "optimizer"])
def test_what_torchtune_has_no_default_for_is_asked_for(key: str) -> None:
    content = minimal()
    del content[key]
    assert refusal(content, key).startswith(f"{key}: null")


def test_datasets_agree_on_the_loss() -> None:
    both = [{"_component_": f"torchtune.datasets.{name}"} for name in ("alpaca_dataset", "samsum_dataset")]
    assert "train_on_input" in refusal(minimal() | {"dataset": both}, "dataset[].train_on_input")
    both[0]["masking_strategy"] = "train_on_assistant"
    assert not spec(accepted(minimal() | {"dataset": both})).train_on_inputs
    both[1]["packed"] = True
    assert "dataset[1].packed: true" in refusal(minimal() | {"dataset": both}, "dataset[1].packed")


def test_checkpointing_of_activations() -> None:
    both = accepted(minimal() | {"enable_activation_checkpointing": True, "ac_mode": "full"})
    assert not spec(both).gradient_checkpointing  # torchtune applies neither
    assert "nothing" in both.mapped["ac_mode"]
    assert spec(accepted(minimal() | {"ac_mode": "full"})).gradient_checkpointing
    some = spec(accepted(minimal() | {"ac_mode": "selective", "ac_option": 2}))
    assert (some.gradient_checkpointing, some.checkpoint_every_n_layers) == (True, 2)


def test_a_norm_that_is_only_measured() -> None:
    assert spec(accepted(minimal() | {"clip_grad_norm": "inf"})).max_grad_norm == 0.0


def test_a_key_of_harness_in_the_file_wins() -> None:
    reader = accepted(minimal() | {"sequence_length": 512, "memory_budget": "8GiB"})
    assert spec(reader).sequence_length == 512


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'batchsize'; did you mean batch_size\?"):
        interpret(minimal() | {"batchsize": 4}, OWN)


# -------------------------------------------------------------------------------------------------------- references


def test_references_are_replaced() -> None:
    content = minimal() | {"size": 4, "batch_size": "${size}", "output_dir": "runs/${model._component_}"}
    content["checkpointer"]["checkpoint_dir"] = "${root}/llama"
    content["root"] = "models"
    reader = accepted(content)
    assert reader.values["micro_batch_size"] == 4
    assert reader.values["base_model"] == "models/llama"
    assert {"root", "size"} <= reader.no_effect.keys()


def test_references_that_name_nothing_stay_text() -> None:
    resolved, named = references.resolve(
        {"a": "${b}", "b": "x${a}", "c": "${nothing.at.all}", "d": "${oc.env:HOME}/x", "e": ["${f.1}"], "f": [1, 2]}
    )
    assert resolved == {"a": "${b}", "b": "x${a}", "c": "${nothing.at.all}", "d": "${oc.env:HOME}/x", "e": [2],
                        "f": [1, 2]}  # fmt: skip
    assert "f" in named
    assert "nothing" not in named


def test_a_folder_that_only_the_environment_knows_is_asked_for() -> None:
    content = minimal()
    content["checkpointer"]["checkpoint_dir"] = "${oc.env:MODELS}/llama"
    assert "give the folder of the model" in refusal(content, "checkpointer.checkpoint_dir")


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a value in a file."""
    if path:
        yield path
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield from places(value, (*path, key))


@pytest.mark.parametrize("name", ["llama3_8b_lora_two_datasets", "gemma_2b_lora_single_device", "mistral_7b_ppo"])
@pytest.mark.parametrize(
    "value",
    [None, 5, -0.5, True, "text", "${a", [], [None, 1], {}, {"_component_": 7}, {"a": 1}, 10**400, math.inf, math.nan],
    ids=lambda value: str(value)[:12],
)
def test_no_value_anywhere_breaks_the_reading(name: str, value: Any) -> None:
    whole = document(name)
    for path in places(whole):
        content = copy.deepcopy(whole)
        inner = content
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = copy.deepcopy(value)
        reader, _ = read(torchtune.DIALECT, content, OWN)
        with contextlib.suppress(ValueError):
            make_spec(normalised(reader.values, "base"), "base")
