"""Packed rows are accepted where documents stay apart and refused where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MambaForCausalLM, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from lowmem.errors import RefusedError
from lowmem.hf.chunked_loss import use_chunked_loss
from lowmem.hf.lora import add_lora
from lowmem.hf.packing_probe import packing_leak, refuse_leaking_model
from lowmem.recipe.schema import LoraRecipe
from tests.hf.tiny_models import tiny_model

CLEAN = ["llama", "gemma2_softcap", "gpt2", "mixtral_router_loss", "qwen2", "cohere_logit_scale"]


class ForgetsPositions(LlamaForCausalLM):
    """Attends over the whole row, as a model does that never looks at position ids."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class ForgetsPositionsOfSeveralRows(LlamaForCausalLM):
    """What flash attention does: packed rows are told apart only in a batch of one."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        return super().forward(
            input_ids, position_ids=position_ids if len(input_ids) == 1 else None, **kwargs
        )


class LeaksALittle(LlamaForCausalLM):
    """A hundredth of the token before comes through, across the border of documents too."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 0.05 * nn.functional.pad(out.logits, (0, 0, 1, 0))[:, :-1]
        return out


class CountsRowPositions(LlamaForCausalLM):
    """Documents stay apart, but the second one does not start at position 0."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * torch.linspace(1, 3, out.logits.shape[1])[:, None]
        return out


class TakesNoPositions(LlamaForCausalLM):
    def forward(self, input_ids, use_cache=None):
        return super().forward(input_ids, use_cache=use_cache)


def as_class(model_class: type, **settings: object) -> PreTrainedModel:
    model = tiny_model(**settings)
    model.__class__ = model_class
    return model


@pytest.mark.parametrize("kind", CLEAN)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_restart_attention_at_each_document_pass(
    kind: str, attention: str, dtype: torch.dtype
) -> None:
    model = tiny_model(kind, dtype=dtype)
    if not (
        kind == "gemma2_softcap" and attention == "sdpa"
    ):  # newer transformers has no sdpa for its soft-cap
        model.set_attn_implementation(attention)
    refuse_leaking_model(model)
    refuse_leaking_model(model, rows=1)
    assert packing_leak(model) < (1e-5 if dtype == torch.float32 else 0.05)


def test_sliding_windows_shorter_than_a_document_pass() -> None:
    model = tiny_model("gemma2_softcap", sliding_window=4)
    assert "sliding_attention" in model.config.layer_types
    refuse_leaking_model(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_class", [ForgetsPositions, LeaksALittle])
def test_a_model_whose_documents_see_each_other_is_refused(model_class: type, dtype: torch.dtype) -> None:
    model = as_class(model_class, dtype=dtype)
    with pytest.raises(RefusedError, match=r"influence each other.*Use data\.packing: false") as refusal:
        refuse_leaking_model(model)
    assert refusal.value.exit_code == 4
    assert model_class.__name__ in str(refusal.value)


def test_a_state_space_model_carries_its_state_over_and_is_refused() -> None:
    model = tiny_model("mamba")
    assert isinstance(model, MambaForCausalLM)
    assert packing_leak(model) > 0.5
    with pytest.raises(RefusedError, match="influence each other"):
        refuse_leaking_model(model)


def test_a_leak_in_batches_of_several_rows_names_the_batch_size_that_works() -> None:
    model = as_class(ForgetsPositionsOfSeveralRows)
    refuse_leaking_model(model, rows=1)
    with pytest.raises(
        RefusedError, match=r"right with one row: use train\.per_device_batch_size: 1, or model\.attn"
    ):
        refuse_leaking_model(model, rows=8)


def test_documents_that_do_not_start_afresh_are_refused() -> None:
    with pytest.raises(RefusedError, match="do not get the logits that they get in a row of their own"):
        refuse_leaking_model(as_class(CountsRowPositions))


def test_a_model_that_takes_no_position_ids_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"cannot be called with packed rows.*position_ids"):
        refuse_leaking_model(as_class(TakesNoPositions))


def test_logits_that_are_not_numbers_are_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(RefusedError, match="nan standard deviations"):
        refuse_leaking_model(model)


def test_the_probe_leaves_no_trace() -> None:
    model = tiny_model(attention_dropout=0.5)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    assert packing_leak(model) == packing_leak(model)
    assert packing_leak(model, vocab_size=50) < 1e-5
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_patched_and_adapted_models_are_probed_like_any_other() -> None:
    model = add_lora(tiny_model(), LoraRecipe(r=2))
    use_chunked_loss(model)
    refuse_leaking_model(model)
    assert model.loss_function is not ForCausalLMLoss
