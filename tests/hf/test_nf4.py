"""Adapters on a frozen base in 4-bit codes: training, resume, inference, and the same model without values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import lowmem.hf.ending
import lowmem.hf.nf4
from lowmem.errors import RefusedError
from lowmem.hf.flow import train
from lowmem.hf.inference_model import load_for_inference
from lowmem.hf.lora import add_lora
from lowmem.hf.make_optimizer import model_bytes
from lowmem.hf.model import load_model
from lowmem.hf.model_setup import recompute_activations
from lowmem.hf.nf4 import pack_without_values_
from lowmem.hf.plan import plan
from lowmem.memory.simulate import Simulation
from lowmem.numerics.held_weights import parameter_count
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import LoraRecipe, ModelRecipe
from tests.hf.tiny_models import tiny_batch, tiny_model
from tests.hf.tiny_runs import character_tokenizer, tiny_config, tiny_recipe

bnb = pytest.importorskip("bitsandbytes", reason="4-bit codes are bitsandbytes'")

QLORA = (
    "model.weights=nf4",
    "model.dtype=bfloat16",
    "lora={r: 4}",
    "optimizer={name: adamw, lr: 1.0e-2}",
    "train.activation_checkpointing=true",
    "report.log_every=1",
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that a matrix has many blocks of scales."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(hidden_size=64, intermediate_size=160))
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows_of(run) if "loss" in row]


def test_gradients_of_adapters_are_those_over_a_plain_model_with_the_weights_that_the_codes_stand_for(
    model_folder: Path,
) -> None:
    recipe = ModelRecipe(name_or_path=str(model_folder), dtype="float32", weights="nf4")
    packed, plain = load_model(recipe, seed=0), load_model(replace(recipe, weights="bf16"), seed=0)
    for name in packed_names(packed):
        codes = packed.get_submodule(name).weight
        with torch.no_grad():
            weight = plain.get_submodule(name).weight
            expanded = bnb.functional.dequantize_4bit(codes.data, codes.quant_state)
            assert not torch.equal(weight, expanded)
            weight.copy_(expanded)
    found = []
    for model in (packed, plain):
        adapted = add_lora(model, LoraRecipe(r=4), seed=1).train()
        recompute_activations(adapted)
        batch = tiny_batch(vocab_size=90)
        adapted(**batch, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], rtol=1e-4, atol=1e-6), name
    assert any(grad.abs().max() > 1e-3 for grad in found[0].values())


def test_adapters_learn_and_alone_are_saved_and_the_plan_is_right_to_the_byte(
    tmp_path: Path, model_folder: Path
) -> None:
    more = ("train.max_steps=8", "report.plan=true", "eval.at_start=true")
    assert train(tiny_recipe(tmp_path, model_folder, *QLORA, *more)) == 0
    before, after = (row["eval_loss"] for row in rows_of(tmp_path / "run") if "eval_loss" in row)
    assert after < before - 0.2
    saved = load_file(tmp_path / "run/model/adapter_model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)
    memory = json.loads((tmp_path / "run/memory.json").read_text())
    assert memory["planned"]["parts"] == memory["parts"]
    assert memory["conditions"]["weights"] == "nf4"
    values = sum(param.numel() for param in AutoModelForCausalLM.from_pretrained(model_folder).parameters())
    assert memory["conditions"]["parameters"] == values + memory["conditions"]["trained_parameters"]


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowmem.hf.ending, "write_report", lambda folder: folder / "report.md")
    settings = (*QLORA, "save.every=2", "eval.every=1", "train.lr_scheduler={name: constant}")
    for name, lengths in (("whole", (4,)), ("parts", (2, 4))):
        (tmp_path / name).mkdir()
        for steps in lengths:
            recipe = tiny_recipe(tmp_path / name, model_folder, *settings, f"train.max_steps={steps}")
            assert train(recipe) == 0
    whole, parts = (
        load_file(tmp_path / name / "run/model/adapter_model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses(tmp_path / "whole/run") == losses(tmp_path / "parts/run")


def test_a_trained_run_and_the_built_in_model_are_loaded_for_inference_in_codes(
    tmp_path: Path, model_folder: Path
) -> None:
    assert train(tiny_recipe(tmp_path, model_folder, *QLORA, "train.max_steps=1")) == 0
    loaded = load_for_inference(str(tmp_path / "run"), [])
    assert len(packed_names(loaded.model)) == 2 * 7
    recipe = ModelRecipe(name_or_path="builtin:tiny-llama")
    packed, plain = (load_model(replace(recipe, weights=kind), seed=3) for kind in ("nf4", "bf16"))
    assert parameter_count(packed) == parameter_count(plain)
    ids = torch.arange(8, 16)[None]
    with torch.no_grad():
        near, exact = (model(input_ids=ids).logits.float() for model in (packed, plain))
    assert torch.nn.functional.cosine_similarity(near, exact, dim=-1).min() > 0.95


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "phi_head_bias"])
def test_the_model_without_values_is_packed_where_a_loaded_one_is_and_takes_the_same_bytes(
    kind: str, tmp_path: Path
) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelRecipe(name_or_path=str(tmp_path), weights="nf4"), seed=0)
    with Simulation().tensors():
        fake = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
        pack_without_values_(fake, torch.bfloat16)
        assert packed_names(fake) == packed_names(loaded)
        assert packed_names(fake)
        assert model_bytes(fake) == model_bytes(loaded)
        assert parameter_count(fake) == parameter_count(loaded) == parameter_count(model)


def test_codes_are_double_quantised_nf4_and_are_left_as_they_are_by_evaluations(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = load_model(ModelRecipe(name_or_path=str(model_folder), weights="nf4"), seed=0)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize, layer.compute_dtype) == (
            "nf4",
            True,
            64,
            torch.bfloat16,
        )
    before = [layer.weight.data.clone() for layer in layers]
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8)[None])
    assert all(torch.equal(layer.weight.data, old) for layer, old in zip(layers, before, strict=True))


def test_without_bitsandbytes_the_command_that_installs_it_is_named_and_a_formula_still_plans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lowmem.hf.nf4, "find_spec", lambda name: None)
    recipe = load_recipe("quickstart", ["model.weights=nf4", "lora={r: 4}"])
    for attempt in (train, plan):
        with pytest.raises(RefusedError, match=r"pip install 'bitsandbytes>=0\.50'.*--formula"):
            attempt(recipe)
    planned = plan(recipe, formula=True)
    assert planned.document["measured_by"] == "formula"
    assert planned.document["conditions"]["weights"] == "nf4"
