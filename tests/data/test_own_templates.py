from __future__ import annotations

import pytest

from lowmem.data.bad_rows import RowError
from tests.data import small_tokenizers
from tests.data.masks import ASK, PIECES, mask, own_template, trained_runs


@pytest.mark.parametrize(
    ("source", "trained"),
    [
        ("{% for m in messages %}{{ m.content | trim }};{% endfor %}", "Because.;"),
        ("{% for m in messages %}{{ m.content }}<end>  \n\n{% endfor %}", " Because. \n<end>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", " Because. \n<|endoftext|>"),
        (
            "{% for m in messages %}{{ '[A]' if m.role == 'assistant' }}{{ m.content }}.{% endfor %}",
            " Because. \n.",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<end>\n{% endfor %}",
            None,
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
            "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}<end>\n{% endfor %}",
            " Because. \n<end>",
        ),
        ("{% for m in messages %}{{ m.content | upper }};{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{{ m.content }};{% endfor %}", None),
        ("{{ messages[0].content }};", None),
        ("{% for m in messages %}{{ m.content | replace('e', 'E') }};{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{{ '!' if m.content | length < 12 }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content | length }}: {{ m.content }};{% endfor %}", None),
        ("{{ raise_exception('no ' ~ messages[1].content | trim) }}", None),
    ],
)
def test_own_templates_are_proven_or_named_as_the_problem(tmp_path, source, trained):
    tokenizer = small_tokenizers.byte_level()
    template = own_template(tmp_path, source, tokenizer)
    if trained is None:
        with pytest.raises(RowError, match=r"template .*own\.jinja"):
            mask(PIECES["byte_level"], template, ASK)
    else:
        assert trained_runs(tokenizer, mask(PIECES["byte_level"], template, ASK)) == [trained]


# the way of reasoning models: thoughts of earlier turns are removed, the last turn always has a block
REASONING = (
    "{% for m in messages %}{% set answer = m.content.split('</think>')[-1].lstrip() %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\\n' }}{{ m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content }}"
    "{{ '\\n</think>\\n\\n' }}{% endif %}"
    "{{ answer + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_reasoning_is_trained_as_the_template_writes_it(tmp_path):
    tokenizer = small_tokenizers.chat()
    template = own_template(tmp_path, REASONING, tokenizer)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nd"},
    ]
    last = "<think>\nso\n</think>\n\nd<|im_end|>"
    assert trained_runs(tokenizer, mask(PIECES["chat"], template, messages, "last_turn")) == [last]
    assert trained_runs(tokenizer, mask(PIECES["chat"], template, messages)) == ["b<|im_end|>", last]
    messages[-1]["content"] = "d"
    empty = "<think>\n\n</think>\n\nd<|im_end|>"
    assert trained_runs(tokenizer, mask(PIECES["chat"], template, messages, "last_turn")) == [empty]


def test_a_template_that_drops_the_reasoning_is_a_problem(tmp_path):
    source = REASONING.replace("{% if m.role == 'assistant' and loop.last %}", "{% if false %}").replace(
        "'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"
    )
    template = own_template(tmp_path, source, small_tokenizers.chat())
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
    ]
    with pytest.raises(RowError, match=r"own\.jinja changes the reasoning before the answer of turn 2"):
        mask(PIECES["chat"], template, messages)


def test_a_template_whose_prompt_leaves_out_earlier_turns_still_gets_its_answers(tmp_path):
    tokenizer = small_tokenizers.byte_level()
    shown = "(messages[:1] if add_generation_prompt else messages)"
    source = "{% for m in " + shown + " %}[{{ m.content }}].{% endfor %}"
    messages = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
    ]
    found = mask(PIECES["byte_level"], own_template(tmp_path, source, tokenizer), messages)
    assert trained_runs(tokenizer, found) == ["b].", "d]."]
