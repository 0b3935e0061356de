"""load_tokenizer always gives a pad token that costs no new row, and explains what cannot be opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lowmem.errors import RecipeError
from lowmem.hf.model import load_model, load_tokenizer
from lowmem.recipe.schema import ModelRecipe
from tests.hf.tiny_models import tiny_model
from tests.hf.tiny_tokenizer import WORDS, tiny_tokenizer


def saved(folder: Path, vocab_size: int = len(WORDS), **special: str) -> Path:
    tiny_tokenizer(**special).save_pretrained(folder)
    tiny_model(vocab_size=vocab_size).config.save_pretrained(folder)
    return folder


def load(name: object) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelRecipe(name_or_path=str(name)))


def problem(name: object) -> str:
    with pytest.raises(RecipeError) as raised:
        load(name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}, "<pad>"),
        ({"unk_token": "<unk>", "eos_token": "</s>"}, "<unk>"),
        ({"eos_token": "</s>"}, "</s>"),
    ],
)
def test_the_pad_token_is_its_own_else_the_unknown_else_the_end(
    tmp_path: Path, special: dict[str, str], expected: str
) -> None:
    tokenizer = load(saved(tmp_path, **special))
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id == WORDS.index(expected)
    assert len(tokenizer) == len(WORDS)
    assert tokenizer("a d").input_ids == [4, 7]


def test_a_tokenizer_that_has_nothing_to_pad_with_is_an_error(tmp_path: Path) -> None:
    assert "Name one of its tokens as pad_token in tokenizer_config.json" in problem(saved(tmp_path))


def test_tokens_beyond_the_embedding_are_an_error(tmp_path: Path) -> None:
    text = problem(saved(tmp_path, vocab_size=len(WORDS) - 2, unk_token="<unk>"))
    assert "has 2 tokens whose ids are beyond the 8 rows of the model's embedding ('e' = 8, 'f' = 9)" in text


def test_more_rows_than_tokens_are_fine(tmp_path: Path) -> None:
    assert len(load(saved(tmp_path, vocab_size=64, unk_token="<unk>"))) == len(WORDS)


def test_a_tokenizer_beside_adapters_needs_no_configuration(tmp_path: Path) -> None:
    saved(tmp_path, unk_token="<unk>")
    (tmp_path / "config.json").unlink()
    assert load(tmp_path).pad_token == "<unk>"


def test_a_folder_without_tokenizer_files_is_an_error(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    text = problem(tmp_path)
    assert "has no tokenizer: none of tokenizer.json, tokenizer.model" in text


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}, "added_tokens": []}'])
def test_a_damaged_tokenizer_file_is_an_error(tmp_path: Path, content: str) -> None:
    saved(tmp_path, unk_token="<unk>")
    (tmp_path / "tokenizer.json").write_text(content)
    assert f"{tmp_path} cannot be loaded" in problem(tmp_path)


def test_a_configuration_that_is_not_json_is_shown_with_its_line(tmp_path: Path) -> None:
    saved(tmp_path, unk_token="<unk>")
    (tmp_path / "config.json").write_text('{\n"a": ?}')
    assert "config.json:2 is not valid JSON" in problem(tmp_path)


def test_a_missing_folder_and_an_unknown_builtin_are_errors(tmp_path: Path) -> None:
    assert "there is no folder" in problem(tmp_path / "x")
    assert "Did you mean builtin:tiny-llama?" in problem("builtin:x")


def test_a_tokenizer_with_code_of_its_own_needs_permission(tmp_path: Path) -> None:
    saved(tmp_path, unk_token="<unk>")
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(
        json.dumps({**settings, "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('the code ran')")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "own"}))
    assert "model.trust_remote_code: true" in problem(tmp_path)


# --- the model that comes with lowmem


def test_the_builtin_model_is_drawn_from_the_seed_alone() -> None:
    recipe = ModelRecipe(name_or_path="builtin:tiny-llama", dtype="float32", attn="eager")
    before = torch.get_rng_state()
    one, same, other = (load_model(recipe, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.config._attn_implementation == "eager"
    assert not one.training
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_the_builtin_model_in_bfloat16_is_the_float32_one_rounded() -> None:
    exact = load_model(ModelRecipe(name_or_path="builtin:tiny-llama", dtype="float32"), seed=0)
    rounded = load_model(ModelRecipe(name_or_path="builtin:tiny-llama"), seed=0)
    for a, b in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    assert rounded.dtype == rounded.config.dtype == torch.bfloat16
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert rounded(torch.tensor([[4, 5, 6]])).logits.dtype == torch.bfloat16


def test_the_builtin_tokenizer_fits_the_builtin_model() -> None:
    tokenizer = load("builtin:tiny-llama")
    model = load_model(ModelRecipe(name_or_path="builtin:tiny-llama"), seed=0)
    assert tokenizer.pad_token is not None
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
