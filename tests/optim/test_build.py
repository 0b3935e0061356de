"""build_optimizer gives every trainable parameter of a model to exactly one rule, chosen by module."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lowmem.hf.trainer_override import optimizer as lowmem_trainer_optimizer
from lowmem.optim import build_optimizer
from lowmem.optim.build import describe_groups
from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.optim.settings import settings_of

ROOT = Path(__file__).parent.parent.parent


def llama(**changes):
    config = dict(
        vocab_size=50, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


def names_by_algorithm(model, optimizer):
    name_of = {param: name for name, param in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            found.setdefault(group["algorithm"], set()).add(name_of[param])
    return found


def test_galore_takes_attention_and_mlp_and_the_rest_falls_back():
    model = llama()
    found = names_by_algorithm(model, build_optimizer(model, "galore", lr=1e-3, rank=4))
    layers = {name for name, param in model.named_parameters() if ".layers." in name and param.dim() == 2}
    assert found["galore"] == layers
    assert found["adamw"] == {name for name, _ in model.named_parameters()} - layers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_trainable_parameter_is_in_exactly_one_group(name):
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = build_optimizer(model, name, lr=1e-3)
    members = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {param for param in model.parameters() if param.requires_grad}


@pytest.mark.parametrize("role", ["fallback", "head"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_the_output_head_as_a_fallback_and_as_a_head(name, role):
    model = llama()
    before = model.lm_head.weight.detach().clone()
    short_turns = {"refresh_every": 1} if "refresh_every" in settings_of(optimizer_class(name)) else {}
    optimizer = build_optimizer(model, "swan", lr=1e-3, **{role: {"name": name, **short_turns}})
    assert "lm_head.weight" in names_by_algorithm(model, optimizer)[name]
    for _ in range(4):  # a turn for each of: embedding, two layers' norms, head
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert (model.lm_head.weight != before).any()


def test_a_tied_embedding_appears_once_and_never_as_a_matrix_even_when_targeted():
    model = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="target 'lm_head' matches no linear layer"):
        build_optimizer(model, "galore", lr=1e-3, rank=4, target=["attn", "lm_head"])
    optimizer = build_optimizer(model, "galore", lr=1e-3, rank=4)
    places = [
        group["algorithm"]
        for group in optimizer.param_groups
        for param in group["params"]
        if param is model.lm_head.weight
    ]
    assert places == ["adamw"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["galore", "sgd"])
def test_the_head_may_have_an_optimizer_of_its_own_and_takes_a_tied_embedding_along(name, tied):
    model = llama(tie_word_embeddings=tied)
    optimizer = build_optimizer(model, name, lr=1e-3, head={"name": "adafactor", "lr": 1e-2})
    head = {"model.embed_tokens.weight" if tied else "lm_head.weight"}
    assert names_by_algorithm(model, optimizer)["adafactor"] == head
    members = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))


def test_a_head_of_the_same_algorithm_takes_what_it_does_not_say_and_a_frozen_one_nothing():
    model = llama()
    optimizer = build_optimizer(
        model, "sinkgd", lr=1e-3, normalize="row", head={"name": "sinkgd", "momentum": 0.9}
    )
    (group,) = [each for each in optimizer.param_groups if each["params"][0] is model.lm_head.weight]
    assert (group["normalize"], group["momentum"], group["lr"]) == ("row", 0.9, 1e-3)
    model.lm_head.weight.requires_grad_(False)
    build_optimizer(model, "sinkgd", lr=1e-3, head={"name": "sinkgd", "momentum": 0.9})


def test_groups_take_the_parameters_that_their_patterns_name_with_settings_of_their_own():
    model = llama()
    optimizer = build_optimizer(
        model,
        "frugal",
        lr=1e-3,
        density=0.5,
        groups=[
            {"match": ["v_proj", "down_proj"], "density": 0.0},
            {"match": ["0.self_attn.q_proj"], "name": "sgd", "lr": 0.5},
            {"match": "norm", "name": "adamw", "weight_decay": 0.1},
        ],
    )
    names = {param: name for name, param in model.named_parameters()}
    by_setting: dict = {}
    for group in optimizer.param_groups:
        key = (group["algorithm"], group["lr"], group.get("density"))
        by_setting.setdefault(key, set()).update(names[param] for param in group["params"])
    every = set(names.values())
    stateless = {name for name in every if "v_proj" in name or "down_proj" in name}
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    norms = {name for name in every if "norm" in name}
    q = {"model.layers.0.self_attn.q_proj.weight"}
    assert by_setting == {
        ("frugal", 1e-3, 0.5): every - stateless - q - norms - embeddings,
        ("frugal", 1e-3, 0.0): stateless,
        ("sgd", 0.5, None): q,
        ("adamw", 1e-3, None): norms | embeddings,
    }
    assert all(
        group["weight_decay"] == 0 for group in optimizer.param_groups if group["params"][0].dim() == 1
    )


@pytest.mark.parametrize(
    ("groups", "head", "words"),
    [
        ([{"match": ["q_proi"]}], None, r"groups\[0\]: match 'q_proi' is in the name of no .*: q_proj"),
        (
            [{"match": ["norm"]}, {"match": ["input"]}],
            None,
            r"input_layernorm.weight is claimed twice: by match 'norm' "
            r"of groups\[0\] and by match 'input' of groups\[1\]",
        ),
        (
            [{"match": ["lm_head"]}],
            {"name": "adamw"},
            "lm_head.weight is claimed twice: by head and by match 'lm_head'",
        ),
        ([{"lr": 1e-3}], None, r"groups\[0\] needs match, .* found None"),
        ([{"match": []}], None, r"groups\[0\] needs match"),
        ([{"match": [3]}], None, r"groups\[0\] needs match, .* found \[3\]"),
        ([{"match": ["norm"], "rank": 2}], None, r"groups\[0\] sgd has no setting 'rank'"),
        ([{"match": ["norm"], "name": "galor"}], None, "Did you mean 'galore'"),
    ],
)
def test_errors_about_groups_name_the_group_and_what_is_wrong(groups, head, words):
    with pytest.raises(ValueError, match=words):
        build_optimizer(llama(), "sgd", lr=1e-3, head=head, groups=groups)


def test_a_group_may_name_what_a_trainer_brings_later():
    lowmem_trainer_optimizer("sgd", lr=1e-3, groups=[{"match": ["q_proj"], "lr": 1e-4}])


def test_errors_about_the_head_say_what_is_wrong():
    with pytest.raises(ValueError, match="the model has no output head .* Leave head out"):
        build_optimizer(nn.ModuleDict({"mlp": nn.Linear(4, 4)}), "sgd", lr=1e-3, head={"name": "adamw"})
    with pytest.raises(ValueError, match="head adamw has no setting 'rank'"):
        build_optimizer(llama(), "sgd", lr=1e-3, head={"name": "adamw", "rank": 4})
    with pytest.raises(ValueError, match="head needs a name"):
        build_optimizer(llama(), "sgd", lr=1e-3, head={"lr": 4})
    with pytest.raises(ValueError, match="head adamw has no setting 'rank'"):
        lowmem_trainer_optimizer("sgd", lr=1e-3, head={"name": "adamw", "rank": 4})
    lowmem_trainer_optimizer("sgd", lr=1e-3, head={"name": "adamw"})


def test_norms_and_biases_are_not_decayed():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = build_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1)
    for group in optimizer.param_groups:
        assert all((param.dim() >= 2) == (group["weight_decay"] == 0.1) for param in group["params"])


def test_the_fallback_has_its_own_settings_and_takes_the_main_lr_by_default():
    model = llama()
    optimizer = build_optimizer(
        model,
        "galore",
        lr=1e-3,
        rank=4,
        weight_decay=0.1,
        fallback={"name": "sgd", "momentum": 0.5, "lr": 0.2},
    )
    by_algorithm = {group["algorithm"]: group for group in optimizer.param_groups}
    assert by_algorithm["sgd"]["lr"] == 0.2
    assert by_algorithm["sgd"]["momentum"] == 0.5
    assert "rank" not in by_algorithm["sgd"]
    plain = build_optimizer(model, "galore", lr=1e-3, rank=4, weight_decay=0.1)
    assert all(group["lr"] == 1e-3 for group in plain.param_groups)
    assert {group["weight_decay"] for group in plain.param_groups} == {0.1, 0.0}
    with pytest.raises(ValueError, match="fallback sgd has no setting 'rank'"):
        build_optimizer(model, "galore", lr=1e-3, fallback={"name": "sgd", "rank": 3})


def test_expert_weights_of_a_mixture_are_matrices():
    config = MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=44, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    optimizer = build_optimizer(model, "galore", lr=1e-3, rank=4)
    found = names_by_algorithm(model, optimizer)
    experts = {name for name, param in model.named_parameters() if param.dim() == 3}
    assert experts
    assert experts <= found["galore"]
    model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())


def test_a_target_without_a_match_lists_near_names():
    with pytest.raises(
        ValueError, match=r"target 'attention' matches no linear layer of the model.*self_attn"
    ):
        build_optimizer(llama(), "galore", lr=1e-3, target=["attention"])


def test_a_frozen_model_is_an_error():
    model = llama().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(model, "adamw", lr=1e-3)


def test_groups_are_described_with_their_counts():
    model = llama()
    text = describe_groups(build_optimizer(model, "galore", lr=1e-3, rank=4))
    matrices = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)
    assert f"galore: 14 tensors, {matrices:,} parameters, lr 0.001" in text


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_small_llama_learns_one_batch(name):
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True)
    lr = {"sgd": 0.5, "sgd_sai": 5e-3}.get(name, 1e-2)
    of_each = {"galore": {"rank": 4}, "sgd": {"momentum": 0.9}, "block_adam": {"refresh_every": 5}}
    settings = of_each.get(name, {})
    optimizer = build_optimizer(model, name, lr=lr, **settings)
    batch = torch.randint(0, 50, (4, 16))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_table_recipes_are_checked_against_is_the_one_the_code_gives():
    script = runpy.run_path(str(ROOT / "scripts" / "make_optimizer_table.py"))
    assert json.loads(script["TABLE"].read_text()) == json.loads(script["optimizer_table"]())
