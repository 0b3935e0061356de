from __future__ import annotations

import subprocess
import sys

import pytest

from lowmem.data.rendering import ChatTemplate
from lowmem.data.templates import SUMMARIES, TEMPLATES, adds_bos
from lowmem.errors import RecipeError
from tests.data import small_tokenizers
from tests.data.written import WRITTEN

CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello {{ name }}"},
    {"role": "assistant", "content": "Hi <b>'&\"</b>"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye."},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:3]])
@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_a_named_template_writes_what_its_model_family_writes(name, messages, kind):
    tokenizer = getattr(small_tokenizers, kind)()
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    text = "".join(part for part, _ in WRITTEN[name](messages, bos, eos))
    if bos and not text.startswith(bos):
        text = bos + text
    assert ChatTemplate(name, tokenizer).render(messages) == text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_a_generation_is_where_the_answer_begins(name):
    template = ChatTemplate(name, small_tokenizers.byte_level())
    whole = template.render(CONVERSATION)
    prompt = template.render(CONVERSATION[:-1], generation_prompt=True)
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].lstrip(" ").startswith("Bye.")


def test_every_template_has_a_summary():
    assert set(SUMMARIES) == set(TEMPLATES) == set(WRITTEN)


def test_a_text_never_begins_with_two_beginning_tokens():
    tokenizer = small_tokenizers.llama()
    assert adds_bos(tokenizer)
    for name in TEMPLATES:
        ids = ChatTemplate(name, tokenizer).prompt_ids(CONVERSATION[1:2])
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]


def test_a_tokenizer_that_does_not_add_its_beginning_token_gets_none_from_plain():
    tokenizer = small_tokenizers.metaspace()
    assert tokenizer.bos_token_id is not None
    assert not adds_bos(tokenizer)
    assert ChatTemplate("plain", tokenizer).render(CONVERSATION[1:2]) == "Hello {{ name }}\n"


def test_alpaca_keeps_input_apart_from_the_instruction():
    message = {"role": "user", "content": "Add.\n\n2, 2", "instruction": "Add.", "input": "2, 2"}
    assert ChatTemplate("alpaca", small_tokenizers.byte_level()).render([message]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n"
    )


def test_auto_is_the_tokenizers_own_template_and_otherwise_plain():
    chat = small_tokenizers.chat()
    assert ChatTemplate("auto", chat).source == chat.chat_template
    assert ChatTemplate("auto", small_tokenizers.byte_level()).source == TEMPLATES["plain"]


def test_auto_takes_the_default_of_several_templates_and_refuses_to_guess(monkeypatch):
    tokenizer = small_tokenizers.byte_level()
    monkeypatch.setattr(tokenizer, "chat_template", {"default": "{{ 'x' }}", "tool_use": "{{ 'y' }}"})
    assert ChatTemplate("auto", tokenizer).render(CONVERSATION[1:2]) == "x"
    monkeypatch.setattr(tokenizer, "chat_template", {"rag": "{{ 'x' }}", "tool_use": "{{ 'y' }}"})
    with pytest.raises(RecipeError, match=r"data\.template: auto cannot choose"):
        ChatTemplate("auto", tokenizer)


def test_a_file_is_a_template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}\n{{ m.role }}: {{ m.content }};\n{% endfor %}\n")
    assert ChatTemplate(str(path), small_tokenizers.byte_level()).render(CONVERSATION[3:]) == (
        "user: And?;\nassistant: Bye.;\n"
    )


def test_wrong_templates_are_answered_with_what_to_change(tmp_path):
    tokenizer = small_tokenizers.byte_level()
    with pytest.raises(
        RecipeError, match=r"chatlm is not a template\. Did you mean chatml\? Known: auto, plain"
    ):
        ChatTemplate("chatlm", tokenizer)
    with pytest.raises(RecipeError, match=r"nowhere\.jinja cannot be read: No such file"):
        ChatTemplate(str(tmp_path / "nowhere.jinja"), tokenizer)
    path = tmp_path / "broken.jinja"
    path.write_text("{{ messages }}\n{% for m in %}\n")
    with pytest.raises(RecipeError, match=r"broken\.jinja:2: not a valid Jinja template"):
        ChatTemplate(str(path), tokenizer)


def test_a_template_cannot_reach_python(tmp_path):
    path = tmp_path / "evil.jinja"
    path.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    from lowmem.data.bad_rows import RowError

    with pytest.raises(RowError, match="unsafe"):
        ChatTemplate(str(path), small_tokenizers.byte_level()).render(CONVERSATION)


def test_listing_templates_imports_neither_torch_nor_transformers():
    code = (
        "import sys, lowmem.data.templates, lowmem.data.prepare; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
