"""How a conversation is written down: named templates, the tokenizer's own, or a file.

A template is Jinja, as in `tokenizer.chat_template`; it sees `messages`, `add_generation_prompt` and
the tokenizer's special tokens. The named ones write the beginning-of-sequence token where their model
family does, or where the tokenizer adds it to every text by itself, so it is there once and not twice.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFUSE_OTHER_ROLES = (
    "{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('it has no place for the role ' ~ message.role) }}"
    "{% endif %}"
)
_SPLIT_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}"
    "{% set system = '' %}{% set turns = messages %}"
    "{% endif %}"
)

_PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LLAMA2 = (
    _SPLIT_SYSTEM + "{% for message in turns %}" + _REFUSE_OTHER_ROLES + "{% if message.role == 'user' %}"
    "{{ bos_token }}{{ '[INST] ' }}"
    "{% if loop.first and system %}{{ '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ message.content ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ message.content ~ ' ' }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role = 'ipython' if message.role == 'tool' else message.role %}"
    "{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' ~ message.content ~ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

_MISTRAL = (
    _SPLIT_SYSTEM
    + "{{ bos_token }}{% for message in turns %}"
    + _REFUSE_OTHER_ROLES
    + "{% if message.role == 'user' %}"
    "{{ '[INST] ' }}{% if loop.first and system %}{{ system ~ '\\n\\n' }}{% endif %}"
    "{{ message.content ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

_GEMMA = (
    _SPLIT_SYSTEM
    + "{{ bos_token }}{% for message in turns %}"
    + _REFUSE_OTHER_ROLES
    + "{{ '<start_of_turn>' ~ ('model' if message.role == 'assistant' else 'user') ~ '\\n' }}"
    "{% if loop.first and system %}{{ system ~ '\\n\\n' }}{% endif %}"
    "{{ message.content ~ '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

_ALPACA = (
    _SPLIT_SYSTEM + "{% for message in turns %}" + _REFUSE_OTHER_ROLES + "{% if message.role == 'user' %}"
    "{% if system and loop.first %}{{ system ~ '\\n\\n' }}"
    "{% elif loop.first %}"
    "{{ 'Below is an instruction that describes a task' }}"
    "{{ ', paired with an input that provides further context' if message.input else '' }}"
    "{{ '. Write a response that appropriately completes the request.\\n\\n' }}"
    "{% endif %}"
    "{{ '### Instruction:\\n' ~ (message.instruction if message.input else message.content) ~ '\\n\\n' }}"
    "{% if message.input %}{{ '### Input:\\n' ~ message.input ~ '\\n\\n' }}{% endif %}"
    "{{ '### Response:\\n' }}"
    "{% else %}{{ message.content }}{{ eos_token }}{{ '' if loop.last else '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)

TEMPLATES: dict[str, str] = {
    "plain": _PLAIN,
    "chatml": _CHATML,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "alpaca": _ALPACA,
}

SUMMARIES: dict[str, str] = {
    "plain": "prompt, newline, answer, end of text; for base models, needs no special token",
    "chatml": "<|im_start|>role ... <|im_end|>; Qwen and many others",
    "llama2": "[INST] prompt [/INST] answer </s>, system in <<SYS>>",
    "llama3": "<|start_header_id|>role<|end_header_id|> ... <|eot_id|>; Llama 3 and later",
    "mistral": "[INST] prompt [/INST] answer</s>; the first Mistral instruct models",
    "gemma": "<start_of_turn>role ... <end_of_turn>; Gemma",
    "alpaca": "### Instruction / ### Input / ### Response, the text of Stanford Alpaca",
}


def template_source(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What `data.template` stands for with this tokenizer: (name for messages, Jinja source).

    `auto` is the tokenizer's own template, or `plain` where it has none. Raises RecipeError for an
    unknown name or a file that cannot be read.
    """
    if name == "auto":
        if tokenizer.chat_template is None:
            return "plain", _with_bos(TEMPLATES["plain"], tokenizer)
        return "auto (the tokenizer's own)", _own_template(tokenizer)
    if name in TEMPLATES:
        return name, _with_bos(TEMPLATES[name], tokenizer)
    if name.endswith((".jinja", ".jinja2", ".j2")) or "/" in name:
        return name, _file_source(Path(name).expanduser())
    near = get_close_matches(name, ["auto", *TEMPLATES], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RecipeError(
        f"data.template: {name} is not a template.{hint} Known: auto, {', '.join(TEMPLATES)}, "
        "or a .jinja file."
    )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its beginning token before every text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _with_bos(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return "{{ bos_token }}" + source if adds_bos(tokenizer) and "bos_token" not in source else source


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several templates and none of them is the default
        raise RecipeError(f"data.template: auto cannot choose: {error}") from error


def _file_source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"data.template: {path} is not UTF-8.") from error
    except OSError as error:
        raise RecipeError(
            f"data.template: {path} cannot be read: {error.strerror}. "
            f"Known names: auto, {', '.join(TEMPLATES)}."
        ) from error
