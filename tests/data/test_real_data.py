"""Public data sets and a real LLaMA tokenizer, prepared whole."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowmem.data.example import IGNORED
from tests.data.recipes import prepared
from tests.real_data import DATA, needs_data

pytestmark = needs_data


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DATA / "stories260k")


@pytest.mark.parametrize(
    ("path", "format", "rows"),
    [
        ("formats/alpaca_identity.json", "alpaca", 40),
        ("formats/sharegpt_dummy.json", "sharegpt", 120),
        ("gsm8k/test.jsonl.gz", "prompt_response", 1319),
        ("instruct/openbookqa_test.json", "alpaca", 500),
        ("instruct/ARC-Easy_test.json.gz", "alpaca", 2376),
        ("instruct/ARC-Easy_train.json.gz", "alpaca", 2251),
        pytest.param("instruct/openbookqa_train.json.gz", "alpaca", 4957, marks=pytest.mark.slow),
        pytest.param("gsm8k/train.jsonl.gz", "prompt_response", 7473, marks=pytest.mark.slow),
        pytest.param("stories/child.jsonl.gz", "prompt_response", 2727, marks=pytest.mark.slow),
        pytest.param("stories/campfire.jsonl.gz", "prompt_response", 2917, marks=pytest.mark.slow),
    ],
)
def test_every_row_is_prepared(tokenizer, path, format, rows):
    found = prepared(DATA / path, tokenizer, format=format, max_length=1024)
    counts = found.summary
    assert (counts["rows"], counts["skipped"], counts["dropped"]) == (rows, 0, 0)
    assert counts["sequences"] == len(found.examples) == len(found.questions) == rows
    assert 0 < counts["trained_tokens"] < counts["tokens"]
    for example, question in zip(found.examples, found.questions, strict=True):
        assert example.input_ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in example.input_ids[1:]
        if format == "prompt_response" and len(example.input_ids) < 1024:
            answer = [label for label in example.labels if label != IGNORED]
            assert answer[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(answer[:-1]) == question.answer


@pytest.mark.parametrize("path", ["wikitext-2/test.txt.gz", "tinyshakespeare/input.txt.gz"])
def test_texts_fill_their_sequences(tokenizer, path):
    found = prepared(DATA / path, tokenizer, format="text", max_length=1024)
    assert found.summary["rows"] == 1
    assert all(len(example.input_ids) == 1024 for example in found.examples[:-1])


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3", "mistral", "gemma", "alpaca"])
def test_every_template_prepares_real_conversations_packed(tokenizer, template):
    path = DATA / "formats/sharegpt_dummy.json"
    found = prepared(path, tokenizer, format="sharegpt", template=template, packing=True, max_length=512)
    assert found.summary["skipped"] == 0
    assert found.summary["sequences"] < 120
    assert all(len(example.input_ids) == 512 for example in found.examples)


def test_tokens_are_those_of_the_whole_text(tokenizer):
    path = DATA / "stories/child.jsonl.gz"
    found = prepared(path, tokenizer, max_length=100_000, take=40)
    for example in found.examples:
        text = tokenizer.decode(example.input_ids)
        whole = tokenizer(text.removeprefix("<s> ").removesuffix("</s>"))["input_ids"]
        assert example.input_ids == [*whole, tokenizer.eos_token_id]
