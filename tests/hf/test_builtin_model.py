from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lowmem.hf.builtin_model import SPECIAL_TOKENS, character_tokenizer, tiny_llama_config

ASCII = string.printable.replace("\x0b", "").replace("\x0c", "")
TOKENIZER = character_tokenizer()


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=ASCII).filter(lambda text: not any(name in text for name in SPECIAL_TOKENS)))
def test_ascii_text_is_one_token_a_character_and_comes_back_unchanged(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert [TOKENIZER.convert_ids_to_tokens(number) for number in ids] == list(text)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_offsets_point_at_the_characters() -> None:
    text = "Add  3\n+ 4.\t"
    found = TOKENIZER(text, return_offsets_mapping=True)["offset_mapping"]
    assert found == [(place, place + 1) for place in range(len(text))]


def test_other_characters_become_one_unknown_token_each() -> None:
    ids = TOKENIZER("caf\u00e9\u00df 5\u20ac")["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["c", "a", "f", "<unk>", "<unk>", " ", "5", "<unk>"]


def test_special_tokens_are_single_tokens_and_are_left_out_on_request() -> None:
    ids = TOKENIZER("<s>7</s><pad>")["input_ids"]
    assert ids == [
        TOKENIZER.bos_token_id,
        *TOKENIZER("7")["input_ids"],
        TOKENIZER.eos_token_id,
        TOKENIZER.pad_token_id,
    ]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "7"


def test_a_text_of_a_book_s_length_is_split_without_a_warning() -> None:
    text = "It was a dark and stormy night.\n" * 10_000
    assert len(TOKENIZER(text, verbose=False)["input_ids"]) == len(text)


def test_the_saved_tokenizer_is_the_same_one(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    tiny_llama_config().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(ASCII) + " two  blanks </s>\u00e9"
    assert again(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == TOKENIZER.decode(TOKENIZER(text)["input_ids"])
    assert again.special_tokens_map == TOKENIZER.special_tokens_map
    assert again.get_vocab() == TOKENIZER.get_vocab()


def test_the_model_has_a_row_for_every_token_and_knows_the_special_ones() -> None:
    config = tiny_llama_config()
    assert config.vocab_size == len(TOKENIZER)
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(config.vocab_size))
    special = (config.pad_token_id, config.bos_token_id, config.eos_token_id)
    assert special == (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)


def test_nine_tenths_of_the_model_are_matrices_that_a_low_rank_optimizer_treats() -> None:
    model = LlamaForCausalLM(tiny_llama_config())
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    matrices = sum(
        size for name, size in sizes.items() if ("attn" in name or "mlp" in name) and "norm" not in name
    )
    assert matrices > 0.9 * sum(sizes.values())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_saved_model_loads_with_transformers_alone_and_answers_alike(tmp_path: Path, attn: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(tiny_llama_config(), attn_implementation=attn).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attn).eval()
    ids = torch.tensor([TOKENIZER("What is 3 + 4?\n")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_its_tokens_go_straight_into_generation() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config()).eval()
    asked = TOKENIZER("What is 3 + 4?\n", return_tensors="pt")
    found = model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert found.shape[1] > asked["input_ids"].shape[1]
