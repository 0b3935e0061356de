"""Whole models that cannot be trained: incomplete, of another kind, with code of their own, without this attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from lowmem.errors import RefusedError
from tests.hf.model_folders import edit_config, edit_weights, llama_folder, load, problem
from tests.hf.tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama_folder(tmp_path)


def test_a_weight_that_would_start_at_random_is_an_error(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("model.layers.0.self_attn.q_proj.weight"))
    text = problem(folder)
    assert "lacks 1 of the weights of LlamaForCausalLM (model.layers.0.self_attn.q_proj.weight)" in text


def test_a_model_without_its_output_layer_is_an_error(tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path)
    assert "lm_head.weight" in problem(tmp_path)


def test_weights_of_another_shape_are_shown_with_both_shapes(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(7, 16)}))
    assert "lm_head.weight is (7, 16), not (199, 16)" in problem(folder)


def test_a_model_that_brings_its_own_code_needs_permission(folder: Path) -> None:
    edit_config(
        folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    )
    (folder / "own.py").write_text("raise SystemExit('the code ran')")
    text = problem(folder)
    assert "Python code of its own" in text
    assert "model.trust_remote_code: true" in text
    with pytest.raises(SystemExit, match="the code ran"):
        load(folder, trust_remote_code=True)


def test_own_code_that_is_not_needed_is_not_run(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text("raise SystemExit('the code ran')")
    assert isinstance(load(folder), LlamaForCausalLM)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


BART = {
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Bert MaskedLM", "is bert, an encoder that sees the tokens to be predicted"),
        ("ViT ImageClassification", "is vit (ViTForImageClassification)"),
        ("T5 ConditionalGeneration", "is t5 (T5ForConditionalGeneration)"),
        ("Bart ConditionalGeneration", "an encoder with a decoder"),
    ],
)
def test_models_that_are_not_causal_language_models_are_refused(
    tmp_path: Path, model: str, expected: str
) -> None:
    family, task = model.split()
    sizes = {
        "Bert": {**SMALL, "vocab_size": 99},
        "ViT": SMALL,
        "T5": {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 99, "d_kv": 8},
        "Bart": {"d_model": 16, "vocab_size": 99, "encoder_layers": 1, "decoder_layers": 1, **BART},
    }[family]
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    getattr(transformers, f"{family}For{task}")(config).save_pretrained(tmp_path)
    text = problem(tmp_path)
    assert expected in text
    assert "lowmem trains causal language models" in text


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "stored quantised (gptq) and cannot be trained" in problem(folder)


# --- attention that is not there


def test_flash_attention_without_a_gpu_names_the_nearest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = problem(folder, RefusedError, attn="flash_attention_2")
    assert "needs a CUDA device" in text
    assert "Use model.attn: sdpa" in text


def test_flash_attention_without_its_package_names_the_install_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = problem(folder, RefusedError, attn="flash_attention_2")
    assert "pip install flash-attn --no-build-isolation" in text


def test_attention_that_the_model_does_not_have_names_the_nearest(tmp_path: Path) -> None:
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=99)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    text = problem(tmp_path, RefusedError, attn="sdpa")
    assert "model.attn: sdpa does not exist for" in text
    assert "Use model.attn: eager" in text
