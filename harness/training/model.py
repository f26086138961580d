"""Builds the model of a spec: the base at its precision, with adapters. It, `adapter_methods` and
`adapter_targets` read `precision` and `lora_*`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

from harness._util.messages import first_line, one_line
from harness.errors import InputError
from harness.sources import models
from harness.spec.keys import FULL, FUSED_LOSSES, LORA, QUANTISED
from harness.spec.trial import TrialSpec
from harness.training import (
    adapter_methods,
    device_limits,
    fused_loss,
    packing,
    quantisers,
    reach,
    recomputation,
    without_logits,
)
from harness.training import sizes as model_sizes
from harness.training.checkpoints import checkpoint_folder

_WEIGHTS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bf16-mixed": torch.float32,
    "fp16-mixed": torch.float32,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
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
    "int4": torch.bfloat16,
    "nf4": torch.bfloat16,
    "fp4": torch.bfloat16,
}
"""Type of autocast; trained weights are fp32."""


def _weights_dtype(spec: TrialSpec) -> torch.dtype:
    """Type of the base weights; of a quantised model, that of what is not quantised, in which the rest is computed."""
    return _WEIGHTS[spec.compute_dtype or spec.precision]


def load(spec: TrialSpec, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """The model of a spec on `device`, in training mode, with adapters over a frozen base if the spec has them.

    Raises:
        InputError: the model is not available, or the device cannot do what the spec says.
        OSError: its files are not safetensors, or are damaged.
    """
    device_limits.refuse_on(spec, "cuda" if device.type == "cuda" else "cpu")
    network = _prepared(base(spec, device, trust_remote_code=trust_remote_code), spec)
    if spec.loss in FUSED_LOSSES:
        fused_loss.refuse_other_code(without_logits.base_of(network), spec.loss)
    return network


def base(spec: TrialSpec, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """The base model of a spec at its precision, with its weights as they are trained over.

    Raises:
        InputError: the model is not available, or its weights are stored in another format than the spec's.
        OSError: its files are not safetensors, or are damaged.
    """
    # Undocumented switch of transformers (5.23): it loads in threads, and the memory tracker sees its own thread alone.
    # An argument of `from_pretrained` would replace it.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    torch.backends.cuda.matmul.allow_tf32 = spec.tf32
    torch.backends.cudnn.allow_tf32 = spec.tf32
    config = _config(spec, trust_remote_code)
    stored = _stored_format(spec, config)
    model = _class_for(config).from_pretrained(
        checkpoint_folder(spec.base_model, spec.folder),
        dtype=_weights_dtype(spec),
        device_map={"": str(device)},
        attn_implementation=_attention(spec),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        **({} if stored else _quantisation(spec)),
    )
    _set_up_4bit(model, spec)
    _set_up_8bit(model)
    if spec.upcasts:
        _upcast_unquantized(model)
    return model


def unquantised_base(
    spec: TrialSpec, device: torch.device, *, trust_remote_code: bool = False
) -> tuple[Any, TrialSpec]:
    """The base that adapters are merged into, and its spec: weights of 8 or 4 bit are in 16 bit.

    Those of a checkpoint that is stored in 8 or 4 bit are unpacked; of others, those that it was stored with are read.

    Raises:
        InputError: as `base`.
        OSError: as `base`.
    """
    at = unquantised(spec)
    if at == spec or not _stored_format(spec, _config(spec, trust_remote_code)):
        return base(at, device, trust_remote_code=trust_remote_code), at
    model = base(spec.model_copy(update={"upcast_unquantized": False}), device, trust_remote_code=trust_remote_code)
    return quantisers.unpacked(model, _weights_dtype(at)), at


def skeleton(spec: TrialSpec, *, trust_remote_code: bool = False) -> Any:
    """The model of a spec as from `load`, but on the device `meta`, from its config alone.

    The weights of bitsandbytes' layers have their unquantised shapes.

    Raises:
        InputError: the model's config is not available, or no such model can be trained as the spec says.
    """
    from transformers.initialization import no_init_weights  # undocumented (5.23)

    config = _config(spec, trust_remote_code)
    stored = _stored_format(spec, config)
    try:
        with torch.device("meta"):
            model = _class_for(config).from_config(
                config,
                dtype=_weights_dtype(spec),
                attn_implementation=_attention(spec),
                trust_remote_code=trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        raise _refused(spec, error) from None
    _keep_fp32(model, _weights_dtype(spec))
    if spec.precision in QUANTISED:
        quantisation = _quantisation(spec)["quantization_config"]
        quantisers.quantise_on_meta(model, quantisation, skipped=stored.get("llm_int8_skip_modules"))
        _set_up_4bit(model, spec)
    if spec.upcasts:
        _upcast_unquantized(model)
    # DoRA begins with the norms of dequantised copies of weights (peft 0.21), which those of bitsandbytes (0.50) are in
    # shape already, and it cannot copy them.
    dequantised = mock.patch("peft.tuners.lora.dora.dequantize_module_weight", _dequantised)
    # Other methods use what torch's functions of initialisation return, which without them is nothing.
    uninitialised = no_init_weights() if spec.adapter == LORA else contextlib.nullcontext()
    with dequantised, mock.patch("peft.tuners.lora.dora.deepcopy", lambda module: module), uninitialised:
        return _prepared(model, spec)


def _dequantised(module: Any) -> torch.Tensor:
    return module.weight.data if quantisers.of_bitsandbytes(module) else quantisers.dequantised(module)


def _config(spec: TrialSpec, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    source = models.resolve(spec.base_model, spec.folder)
    if source.kind == "bundled":
        return AutoConfig.for_model(**models.ARCHITECTURES[models.BUNDLED_SHAPE])
    try:
        if source.kind == "random":
            return AutoConfig.for_model(**models.random_config(source.name, spec.folder))
        return AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise _refused(spec, error) from None


def _class_for(config: Any) -> Any:
    """What makes a model of a config: a class of text, or one of text and images where there is none of text alone."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    of_text: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    of_images: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = type(config)
    # The class of some, as of Mllama, takes a config of their text part, which transformers (5.23) has no class for.
    has_text = kind in of_text and of_text[kind].config_class in of_text
    return AutoModelForImageTextToText if kind in of_images and not has_text else AutoModelForCausalLM


def _refused(spec: TrialSpec, error: Exception) -> InputError:
    """What transformers says of a config that it cannot make a causal language model of."""
    text = first_line(error)
    if "trust_remote_code" in str(error):
        text = "it has code of its own; give --trust-remote-code to run it"
    elif "attention" in text or isinstance(error, ImportError):
        text = f"attention {spec.attention} is not to be had ({text}); use attention: auto"
    elif "Unrecognized configuration class" in text:
        text = f"{text.split('<')[-1].split('>')[0]} is not of a causal language model; give one that generates text"
    return InputError(one_line(f"base_model {spec.base_model}: {text}"))


def _attention(spec: TrialSpec) -> str | None:
    """What transformers is asked for: null where it shall choose, sdpa where the model has it, else eager."""
    return None if spec.attention == "auto" else spec.attention


def _stored_format(spec: TrialSpec, config: Any) -> dict[str, Any]:
    """How the checkpoint says that its weights are quantised already; empty where they are not.

    Raises:
        InputError: they are in another format than the spec's.
    """
    given = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if given is None:
        return {}
    if spec.init_lora_weights == "loftq":
        raise InputError(
            f"init_lora_weights loftq: the weights of base_model {spec.base_model} are quantised already, and what "
            "that has taken is not known; give the checkpoint that it was made from"
        )
    stored: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    double = False
    if stored.get("load_in_4bit"):
        name, double = stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant"))
    elif stored.get("load_in_8bit"):
        name = "int8"
    else:
        bits = stored.get("bits") or stored.get("w_bit")
        how = f"{stored.get('quant_method', 'an unknown format')}{f', {bits} bit' if bits else ''}"
        raise InputError(
            f"the weights of base_model {spec.base_model} are quantised already ({how}), which is none of the formats "
            f"of precision ({', '.join(_WEIGHTS)}); give the checkpoint that it was made from"
        )
    if (spec.precision, spec.quantizer, spec.double_quantization) != (name, "bitsandbytes", double):
        asked = spec.precision + " with double_quantization" * spec.double_quantization
        asked += f" with quantizer {spec.quantizer}" * (spec.quantizer != "bitsandbytes")
        own = name + " with double_quantization: true" * double
        raise InputError(
            f"precision {asked}: the weights of base_model {spec.base_model} are quantised already; use their own, "
            f"precision: {own}, or give the checkpoint that it was made from"
        )
    return stored


def _keep_fp32(model: Any, dtype: torch.dtype) -> None:
    """Make the weights fp32 that transformers keeps so when it loads a checkpoint in 16 bit."""
    # Undocumented parts of transformers (5.23): its plan of types, by patterns of names, and how it matches them.
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation([*plan])
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            parameter.data = parameter.data.to(torch.float32)


def _prepared(model: Any, spec: TrialSpec) -> Any:
    """A base model set up for training: checkpointing, adapters, training mode."""
    if spec.loss != "full":
        without_logits.refuse_if_impossible(model, spec.loss)
    model.config.use_cache = False
    if spec.sample_packing:
        packing.set_up(model)
    if spec.gradient_checkpointing:
        recomputation.enable(model, spec)
    if spec.gradient_checkpointing and spec.reentrant_checkpointing and spec.adapter != FULL:
        model.enable_input_require_grads()  # frozen embeddings do not provide inputs with gradients
    unreached = reach.unreached(model)
    if spec.adapter != FULL:
        model = adapter_methods.attach(model, spec, unreached)
    if spec.neftune_noise_alpha is not None:  # on what an adapter has in place of the embeddings, if it has
        model.get_input_embeddings().register_forward_hook(functools.partial(_with_noise, spec.neftune_noise_alpha))
    for parameter in unreached.values():
        parameter.requires_grad_(False)
    if spec.loss in FUSED_LOSSES:
        fused_loss.refuse_if_impossible(without_logits.base_of(model), spec.loss)
    if compute_dtype(spec) is torch.float16:
        _refuse_fp16_gradients(model, spec)
    model.train()
    return model


def _refuse_fp16_gradients(model: Any, spec: TrialSpec) -> None:
    """Refuse to train weights in fp16, whose gradients the loss scaler cannot unscale."""
    name = next((name for name, p in model.named_parameters() if p.requires_grad and p.dtype is torch.float16), None)
    if name is not None:
        key = "precision" if spec.compute_dtype is None else "compute_dtype"
        raise InputError(
            f"{key} {getattr(spec, key)}: {name} would be trained in fp16, where the loss scaler cannot unscale its "
            f"gradient; use {key}: bf16, or train no weights of the base"
        )


def _with_noise(alpha: float, embeddings: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
    """NEFTune (arXiv:2310.05914), as in transformers' Trainer, whose own hook needs the value of a tensor."""
    if not embeddings.training:
        return output
    most = alpha / math.sqrt(output.shape[1] * output.shape[2])
    return output + torch.empty_like(output).uniform_(-most, most)


def _upcast_unquantized(model: Any) -> None:
    """Make 16-bit weights fp32, all of which are of layers that are not quantised.

    As `prepare_model_for_kbit_training` of peft (0.21), which also freezes the base and sets up checkpointing.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # On `meta` the weights of quantised layers are still in 16 bit.
            quantised = quantisers.of_bitsandbytes(module) and name == "weight"
            if parameter.dtype in (torch.bfloat16, torch.float16) and not quantised:
                parameter.data = parameter.data.to(torch.float32)


def _quantisation(spec: TrialSpec) -> dict[str, Any]:
    if spec.precision not in QUANTISED:
        return {}
    made = quantisers.config(
        spec.quantizer, spec.precision, double=spec.double_quantization, arithmetic=_weights_dtype(spec)
    )
    return {"quantization_config": made}


def _set_up_4bit(model: Any, spec: TrialSpec) -> None:
    """Keep 4-bit weights in the layout that has gradients, and compute in the type of `precision`.

    On a CPU with bf16 instructions, bitsandbytes (0.50) converts a layer's weights in its first evaluation, for good,
    to a layout whose product has no gradient. The patch can go once it converts them back for training. A checkpoint
    that is stored in 4 bit brings a type to compute in, whatever the spec says.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = _weights_dtype(spec)


def _set_up_8bit(model: Any) -> None:
    """Keep the scales of 8-bit weights on a CPU, where peft (0.21) replaces a weight that it dequantises for DoRA.

    The new one has no scales, and bitsandbytes (0.50) takes the layer's from it all the same in the next forward pass.
    The patch can go once either hands them on.
    """
    from bitsandbytes.nn.modules import Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.init_8bit_state = functools.partial(_take_8bit_state, module)  # type: ignore[method-assign]


def _take_8bit_state(module: Any) -> None:
    weight, state = module.weight, module.state
    state.CB, state.SCB = weight.CB, state.SCB if weight.SCB is None else weight.SCB
    weight.CB = weight.SCB = None


def is_quantised(spec: TrialSpec) -> bool:
    """Whether the base has 8-bit or 4-bit weights."""
    return spec.precision in QUANTISED


def unquantised(spec: TrialSpec) -> TrialSpec:
    """The spec with a base that adapters can be merged into: bf16 instead of 8 or 4 bit."""
    return spec.model_copy(update={"precision": "bf16"}) if spec.precision in QUANTISED else spec


def weights_format(spec: TrialSpec) -> str:
    """Format of the base weights, by its name in a grid."""
    return spec.precision


def format_of_linear_weights(spec: TrialSpec) -> str:
    """Format that the base's linear weights are in where none was skipped: `precision`, without its arithmetic."""
    return "fp32" if spec.precision.endswith("-mixed") else spec.precision


def compute_dtype(spec: TrialSpec) -> torch.dtype | None:
    """Type of 16-bit arithmetic over weights that are of another type in part; null: none, for fp32 and for full
    fine-tuning in 16 bit.
    """
    if spec.adapter == FULL and spec.precision in ("bf16", "fp16") and not spec.autocasts:
        return None
    if spec.compute_dtype is not None:
        return None if spec.compute_dtype == "fp32" else _WEIGHTS[spec.compute_dtype]
    return _COMPUTE.get(spec.precision)


def autocast(spec: TrialSpec, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast for a forward pass at the spec's precision."""
    if not spec.autocasts:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=compute_dtype(spec))


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """Parameters that the optimizer changes."""
    return [p for p in model.parameters() if p.requires_grad]


def adapters(model: Any) -> list[torch.Tensor]:
    """Tensors of the adapters, and what is trained of the base with them; none for full fine-tuning."""
    return adapter_methods.tensors(model)


def not_trained(model: Any, spec: TrialSpec) -> str | None:
    """What the spec names and is not trained, because text does not reach it; null: there is nothing."""
    if spec.adapter != FULL:
        left, trained = adapter_methods.without(model)
        what = f"{len(left)} layers of {{}} get no adapter"
    else:
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if not parameter.requires_grad}
        left, trained = list(sizes), [name for name, _ in model.named_parameters() if name not in sizes]
        what = f"{sum(sizes.values()):,} parameters of {{}} are not trained"
    where = " and ".join(reach.parts(left, trained))
    return f"{spec.base_model}: {what.format(where)}: text does not reach them" if left else None


def sizes(model: Any, spec: TrialSpec) -> dict[str, float | int | None]:
    """`trainable_parameters` and `total_parameters`, and of adapters their `_bytes`, `_share` and `_seconds`."""
    seconds = {} if spec.adapter == FULL else {"adapter_seconds": model.seconds_to_attach}
    return {**model_sizes.of(model), **seconds}
