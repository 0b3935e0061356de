"""Streaming answers: the same tokens as plain greedy decoding, the same text as decoding them at once."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import lowmem.hf.ending
from lowmem.errors import RecipeError
from lowmem.hf.answer_end import AnswerEnd
from lowmem.hf.flow import train
from lowmem.hf.generation import Generator, chosen_token, overlap, streamed_text
from tests.hf.tiny_runs import character_tokenizer, tiny_config, tiny_recipe, write_recipe

OPEN_END = AnswerEnd([], None)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model whose answers depend on the prompt."""
    folder = tmp_path_factory.mktemp("model")
    set_seed(3)
    model = LlamaForCausalLM(tiny_config())
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(6 if param.dim() == 2 else 1)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def generator(tmp_path, model_folder):
    return Generator(str(write_recipe(tmp_path, model_folder)))


def test_streamed_pieces_join_to_what_greedy_decoding_without_a_cache_gives(generator, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = generator.prompt_ids("12+34=")
    answer = []
    for _ in range(20):
        with torch.no_grad():
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    assert 1 not in answer
    pieces = list(generator.stream("12+34=", max_new_tokens=20))
    assert "".join(pieces) == generator.tokenizer.decode(answer)
    assert len(pieces) > 10, "token by token, not all at the end"


def test_tokens_come_when_they_are_made_and_not_before_they_are_asked_for(generator, monkeypatch):
    calls = []
    real = generator.model.forward

    def forward(*args, **kwargs):
        calls.append(kwargs["input_ids"].shape[1])
        return real(*args, **kwargs)

    monkeypatch.setattr(generator.model, "forward", forward)
    stream = generator.stream("12+34=", max_new_tokens=20)
    assert calls == []
    next(stream)
    assert len(calls) <= 2
    list(stream)
    assert calls == [len(generator.prompt_ids("12+34=")), *[1] * 19], "the cache is used"


def test_a_model_without_this_kind_of_cache_gives_the_same_answer(generator, monkeypatch):
    expected = "".join(generator.stream("7+8=", max_new_tokens=12))
    real = generator.model.forward

    def forward(**kwargs):
        return real(**{**kwargs, "past_key_values": None, "use_cache": False})

    monkeypatch.setattr(generator.model, "forward", forward)
    assert "".join(generator.stream("7+8=", max_new_tokens=12)) == expected


def test_an_answer_ends_at_the_end_token_which_is_not_shown(generator):
    whole = "".join(generator.stream("7+8=", max_new_tokens=12))
    stop = next(character for character in whole[2:] if character not in whole[:2])
    token = generator.tokenizer.convert_tokens_to_ids(stop)
    generator.end = AnswerEnd([token], None)
    assert "".join(generator.stream("7+8=", max_new_tokens=12)) == whole[: whole.index(stop)]


def test_the_prompt_is_written_as_in_training(tmp_path, model_folder):
    recipe = str(write_recipe(tmp_path, model_folder))
    chat = Generator(recipe, ["data.template=chatml"])
    text = chat.tokenizer.decode(chat.prompt_ids("hello"))
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_text_model_continues_the_prompt_as_it_stands(tmp_path, model_folder):
    recipe = write_recipe(tmp_path, model_folder)
    (tmp_path / "text.jsonl").write_text('{"text": "once upon a time"}\n')
    rows = ["data.train.path=" + str(tmp_path / "text.jsonl"), "data.train.format=text", "data.eval=null"]
    text = Generator(str(recipe), rows)
    assert text.tokenizer.decode(text.prompt_ids("once")) == "once"
    with pytest.raises(RecipeError, match="prompt is empty"):
        next(text.stream(""))


def test_a_temperature_draws_the_same_answer_from_the_same_seed(generator):
    first, again = ("".join(generator.stream("1+1=", max_new_tokens=30, temperature=2.0)) for _ in range(2))
    assert first == again != "".join(generator.stream("1+1=", max_new_tokens=30))


def test_drawn_tokens_follow_the_softmax_at_that_temperature():
    logits = torch.tensor([1.0, 2.0, 0.0])
    random = torch.Generator().manual_seed(0)
    drawn = torch.stack([chosen_token(logits, 2.0, random) for _ in range(4000)])
    parts = torch.bincount(drawn, minlength=3) / len(drawn)
    assert torch.allclose(parts, torch.softmax(logits / 2.0, 0), atol=0.03)


@pytest.mark.parametrize("temperature", [-1.0, float("nan")])
def test_a_negative_temperature_is_an_error(generator, temperature):
    with pytest.raises(RecipeError, match="must be 0 or more"):
        next(generator.stream("1+1=", temperature=temperature))


def test_the_model_of_a_run_answers(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")
    assert train(tiny_recipe(tmp_path, model_folder, "train.max_steps=2")) == 0
    generator = Generator(str(tmp_path / "run"))
    assert "".join(generator.stream("1+1=", max_new_tokens=5))


def byte_tokenizer():
    """One token a byte, as at the ends of every byte-level vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_characters_of_several_tokens_are_sent_whole():
    text = "a \u00e4\u2192\U0001f600 z"
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    pieces = list(streamed_text(iter(ids), tokenizer, OPEN_END))
    assert pieces == list(text)


def test_a_character_that_is_never_finished_is_shown_as_such():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a\U0001f600")["input_ids"][:-1]
    assert "".join(streamed_text(iter(ids), tokenizer, OPEN_END)) == tokenizer.decode(ids)


def test_blanks_between_words_survive_a_tokenizer_that_drops_the_first():
    words = ["\u2581Once", "\u2581upon", "\u2581a", "\u2581time", ".", "\n", "\u2581The", "\u2581end"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    pieces = list(streamed_text(iter(range(len(words))), fast, OPEN_END))
    assert "".join(pieces) == fast.decode(list(range(len(words)))) == "Once upon a time.\n The end"
    assert len(pieces) == len(words)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("forty two<|end|> and more", "forty two"),
        ("a <| is not the end", "a <| is not the end"),
        ("it stops at <|en", "it stops at <|en"),
        ("<|end|>", ""),
    ],
)
def test_the_text_that_ends_an_answer_is_held_back_until_it_is_decided(text, shown):
    tokenizer = character_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = list(streamed_text(iter(ids), tokenizer, AnswerEnd([], "<|end|>")))
    assert "".join(pieces) == shown


def test_the_overlap_is_the_longest_end_that_begins_the_mark():
    assert overlap("abc<|", "<|end|>") == 2
    assert overlap("abc<|end|", "<|end|>") == 6
    assert overlap("abc", "<|end|>") == 0
    assert overlap("abab", "abac") == 2
    assert overlap("x", "") == 0
