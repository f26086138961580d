"""The adapter of a spec: peft's methods, and the options of their own that `adapter_options` gives."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import time
import typing
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pydantic
import torch

from harness._util.messages import first_line, one_line
from harness.errors import InputError
from harness.spec.keys import INITIALISED_LATER, LORA
from harness.spec.trial import TrialSpec
from harness.training import adapter_inputs, adapter_targets, initialisations, lora_variants

_GRID_KEYS = {
    "target_modules": adapter_targets.KEY,
    "modules_to_save": "lora_modules_to_save",
    "target_parameters": "lora_target_parameters",
}
"""Options of peft that are keys of a grid, for every method that has them."""
_OF_LORA = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "bias": "lora_bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "init_lora_weights": "init_lora_weights",
}
"""The same for LoRA."""
_SET_HERE = frozenset(
    {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
     "inference_mode", "exclude_modules", "total_step"}
)  # fmt: skip
"""Options that follow from the trial."""
_OF_GPTQ = "peft has it over GPTQ's checkpoints alone, which are none of the formats of precision"
_NOT_READ = {
    "adalora": {"r": "adalora does not read it; use init_r and target_r"},
    "cpt": dict.fromkeys(
        ("opt_weighted_loss_type", "opt_loss_decay_factor"),
        "losses of all methods are of the same tokens, at one weight; leave it out",
    ),
    LORA: {
        **dict.fromkeys(("use_qalora", "qalora_group_size"), f"{_OF_GPTQ}; leave it out"),
        **dict.fromkeys(
            ("eva_config", "corda_config", "loftq_config", "lora_ga_config"),
            "initialisations by data have settings of their own (docs/grids.md); use init_lora_weights alone",
        ),
        "arrow_config": "it chooses between adapters that were trained before; leave it out",
    },
}
"""Options that would have no effect, with why, by method."""
_OWN_LAYERS = frozenset({"adaption_prompt", "ln_tuning", "trainable_tokens"})
"""Methods that choose their layers themselves, none of which is linear, unless they are named."""
_SCHEDULE = {"adalora": "total_step"}
"""Options that are the number of optimizer steps, by method."""
_ANY_STEPS = 10**9
"""That number until it is known."""
_OF_VALUES = frozenset({"boft", "unilora"})
"""Methods that make tensors of an adapter of the values of others, such as permutations."""
_OUT_OF_WEIGHTS = ("pissa", "olora", "corda")
"""Beginnings of the initialisations that take a part out of the base's weights."""
_REQUIRED: dict[str, dict[str, Any]] = {
    **{name: {"num_virtual_tokens": 20} for name in ("prompt_tuning", "p_tuning", "prefix_tuning", "cartridge")},
    "adaption_prompt": {"adapter_len": 10, "adapter_layers": 8},
    "trainable_tokens": {"token_indices": [10, 11]},
    "cpt": {"cpt_token_ids": [10, 11], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
}
"""Options that peft has no default for, each with an example, by method."""


def attach(network: Any, spec: TrialSpec, unreached: Collection[str]) -> Any:
    """A base model with adapters over it.

    Args:
        network: the base model.
        spec: which adapters, and where.
        unreached: names of parameters that text does not reach; a layer whose own are all among them gets no adapter.

    Raises:
        InputError: a target is the name of no layer that can have an adapter, or of none that text reaches; or the
            method has no such option, or cannot be had of this model.
    """
    from peft import get_peft_model

    started = time.perf_counter()
    on_meta = network.device.type == "meta"
    of_base = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    config, unfit = _config(network, spec, unreached)
    if spec.sample_packing and config.is_prompt_learning:
        raise InputError(
            f"adapter {spec.adapter} with sample_packing: its prompt would stand before the first example of a row "
            "alone; use sample_packing: false"
        )
    try:
        # peft makes adapters of 16-bit and quantised models fp32; those of a model on `meta` are on `meta`.
        with _on_meta(spec) if on_meta else contextlib.nullcontext():
            adapted = get_peft_model(network, config, low_cpu_mem_usage=on_meta)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        if on_meta and isinstance(error, NotImplementedError):
            raise  # there are no values on `meta`, and the method makes its adapters of them
        raise InputError(one_line(unfit or _described(spec, error))) from None
    if on_meta:
        _to_meta(adapted)
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:  # a count: peft (0.21) lets AdaLoRA train it over 16-bit and quantised weights
            parameter.requires_grad_(False)
    named = (*adapted.named_parameters(), *adapted.named_buffers())
    adapted.own_tensors = frozenset(
        name for name, tensor in named if id(tensor) not in of_base and "base_layer." not in name
    )
    # What is trained of the base itself, such as biases, belongs to the adapter too.
    adapted.adapter_tensors = adapted.own_tensors | {name for name, tensor in named if tensor.requires_grad}
    if spec.adapter == LORA:
        _set_up_lora(adapted, spec)
    elif spec.adapter == "adaption_prompt":  # peft (0.21) calls the forward pass that the model had when it was made
        adapted.base_model.forward = adapted.get_base_model().__call__
    adapted.seconds_to_attach = time.perf_counter() - started
    return adapted


@contextlib.contextmanager
def _on_meta(spec: TrialSpec) -> Iterator[None]:
    """Within, a method makes its tensors on `meta`, unless it needs some values to make others."""
    with contextlib.nullcontext() if spec.adapter in _OF_VALUES else torch.device("meta"):
        yield


def _to_meta(adapted: Any) -> None:
    """Put all that a method has made of values on `meta` too."""
    for module in adapted.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to("meta")


def _set_up_lora(adapted: Any, spec: TrialSpec) -> None:
    lora_variants.check(adapted, spec)
    if spec.init_lora_weights in INITIALISED_LATER:
        initialisations.check(adapted, spec.init_lora_weights)
    if spec.init_lora_weights.startswith(_OUT_OF_WEIGHTS):
        _refuse_tied(adapted, f"init_lora_weights {spec.init_lora_weights}")
    elif adapted.peft_config["default"].kasa_config is not None:
        _refuse_tied(adapted, "kasa_config")
    if spec.loraplus_lr_ratio is not None:
        _refuse_embeddings(adapted)
    set_dtype(adapted, spec)
    for name, parameter in adapted.named_parameters():
        if spec.optimizer == "lora_fa" and (".lora_A." in name or ".lora_embedding_A" in name):
            parameter.requires_grad_(False)
    if spec.recompute_adapter_inputs:
        adapter_inputs.recompute(adapted)


def set_dtype(adapted: Any, spec: TrialSpec) -> None:
    """Give LoRA's matrices the type that a spec trains them in: peft makes them fp32 over 16-bit weights."""
    if spec.adapter != LORA or spec.adapter_dtype != "bf16":
        return
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def _refuse_embeddings(adapted: Any) -> None:
    """Refuse LoRA on embeddings with LoRA+, whose implementations train it at a rate that follows from no other."""
    name = next((name for name, _ in adapted.named_parameters() if ".lora_embedding_" in name), None)
    if name is not None:
        layer = name.partition(".lora_embedding_")[0].rpartition(".")[2]
        raise InputError(
            f"loraplus_lr_ratio with an adapter on {layer}: embeddings have a rate of their own in LoRA+; leave it out "
            "of lora_target_modules, or name it in lora_modules_to_save"
        )


def _refuse_tied(adapted: Any, asked: str) -> None:
    """Refuse to take a part out of a weight that another module has too, and no adapter in its place.

    Raises:
        InputError: there is such a weight.
    """
    base = adapted.get_base_model()
    holders = Counter(id(weight) for module in base.modules() for weight in module.parameters(recurse=False))
    for name, layer in initialisations.layers(adapted).items():
        if any(holders[id(weight)] > 1 for weight in layer.get_base_layer().parameters(recurse=False)):
            raise InputError(
                f"{asked}: it takes a part out of the weight of {name}, which "
                f"another layer has too; leave {name.rpartition('.')[2]} out of {adapter_targets.KEY}"
            )


def _described(spec: TrialSpec, error: Exception) -> str:
    """What peft or torch says of a method that cannot be had as it is asked for."""
    options = ", ".join(f"{name}: {value}" for name, value in spec.adapter_options or ())
    given = f" with adapter_options {{{options}}}" if options else ""
    return f"adapter {spec.adapter}{given}: peft: {first_line(error)}"


def _config(network: Any, spec: TrialSpec, unreached: Collection[str]) -> tuple[Any, str | None]:
    """The configuration of peft, and what is wrong with the layers that the spec names, if something is."""
    kind = _config_class(spec.adapter)
    fields = {field.name for field in dataclasses.fields(kind)}
    options = {"task_type": "CAUSAL_LM", **_options(kind, spec), **_of_lora(network, spec)}
    if spec.adapter in _SCHEDULE:
        options[_SCHEDULE[spec.adapter]] = _ANY_STEPS
    if "modules_to_save" in fields and spec.adapter not in _OWN_LAYERS:
        options["modules_to_save"] = adapter_targets.whole(network, spec)
    matches: Mapping[str, Sequence[str]] = {}
    if "target_modules" in fields and not (spec.adapter in _OWN_LAYERS and spec.lora_target_modules is None):
        options["target_modules"] = adapter_targets.targets(network, spec, _by_architecture(spec.adapter), options)
        matches = adapter_targets.matches(network, options["target_modules"])
    if spec.adapter == "ia3":
        options |= adapter_targets.of_ia3(network, matches, options.get("feedforward_modules"))
    try:
        config = kind(**options)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(one_line(_described(spec, error))) from None
    if spec.lora_target_modules is not None and matches:  # an architecture may lack one of peft's defaults
        adapter_targets.refuse_missing(network, matches, config)
    if matches:
        config.exclude_modules = adapter_targets.excluded(network, matches, unreached)
    return config, adapter_targets.unfit(network, matches)


def _config_class(method: str) -> Any:
    """The class of a method's configuration.

    Raises:
        InputError: this release has no such method.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    classes = {kind.value.lower(): each for kind, each in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method not in classes:
        raise InputError(
            f"adapter {method}: peft {peft.__version__} does not have it; use {', '.join(sorted(classes))}"
        )
    return classes[method]


def _by_architecture(method: str) -> Mapping[str, Sequence[str] | str]:
    """The layers that a method's adapters are on unless they are named, by kinds of models."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    of_ia3: Mapping[str, Sequence[str]] = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    tuners = {kind.value.lower(): each for kind, each in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    return of_ia3 if method == "ia3" else getattr(tuners[method], "target_module_mapping", {})


def _options(kind: Any, spec: TrialSpec) -> dict[str, Any]:
    """The options of a spec, each checked against the type that peft declares.

    Raises:
        InputError: the method has no such option, it is a key of its own, or it is of another type; or one is lacking.
    """
    hints = typing.get_type_hints(kind)
    keys = _keys(spec.adapter)
    options: dict[str, Any] = {}
    for name, value in spec.adapter_options or ():
        if name in keys:
            raise InputError(f"adapter_options.{name}: it has a key of its own; use {keys[name]}")
        if name in _SET_HERE:
            raise InputError(f"adapter_options.{name}: it follows from the trial; leave it out")
        if why := _NOT_READ.get(spec.adapter, {}).get(name):
            raise InputError(f"adapter_options.{name}: {why}")
        known = [each for each in hints if each not in _unavailable(spec.adapter)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"adapter_options.{name}: {spec.adapter} has no such option; {hint}its options are {', '.join(known)}"
            )
        try:  # as JSON, where a list stands for a set, and a text for a value of an enumeration
            options[name] = pydantic.TypeAdapter(hints[name]).validate_json(json.dumps(value), strict=True)
        except pydantic.ValidationError as error:
            raise InputError(one_line(f"adapter_options.{name}: {value!r}: {error.errors()[0]['msg']}")) from None
    if lacking := [name for name in _REQUIRED.get(spec.adapter, {}) if name not in options]:
        example = json.dumps(_REQUIRED[spec.adapter]).replace('"', "")
        raise InputError(f"adapter {spec.adapter} needs {' and '.join(lacking)}, as in adapter_options: {example}")
    return options


def _keys(method: str) -> dict[str, str]:
    """Keys of a grid, by the options of a method that they are."""
    return {**_GRID_KEYS, **(_OF_LORA if method == LORA else {})}


def _unavailable(method: str) -> frozenset[str]:
    """Options of peft that `adapter_options` does not take for a method."""
    return _SET_HERE.union(_keys(method), _NOT_READ.get(method, ()))


def options_of(method: str) -> list[tuple[str, str, str]]:
    """Name, default and meaning of each option that `adapter_options` takes for a method, in peft's words.

    Raises:
        InputError: the installed peft does not have the method.
    """
    fields = dataclasses.fields(_config_class(method))
    return [
        (field.name, _default(field), " ".join(str(field.metadata.get("help", "")).split()))
        for field in fields
        if field.name not in _unavailable(method)
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(getattr(field.default, "value", field.default))
    return str(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"


def _of_lora(network: Any, spec: TrialSpec) -> dict[str, Any]:
    """LoRA's options that are keys of a grid."""
    if spec.adapter != LORA:
        return {}
    # What takes parts of the base's weights has no values on `meta`, and adapters of the same shapes.
    of_weights = network.device.type == "meta" and spec.init_lora_weights != "mica"
    as_default = {"default", *INITIALISED_LATER, spec.init_lora_weights if of_weights else "default"}
    return {
        "r": spec.lora_r,
        "lora_alpha": spec.lora_alpha,
        "lora_dropout": spec.lora_dropout,
        "bias": spec.lora_bias,
        "target_parameters": adapter_targets.weights(network, spec),
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "init_lora_weights": True if spec.init_lora_weights in as_default else spec.init_lora_weights,
    }


def prompt_tokens(network: Any) -> int:
    """Tokens of an adapter's prompt, which stand before each text; 0 where it has none."""
    configs = getattr(network, "peft_config", {}).values()
    return sum(config.num_virtual_tokens for config in configs if config.is_prompt_learning)


def without(network: Any) -> tuple[list[str], list[str]]:
    """Names of the layers that match the targets of a model with adapters and have none, and of those that have one."""
    (config,) = network.peft_config.values()
    excluded = getattr(config, "exclude_modules", None) or ()
    return list(excluded), list(getattr(network.base_model, "targeted_module_names", ()))


def tensor_names(network: Any) -> frozenset[str]:
    """Names of the parameters and buffers that a model's adapter has, and of what it trains of the base; empty without
    an adapter.
    """
    names: frozenset[str] = getattr(network, "adapter_tensors", frozenset())
    return names


def own_names(network: Any) -> frozenset[str]:
    """Names of the parameters and buffers that an adapter has added; empty without one."""
    names: frozenset[str] = getattr(network, "own_tensors", frozenset())
    return names


def tensors(network: Any) -> list[torch.Tensor]:
    """The tensors of `tensor_names`."""
    names = tensor_names(network)
    return [tensor for name, tensor in (*network.named_parameters(), *network.named_buffers()) if name in names]


def set_steps(network: Any, steps: int) -> None:
    """Say how many optimizer steps there will be to a method that takes ranks away on the way."""
    for config in getattr(network, "peft_config", {}).values():
        if getattr(config, "total_step", None) is not None:
            config.total_step = steps
            network.base_model.rankallocator.set_total_step(steps)


def after_update(network: Any, step: int) -> None:
    """Let a method that takes ranks away look at the gradients of a step, while they are there.

    Args:
        network: with or without adapters.
        step: number of the optimizer step, from 1.
    """
    allocate = getattr(getattr(network, "base_model", None), "update_and_allocate", None)
    if allocate is not None:
        allocate(step)


def penalty(network: Any) -> torch.Tensor | None:
    """What a method adds to the loss, after a forward pass; null: nothing.

    AdaLoRA's is the mean distance of its matrices from orthogonal ones, at its weight (arXiv:2303.10512, section 3.1).
    """
    for config in getattr(network, "peft_config", {}).values():
        if weight := getattr(config, "orth_reg_weight", 0.0):
            matrices = [
                each.T if ".lora_B." in name else each
                for name, each in network.named_parameters()
                if ".lora_A." in name or ".lora_B." in name
            ]
            gaps = [rows @ rows.T - torch.eye(len(rows), device=rows.device) for rows in matrices]
            return float(weight) * torch.stack([torch.linalg.matrix_norm(gap) for gap in gaps]).mean()
    return lora_variants.own_term(network)
