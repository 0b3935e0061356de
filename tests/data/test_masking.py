from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lowmem.data.bad_rows import RowError
from lowmem.data.example import IGNORED
from lowmem.data.pieces import PieceTokenizer
from lowmem.data.rendering import ChatTemplate
from tests.data import small_tokenizers
from tests.data.masks import ASK, PIECES, mask, own_template, trained_runs
from tests.data.small_tokenizers import EXACT
from tests.data.written import WRITTEN

FRAGMENTS = st.one_of(
    st.sampled_from(
        ["Hello", " ", "\n", "\n\n", "cat", "42", ":", "Answer", "user\n", "[INST]", "<|im", "|>", "é", "😀"]
    ),
    st.sampled_from(
        ["e\u0301", "###", "\t", "\u3000", "assistant", "{{ x }}", "{% if %}", "<think>", "a", "\r\n", "ﬁ"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=3),
)
TEXTS = st.lists(FRAGMENTS, min_size=1, max_size=6).map("".join).filter(lambda text: bool(text.strip()))
SPECIAL = ["<s>", "</s>", "<unk>", "<eos>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(TEXTS)}, {"role": "assistant", "content": draw(TEXTS)}]
    assume(not any(token in m["content"] for m in messages for token in SPECIAL))
    return messages


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations(), kind=st.sampled_from(sorted(EXACT)), name=st.sampled_from(sorted(WRITTEN)))
def test_labelled_tokens_decode_to_exactly_the_answers_and_their_ends(messages, kind, name):
    tokenizer = EXACT[kind]()
    parts = WRITTEN[name](messages, tokenizer.bos_token or "", tokenizer.eos_token)
    found = mask(PIECES[kind], ChatTemplate(name, tokenizer), messages)
    expected = [text for text, trained in parts if trained]
    runs = trained_runs(tokenizer, found)
    if kind in ("llama", "metaspace"):  # their decoders remove a space at the beginning of any text
        runs, expected = [run.lstrip(" ") for run in runs], [text.lstrip(" ") for text in expected]
    assert runs == expected
    # nothing else is changed: all tokens together read like the template's text tokenised in one go
    text = "".join(text for text, _ in parts)
    if name in ("plain", "chatml", "alpaca") and kind == "llama":
        text = tokenizer.bos_token + text
    text = text if parts[-1][1] else text.removesuffix(parts[-1][0])
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(found.example.input_ids) == tokenizer.decode(whole)
    assert found.answer == messages[-1]["content"]


@settings(max_examples=100, deadline=None)
@given(messages=conversations(), kind=st.sampled_from(sorted(EXACT)), name=st.sampled_from(sorted(WRITTEN)))
def test_the_trained_answer_follows_the_very_prompt_generation_would_use(messages, kind, name):
    messages = [m for m in messages if m["role"] == "system"] + messages[-2:]
    template = ChatTemplate(name, EXACT[kind]())
    found = mask(PIECES[kind], template, messages)
    assert found.prompt_ids == template.prompt_ids(messages[:-1])
    assert found.example.input_ids[: len(found.prompt_ids)] == found.prompt_ids


WORDS = st.lists(st.sampled_from(["Hello", "the cat", "42.", "why?", "ok"]), min_size=1, max_size=5).map(
    " ".join
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    kind=st.sampled_from(["byte_level", "chat", "llama", "metaspace"]),
)
def test_marked_templates_get_the_mask_transformers_makes(tmp_path_factory, pairs, kind):
    tokenizer = EXACT[kind]()
    messages = []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    path = tmp_path_factory.mktemp("template") / "marked.jinja"
    path.write_text(MARKED)
    found = mask(PIECES[kind], ChatTemplate(str(path), tokenizer), messages)
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    length = len(found.example.input_ids)  # theirs also has the line end behind the last turn
    assert theirs["input_ids"][:length] == found.example.input_ids
    assert set(theirs["assistant_masks"][length:]) <= {0}
    assert [int(label != IGNORED) for label in found.example.labels] == theirs["assistant_masks"][:length]


@pytest.mark.parametrize("kind", ["byte_level", "chat"])
def test_tokens_equal_tokenising_the_whole_text_where_nothing_merges_across_a_cut(kind):
    tokenizer = EXACT[kind]()
    messages = [
        {"role": "user", "content": "Hello, how are you?"},
        {"role": "assistant", "content": "Well."},
    ] * 2
    template = ChatTemplate("plain", tokenizer)
    whole = tokenizer(template.render(messages), add_special_tokens=False)["input_ids"]
    assert mask(PIECES[kind], template, messages).example.input_ids == whole


def test_a_merge_across_the_beginning_of_the_answer_is_undone():
    tokenizer = small_tokenizers.byte_level_across_words()
    messages = [{"role": "user", "content": "42."}, {"role": "assistant", "content": "Answer: 42"}]
    whole = tokenizer("42.\nAnswer: 42<eos>", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("42.\n", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt  # this tokenizer does merge there
    found = mask(PIECES["byte_level_across_words"], ChatTemplate("plain", tokenizer), messages)
    assert found.prompt_ids == prompt
    assert trained_runs(tokenizer, found) == ["Answer: 42<eos>"]


@pytest.mark.parametrize("train_on", ["assistant", "last_turn", "all"])
def test_train_on_chooses_the_turns(train_on):
    tokenizer = small_tokenizers.chat()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    found = mask(PIECES["chat"], ChatTemplate("auto", tokenizer), messages, train_on)
    whole = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n" * 2
    expected = {
        "assistant": ["b<|im_end|>", "b<|im_end|>"],
        "last_turn": ["b<|im_end|>"],
        "all": [whole.removeprefix("<|im_start|>")],
    }
    assert trained_runs(tokenizer, found) == expected[train_on]
    assert found.example.labels[0] == IGNORED
    assert found.answer == "b"
    assert tokenizer.decode(found.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_token_that_swallows_white_space_is_not_cut_from_it():
    tokenizer = small_tokenizers.swallowing()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    template = ChatTemplate("chatml", tokenizer)
    found = mask(PieceTokenizer(tokenizer), template, messages)
    text = template.render(messages)
    assert found.example.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert trained_runs(tokenizer, found) == ["b<|im_end|>", "b<|im_end|>"]


def test_texts_a_tokenizer_does_not_keep_are_no_wrong_masks():
    for make in (small_tokenizers.composing, small_tokenizers.characters):
        tokenizer = make()
        messages = [
            {"role": "user", "content": "caf\u0065\u0301"},
            {"role": "assistant", "content": "e\u0301 z"},
        ]
        found = mask(PieceTokenizer(tokenizer), ChatTemplate("plain", tokenizer), messages)
        alone = tokenizer("e\u0301 z<eos>", add_special_tokens=False)["input_ids"]
        assert [label for label in found.example.labels if label != IGNORED] == alone


def test_a_tokenizer_that_changes_the_answer_behind_its_prompt_is_caught(monkeypatch):
    tokenizer = small_tokenizers.byte_level()
    pieces = PieceTokenizer(tokenizer)
    cut = pieces.cut

    def one_token_less(texts):
        return [[ids[:-1] for ids in row] for row in cut(texts)]

    monkeypatch.setattr(pieces, "cut", one_token_less)
    with pytest.raises(RowError, match=r"the trained tokens would read ' Because\. \\n' and not"):
        mask(pieces, ChatTemplate("plain", tokenizer), ASK)


def test_a_text_that_looks_like_a_placeholder_is_only_a_text():
    tokenizer = small_tokenizers.byte_level()
    messages = [
        {"role": "user", "content": "AnswerOfTurn1E"},
        {"role": "assistant", "content": "AnswerOfTurnX1E AnswerOfTurn3E"},
        {"role": "user", "content": "AnswerOfTurn3E"},
        {"role": "assistant", "content": "AnswerOfTurn1E"},
    ]
    found = mask(PIECES["byte_level"], ChatTemplate("plain", tokenizer), messages)
    assert trained_runs(tokenizer, found) == [m["content"] + "<|endoftext|>" for m in messages[1::2]]


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_an_answer_right_behind_a_special_token_is_tokenised_as_in_one_text(tmp_path, kind):
    tokenizer = EXACT[kind]()
    source = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "Hello cat"}]
    found = mask(PIECES[kind], own_template(tmp_path, source, tokenizer), messages)
    whole = tokenizer("the cat</s>Hello cat</s>", add_special_tokens=False)["input_ids"]
    assert found.example.input_ids == whole
    assert [run.lstrip(" ") for run in trained_runs(tokenizer, found)] == ["Hello cat</s>"]


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_an_answer_of_byte_tokens_right_behind_byte_tokens_is_read_right(tmp_path, kind):
    tokenizer = EXACT[kind]()
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "caf\u00e9"}, {"role": "assistant", "content": "\u00e8 \u00e8"}]
    found = mask(PIECES[kind], own_template(tmp_path, source, tokenizer), messages)
    assert tokenizer.decode(found.example.input_ids) == "caf\u00e9\u00e8 \u00e8</s>"
    assert trained_runs(tokenizer, found) == ["\u00e8 \u00e8</s>"]


def test_an_answer_that_begins_like_the_anchor_keeps_its_beginning():
    tokenizer = small_tokenizers.metaspace()
    assert tokenizer.tokenize("\n\n") == ["▁", "\n\n"]
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "\n:a.0\n"}]
    found = mask(PIECES["metaspace"], ChatTemplate("mistral", tokenizer), messages)
    assert trained_runs(tokenizer, found) == ["\n:a.0\n</s>"]
    messages[0]["content"] = "why"
    found = mask(PIECES["metaspace"], ChatTemplate("plain", tokenizer), messages)
    assert trained_runs(tokenizer, found) == ["\n:a.0\n</s>"]
    assert found.prompt_ids == tokenizer("why\n", add_special_tokens=False)["input_ids"]
