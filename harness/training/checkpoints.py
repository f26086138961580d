"""Weights and tokenizers of base models on disk; converted and random ones are made once, in the cache."""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from harness._util.files import folder_aside
from harness._util.messages import first_line, one_line
from harness.errors import InputError
from harness.sources import models
from harness.spec.keys import OWN_TEMPLATE
from harness.spec.trial import TrialSpec
from harness.training import chat_templates


class NoTokenizer(InputError):
    """A base model has no tokenizer that can be loaded."""


def load_tokenizer(spec: TrialSpec, *, trust_remote_code: bool = False, folder: Path | None = None) -> Any:
    """The base model's tokenizer, or that of a folder, with the chat template and the special tokens of the spec.

    For random weights it is `byte_tokenizer`, which has no chat template, and few special tokens: its losses are null,
    and its examples are longer than any other's, if anything.

    Raises:
        NoTokenizer: there is none, or it needs its own code.
        InputError: the chat template is unknown or no Jinja, or the model's own and there is none; or a special token
            is not in the vocabulary.
    """
    own = spec.chat_template in (None, OWN_TEMPLATE)
    template = None if own else chat_templates.resolve(str(spec.chat_template))
    trained = models.pretrained(spec.base_model)
    tokenizer = _own_tokenizer(spec, trust_remote_code, folder) if trained else byte_tokenizer()
    _set_special_tokens(tokenizer, spec, refuse_unknown=trained)
    if template is not None and trained:
        chat_templates.install(template, tokenizer)
    elif spec.chat_template == OWN_TEMPLATE and trained and not tokenizer.chat_template:
        raise InputError(
            f"{spec.base_model} has no chat template of its own; give one with chat_template: "
            f"{', '.join(chat_templates.TEMPLATES)}, or its Jinja text"
        )
    return tokenizer


def _own_tokenizer(spec: TrialSpec, trust_remote_code: bool, folder: Path | None) -> Any:
    from transformers import AutoTokenizer

    place = checkpoint_folder(spec.base_model, spec.folder) if folder is None else str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _no_tokenizer(spec, one_line(first_line(error)).rstrip(":")) from None
    if not _has_vocabulary(tokenizer):
        raise _no_tokenizer(spec, f"what there is knows {len(tokenizer)} tokens, and no words or letters among them")
    return tokenizer


def vocabulary(spec: TrialSpec, *, trust_remote_code: bool = False) -> int:
    """Number of tokens that a base model has embeddings for, by its configuration; 0: it does not say."""
    from transformers import AutoConfig

    folder = checkpoint_folder(spec.base_model, spec.folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return int(getattr(config.get_text_config(), "vocab_size", 0))


def _has_vocabulary(tokenizer: Any) -> bool:
    """Whether it tells words apart: of a folder without its files transformers (5.23) makes an empty one for some
    models, whose every text is one token.
    """
    ids = tokenizer("The fox ran over 12 hills.", add_special_tokens=False)["input_ids"]
    return len(set(ids)) > 2


def _no_tokenizer(spec: TrialSpec, reason: str) -> NoTokenizer:
    return NoTokenizer(
        f"base_model {spec.base_model} has no tokenizer that can be loaded ({reason}); put tokenizer.json and "
        "tokenizer_config.json next to its weights"
    )


def _set_special_tokens(tokenizer: Any, spec: TrialSpec, *, refuse_unknown: bool) -> None:
    """Give tokens of the vocabulary their roles.

    A padding token that is not there is passed over: padding is masked, so any id will do, and a new one would have no
    embedding.
    """
    vocabulary = tokenizer.get_vocab() if spec.special_tokens else {}
    for role, token in spec.special_tokens or ():
        if token in vocabulary:
            tokenizer.add_special_tokens({role: token})
        elif refuse_unknown and role != "pad_token":
            own = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
            near = difflib.get_close_matches(token, own, n=1) or [getattr(tokenizer, role) or min(own, default="")]
            raise InputError(
                f"special_tokens: {role} {token!r} is not in the vocabulary of {spec.base_model}, and tokens are not "
                f"added to it; use one that is, like {near[0]!r}"
            )


def pad_id(tokenizer: Any, embeddings: int | None) -> int:
    """Id for padding: that of the tokenizer where it has an embedding. Any id will do, since the mask marks padding.

    Args:
        tokenizer: of the model.
        embeddings: ids of the model, those below; null: not known.
    """
    candidates: tuple[int | None, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in candidates if i is not None and (embeddings is None or i < embeddings)), 0)


def byte_tokenizer() -> Any:
    """A tokenizer of one token per byte, for models without one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin|>", "<|end|>"]  # ids 0 and 1, as in sources.models.ARCHITECTURES
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )


def checkpoint_folder(base_model: str, folder: str | None = None) -> str:
    """What transformers loads: a folder, or a hub id. A relative path begins at `folder`; null: the current one."""
    source = models.resolve(base_model, folder)
    if source.kind == "bundled":
        file = models.bundled_file()
        return str(_made_once(f"{source.name}-{file.stat().st_size}", lambda folder: _convert(file, folder)))
    if source.kind == "random":
        config = models.random_config(source.name, folder)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
        name = f"random-{Path(source.name).stem}-{digest}"
        return str(_made_once(name, lambda folder: _random_checkpoint(config, folder)))
    return source.name


def prepare(base_model: str) -> None:
    """Make or convert a model's weights now, if they are not cached: the first trial would include that time.

    Raises:
        InputError: it names no model.
    """
    checkpoint_folder(base_model)


def _made_once(name: str, make: Any) -> Path:
    """A folder of the cache; the first process that needs it makes it."""
    cache = models.cache_folder()
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):
        for left in cache.glob(f".{name}.*/"):  # of a killed process: nobody else holds the lock
            shutil.rmtree(left, ignore_errors=True)
        if not folder.is_dir():
            with folder_aside(cache, name) as aside:
                aside.mkdir()
                make(aside)
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
    """Write a checkpoint of normally distributed weights in bf16, which is then loaded as any other.

    It is written shard by shard: the whole is never in memory.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=1))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = set(model.all_tied_weights_keys) if config.get("tie_word_embeddings") else set()
    generator = torch.Generator().manual_seed(0)
    std = float(config.get("initializer_range", 0.02))

    index: dict[str, str] = {}
    for number, shard in enumerate(_shards(model, tied), start=1):
        name = f"model-{number:05d}.safetensors"
        tensors = {key: _random_weight(shape, std, generator) for key, shape in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _shards(model: Any, tied: set[str]) -> Iterator[list[tuple[str, torch.Size]]]:
    shard: list[tuple[str, torch.Size]] = []
    size = 0
    for key, parameter in model.named_parameters():
        if key not in tied:
            shard.append((key, parameter.shape))
            size += parameter.numel() * 2
            if size >= _SHARD_BYTES:
                yield shard
                shard, size = [], 0
    if shard:
        yield shard


def _random_weight(shape: torch.Size, std: float, generator: torch.Generator) -> torch.Tensor:
    """Ones for norms (one dimension), else normally distributed."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, std, generator=generator)
