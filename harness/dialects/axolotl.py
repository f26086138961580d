"""Training files of Axolotl. Keys and defaults are those of its configuration schema (axolotl.utils.schemas)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness._util.messages import as_written
from harness.dialects import axolotl_data
from harness.dialects.axolotl_keys import CLASSES, FAMILIES, TABLE
from harness.dialects.common import NOT_MEASURED, read_compile, set_optimizer, set_scheduler
from harness.dialects.rules import Dialect, Reader, Together
from harness.dialects.sharding import fsdp_checkpoints, read_deepspeed, read_fsdp
from harness.spec.keys import ALL_LINEAR

_WARM_UP = 0.03
"""Share of the steps without a key for it, of 100 steps at most; Axolotl rounds down."""


_PATTERNS = {"lora_rank_pattern": "rank_pattern", "lora_alpha_pattern": "alpha_pattern"}
"""Keys of single layers, and the options of peft that they are."""

_OF_PEFT = {
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
}
"""Keys of adapters that have another name here."""


def _combine(reader: Reader) -> None:
    _read_model(reader)
    read_compile(reader, implied=False)
    axolotl_data.read(reader)
    _read_precision(reader)
    _read_adapter(reader)
    _read_length(reader)
    _read_batch(reader)
    _read_checkpointing(reader)
    _read_attention(reader)
    _read_loss(reader)
    read_fsdp(reader, implied=True)
    read_deepspeed(reader, "deepspeed")
    _read_plugins(reader)
    set_optimizer(reader, "optimizer")
    set_scheduler(reader, "lr_scheduler")


def _read_model(reader: Reader) -> None:
    base = reader.get("base_model")
    if base is not None:
        reader.set("base_model", base, "base_model")
    for name in ("base_model_config", "tokenizer_config"):
        if reader.get(name) not in (None, base):
            reader.refuse(name, "put it next to the weights of base_model")
    reader.ignore("that of base_model", "base_model_config", "tokenizer_config")
    if "Classification" in str(reader.get("model_type", "")):
        reader.other_task("model_type", CLASSES)
    reader.ignore("the model's class", "model_type")


def _read_precision(reader: Reader) -> None:
    """Weights are loaded in the 16-bit type of `bf16` and `fp16`, whose default is bf16 where the card has it."""
    flags = {"bf16": ("bf16", "bfloat16"), "fp16": ("fp16", "float16"), "fp32": ("float32",)}
    on = {kind: [n for n in names if reader.get(n) not in (None, False)] for kind, names in flags.items()}
    explicit = [name for name in on["bf16"] if reader.get(name) != "auto"]
    if explicit and on["fp16"]:
        reader.refuse(on["fp16"][0], f"contradicts {explicit[0]}: true; keep one")
        return
    # `auto` gives way to what is named.
    half = "fp16" if on["fp16"] else "bf16"
    none = not on["fp16"] and (on["fp32"] or (reader.get("bf16") is False and not on["bf16"]))
    arithmetic = "fp32" if none else half
    names = [name for each in flags.values() for name in each]
    _read_autocast(reader, arithmetic, names)
    quantised = next((name for name in ("load_in_4bit", "load_in_8bit") if reader.get(name)), None)
    if quantised is None and reader.get("adapter") == "qlora":
        quantised = "adapter"
    if quantised is None and _is_torchao(reader):
        reader.set("precision", "int8", "peft", *names)
        reader.set("quantizer", "torchao", "peft")
        reader.set("compute_dtype", arithmetic, *names)
        return
    if quantised is None:
        reader.set("precision", arithmetic, *names, "load_in_8bit", "load_in_4bit")
        return
    reader.set("precision", "int8" if quantised == "load_in_8bit" else "nf4", "load_in_8bit", "load_in_4bit")
    reader.set("compute_dtype", arithmetic, *names)
    if quantised != "load_in_8bit":
        _read_4bit(reader)


def _read_autocast(reader: Reader, arithmetic: str, names: Sequence[str]) -> None:
    """Axolotl's trainer runs under autocast, but for `bf16: full` and `float16`, which are about the weights alone."""
    by_trainer = bool(reader.get("fp16")) if arithmetic == "fp16" else reader.get("bf16") != "full"
    if arithmetic == "bf16" and by_trainer:  # with adapters as without: levels of a grid may have either
        reader.set("autocast", True, *names)
    elif reader.get("adapter") is not None and not by_trainer and arithmetic != "fp32":
        reader.set("autocast", False, *names)


def _read_4bit(reader: Reader) -> None:
    """Axolotl quantises the scales too, unless it is told otherwise."""
    given = reader.get("bnb_config_kwargs", {})
    options = dict(given) if isinstance(given, Mapping) else {"": given}
    double = options.pop("bnb_4bit_use_double_quant", True)
    kind = options.pop("bnb_4bit_quant_type", "nf4")
    options.pop("bnb_4bit_quant_storage", None)  # how they are stored, for sharding
    options.pop("llm_int8_has_fp16_weight", None)
    compute = str(options.pop("bnb_4bit_compute_dtype", "")).removeprefix("torch.")
    reader.set("precision", kind, "load_in_4bit")
    reader.set("double_quantization", bool(double), "bnb_config_kwargs")
    if compute:
        reader.set("compute_dtype", {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(compute, compute))
    for name, value in options.items():
        reader.refuse(f"bnb_config_kwargs.{name}", "leave it out", value)


def _read_adapter(reader: Reader) -> None:
    kind = reader.get("adapter")
    lora_keys = [name for name in reader.given if name.startswith(("lora_", "peft_use_", "peft_init_", "loraplus_"))]
    if kind is None:
        reader.set("adapter", "none")
        for name in lora_keys:  # those that only hold for adapters
            if isinstance(TABLE.get(name), Together):
                reader.no_effect[name] = "no adapter: all weights are trained"
                reader.unsupported.pop(name, None)
        return
    if kind not in ("lora", "qlora"):
        reader.refuse("adapter", "use lora or qlora, or leave it out for full fine-tuning")
        return
    reader.set("adapter", "lora", "adapter")
    # An empty rank or alpha leaves peft's own.
    reader.set("lora_r", reader.get("lora_r", 8), "lora_r")
    reader.set("lora_alpha", reader.get("lora_alpha", 8), "lora_alpha")
    reader.set("lora_dropout", reader.get("lora_dropout", 0.0), "lora_dropout")
    for name, key in _OF_PEFT.items():
        if reader.get(name) is not None:
            reader.set(key, reader.get(name), name)
    if reader.values.get("loraplus_lr_ratio") is not None and reader.values.get("weight_decay"):
        del reader.mapped["weight_decay"]
        reader.set("weight_decay", 0.0, "weight_decay", note="Axolotl has none with LoRA+")
    if reader.get("peft_autocast_adapter_dtype") is False:
        reader.set("adapter_dtype", "bf16", "peft_autocast_adapter_dtype")
    else:
        reader.ignore("adapters are fp32, as in peft", "peft_autocast_adapter_dtype")
    for name in ("lora_modules_to_save", "lora_target_parameters"):
        if name in reader.given:
            reader.set(name, reader.get(name), name)
    options = {option: reader.get(name) for name, option in _PATTERNS.items() if name in reader.given}
    if options:
        reader.set("adapter_options", options | reader.get("adapter_options", {}), *_PATTERNS)
    _read_targets(reader)
    _read_peft(reader)


def _read_targets(reader: Reader) -> None:
    """Named layers and all linear ones add up."""
    named, linear = reader.get("lora_target_modules"), bool(reader.get("lora_target_linear"))
    names = ("lora_target_modules", "lora_target_linear")
    if named is None:
        reader.set("lora_target_linear", linear, *names)
        return
    listed = [named] if isinstance(named, str) else named
    if not isinstance(listed, list):
        reader.refuse("lora_target_modules", "give a list of names, or a pattern")
        return
    if linear and listed != [ALL_LINEAR]:
        listed = [ALL_LINEAR, *listed]
    reader.set("lora_target_modules", listed, *names)


def _is_torchao(reader: Reader) -> bool:
    given = reader.get("peft")
    wanted = {"backend": "torchao", "weight_dtype": "int8"}
    return isinstance(given, Mapping) and wanted.items() <= given.items()


def _read_peft(reader: Reader) -> None:
    if _is_torchao(reader):
        reader.note("quantised by torchao", "peft")
        return
    given = reader.get("peft")
    for name, value in given.items() if isinstance(given, Mapping) else ():
        if value and (name, value) not in (("backend", "bnb"), ("weight_dtype", "nf4"), ("weight_dtype", "int8")):
            reader.refuse(f"peft.{name}", "leave it out, or use backend: torchao with weight_dtype: int8", value)
    reader.note("quantised by bitsandbytes", "peft")


def _read_length(reader: Reader) -> None:
    """`max_steps` ends the training, which in Axolotl is no longer than `num_epochs` either."""
    steps = reader.get("max_steps")
    limited = steps is not None and not (isinstance(steps, int) and steps < 0)
    if limited:
        passes = f"num_epochs: {as_written(reader.get('num_epochs', 1))}"
        reader.set("max_steps", steps, "max_steps", note=f"Axolotl ends with {passes} where that is sooner")
        reader.note("max_steps ends the training", "num_epochs")
    elif "train_samples" in reader.given:
        reader.note("train_samples ends the training", "num_epochs", "max_steps")
    else:
        reader.ignore("no limit", "max_steps")
        reader.set("num_epochs", reader.get("num_epochs", 1.0), "num_epochs")
    _read_warm_up(reader, steps if limited and isinstance(steps, int) else None)


def _read_warm_up(reader: Reader, steps: int | None) -> None:
    """Of one step Axolotl makes two. Where the steps are only known from the data, the share of them is kept."""
    wanted, ratio = reader.get("warmup_steps"), reader.get("warmup_ratio")
    if wanted is not None:
        reader.note("warmup_steps says it", "warmup_ratio")
    elif steps is not None and ratio is None:
        wanted = min(int(_WARM_UP * steps), 100)
    elif steps is not None and isinstance(ratio, int | float) and 0 <= ratio <= 1:
        wanted = int(ratio * steps)
        reader.note(f"warmup_steps: {wanted}", "warmup_ratio")
    if wanted is None:
        reader.set("warmup_ratio", _WARM_UP if ratio is None else ratio, "warmup_ratio")
    elif wanted == 1:
        reader.set("warmup_steps", 2, "warmup_steps", "warmup_ratio", note="Axolotl makes two of one")
    else:
        reader.set("warmup_steps", wanted, "warmup_steps")


def _read_batch(reader: Reader) -> None:
    micro = reader.get("micro_batch_size", 1)
    accumulation = reader.get("gradient_accumulation_steps")
    whole = reader.get("batch_size")
    if accumulation is None and isinstance(whole, int) and isinstance(micro, int) and micro > 0:
        processes = reader.values.get("num_processes", 1)
        accumulation = max(1, whole // (micro * (processes if isinstance(processes, int) and processes > 0 else 1)))
    reader.set("micro_batch_size", micro, "micro_batch_size")
    if reader.get("pad_to_sequence_len") is True:
        reader.set("pad_to_sequence_len", True, "pad_to_sequence_len")
    else:  # false says here that all examples fill the sequence
        reader.ignore("micro-batches are padded to their longest example", "pad_to_sequence_len")
    reader.set("gradient_accumulation_steps", accumulation or 1, "gradient_accumulation_steps", "batch_size")


def _read_checkpointing(reader: Reader) -> None:
    """Without arguments Axolotl asks for the reentrant variant."""
    wanted = reader.get("gradient_checkpointing", False)
    if wanted not in (True, False):
        reader.refuse("gradient_checkpointing", "use true: offloading is not measured here yet")
        return
    reader.set("gradient_checkpointing", wanted, "gradient_checkpointing")
    given = reader.get("gradient_checkpointing_kwargs", {"use_reentrant": True})
    options = dict(given) if isinstance(given, Mapping) else {}
    reentrant = options.pop("use_reentrant", False)
    if not wanted and fsdp_checkpoints(reader, implied=True):
        reader.set("gradient_checkpointing", True, "fsdp_config", note="FSDP's own")
    if not wanted:
        reader.ignore("no checkpointing by the trainer", "gradient_checkpointing_kwargs")
        return
    reader.set("reentrant_checkpointing", bool(reentrant), "gradient_checkpointing_kwargs")
    for name, value in options.items():
        reader.refuse(f"gradient_checkpointing_kwargs.{name}", "leave it out", value)


_ATTENTION = {
    "eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash_attention_2",
    "eager_attention": "eager", "sdp_attention": "sdpa", "flash_attention": "flash_attention_2",
    "flex_attention": "flex_attention",
}  # fmt: skip


def _read_attention(reader: Reader) -> None:
    flags = ("flash_attention", "sdp_attention", "eager_attention", "xformers_attention", "s2_attention")
    for name in (*flags, "flex_attention", "sage_attention", "attn_implementation"):
        value = reader.get(name)
        if value in (None, False):
            reader.ignore("off", name)
            continue
        kernel = _ATTENTION.get(str(value) if name == "attn_implementation" else name)
        if kernel is None:
            reader.refuse(name, "use sdpa, eager, flash_attention_2 or flex_attention")
        else:
            reader.set("attention", kernel, name)


_LOSSES = {
    "chunked_cross_entropy": "chunked",
    "cut_cross_entropy": "cce",
    "liger_fused_linear_cross_entropy": "liger",
}


def _read_loss(reader: Reader) -> None:
    for name, loss in _LOSSES.items():
        if reader.get(name):
            reader.set("loss", loss, name)
        else:
            reader.ignore("off", name)


def _read_plugins(reader: Reader) -> None:
    """Plug-ins that change the step are named by their keys too; those that do not are about saving and evaluating."""
    plugins = reader.get("plugins", [])
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        if any(word in str(plugin).lower() for word in ("lm_eval", "swanlab", "cut_cross_entropy", "liger")):
            continue
        reader.refuse("plugins", NOT_MEASURED, str(plugin).rpartition(".")[2])
        return
    reader.ignore("evaluation, saving, or what keys of their own ask for", "plugins")


DIALECT = Dialect(
    "Axolotl",
    TABLE,
    {
        "sequence_length": 512,
        "excess_length": "drop",
        "val_set_size": 0,
        "epoch_end": "step",
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "seed": 42,
    },
    _combine,
    families=FAMILIES,
)
