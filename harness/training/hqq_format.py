"""Quantises a checkpoint with HQQ while transformers loads it, weight by weight.

transformers (5.23) has a quantizer of that name which loads nothing: it has no operation that quantises, and refuses a
CPU. This one is registered beside it by its public functions, and can go once transformers' own loads.
"""

from __future__ import annotations

from typing import Any

import torch
from hqq.core.quantize import HQQLinear, hqq_base_quant_config
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

_NAME = "hqq-while-loading"
_GROUP = 64
"""Weights that share a scale and a zero, along a row: the default of HQQ and of transformers."""


@register_quantization_config(_NAME)
class Config(QuantizationConfigMixin):
    """What `from_pretrained` takes.

    Args:
        bits: of a weight, 4 or 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(quant_method=_NAME)  # type: ignore[arg-type]  # declared as one of transformers' own
        self.bits = bits


@register_quantizer(_NAME)
class Quantizer(HfQuantizer):
    """Makes linear layers HQQ's, but for the head and what the model keeps in fp32."""

    quantization_config: Config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._skipped = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether it is the weight of a layer that is made HQQ's."""
        owner, _, own = param_name.rpartition(".")
        linear = own == "weight" and isinstance(model.get_submodule(owner), torch.nn.Linear)
        return linear and should_convert_module(param_name, self._skipped)

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a weight, by which transformers expects what a card must hold."""
        return self.quantization_config.bits / 8

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that quantises a weight."""
        return _Quantise(self.quantization_config.bits)

    def is_serializable(self) -> bool:
        """Quantised bases are not written."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters over it are."""
        return True


class _Quantise(ConversionOps):
    def __init__(self, bits: int) -> None:
        self._bits = bits

    def convert(self, input_dict: dict[str, Any], *_: Any, **of: Any) -> dict[str, Any]:
        """Put a layer of HQQ in the place of the linear one that a weight is of."""
        model, full_layer_name = of["model"], of["full_layer_name"]
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        path = full_layer_name.rpartition(".")[0]
        config = hqq_base_quant_config(nbits=self._bits, group_size=_GROUP)
        # What optimises the scales reads values, which there are none of on `meta`.
        config["weight_quant_params"]["optimize"] = not weight.is_meta
        made = HQQLinear(None, config, compute_dtype=weight.dtype, device=str(weight.device))
        made.quantize(weight, **made.quant_config)
        made.bias = model.get_submodule(path).bias
        made._is_hf_initialized = True
        model.set_submodule(path, made)
        of["missing_keys"].discard(full_layer_name)
        return {}
