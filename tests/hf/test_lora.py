"""Adapters are attached where the recipe says, train alone, are saved without the model, and merge exactly."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowmem.errors import FaultError, RecipeError
from lowmem.hf.adapter_files import adapters_in
from lowmem.hf.lora import add_lora, load_adapters, merge, save_adapters, trainable_parameters
from lowmem.recipe.schema import LoraRecipe
from tests.hf.tiny_models import checkpoint_activations, tiny_batch, tiny_model


def adapted_names(model: nn.Module) -> set[str]:
    return {
        name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_modules() if ".lora_A" in name
    }


def with_random_b(model: PeftModel) -> PeftModel:
    """B starts at zero; random values make the adapters do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_batch()["input_ids"]).logits


def test_all_linear_adapts_every_layer_but_the_head() -> None:
    model = add_lora(tiny_model(), LoraRecipe())
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted_names(model) == linear
    assert type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("target", ["q_proj", ["q_proj"], ["q_proj", "mlp.down_proj"]])
def test_named_layers_and_no_others_are_adapted(target: str | list[str]) -> None:
    model = add_lora(tiny_model(), LoraRecipe(target=target))
    expected = {"q_proj", "down_proj"} if "mlp.down_proj" in target else {"q_proj"}
    assert adapted_names(model) == expected


def test_layers_of_gpt2_which_are_no_nn_linear_are_adapted_too() -> None:
    assert adapted_names(add_lora(tiny_model("gpt2"), LoraRecipe(target=["c_attn"]))) == {"c_attn"}
    assert "c_fc" in adapted_names(add_lora(tiny_model("gpt2"), LoraRecipe()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_an_adapter_file_holds_is_known_by_the_names_of_the_parameters(tmp_path, kind) -> None:
    model = with_random_b(add_lora(tiny_model(kind), LoraRecipe(r=2)))
    save_adapters(model, tmp_path)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    found = adapters_in(tmp_path)
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], param) for name, param in trained.items())


def test_names_that_match_nothing_are_all_reported_with_near_ones() -> None:
    with pytest.raises(RecipeError) as raised:
        add_lora(tiny_model(), LoraRecipe(target=["q_proj", "v_prj", "embed_tokens", "quux"]))
    problems = raised.value.problems
    assert len(problems) == 3
    assert (
        "lora.target: 'v_prj' names no linear layer of LlamaForCausalLM. Did you mean v_proj?" in problems[0]
    )
    assert "'embed_tokens' names no linear layer" in problems[1]
    assert (
        "names out of down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in problems[2]
    )
    with pytest.raises(RecipeError, match="Did you mean all-linear"):
        add_lora(tiny_model(), LoraRecipe(target="all_linear"))
    with pytest.raises(RecipeError, match="the list is empty"):
        add_lora(tiny_model(), LoraRecipe(target=[]))


def test_only_adapters_train_and_their_number_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    total = sum(parameter.numel() for parameter in model.parameters())
    with caplog.at_level(logging.INFO):
        adapted = add_lora(model, LoraRecipe(r=3, target=["q_proj", "down_proj"]))
    # A is (r, in) and B is (out, r): 16 -> 16 and 24 -> 16, in each of two layers.
    adapters = 2 * 3 * (16 + 16 + 24 + 16)
    assert trainable_parameters(adapted) == (adapters, total + adapters)
    assert f"LoRA trains {adapters} of {total + adapters} parameters" in caplog.text
    assert all(("lora_" in name) == p.requires_grad for name, p in adapted.named_parameters())


def test_alpha_over_r_scales_the_adapters() -> None:
    base = tiny_model()
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = with_random_b(add_lora(base, LoraRecipe(r=4, alpha=6.0, target="q_proj")))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = merge(model).model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged.detach(), (weight + 6.0 / 4 * delta).detach())


def test_adapters_start_without_effect_and_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (add_lora(tiny_model(), LoraRecipe(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(one), logits(tiny_model()))
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_adapters_of_a_bfloat16_model_are_float32() -> None:
    model = add_lora(tiny_model(dtype=torch.bfloat16), LoraRecipe())
    dtypes = {"lora_" in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert model(**tiny_batch()).loss.isfinite()


def test_dropout_acts_on_adapters_in_training_only() -> None:
    model = with_random_b(add_lora(tiny_model(), LoraRecipe(dropout=0.5))).train()
    batch = tiny_batch()
    assert not torch.equal(model(**batch).loss, model(**batch).loss)
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_activation_checkpointing_equal_those_without(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = with_random_b(add_lora(tiny_model(), LoraRecipe(target=["q_proj", "up_proj"]))).train()
        if checkpointing:
            checkpoint_activations(model.get_base_model(), reentrant=reentrant)
        model(**tiny_batch(), use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    assert len(plain) == 8
    assert all(plain[name].any() for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_saved_adapters_hold_no_weight_of_the_model_and_load_on_top_of_it(tmp_path: Path) -> None:
    model = with_random_b(add_lora(tiny_model(), LoraRecipe(r=2)))
    save_adapters(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored
    assert all("lora_" in name for name in stored)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    assert not list(tmp_path.glob("*.bin"))
    again = load_adapters(tiny_model(), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
def test_the_merged_model_answers_like_the_adapted_one_and_is_plain(tmp_path: Path, kind: str) -> None:
    model = with_random_b(add_lora(tiny_model(kind), LoraRecipe()))
    expected = logits(model)
    assert not torch.allclose(expected, logits(tiny_model(kind)), atol=1e-3)
    merged = merge(model)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert merged.state_dict().keys() == tiny_model(kind).state_dict().keys()
    assert {type(module) for module in merged.modules()} == {
        type(module) for module in tiny_model(kind).modules()
    }
    ids = tiny_batch()["input_ids"]
    # What add_lora hooked onto the embedding is gone again.
    assert not merged.get_input_embeddings()(ids).requires_grad
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged))


def test_merging_keeps_the_dtype_of_the_model() -> None:
    merged = merge(with_random_b(add_lora(tiny_model(dtype=torch.bfloat16), LoraRecipe())))
    assert isinstance(merged, LlamaForCausalLM)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_adapters_that_are_not_finite_are_not_merged() -> None:
    model = with_random_b(add_lora(tiny_model(), LoraRecipe(target="q_proj")))
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.q_proj.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(FaultError, match=r"cannot be merged.*save\.merge_lora: false") as raised:
        merge(model)
    assert raised.value.exit_code == 5
