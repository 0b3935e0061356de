from __future__ import annotations

import json
import logging
import sys
import types

import pytest

from lowmem.data.example import IGNORED
from lowmem.data.prepare import prepare
from lowmem.errors import RecipeError
from lowmem.recipe.schema import DataRecipe, SourceRecipe
from tests.data import small_tokenizers
from tests.data.recipes import jsonl, prepared

GOOD = {"prompt": "why?", "response": "Hello."}
LONG = {"prompt": "why? " * 30, "response": "Hello."}


def test_rows_become_sequences_questions_and_counts(tmp_path):
    tokenizer = small_tokenizers.byte_level()
    found = prepared(jsonl(tmp_path / "x.jsonl", [GOOD] * 3), tokenizer)
    whole = tokenizer("why?\nHello.<|endoftext|>")["input_ids"]
    prompt = tokenizer("why?\n")["input_ids"]
    for example in found.examples:
        assert example.input_ids == whole
        assert example.labels == [IGNORED] * len(prompt) + whole[len(prompt) :]
        assert example.position_ids is None
    assert [(q.prompt_ids, q.answer) for q in found.questions] == [(prompt, "Hello.")] * 3
    assert found.summary == {
        "rows": 3,
        "skipped": 0,
        "dropped": 0,
        "truncated": 0,
        "tokens": 3 * len(whole),
        "trained_tokens": 3 * (len(whole) - len(prompt)),
        "sequences": 3,
    }
    assert found.sample == "why?\n[[[Hello.<|endoftext|>]]]"
    assert found.template is not None
    assert found.notes == []


def test_packed_sequences_are_full_and_keep_every_trained_token(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "why?", "response": "Hello " * n} for n in range(1, 12)])
    tokenizer = small_tokenizers.byte_level()
    apart = prepared(path, tokenizer, max_length=64)
    together = prepared(path, tokenizer, max_length=64, packing=True)
    assert all(len(example.input_ids) == 64 for example in together.examples)
    assert together.summary == apart.summary | {"sequences": len(together.examples)}
    assert len(together.examples) < len(apart.examples)
    assert sorted(label for e in together.examples for label in e.labels if label != IGNORED) == sorted(
        label for e in apart.examples for label in e.labels if label != IGNORED
    )
    assert prepared(path, tokenizer, max_length=64, packing=True) == together
    assert prepared(path, tokenizer, max_length=64, packing=True, seed=1).examples != together.examples


def test_text_has_no_questions_and_no_template(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Once upon a time there was a small cat.\n" * 20)
    found = prepared(path, small_tokenizers.llama(), format="text", max_length=32)
    assert found.questions == []
    assert found.template is None
    assert found.summary["rows"] == 1
    assert found.summary["sequences"] > 10
    assert found.sample.startswith("<s>[[[Once upon")


def test_a_row_without_answer_is_reported_with_file_and_line(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl", [GOOD, {"prompt": "why?"}, GOOD, {"prompt": "why?", "response": ""}, 7]
    )
    with pytest.raises(RecipeError) as caught:
        prepared(path, small_tokenizers.byte_level())
    first, second, third, cure = caught.value.problems
    assert first.startswith(f"{path}:2: format prompt_response needs prompt and response")
    assert second == f"{path}:4: response is empty"
    assert third == f"{path}:5: the row is a number, not an object"
    assert cure == "data.train: mend these rows, or set data.on_bad_row: skip to leave them out."


def test_only_the_first_twenty_bad_rows_are_listed(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{}] * 25 + [GOOD])
    with pytest.raises(RecipeError) as caught:
        prepared(path, small_tokenizers.byte_level())
    assert len(caught.value.problems) == 22
    assert caught.value.problems[19].startswith(f"{path}:20: ")
    assert caught.value.problems[20] == "... and 5 more bad rows"


def test_bad_rows_are_skipped_and_counted_when_asked(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [GOOD, {}, [], GOOD])
    path.write_text(path.read_text() + '{"prompt": \n')
    found = prepared(path, small_tokenizers.byte_level(), on_bad_row="skip")
    assert (found.summary["rows"], found.summary["skipped"], found.summary["sequences"]) == (5, 3, 2)


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    with pytest.raises(RecipeError, match=r"(?s)x\.jsonl:1: .*no row is left to train on"):
        prepared(jsonl(tmp_path / "x.jsonl", [{}]), small_tokenizers.byte_level(), on_bad_row="skip")
    with pytest.raises(RecipeError, match=r"2 rows are longer than data\.max_length \(16 tokens\)"):
        prepared(
            jsonl(tmp_path / "y.jsonl", [LONG] * 2),
            small_tokenizers.byte_level(),
            max_length=16,
            on_too_long="drop",
        )


def test_long_rows_are_dropped_or_cut_and_counted(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [GOOD, {"prompt": "why?", "response": "Hello " * 40}])
    tokenizer = small_tokenizers.llama()
    counts = {}
    for policy in ("drop", "truncate_left", "truncate_right"):
        found = prepared(path, tokenizer, max_length=24, on_too_long=policy)
        counts[policy] = [found.summary[key] for key in ("dropped", "truncated", "sequences")]
        assert all(len(example.input_ids) <= 24 for example in found.examples)
        assert all(example.input_ids[0] == tokenizer.bos_token_id for example in found.examples)
        assert len(found.questions) == len(found.examples)
    assert counts == {"drop": [1, 0, 1], "truncate_left": [0, 1, 2], "truncate_right": [0, 1, 2]}


def test_a_row_whose_answer_was_cut_away_is_a_bad_row(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [GOOD] * 19 + [LONG])
    tokenizer = small_tokenizers.byte_level()
    with pytest.raises(
        RecipeError, match=r"x\.jsonl:20: no trained token is left of \d+ after truncate_right"
    ):
        prepared(path, tokenizer, max_length=16)
    found = prepared(path, tokenizer, max_length=16, on_bad_row="skip")
    assert (found.summary["skipped"], found.summary["sequences"]) == (1, 19)
    found = prepared(path, tokenizer, max_length=16, on_too_long="truncate_left")
    assert (found.summary["truncated"], found.summary["sequences"]) == (1, 20)


def test_more_than_a_tenth_without_trained_tokens_is_an_error_even_when_skipping(tmp_path):
    tokenizer = small_tokenizers.byte_level()
    tenth = jsonl(tmp_path / "tenth.jsonl", [GOOD] * 18 + [LONG] * 2)
    assert prepared(tenth, tokenizer, max_length=16, on_bad_row="skip").summary["skipped"] == 2
    more = jsonl(tmp_path / "more.jsonl", [GOOD] * 17 + [LONG] * 2)
    with pytest.raises(RecipeError, match=r"2 of 19 rows have no trained token; at most 10% may be left out"):
        prepared(more, tokenizer, max_length=16, on_bad_row="skip")


def test_a_template_that_changes_answers_is_an_error_that_names_row_and_template(tmp_path):
    template = tmp_path / "loud.jinja"
    template.write_text("{% for m in messages %}{{ m.content | upper }}\n{% endfor %}")
    path = jsonl(tmp_path / "x.jsonl", [GOOD])
    for policy in ("error", "skip"):
        with pytest.raises(
            RecipeError,
            match=r"x\.jsonl:1: the template .*loud\.jinja leaves out or changes assistant turn 2",
        ):
            prepared(path, small_tokenizers.byte_level(), template=str(template), on_bad_row=policy)


def test_roles_a_template_refuses_are_reported_with_their_row(tmp_path):
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]}
    row["conversations"].append({"from": "gpt", "value": "c"})
    path = jsonl(tmp_path / "x.jsonl", [row])
    message = r"x\.jsonl:1: the template gemma cannot render it: it has no place for the role tool"
    with pytest.raises(RecipeError, match=message):
        prepared(path, small_tokenizers.byte_level(), format="sharegpt", template="gemma")


def test_marks_the_tokenizer_lacks_are_said_once(tmp_path, caplog):
    path = jsonl(tmp_path / "x.jsonl", [GOOD] * 600)
    with caplog.at_level(logging.WARNING):
        found = prepared(path, small_tokenizers.byte_level(), template="chatml")
    (note,) = found.notes
    assert "chatml uses <|im_start|>, <|im_end|>, which this tokenizer does not know as one token" in note
    assert [record.getMessage() for record in caplog.records] == [note]
    assert prepared(path, small_tokenizers.chat(), template="chatml").notes == []


def test_other_mismatches_of_template_and_tokenizer_are_said(tmp_path):
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    path = jsonl(tmp_path / "x.jsonl", [GOOD])
    found = prepared(path, small_tokenizers.llama(), template=str(template))
    assert any("does not begin with <s>" in note for note in found.notes)
    assert any("puts nothing behind an answer; </s> was added" in note for note in found.notes)
    assert found.examples[0].labels[-1] == small_tokenizers.llama().eos_token_id


def test_characters_the_tokenizer_does_not_know_are_said(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [GOOD, {"prompt": "why?", "response": "\u2603"}])
    (note,) = prepared(path, small_tokenizers.characters()).notes
    assert "1 answers hold characters that the tokenizer does not know" in note


def test_a_generated_set_is_asked_for_by_its_recipe(monkeypatch):
    asked = []

    def generate(name, *, split, size, seed):
        asked.append((name, split, size, seed))
        return [GOOD] * 2

    fake = types.ModuleType("lowmem.data.builtins")
    fake.generate, fake.BUILTINS = generate, {"sums": "sums of two numbers"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lowmem.data.builtins", fake)
    for split in (None, "held_out"):
        source = SourceRecipe(builtin="sums", split=split, size=5)
        data = DataRecipe(train=source)
        found = prepare(source, data, small_tokenizers.byte_level(), seed=3, where="data.eval")
        assert found.summary["rows"] == 2
    assert asked == [("sums", "train", 5, 3), ("sums", "held_out", 5, 3)]
    for source, message in [
        (
            SourceRecipe(builtin="summs"),
            r"data\.eval\.builtin: summs is not .*Did you mean sums\? Known: sums",
        ),
        (SourceRecipe(builtin="sums", split="test"), r"data\.eval\.split: test is not a split of a builtin"),
    ]:
        with pytest.raises(RecipeError, match=message):
            prepare(
                source, DataRecipe(train=source), small_tokenizers.byte_level(), seed=3, where="data.eval"
            )


def test_multi_turn_questions_ask_for_the_last_answer(tmp_path):
    tokenizer = small_tokenizers.chat()
    turns = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns]}
    path = tmp_path / "x.json"
    path.write_text(json.dumps([row]))
    (question,) = prepared(path, tokenizer, format="sharegpt").questions
    assert question.answer == "d"
    assert tokenizer.decode(question.prompt_ids).endswith("user\nc<|im_end|>\n<|im_start|>assistant\n")
