"""The base model at its precision, and its adapters. The one reader of `precision` and of `lora_*`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from harness import distributed, model_source
from harness.errors import InputError
from harness.private import without_home
from harness.spec import QUANTISED, TrialSpec

_WEIGHTS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bf16-mixed": torch.float32,
    "fp16-mixed": torch.float32,
    "int8": torch.bfloat16,
    "nf4": torch.bfloat16,
    "fp4": torch.bfloat16,
}
"""How base weights are loaded; of quantised models, what is not quantised (embeddings, norms, head)."""

_COMPUTE: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "fp16-mixed": torch.float16,
    "int8": torch.bfloat16,
    "nf4": torch.bfloat16,
    "fp4": torch.bfloat16,
}
"""What autocast computes in, while trained weights stay fp32."""


def load(spec: TrialSpec, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """The model of a spec on `device`, in training mode, adapters attached, base frozen under them.

    Raises:
        InputError: the model cannot be had.
        OSError: its files are not safetensors, or are damaged.
    """
    return _prepared(base(spec, device, trust_remote_code=trust_remote_code), spec)


def base(spec: TrialSpec, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """The base model of a spec at its precision, as it is loaded.

    Raises:
        InputError: the model cannot be had.
        OSError: its files are not safetensors, or are damaged.
    """
    from transformers import AutoModelForCausalLM

    # Loading in threads hides allocations from the memory tracker, which follows the thread that it is in.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    torch.backends.cuda.matmul.allow_tf32 = spec.tf32
    torch.backends.cudnn.allow_tf32 = spec.tf32
    model = AutoModelForCausalLM.from_pretrained(
        _folder(spec.base_model),
        dtype=_WEIGHTS[spec.precision],
        device_map={"": str(device)},
        attn_implementation=spec.attention,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        **_quantisation(spec),
    )
    _keep_gradients(model)
    return model


def skeleton(spec: TrialSpec, *, trust_remote_code: bool = False) -> Any:
    """The model of a spec without its weights: all that `load` gives, on the device `meta`, from the config alone.

    Quantised layers are there, and their weights have the shapes from before.

    Raises:
        InputError: the model's config cannot be had.
        NotImplementedError: peft needs the weights themselves to attach such adapters.
    """
    from transformers import AutoModelForCausalLM

    if spec.use_dora and spec.precision in QUANTISED:
        raise NotImplementedError(f"DoRA over {spec.precision} weights begins with their norms, which need contents")
    config = _config(spec.base_model, trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=_WEIGHTS[spec.precision],
            attn_implementation=spec.attention,
            trust_remote_code=trust_remote_code,
        )
    if spec.precision in QUANTISED:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import get_keys_to_not_convert

        quantisation = _quantisation(spec)["quantization_config"]
        model = replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantisation)
        # peft asks a model, not its layers, whether it is quantised.
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantisation.load_in_8bit, quantisation.load_in_4bit
    return _prepared(model, spec)


def _config(base_model: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    source = model_source.resolve(base_model)
    if source.kind == "random":
        return AutoConfig.for_model(**model_source.random_config(source.name))
    if source.kind == "bundled":
        return AutoConfig.for_model(**model_source.ARCHITECTURES[model_source.BUNDLED_SHAPE])
    return AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code)


def _prepared(model: Any, spec: TrialSpec) -> Any:
    """The base model ready to be trained: checkpointing, adapters, training mode."""
    model.config.use_cache = False
    if spec.gradient_checkpointing:
        # The reentrant variant would need inputs with gradients, which frozen embeddings do not give.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spec.adapter == "lora":
        model = _with_adapters(model, spec)
    model.train()
    return model


def _quantisation(spec: TrialSpec) -> dict[str, Any]:
    if spec.precision not in QUANTISED:
        return {}
    from transformers import BitsAndBytesConfig

    if spec.precision == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=spec.precision,
            bnb_4bit_use_double_quant=spec.double_quantization,
            bnb_4bit_compute_dtype=_COMPUTE[spec.precision],
        )
    }


def _keep_gradients(model: Any) -> None:
    """Keep 4-bit layers in the form that they are trained in.

    On a CPU with bf16 instructions bitsandbytes (0.50) brings a layer's weights, at its first evaluation and for
    good, into a form whose product has no gradient: training after it learns from a part of the layers alone.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _with_adapters(model: Any, spec: TrialSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    if spec.lora_target_modules is not None:
        targets: str | list[str] | None = list(spec.lora_target_modules)
    else:
        targets = "all-linear" if spec.lora_target_linear else None
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora_r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        bias=spec.lora_bias,
        target_modules=targets,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
    )
    # Adapters of 16-bit and quantised models are made fp32 by peft; those of a skeleton have no weights either.
    return get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """What peft keeps of a model, by its name there, each in one piece: adapters, biases, embeddings that have one."""
    from peft import get_peft_model_state_dict

    weights = model.state_dict()
    kept = {id(weight) for weight in get_peft_model_state_dict(model, state_dict=weights).values()}
    return {name: distributed.whole(weight) for name, weight in weights.items() if id(weight) in kept}


def save_adapter(model: Any, spec: TrialSpec, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """The adapters in peft's format, with the base under the name that it has in the spec, not its path here."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = spec.base_model
        if isinstance(config.target_modules, set):  # in an order that is each process's own
            config.target_modules = sorted(config.target_modules)
    model.save_pretrained(folder, state_dict=weights)
    card = folder / "README.md"  # peft's, which names the path
    said = card.read_text(encoding="utf-8").replace(str(model.config._name_or_path), spec.base_model)
    card.write_text(without_home(said), encoding="utf-8")


def with_saved_adapter(model: Any, folder: Path) -> Any:
    """A base model with the adapter of a folder attached, for inference.

    Raises:
        InputError: the adapter was made for another model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    misfit = f"adapter {folder} does not fit the base {type(model).__name__}"
    try:
        found = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError) as error:
        detail = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        raise InputError(f"{misfit}: {detail or str(error).splitlines()[0]}") from None
    wanted = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(found).items()}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        given = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    if given != wanted:
        key = sorted(given.keys() ^ wanted.keys())[0] if given.keys() != wanted.keys() else "its shapes"
        raise InputError(f"{misfit}: {key} is in one of them alone")
    return found


def unquantised(spec: TrialSpec) -> TrialSpec:
    """The spec with a base that adapters can be merged into: 16 bit in place of 8 and 4."""
    return spec.model_copy(update={"precision": "bf16"}) if spec.precision in QUANTISED else spec


def weights_format(spec: TrialSpec) -> str:
    """What the base weights are held in, by its name in a grid."""
    return spec.precision


def compute_dtype(spec: TrialSpec) -> torch.dtype | None:
    """What autocast computes in; null: in the weights' own format (fp32, and 16-bit full fine-tuning)."""
    if spec.adapter == "none" and spec.precision in ("bf16", "fp16"):
        return None
    return _COMPUTE.get(spec.precision)


def autocast(spec: TrialSpec, device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic of a forward pass at the spec's precision."""
    dtype = compute_dtype(spec)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """Parameters that the optimizer changes."""
    return [p for p in model.parameters() if p.requires_grad]


def adapters(model: Any, spec: TrialSpec) -> list[torch.nn.Parameter]:
    """Weights that were added to the base; none for full fine-tuning."""
    return trainable(model) if spec.adapter == "lora" else []


def sizes(model: Any, spec: TrialSpec) -> dict[str, float | int | None]:
    """`trainable_parameters`, `total_parameters`, `adapter_bytes` and `adapter_share`, as metrics."""
    if spec.adapter == "none":
        count = model.num_parameters()
        return {"trainable_parameters": count, "total_parameters": count}
    from peft import get_peft_model_state_dict

    trained, total = model.get_nb_trainable_parameters()
    saved = get_peft_model_state_dict(model).values()
    added = sum(t.numel() for t in saved)
    return {
        "trainable_parameters": trained,
        "total_parameters": total,
        "adapter_bytes": sum(t.numel() * t.element_size() for t in saved),
        "adapter_share": added / (total - added),
    }


# ------------------------------------------------------------------------------------ tokenizers


def load_tokenizer(spec: TrialSpec, *, trust_remote_code: bool = False) -> Any:
    """The base model's tokenizer; for random weights one of bytes, which needs no file and fits any text."""
    if model_source.resolve(spec.base_model).kind == "random":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder(spec.base_model), trust_remote_code=trust_remote_code)


def pad_id(tokenizer: Any) -> int:
    """What a tokenizer pads with; without a padding token anything would do: the mask says what is padding."""
    found: int | None = tokenizer.pad_token_id
    return found if found is not None else tokenizer.eos_token_id or 0


def byte_tokenizer() -> Any:
    """One token to a byte, for models that bring no tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin|>", "<|end|>"]  # ids 0 and 1, as in model_source.ARCHITECTURES
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )


# ------------------------------------------------------------------------------------ folders


def _folder(base_model: str) -> str:
    """What transformers shall load: a folder, or a hub id."""
    source = model_source.resolve(base_model)
    if source.kind == "bundled":
        file = model_source.bundled_file()
        return str(_made_once(f"{source.name}-{file.stat().st_size}", lambda folder: _convert(file, folder)))
    if source.kind == "random":
        config = model_source.random_config(source.name)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
        name = f"random-{Path(source.name).stem}-{digest}"
        return str(_made_once(name, lambda folder: _random_checkpoint(config, folder)))
    return source.name


def prepare(base_model: str) -> None:
    """Make or convert the weights of a model now, if they are not at hand: a trial's time would begin with it.

    Raises:
        InputError: it names nothing.
    """
    _folder(base_model)


def _made_once(name: str, make: Any) -> Path:
    """A folder of the cache, made aside and renamed by whoever comes first."""
    cache = model_source.cache_folder()
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):
        for left in cache.glob(f".{name}.*/"):  # by one that was killed: nobody else makes it now
            shutil.rmtree(left, ignore_errors=True)
        if not folder.is_dir():
            aside = cache / f".{name}.{uuid.uuid4().hex[:8]}"
            try:
                aside.mkdir()
                make(aside)
                os.replace(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """GGUF to safetensors in bf16, the format in which these weights were published."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


_SHARD_BYTES = 2**31


def _random_checkpoint(config: dict[str, Any], folder: Path) -> None:
    """A checkpoint of normal weights in bf16, so that random shapes are loaded as any model is.

    Written shard by shard: the whole never stands in memory.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=1))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = set(model.all_tied_weights_keys) if config.get("tie_word_embeddings") else set()
    generator = torch.Generator().manual_seed(0)
    spread = float(config.get("initializer_range", 0.02))

    index: dict[str, str] = {}
    for number, shard in enumerate(_shards(model, tied), start=1):
        name = f"model-{number:05d}.safetensors"
        tensors = {key: _random_weight(shape, spread, generator) for key, shape in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _shards(model: Any, left_out: set[str]) -> Iterator[list[tuple[str, torch.Size]]]:
    shard: list[tuple[str, torch.Size]] = []
    size = 0
    for key, parameter in model.named_parameters():
        if key not in left_out:
            shard.append((key, parameter.shape))
            size += parameter.numel() * 2
            if size >= _SHARD_BYTES:
                yield shard
                shard, size = [], 0
    if shard:
        yield shard


def _random_weight(shape: torch.Size, spread: float, generator: torch.Generator) -> torch.Tensor:
    """Ones for norms (one dimension), else normal numbers."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, spread, generator=generator)
