"""Trained adapters on disk, in peft's format."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from harness._util.files import folder_aside
from harness._util.messages import first_line
from harness._util.redact import redact_home
from harness.errors import InputError
from harness.spec.trial import TrialSpec
from harness.training import distributed


def save(model: Any, spec: TrialSpec, folder: Path | None) -> str | None:
    """Save a model's adapter as `folder/<id>`. Every rank must call it, since weights may be sharded.

    Args:
        model: with adapters.
        spec: that it was trained by.
        folder: of the results; null on all ranks but the first.

    Returns:
        The id, which is the hash of the files; null without a folder.
    """
    weights = None if spec.sharding == "none" else full_weights(model)
    if folder is None:
        return None
    adapter_id = ""

    def name(aside: Path) -> str:
        nonlocal adapter_id
        adapter_id = _content_hash(aside)
        return adapter_id

    with folder_aside(folder, name, exist_ok=True) as aside:
        write(model, spec, aside, weights=weights)
    return adapter_id


def full_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a sharded model that peft saves, by their names: adapters, trained biases and embeddings."""
    from peft import get_peft_model_state_dict

    weights = model.state_dict()
    saved = {id(weight) for weight in get_peft_model_state_dict(model, state_dict=weights).values()}
    return {name: distributed.full_tensor(weight) for name, weight in weights.items() if id(weight) in saved}


def write(model: Any, spec: TrialSpec, folder: Path, *, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write an adapter. Its base has the name that the spec gives it, not a path of this machine.

    Args:
        model: with the adapter.
        spec: that it was trained by.
        folder: to write to.
        weights: of `full_weights`; null: the model's own, which is not sharded.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = spec.base_model
        for name, value in vars(config).items():
            if isinstance(value, set):  # whose order differs between processes
                setattr(config, name, sorted(value))
    model.save_pretrained(folder, state_dict=weights)
    card = folder / "README.md"  # peft writes the path there
    # Private attribute of transformers (5.23), from which peft (0.21) takes the path.
    text = card.read_text(encoding="utf-8").replace(str(model.config._name_or_path), spec.base_model)
    card.write_text(redact_home(text), encoding="utf-8")


def load(base: Any, folder: Path) -> Any:
    """A base model with the adapter of a folder attached, for inference.

    Raises:
        InputError: the adapter was made for another model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    misfit = f"adapter {folder} does not fit the base {type(base).__name__}"
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError) as error:
        detail = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        raise InputError(f"{misfit}: {detail or first_line(error)}") from None
    expected = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        actual = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    if actual != expected:
        different = sorted(actual.keys() ^ expected.keys())
        raise InputError(f"{misfit}: {different[0] if different else 'its shapes'} is in one of them alone")
    return model


def merged(network: Any) -> Any:
    """The base of a model with adapters, with the adapters merged into its weights.

    A weight that several modules hold (a head tied to the embeddings) is changed in the adapted module alone: the model
    is no longer tied.

    Raises:
        InputError: the method adds to no weights, or peft does not merge it into these.
    """
    if not hasattr(network, "merge_and_unload"):
        raise InputError("it adds to what layers are given, not to weights: there is nothing to merge")
    _untie(network.get_base_model())
    try:
        return network.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"peft does not merge it into these weights ({first_line(error)})") from None


def _untie(base: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    holders = Counter(id(weight) for module in base.modules() for weight in module.parameters(recurse=False))
    adapted = [module.get_base_layer() for module in base.modules() if isinstance(module, BaseTunerLayer)]
    for layer in adapted:
        for name, weight in layer.named_parameters(recurse=False):
            if holders[id(weight)] > 1:
                setattr(layer, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
                for config in (base.config, base.config.get_text_config()):
                    config.tie_word_embeddings = False


def _content_hash(folder: Path) -> str:
    """16 hex digits of the hash of a folder's weights and configuration."""
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"))):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
