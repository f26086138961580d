"""Builds the model of a spec: the base at its precision, with adapters. The one reader of `precision` and `lora_*`."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch

from harness.sources import models
from harness.spec import QUANTISED, TrialSpec
from harness.training.checkpoints import checkpoint_folder

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
"""Type of base weights; of quantised models, that of the unquantised ones (embeddings, norms, head)."""
_COMPUTE: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "fp16-mixed": torch.float16,
    "int8": torch.bfloat16,
    "nf4": torch.bfloat16,
    "fp4": torch.bfloat16,
}
"""Type of autocast; trained weights are fp32."""


def load(spec: TrialSpec, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """The model of a spec on `device`, in training mode, with adapters over a frozen base if the spec has them.

    Raises:
        InputError: the model is not available.
        OSError: its files are not safetensors, or are damaged.
    """
    return _prepared(base(spec, device, trust_remote_code=trust_remote_code), spec)


def base(spec: TrialSpec, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """The base model of a spec at its precision.

    Raises:
        InputError: the model is not available.
        OSError: its files are not safetensors, or are damaged.
    """
    from transformers import AutoModelForCausalLM

    # Undocumented switch of transformers (5.23): it loads in threads, and the memory tracker sees its own thread alone.
    # An argument of `from_pretrained` would replace it.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    torch.backends.cuda.matmul.allow_tf32 = spec.tf32
    torch.backends.cudnn.allow_tf32 = spec.tf32
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint_folder(spec.base_model, spec.folder),
        dtype=_WEIGHTS[spec.precision],
        device_map={"": str(device)},
        attn_implementation=spec.attention,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        **_quantisation(spec),
    )
    _disable_inference_layout(model)
    return model


def skeleton(spec: TrialSpec, *, trust_remote_code: bool = False) -> Any:
    """The model of a spec as from `load`, but on the device `meta`, from its config alone.

    The weights of quantised layers have their unquantised shapes.

    Raises:
        InputError: the model's config is not available.
        NotImplementedError: peft needs the weights' values to attach such adapters.
    """
    from transformers import AutoModelForCausalLM

    if spec.use_dora and spec.precision in QUANTISED:
        raise NotImplementedError(f"DoRA over {spec.precision} weights starts from their norms, which need values")
    config = _config(spec, trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=_WEIGHTS[spec.precision],
            attn_implementation=spec.attention,
            trust_remote_code=trust_remote_code,
        )
    if spec.precision in QUANTISED:
        # Internal functions of transformers (5.23), whose `from_pretrained` quantises only while it loads weights. A
        # public way to replace the layers of a model on `meta` would let them go.
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import get_keys_to_not_convert

        quantisation = _quantisation(spec)["quantization_config"]
        model = replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantisation)
        # peft (0.21) reads these attributes of the model.
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantisation.load_in_8bit, quantisation.load_in_4bit
    return _prepared(model, spec)


def _config(spec: TrialSpec, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    source = models.resolve(spec.base_model, spec.folder)
    if source.kind == "random":
        return AutoConfig.for_model(**models.random_config(source.name, spec.folder))
    if source.kind == "bundled":
        return AutoConfig.for_model(**models.ARCHITECTURES[models.BUNDLED_SHAPE])
    return AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code)


def _prepared(model: Any, spec: TrialSpec) -> Any:
    """A base model set up for training: checkpointing, adapters, training mode."""
    model.config.use_cache = False
    if spec.gradient_checkpointing:
        # The reentrant variant needs inputs with gradients, which frozen embeddings do not provide.
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


def _disable_inference_layout(model: Any) -> None:
    """Keep 4-bit weights in the layout that has gradients.

    On a CPU with bf16 instructions, bitsandbytes (0.50) converts a layer's weights in its first evaluation, for good,
    to a layout whose product has no gradient. The patch can go once it converts them back for training.
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
    # peft makes adapters of 16-bit and quantised models fp32; those of a model on `meta` are on `meta`.
    return get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")


def unquantised(spec: TrialSpec) -> TrialSpec:
    """The spec with a base that adapters can be merged into: bf16 instead of 8 or 4 bit."""
    return spec.model_copy(update={"precision": "bf16"}) if spec.precision in QUANTISED else spec


def weights_format(spec: TrialSpec) -> str:
    """Format of the base weights, by its name in a grid."""
    return spec.precision


def compute_dtype(spec: TrialSpec) -> torch.dtype | None:
    """Type of autocast; null: none, for fp32 and for full fine-tuning in 16 bit."""
    if spec.adapter == "none" and spec.precision in ("bf16", "fp16"):
        return None
    return _COMPUTE.get(spec.precision)


def autocast(spec: TrialSpec, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast for a forward pass at the spec's precision."""
    dtype = compute_dtype(spec)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """Parameters that the optimizer changes."""
    return [p for p in model.parameters() if p.requires_grad]


def adapters(model: Any, spec: TrialSpec) -> list[torch.nn.Parameter]:
    """Trained weights of the adapters; none for full fine-tuning."""
    return trainable(model) if spec.adapter == "lora" else []


def sizes(model: Any, spec: TrialSpec) -> dict[str, float | int | None]:
    """`trainable_parameters`, `total_parameters`, `adapter_bytes` and `adapter_share`, as metrics."""
    if spec.adapter == "none":
        count = model.num_parameters()
        return {"trainable_parameters": count, "total_parameters": count}
    from peft import get_peft_model_state_dict

    trained, total = model.get_nb_trainable_parameters()
    saved = get_peft_model_state_dict(model).values()
    adapter_parameters = sum(t.numel() for t in saved)
    return {
        "trainable_parameters": trained,
        "total_parameters": total,
        "adapter_bytes": sum(t.numel() * t.element_size() for t in saved),
        "adapter_share": adapter_parameters / (total - adapter_parameters),
    }
