"""Optimizer state by formula against what the optimizers themselves declare."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem.errors import RecipeError
from lowmem.memory.architecture import Architecture
from lowmem.memory.state_formulas import (
    BITSANDBYTES_TABLES_BYTES,
    FORMULAS,
    TREATS_MATRICES,
    adamw8bit_state_bytes,
    state_bytes,
    treatments,
)
from lowmem.optim import build_optimizer
from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import OptimizerRecipe

SHAPES = [(1,), (7,), (300,), (64, 64), (33, 130), (130, 33), (129, 40), (3, 40, 24), (5, 24, 40), (0,)]
VARIED = {
    "momentum": [0.0, 0.9],
    "beta1": [0.0, 0.9],
    "projection": ["subspace", "dct"],
    "residual": ["scaled", "none"],
    "growth_limit": [None, 1.01],
    "rank": [None, 1, 32, 200],
    "density": [0.0, 0.01, 0.3, 1.0],
    "inner": ["adam", "lion", "momentum", "sign"],
    "lazy": [True, False],
    "similarity_window": [1, 5],
    "min_8bit_size": [1, 300, 4096],
    "storage": [
        None,
        {"moment": "bf16", "variance": "fp32"},
        {"moment": "fp32", "basis": "bf16"},
        {"moment": "param", "variance": "bf16", "basis": "fp32"},
        {"moment": "int8", "basis": "int8"},
        {"moment": "int8", "variance": "int8", "basis": "int4"},
    ],
}
SMALL_LLAMA = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def variations(name: str) -> list[dict]:
    """Every combination of the settings of `name` that decide about state."""
    known = optimizer_table()[name]["settings"]
    own = {
        key: values
        for key, values in VARIED.items()
        if key in known and set(map(str, values)) <= set(known[key].get("choices", map(str, values)))
    }
    return [dict(zip(own, values, strict=True)) for values in itertools.product(*own.values())]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_formula(name):
    assert name in FORMULAS, f"{name} has no formula in lowmem/memory/state_formulas.py: add one to FORMULAS"
    assert (name in TREATS_MATRICES) == optimizer_class(name).treats_matrices, (
        f"{name} belongs into TREATS_MATRICES of lowmem/memory/state_formulas.py, or out of it"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_a_parameter_is_what_the_optimizer_declares(name, dtype):
    for settings in variations(name):
        for shape in SHAPES:
            param = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
            declared = optimizer_class(name)([param], **settings).state_bytes()
            assert state_bytes(name, settings, shape, dtype.itemsize) == declared, (settings, shape)


def model_and_parameters(**overrides):
    config = AutoConfig.for_model("llama", **{**SMALL_LLAMA, **overrides})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model, Architecture.from_config(config.to_dict()).parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("target", "fallback"),
    [
        (["attn", "mlp"], None),
        (["q_proj", "down_proj"], None),
        (["mlp"], {"name": "sgd", "momentum": 0.9}),
        (["attn"], {"name": "adamw", "storage": {"moment": "fp32"}}),
        (["attn"], {"name": "galore", "rank": 16}),
        (["attn"], {"name": "sgd_sai"}),
    ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_is_divided_between_optimizer_and_fallback_as_build_optimizer_does_it(
    name, target, fallback, tied
):
    model, parameters = model_and_parameters(tie_word_embeddings=tied)
    settings = {"storage": {"moment": "fp32", "variance": "bf16"}}
    if "storage" not in optimizer_table()[name]["settings"]:
        settings = {"min_8bit_size": 20_000}  # some matrices have codes
    declared = build_optimizer(
        model, name, lr=1e-3, target=target, fallback=fallback, **settings
    ).state_bytes()
    recipe = OptimizerRecipe(name=name, target=target, fallback=fallback, settings={"lr": 1e-3, **settings})
    found = sum(
        state_bytes(each.algorithm, each.settings, each.parameter.shape, 2)
        for each in treatments(recipe, parameters)
    )
    assert found == declared


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"active": 2}, {"others": "frozen"}, {"active": 9, "others": "frozen"}], ids=str
)
def test_where_layers_take_turns_the_formula_is_that_of_the_fullest_turn(settings, tied):
    model, parameters = model_and_parameters(tie_word_embeddings=tied, num_hidden_layers=3)
    recipe = OptimizerRecipe(name="block_adam", target=["mlp", "attn"], settings={"lr": 1e-3, **settings})
    foreseen = sum(
        state_bytes(each.algorithm, each.settings, each.parameter.shape, 2)
        for each in treatments(recipe, parameters)
    )
    optimizer = build_optimizer(model, "block_adam", lr=1e-3, refresh_every=1, **settings)
    turns = []
    for number in range(60):
        for group in optimizer.param_groups:
            group["steps"] = number
        turns.append(optimizer.state_bytes())
    assert max(turns) == foreseen


def test_where_matrices_take_turns_the_formula_is_that_of_the_fullest_turn():
    config = AutoConfig.for_model("llama", **SMALL_LLAMA)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = Architecture.from_config(config.to_dict()).parameters
    recipe = OptimizerRecipe(
        name="frugal", target=["mlp", "attn"], settings={"lr": 1e-3, "projection": "block", "density": 0.2}
    )
    foreseen = sum(
        state_bytes(each.algorithm, each.settings, each.parameter.shape, 2)
        for each in treatments(recipe, parameters)
    )
    optimizer = build_optimizer(model, "frugal", lr=1e-3, projection="block", density=0.2, refresh_every=1)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    turns = []
    for _ in range(150):
        turns.append(optimizer.state_bytes())
        optimizer.step()
    assert max(turns) == foreseen
    assert min(turns) < foreseen


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [{"name": "sinkgd", "momentum": 0.9}, {"name": "adamw"}], ids=str)
@pytest.mark.parametrize("name", ["sinkgd", "sgd"])
def test_a_head_with_an_optimizer_of_its_own_is_counted_as_build_optimizer_does_it(name, head, tied):
    model, parameters = model_and_parameters(tie_word_embeddings=tied)
    recipe = OptimizerRecipe(name=name, head=head, settings={"lr": 1e-3})
    found = sum(
        state_bytes(each.algorithm, each.settings, each.parameter.shape, 2)
        for each in treatments(recipe, parameters)
    )
    assert found == build_optimizer(model, name, lr=1e-3, head=head).state_bytes()


GROUPS = [
    [{"match": ["v_proj", "down_proj"], "lr": 1e-4}],
    [{"match": ["layers.0.self_attn"], "name": "adamw"}, {"match": ["norm"], "name": "sgd", "momentum": 0.9}],
    [{"match": ["embed_tokens"], "name": "galore", "rank": 4, "storage": {"moment": "int8"}}],
]


@pytest.mark.parametrize("fallback", [None, {"name": "adafactor"}], ids=str)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("name", ["galore", "sgd", "block_adam"])
def test_groups_are_counted_as_build_optimizer_makes_them(name, groups, fallback):
    model, parameters = model_and_parameters()
    recipe = OptimizerRecipe(name=name, groups=groups, fallback=fallback, settings={"lr": 1e-3})
    found = sum(
        state_bytes(each.algorithm, each.settings, each.parameter.shape, 2)
        for each in treatments(recipe, parameters)
    )
    optimizer = build_optimizer(model, name, lr=1e-3, groups=groups, fallback=fallback)
    assert found >= optimizer.state_bytes()
    if name != "block_adam":  # its fullest turn need not be the first
        assert found == optimizer.state_bytes()


def test_a_parameter_that_two_groups_claim_is_an_error_in_words():
    _, parameters = model_and_parameters()
    groups = [{"match": ["norm"]}, {"match": ["layers.0."]}]
    recipe = OptimizerRecipe(name="sgd", groups=groups, settings={"lr": 1e-3})
    with pytest.raises(RecipeError, match="claimed twice: by match 'norm' of groups"):
        treatments(recipe, parameters)


def test_a_target_without_a_match_is_an_error_in_words():
    _, parameters = model_and_parameters()
    recipe = OptimizerRecipe(name="galore", target=["attn", "expert"], settings={"lr": 1e-3})
    with pytest.raises(RecipeError, match="target 'expert' matches no linear layer"):
        treatments(recipe, parameters)


def test_eight_bit_adamw_takes_what_bitsandbytes_allocates():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bitsandbytes = pytest.importorskip("bitsandbytes")
    params = [nn.Parameter(torch.ones(numel)) for numel in (1, 4095, 4096, 5000, 100_000)]
    optimizer = bitsandbytes.optim.AdamW8bit(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    expected = sum(adamw8bit_state_bytes(param.numel()) for param in params)
    assert sum(storages.values()) == expected + BITSANDBYTES_TABLES_BYTES
