"""Chat templates by name, and one as text: Jinja, with marks around what the assistant says.

A template may put `{% generation %}` around the text that carries loss; where it does, that is what is trained on.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateSyntaxError

from harness._util.messages import first_line, one_line, unknown
from harness.errors import InputError

# `content` and `eos_token` are printed each by itself: one that is not there is then nothing, and no error.
_ANSWER = "{% generation %}{{ m.content }}%s{% endgeneration %}"
_TRIMMED = "{% generation %}{{ m.content | trim }}%s{% endgeneration %}"
_END = "{{ eos_token }}"
_USERS_AND_ASSISTANTS = (
    "{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('it has no turn of the role ' + m.role) }}{% endif %}"
)


def _template(turn: str, generation_prompt: str, beginning: str = "") -> str:
    """A template of turns that are rendered one by one: `m` is a message."""
    return (
        f"{beginning}{{% for m in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{generation_prompt}{{% endif %}}"
    )


def _with_role(head: str, end: str, after: str, *, role: str = "{{ m.role }}", answer: str = _ANSWER) -> str:
    """One turn whose head names its role (`ROLE`), with the end-of-turn token, and what stands between turns."""
    content = "{{ m.content | trim }}" if answer == _TRIMMED else "{{ m.content }}"
    return (
        head.replace("ROLE", role)
        + "{% if m.role == 'assistant' %}"
        + answer.replace("%s", end)
        + "{% else %}"
        + content
        + end
        + "{% endif %}"
        + after
    )


_NEW_LINE = "{{ '\\n' }}"
_BLANK_LINE = "{{ '\\n\\n' }}"
_BEGINNING = "{{ bos_token }}"
_BETWEEN = "{% if not loop.first %}" + _BLANK_LINE + "{% endif %}"

TEMPLATES: dict[str, str] = {
    "chatml": _template(
        _with_role("<|im_start|>ROLE" + _NEW_LINE, "<|im_end|>", _NEW_LINE), "<|im_start|>assistant" + _NEW_LINE
    ),
    "alpaca": _template(
        _BETWEEN
        + "{% if m.role == 'system' and loop.first %}{{ m.content }}"
        + "{% elif m.role == 'user' %}### Instruction:"
        + _NEW_LINE
        + "{{ m.content }}{% elif m.role == 'assistant' %}### Response:"
        + _NEW_LINE
        + _ANSWER.replace("%s", _END)
        + "{% endif %}",
        _BLANK_LINE + "### Response:" + _NEW_LINE,
        _BEGINNING,
    ),
    "llama3": _template(
        _with_role("<|start_header_id|>ROLE<|end_header_id|>" + _BLANK_LINE, "<|eot_id|>", "", answer=_TRIMMED),
        "<|start_header_id|>assistant<|end_header_id|>" + _BLANK_LINE,
        _BEGINNING,
    ),
    "gemma": _template(
        _USERS_AND_ASSISTANTS
        + _with_role(
            "<start_of_turn>ROLE" + _NEW_LINE,
            "<end_of_turn>",
            _NEW_LINE,
            role="{{ 'model' if m.role == 'assistant' else m.role }}",
            answer=_TRIMMED,
        ),
        "<start_of_turn>model" + _NEW_LINE,
        _BEGINNING,
    ),
    "mistral": _template(
        _USERS_AND_ASSISTANTS
        + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}"
        + _ANSWER.replace("{{ m.content }}", "{{ ' ' }}{{ m.content }}").replace("%s", _END)
        + "{% endif %}",
        "",
        _BEGINNING,
    ),
    "phi_3": _template(_with_role("<|ROLE|>" + _NEW_LINE, "<|end|>", _NEW_LINE), "<|assistant|>" + _NEW_LINE),
    "phi_4": _template(_with_role("<|im_start|>ROLE<|im_sep|>", "<|im_end|>", ""), "<|im_start|>assistant<|im_sep|>"),
    "zephyr": _template(_with_role("<|ROLE|>" + _NEW_LINE, _END, _NEW_LINE), "<|assistant|>" + _NEW_LINE),
    "vicuna": _template(
        "{% if m.role == 'system' and loop.first %}{{ m.content }}{{ ' ' }}"
        "{% elif m.role == 'user' %}USER: {{ m.content }}{{ ' ' }}"
        "{% elif m.role == 'assistant' %}ASSISTANT:"
        + _ANSWER.replace("{{ m.content }}", "{{ ' ' }}{{ m.content }}").replace("%s", _END)
        + "{% endif %}",
        "ASSISTANT:",
        _BEGINNING,
    ),
}
"""The formats of families of models, by name."""

PLAIN = _template(
    "{% if m.role == 'system' and loop.first %}{{ m.content }}{% else %}"
    "{{ '### ' + {'user': 'Instruction', 'assistant': 'Response'}.get(m.role, m.role | capitalize) + ':\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endif %}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}",
    "{{ '\\n\\n### Response:\\n' }}",
    "{% if tools %}{{ '### Tools:\\n' + (tools | tojson) + '\\n\\n' }}{% endif %}",
)
"""What a chat looks like where the model has no chat template: `prompts.render` of a story, for several turns."""


def resolve(given: str) -> str:
    """The Jinja text of `chat_template` in a spec: of a name, or itself.

    Raises:
        InputError: no such name.
    """
    if "{{" in given or "{%" in given:
        return given
    if given not in TEMPLATES:
        names = f"{unknown('chat_template', one_line(given), TEMPLATES)} ({', '.join(TEMPLATES)})"
        raise InputError(f"{names}; Jinja text has {{{{ or {{% in it, and without the key the model's own is used")
    return TEMPLATES[given]


def install(text: str, tokenizer: Any) -> None:
    """Replace a tokenizer's chat template.

    Raises:
        InputError: it is no Jinja.
    """
    tokenizer.chat_template = text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise InputError(
            f"chat_template is no Jinja: line {error.lineno}: {one_line(first_line(error))}; "
            f"mend it, or use one of {', '.join(TEMPLATES)}"
        ) from None
    except Exception:  # noqa: S110 - what it refuses shows with the data, which it may take
        pass
