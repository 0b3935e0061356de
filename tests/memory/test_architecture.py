"""The shapes read from a config against the modules that transformers builds from it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem.errors import RecipeError, RefusedError
from lowmem.memory.architecture import FAMILIES, Architecture

SMALL = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VARIANTS = [
    {},
    {"head_dim": 32},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": 6, "tie_word_embeddings": False},
]


def model_on_meta(config) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda overrides: "-".join(overrides) or "plain")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_has_the_name_the_place_and_the_shape_that_transformers_gives_it(
    model_type, overrides
):
    config = AutoConfig.for_model(model_type, **{**SMALL, **overrides})
    model = model_on_meta(config)
    architecture = Architecture.from_config(json.loads(config.to_json_string(use_diff=False)))
    expected = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(each.name, each.shape) for each in architecture.parameters] == expected
    assert architecture.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    assert {each.name for each in architecture.parameters if each.is_linear} == linear
    assert sorted(architecture.buffer_numels) == sorted(buffer.numel() for buffer in model.buffers())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sizes_that_a_config_leaves_out_are_those_of_transformers(model_type):
    """Old config.json files lack keys that came later."""
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    written = {"model_type": model_type, **{key: SMALL[key] for key in required}, "num_attention_heads": 32}
    written["hidden_size"] = 128
    model = model_on_meta(AutoConfig.for_model(**written, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    architecture = Architecture.from_config(written)
    expected = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(each.name, each.shape) for each in architecture.parameters] == expected


def test_a_model_without_formulas_is_refused_and_told_what_works():
    with pytest.raises(RefusedError, match=r"llama.*this model is mixtral.*simulation.*handles every model"):
        Architecture.from_config({"model_type": "mixtral"})


def test_a_config_without_a_size_is_answered_with_its_key():
    with pytest.raises(RecipeError, match="intermediate_size: None"):
        Architecture.from_config(
            {
                "model_type": "llama",
                "num_attention_heads": 2,
                "hidden_size": 8,
                "vocab_size": 16,
            }
        )
