"""Trained adapters on disk, in peft's format."""

from __future__ import annotations

import hashlib
import re
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

_WHOLE_WEIGHT = re.compile(
    r"base_model\.model\.(.*\.)?(?P<layer>embed_tokens|lm_head|wte|embed_in|embed_out|word_embeddings|embeddings)"
    r"(\.token_adapter)?(\.base_layer|\.modules_to_save|\.original_module)?\.weight"
)
"""Names under which peft saves whole embeddings and heads, by what models call these."""


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
    saved = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    kept = {id(weight) for weight in saved.values()}
    return {name: distributed.full_tensor(weight) for name, weight in weights.items() if id(weight) in kept}


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
    # Where embeddings have an adapter, peft would add the base's own.
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    card = folder / "README.md"  # peft writes the path there
    # Private attribute of transformers (5.23), from which peft (0.21) takes the path.
    text = card.read_text(encoding="utf-8").replace(str(model.config._name_or_path), spec.base_model)
    card.write_text(redact_home(text), encoding="utf-8")


def vocabulary(folder: Path) -> int:
    """Number of tokens of the embeddings that an adapter brings; 0: it brings none."""
    return max(_embeddings(folder).values(), default=0)


def fit_vocabulary(base: Any, folder: Path) -> None:
    """Give a base as many embeddings as an adapter brings, which was trained with more tokens, or with fewer.

    Raises:
        InputError: it does not bring all of them.
    """
    brought, there = _embeddings(folder), base.get_input_embeddings().weight.shape[0]
    if {*brought.values()} <= {there}:
        return
    # peft saves both the embeddings and the head where their number has changed; of weights that are tied, only one
    # that an adapter is over. One alone is a trained copy, and the other has tokens that are not known.
    layers = {match["layer"] for match in map(_WHOLE_WEIGHT.fullmatch, brought) if match}
    whole = len(layers) > 1 or (_is_tied(base) and any(".base_layer." in key for key in brought))
    if len({*brought.values()}) > 1 or not whole:
        raise InputError(
            f"adapter {folder} was trained with {vocabulary(folder)} tokens, the base has {there}, and the adapter "
            "does not bring the embeddings and the head of all of them; give the base that it was trained with, or "
            "save the adapter with save_embedding_layers=True"
        )
    torch.manual_seed(0)  # what the adapter does not replace of a base alone is the same each time
    base.resize_token_embeddings(vocabulary(folder), mean_resizing=False)


def _embeddings(folder: Path) -> dict[str, int]:
    """Number of tokens of each whole embedding, or head, that an adapter brings, by its name there."""
    # Packed weights have one column.
    return {
        key: shape[0]
        for key, shape in _shapes(folder).items()
        if _WHOLE_WEIGHT.fullmatch(key) and len(shape) == 2 and shape[1] > 1
    }


def _is_tied(base: Any) -> bool:
    head = base.get_output_embeddings()
    return head is None or head.weight is base.get_input_embeddings().weight


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's tensors on disk, by their names."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping


def load(base: Any, folder: Path) -> Any:
    """A base model with the adapter of a folder attached, for inference.

    Raises:
        InputError: the adapter was made for another model.
    """
    from peft import PeftModel

    misfit = f"adapter {folder} does not fit the base {type(base).__name__}"
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except (RuntimeError, ValueError) as error:
        detail = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        raise InputError(f"{misfit}: {detail or first_line(error)}") from None
    expected, actual = _expected(model, embeddings=False), _shapes(folder)
    if actual != expected:  # embeddings may be saved that no adapter needs
        different = (expected.items() - actual.items()) | (actual.items() - _expected(model, embeddings=True).items())
        for name, shape in sorted(different):
            raise InputError(f"{misfit}: {name} of shape {shape} is in one of them alone")
    return model


def _expected(model: Any, *, embeddings: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of what peft saves of a model with adapters, with its whole embeddings or without, by their names."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, save_embedding_layers=embeddings)
    return {key: tuple(value.shape) for key, value in saved.items()}


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
    except (RuntimeError, ValueError) as error:
        if not isinstance(error, NotImplementedError | ValueError) and "Impossible to merge" not in str(error):
            raise  # it is not about the method, but of torch, as where memory is lacking
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
