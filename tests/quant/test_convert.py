"""Which modules of real models become int8, and what is said where one cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.quant.convert import Int8Choice, int8_places, quantize_model_
from lowmem.quant.int8_embedding import Int8Embedding, Int8TiedLinear
from lowmem.quant.int8_linear import Int8Linear
from lowmem.quant.int8_weight import Int8Module
from tests.hf.tiny_models import tiny_batch, tiny_model


def int8_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, Int8Module)}


def linear_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if type(module) is nn.Linear}


def test_every_linear_layer_but_the_head_becomes_int8():
    model = tiny_model()
    wanted = linear_paths(model) - {"lm_head"}
    quantize_model_(model)
    assert int8_paths(model) == wanted
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding


def test_embedding_and_head_become_int8_when_asked():
    model = tiny_model()
    wanted = {*linear_paths(model), "model.embed_tokens"}
    places = quantize_model_(model, Int8Choice(embeddings=True))
    assert int8_paths(model) == wanted
    assert (places.embedding, places.tied_head) == ("model.embed_tokens", None)


def test_a_tied_head_uses_the_codes_of_its_embedding():
    model = tiny_model("llama_tied")
    quantize_model_(model, Int8Choice(embeddings=True))
    assert isinstance(model.lm_head, Int8TiedLinear)
    assert isinstance(model.model.embed_tokens, Int8Embedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(name.startswith("lm_head") for name in model.state_dict())


@pytest.mark.parametrize(
    ("kind", "embeddings"),
    [
        *((kind, embeddings) for kind in ("llama", "llama_tied", "qwen2") for embeddings in (False, True)),
        ("gemma2_softcap", False),
        ("phi_head_bias", True),
    ],
)
def test_the_model_computes_with_the_dequantised_weights(kind, embeddings):
    model, twin = tiny_model(kind).eval(), tiny_model(kind).eval()
    quantize_model_(model, Int8Choice(embeddings=embeddings))
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, Int8Module):
                twin.get_submodule(path).weight.copy_(module.dequantized())
    ids = tiny_batch()["input_ids"]
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-5)


def test_names_keep_modules_float():
    model = tiny_model()
    places = quantize_model_(model, Int8Choice(keep=("layers.0", "down_proj")))
    assert int8_paths(model) == {
        f"model.layers.1.{name}"
        for name in (*(f"self_attn.{part}_proj" for part in "qkvo"), "mlp.gate_proj", "mlp.up_proj")
    }
    assert places.left_float["model.layers.1.mlp.down_proj"] == "asked for"


def test_a_name_is_whole_names_of_a_path_and_not_a_part_of_one():
    with pytest.raises(ValueError, match="'gate', which is to stay float, is no module"):
        int8_places(tiny_model(), Int8Choice(keep=("gate",)))


def test_a_mistyped_name_is_answered_with_the_near_one():
    with pytest.raises(ValueError, match="Did you mean down_proj"):
        int8_places(tiny_model(), Int8Choice(keep=("dwn_proj",)))


def test_gpt2_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn \(Conv1D, which keeps its matrix transposed\)"):
        quantize_model_(tiny_model("gpt2"))


def test_an_embedding_that_does_more_is_named():
    model = tiny_model("gemma2_softcap")
    with pytest.raises(ValueError, match=r"model\.embed_tokens is a Gemma2TextScaledWordEmbedding"):
        quantize_model_(model, Int8Choice(embeddings=True))
    assert not int8_paths(model), "nothing is changed by a refusal"


def test_a_kept_half_of_a_tied_pair_keeps_both():
    model = tiny_model("llama_tied")
    places = quantize_model_(model, Int8Choice(embeddings=True, keep=("lm_head",)))
    assert places.embedding is None
    assert places.tied_head is None
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_models_without_values_become_int8_without_values():
    with torch.device("meta"):
        model = tiny_model()
    quantize_model_(model)
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, Int8Linear)
    assert linear.weight_codes.is_meta
    assert linear.weight_codes.dtype is torch.int8


def test_what_is_frozen_stays_frozen_and_the_mode_stays():
    model = tiny_model().eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    quantize_model_(model)
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[0].mlp.down_proj.weight.requires_grad
    assert not any(module.training for module in model.modules())
