from __future__ import annotations

import json
import resource

import pytest
import torch

import lowmem
from lowmem.hf.out_of_memory import out_of_memory_advice
from lowmem.recipe.load import load_recipe

GIB = 2**30
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr("lowmem.hf.out_of_memory.card_memory", lambda: (GIB, 24 * GIB))
    return load_recipe(
        "quickstart",
        [
            f"model.name_or_path={tmp_path}",
            "model.dtype=bfloat16",
            "data.max_length=2048",
            "optimizer.rank=256",
        ],
    )


def test_the_parts_of_the_plan_and_changes_that_would_fit_are_named(recipe):
    text = out_of_memory_advice(recipe, ERROR)
    assert "the card has 24.00 GiB, 1.00 GiB free now" in text
    assert "Tried to allocate 2.00 GiB. By plan the training step needs " in text
    assert "weights 12.55 GiB" in text
    changes = text.partition("Would fit: ")[2].partition(". lowmem plan")[0].split("; ")
    assert 1 <= len(changes) <= 3
    for change in changes:
        with_it = lowmem.plan(recipe_with(recipe, change.split()), gpu="24GiB", formula=True)
        assert with_it.fits, change


def test_without_a_gpu_the_changes_are_those_that_fit_what_the_process_may_have(recipe, monkeypatch):
    monkeypatch.setattr("lowmem.hf.out_of_memory.card_memory", lambda: None)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (20 * GIB, before[1]))
    try:
        text = out_of_memory_advice(recipe, ERROR)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert "this process may have 20.00 GiB of the host's memory" in text
    changes = text.partition("Would fit: ")[2].partition(". lowmem plan")[0].split("; ")
    assert 1 <= len(changes) <= 3
    for change in changes:
        assert lowmem.plan(recipe_with(recipe, change.split()), gpu="20GiB", formula=True).fits, change


def recipe_with(recipe, overrides):
    return load_recipe(
        "quickstart",
        [f"model.name_or_path={recipe.model.name_or_path}", "model.dtype=bfloat16", "data.max_length=2048",
         "optimizer.rank=256", *overrides],
    )  # fmt: skip


def test_a_model_without_formulas_gets_the_usual_advice(recipe, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "falcon"}')
    text = out_of_memory_advice(recipe, ERROR)
    assert (
        "Try, in this order: train.activation_checkpointing=true; a smaller train.per_device_batch_size"
        in text
    )
