"""Tiny model folders with random weights, as people have them: `tiny_model(folder, "gpt2")` makes one in a moment.

Vocabulary, shapes and special tokens are few and fixed; what a test is about is given as keywords.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<|user|>", "<|system|>", "<|assistant|>")
"""Ids from 0 on; bytes follow, and then padding, as where people add it to a model without one."""
PAD = "<pad>"
EMBEDDINGS = 272
"""A few more than the tokenizer has tokens, as in most models."""

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template with a system turn."""
WITH_BEGINNING = "{{ bos_token }}" + CHAT
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
)
IGNORES_SYSTEM = CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
REFUSES_ALL = "{{ raise_exception('No chat with this model') }}"

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOW: dict[str, Any] = {"head_dim": 16, "sliding_window": 32}
_LINEAR: dict[str, Any] = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),  # with biases
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        _LLAMA | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mixtral": ("mixtral", _LLAMA | _EXPERTS),
    "gemma2": ("gemma2", _LLAMA | _WINDOW),
    "gemma3_text": ("gemma3_text", _LLAMA | _WINDOW),
    "gpt2": ("gpt2", _GPT),  # learned positions
    "gptj": ("gptj", _GPT | {"rotary_dim": 4}),  # a table of computed positions
    "gpt_neox": ("gpt_neox", _LLAMA),
    "opt": ("opt", _LLAMA | {"ffn_dim": 64, "word_embed_proj_dim": 32}),  # learned positions after two other rows
    "granite": ("granite", _LLAMA),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),  # no positions
    "phi3": ("phi3", _LLAMA),
    "lfm2": ("lfm2", _LLAMA | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),  # convolutions
    "qwen3_next": (
        "qwen3_next",
        _LLAMA
        | _LINEAR
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "gpt_oss": ("gpt_oss", _LLAMA | _EXPERTS | _WINDOW),
    "own_code": ("llama", _LLAMA),  # loads with trust_remote_code alone
}
"""Transformers' name of each architecture and its shape."""

_OWN_CODE = '''
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast


class OwnForCausalLM(LlamaForCausalLM):
    """A mean over its own batch for a loss, whatever else the trainer says."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)
'''


def tiny_model(
    folder: Path,
    architecture: str = "llama",
    *,
    config: dict[str, Any] | None = None,
    chat_template: str | None = None,
    adds_beginning: bool = False,
    padding: bool = True,
    with_tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Make a model folder, and its tokenizer of one token per byte.

    Args:
        folder: where; it is made.
        architecture: one of `ARCHITECTURES`.
        config: keys of its config beyond the shape, or in place of others: `vocab_size` is the number of embeddings.
        chat_template: of the tokenizer; null: none.
        adds_beginning: whether the tokenizer puts `<s>` before each text.
        padding: whether the tokenizer has a padding token of its own, the last one.
        with_tokenizer: whether there is a tokenizer.
        dtype: format of the weights.

    Returns:
        The folder, as a spec's `base_model`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(chat_template=chat_template, adds_beginning=adds_beginning, padding=padding)
    if with_tokenizer:
        tokenizer.save_pretrained(folder)
    model_type, shape = ARCHITECTURES[architecture]
    tokens = {"vocab_size": EMBEDDINGS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(tokens | shape | (config or {}))))
    network.to(dtype).save_pretrained(folder)
    if architecture == "own_code":
        (folder / "modeling_own.py").write_text(_OWN_CODE)
        saved = json.loads((folder / "config.json").read_text())
        saved |= {
            "architectures": ["OwnForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
        }
        (folder / "config.json").write_text(json.dumps(saved))
    return str(folder)


def byte_tokenizer(
    *, chat_template: str | None = None, adds_beginning: bool = False, padding: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte, with the special tokens that people's have; arguments as of `tiny_model`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    backend.add_special_tokens([*SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_beginning:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")  # noqa: S106 - no secret
    if padding:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.chat_template = chat_template
    return tokenizer
