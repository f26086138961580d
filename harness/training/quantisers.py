"""Libraries that quantise a base: what transformers takes to load with each, and the layers that they make."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import torch

from harness._util.messages import pip_install
from harness.errors import InputError


def config(quantizer: str, name: str, *, double: bool, arithmetic: torch.dtype) -> Any:
    """What `from_pretrained` takes to quantise.

    Args:
        quantizer: the library.
        name: of the format: int8, int4, nf4 or fp4.
        double: whether bitsandbytes quantises the scales too.
        arithmetic: type in which bitsandbytes multiplies 4-bit weights; others multiply in that of the weights.

    Raises:
        InputError: the library is not installed.
    """
    if quantizer == "torchao":
        return _config_of_torchao()
    if quantizer == "hqq":
        _require("hqq")
        from harness.training import hqq_format

        return hqq_format.Config(bits=int(name.removeprefix("int")))
    from transformers import BitsAndBytesConfig

    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=arithmetic,
    )


def _config_of_torchao() -> Any:
    _require("torchao")
    from transformers import TorchAoConfig

    return TorchAoConfig(int8_of_torchao())


def int8_of_torchao() -> Any:
    """The settings of torchao for int8 weights with a scale to a row."""
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)  # else it sets options of torch's compiler


def _require(library: str) -> None:
    # torchao (0.18) says of each kernel that it cannot load that it cannot, and torch (2.13) of its enumerations.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        importlib.import_module(library)
    except ImportError:
        raise InputError(f"quantizer {library}: it is not installed; {pip_install(library)}") from None


def quantise_on_meta(model: Any, quantization: Any, *, skipped: list[str] | None) -> None:
    """Make the layers of a model on `meta` those that loading it with a configuration would make.

    Args:
        model: changed in place.
        quantization: from `config`.
        skipped: parts of names that a stored checkpoint leaves as they are; null: the usual ones.
    """
    # Internal functions of transformers (5.23), whose `from_pretrained` quantises only while it loads weights. A
    # public way to replace the layers of a model on `meta` would let them go.
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import HfQuantizer

    if quantization.quant_method == "bitsandbytes":
        skipped = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        replace_with_bnb_linear(model, skipped, quantization)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # new ones are fp32, and loading gives them the type of those before
                parameter.data = parameter.data.to(dtypes[name])
        # peft (0.21) reads these attributes of the model.
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization.load_in_8bit, quantization.load_in_4bit
        return
    quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.validate_environment()
    quantizer._process_model_before_weight_loading(model)
    for name, parameter in list(model.named_parameters()):
        if quantizer.param_needs_quantization(model, name):
            operation = quantizer.get_quantize_ops()
            operation.convert({name: parameter.data}, model=model, full_layer_name=name, missing_keys=set())
    model.hf_quantizer = quantizer  # peft (0.21) looks for torchao's there


def unpacked(model: Any, dtype: torch.dtype) -> Any:
    """A model of a checkpoint that bitsandbytes had quantised, with its weights in 16 bit: it can be saved as such."""
    model = model.dequantize(dtype)
    # Private attribute of transformers (5.23): how it has read the weights, of which saving wants the reverse in vain.
    model._weight_conversions = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or ()
        if not any("bitsandbytes" in type(step).__module__ for step in getattr(conversion, "operations", ()))
    ]
    return model


def of_bitsandbytes(module: torch.nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes'."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return isinstance(module, Linear4bit | Linear8bitLt)


def of_hqq(module: torch.nn.Module) -> bool:
    """Whether a layer is one of HQQ's, which is no linear layer of torch's."""
    library = sys.modules.get("hqq.core.quantize")
    return library is not None and isinstance(module, library.HQQLinear)


def of_torchao(parameter: torch.Tensor | None) -> bool:
    """Whether a weight is one of torchao's: a tensor that is made of others."""
    return type(parameter).__module__.startswith("torchao.")


def dequantised(module: Any) -> torch.Tensor:
    """A layer's weight in the type of its arithmetic, as peft (0.21) has it for DoRA, but for bitsandbytes' layers."""
    from peft.utils.integrations import dequantize_module_weight

    weight: torch.Tensor = dequantize_module_weight(module)
    return weight
