"""The layers that get an adapter: those that the spec names, all of them, or it is refused."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from harness._util.messages import first_line, one_line
from harness.errors import InputError
from harness.spec.keys import ALL_LINEAR, LORA, is_pattern
from harness.spec.trial import TrialSpec
from harness.training import quantisers

KEY = "lora_target_modules"
"""The key that names them."""
_INDICES = "layers_to_transform"
"""The option of peft that chooses among them by their indices."""


def targets(
    network: Any,
    spec: TrialSpec,
    by_architecture: Mapping[str, Sequence[str] | str],
    options: Mapping[str, Any] = MappingProxyType({}),
) -> str | list[str]:
    """As peft takes them: a text is a regular expression of whole names, or `all-linear`.

    Args:
        network: the base model.
        spec: which layers.
        by_architecture: the method's default layers by kinds of models.
        options: of the method, which may choose among the layers by their indices.

    Raises:
        InputError: they are the defaults, and the method has none for this kind of model; or there is no such index.
    """
    if spec.lora_target_modules is not None and spec.lora_target_modules[0] != ALL_LINEAR:
        names = list(spec.lora_target_modules)
        return names[0] if is_pattern(names[0]) else names
    if spec.lora_target_modules is None and not spec.lora_target_linear:
        return _defaults(network, by_architecture)
    others = (spec.lora_target_modules or ())[1:]
    # peft (0.21) does not count HQQ's layers among all linear ones, and chooses none of them by their indices.
    if others or options.get(_INDICES) is not None or any(map(quantisers.of_hqq, network.modules())):
        return [*_with_indices(linear_names(network), options), *others]
    return ALL_LINEAR


def _with_indices(names: Sequence[str], options: Mapping[str, Any]) -> Sequence[str]:
    """Those of whole names that have one of the indices that an option chooses; peft would take them all."""
    given = options.get(_INDICES)
    if given is None or given == []:
        return names
    chosen: list[str] = []
    for index in [given] if isinstance(given, int) else given:
        layer = SimpleNamespace(layers_to_transform=index, layers_pattern=options.get("layers_pattern"))
        of_layer = [name for name in names if _is_in(layer, name)]
        if not of_layer:
            raise InputError(f"adapter_options.{_INDICES}: no linear layer is in layer {index}; layers count from 0")
        chosen += of_layer
    return chosen


def _is_in(layer: SimpleNamespace, name: str) -> bool:
    """Whether a module is in a layer, by peft's rule for names that end in a target."""
    from peft.tuners.tuners_utils import check_target_module_exists

    layer.target_modules = [name.rpartition(".")[2]]
    return name not in layer.target_modules and bool(check_target_module_exists(layer, name))


def linear_names(network: Any) -> list[str]:
    """Whole names of all linear layers but the head."""
    head = network.get_output_embeddings()
    return [name for name, module in network.named_modules() if _is_linear(module) and module is not head]


def whole(network: Any, spec: TrialSpec) -> list[str] | None:
    """Names of the layers that are trained as a whole.

    Raises:
        InputError: the model has none of a name.
    """
    if spec.lora_modules_to_save is None:
        return None
    there = {
        name.rpartition(".")[2]
        for name, module in network.named_modules()
        if next(module.parameters(False), None) is not None
    }
    for name in spec.lora_modules_to_save:
        if not any(f".{each}".endswith(f".{name}") for each, _ in network.named_modules() if each):
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                one_line(
                    f"lora_modules_to_save: {type(network).__name__} has no module {name}; {hint}"
                    f"its layers with weights are {', '.join(sorted(there))}"
                )
            )
    return list(spec.lora_modules_to_save)


def weights(network: Any, spec: TrialSpec) -> list[str] | None:
    """Names of the weights that get an adapter besides the layers.

    Raises:
        InputError: the model has none of a name, or one that cannot have an adapter.
    """
    if spec.lora_target_parameters is None:
        return None
    of_layers = {id(weight) for module in network.modules() if _is_adaptable(module) for weight in module.parameters()}
    fit = [name for name, weight in network.named_parameters() if weight.ndim == 3 and id(weight) not in of_layers]
    for target in spec.lora_target_parameters:
        if not any(f".{name}".endswith(f".{target}") for name in fit):
            others = dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in fit)
            there = f"those are {', '.join(others)}" if others else "there are none; use lora_target_modules"
            raise InputError(
                one_line(
                    f"lora_target_parameters: {type(network).__name__} has no weight of several experts called "
                    f"{target}; {there}"
                )
            )
    return list(spec.lora_target_parameters)


def _defaults(network: Any, by_architecture: Mapping[str, Sequence[str] | str]) -> str | list[str]:
    kind = network.config.model_type
    defaults = by_architecture.get(kind)
    if defaults is None:
        raise InputError(
            f"lora_target_linear false: peft has no default layers for {kind}; name them in {KEY} "
            f"({', '.join(_layers(network))}), or leave the key out for all linear layers"
        )
    return defaults if isinstance(defaults, str) else list(defaults)


def matches(network: Any, targets: str | Sequence[str]) -> dict[str, list[str]]:
    """Whole names of the modules that each target matches, by peft's rules."""
    names = [name for name, _ in network.named_modules() if name]
    if targets == ALL_LINEAR:
        return {ALL_LINEAR: [name for name in names if _is_linear(network.get_submodule(name))]}
    if isinstance(targets, str):
        return {targets: [name for name in names if re.fullmatch(targets, name)]}
    return {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}


def of_ia3(network: Any, targets: Mapping[str, Sequence[str]], feedforward: Any) -> dict[str, list[str]]:
    """Whole names of the layers that IA3 scales, and of those whose inputs it scales, which it must be given together.

    Args:
        network: the base model.
        targets: names of modules that each target matches.
        feedforward: whose inputs are scaled, as targets are named; null: those that peft says for the kind of model,
            the second layer of each MLP. Of a kind that it does not know, there are none.

    Raises:
        InputError: one is named that no target matches.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as BY_ARCHITECTURE

    head = network.get_output_embeddings()
    names = [name for each in targets.values() for name in each if network.get_submodule(name) is not head]
    of_each = matches(network, feedforward or BY_ARCHITECTURE.get(network.config.model_type, []))
    for name, matched in of_each.items():
        if feedforward and not {*matched} & {*names}:
            raise InputError(
                one_line(
                    f"adapter_options.feedforward_modules: {name} is none of the layers that get an adapter, which are "
                    f"{', '.join(dict.fromkeys(each.rpartition('.')[2] for each in names))}"
                )
            )
    chosen = {name for matched in of_each.values() for name in matched}
    return {"target_modules": names, "feedforward_modules": [name for name in names if name in chosen]}


def refuse_missing(network: Any, matches: Mapping[str, Sequence[str]], config: Any) -> None:
    """Check that each target that the spec names matches a module.

    Raises:
        InputError: one matches none.
    """
    missing = [target for target, names in matches.items() if not names]
    if missing and is_pattern(missing[0]):
        linear = (name for name, module in network.named_modules() if _is_linear(module))
        raise InputError(
            f"{KEY}: {missing[0]!r} matches the whole name of no module; names are like {next(linear, 'lm_head')}: "
            "let it begin with .*"
        )
    if missing and (missing := [target for target in missing if target in _converted(network, config)]):
        raise InputError(_missing(network, missing))


def _converted(network: Any, config: Any) -> Collection[str]:
    """The names that peft looks for: those of experts that transformers has in one weight stand for that weight."""
    # Internal function of peft (0.21), which calls it before it looks for layers and changes the configuration.
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, network, None)
    except ValueError as error:
        raise InputError(one_line(f"{KEY}: {first_line(error)}")) from None
    return list(converted.target_modules)


def _missing(network: Any, missing: Sequence[str]) -> str:
    layers = _layers(network)
    near = [name for target in missing for name in _near(target, layers)]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    return one_line(
        f"{KEY}: {type(network).__name__} has no module {' or '.join(missing)}; {hint}"
        f"its layers that can have an adapter are {', '.join(layers)}"
    )


def _near(target: str, layers: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(target.rpartition(".")[2], layers, n=1, cutoff=0.75)


def _layers(network: Any) -> list[str]:
    """Last parts of the names of layers that can have an adapter."""
    names = (name.rpartition(".")[2] for name, module in network.named_modules() if _is_adaptable(module))
    return list(dict.fromkeys(name for name in names if not name.isdigit()))


def _is_adaptable(module: torch.nn.Module) -> bool:
    """Whether peft puts adapters on a layer."""
    nn = torch.nn
    others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return _is_linear(module) or isinstance(module, others)


def _is_linear(module: torch.nn.Module) -> bool:
    """Whether a layer is a linear one; quantised ones are derived from `Linear`, but for HQQ's."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D) or quantisers.of_hqq(module)


def unfit(network: Any, matches: Mapping[str, Sequence[str]]) -> str | None:
    """What is wrong with the first module that matches a target and cannot have an adapter."""
    for target, names in matches.items():
        for name in names:
            module = network.get_submodule(name)
            if not _is_adaptable(module):
                return (
                    f"{target!r} matches {name}, a {type(module).__name__}, which cannot have an adapter; "
                    f"layers that can are {', '.join(_layers(network))}"
                )
    return None


def excluded(network: Any, matches: Mapping[str, Sequence[str]], unreached: Collection[str]) -> list[str] | None:
    """The matched modules that text does not reach; null where it reaches all.

    Raises:
        InputError: it reaches none that a target matches.
    """
    excluded: set[str] = set()
    for target, names in matches.items():
        beyond = {name for name in names if _is_beyond(network.get_submodule(name), name, unreached)}
        if names and len(beyond) == len(names):
            raise InputError(
                one_line(f"{KEY}: {target} is {min(beyond)} alone, which text does not reach: it would not be trained")
            )
        excluded |= beyond
    return sorted(excluded) or None


def no_biases(network: Any, spec: TrialSpec) -> str | None:
    """What to say where biases are to be trained, and the model with its adapters has none; else null."""
    if spec.adapter != LORA or spec.lora_bias == "none":
        return None
    trained = (name for name, parameter in network.named_parameters() if parameter.requires_grad)
    if any("bias" in name and ".lora_" not in name for name in trained):
        return None
    where = "" if spec.lora_bias == "all" else " in layers that get an adapter"
    return f"lora_bias {spec.lora_bias}: {spec.base_model} has no biases{where}; it trains as with lora_bias: none"


def _is_beyond(module: torch.nn.Module, name: str, unreached: Collection[str]) -> bool:
    own = [f"{name}.{each}" for each, _ in module.named_parameters(recurse=False)]
    return bool(own) and all(each in unreached for each in own)
