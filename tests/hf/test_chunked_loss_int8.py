"""The chunked loss of int8 heads against the same model with the same weights in float."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem.hf.chunked_loss import chunked_loss_agrees, loss_only, use_chunked_loss, use_plain_loss
from lowmem.hf.deferred_logits import DeferredLogits
from lowmem.numerics.held_weights import grad_of
from lowmem.optim import build_optimizer
from lowmem.quant.convert import Int8Choice, quantize_model_
from lowmem.quant.int8_embedding import Int8Embedding, Int8TiedLinear
from lowmem.quant.int8_linear import Int8Linear
from lowmem.run.choose import EXECUTIONS
from tests.hf.test_chunked_loss_memory import AllocationLog
from tests.hf.tiny_models import tiny_batch, tiny_model

KINDS = ["llama", "llama_tied", "gemma2_softcap", "phi_head_bias"]
SMALL_TILE = 1
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def int8_and_float(
    kind: str, dtype: torch.dtype = torch.float32, **settings: object
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model whose head (and embedding, where tied to it) is int8, and its twin with these weights in float."""
    if kind == "gemma2_softcap":
        settings = {"tie_word_embeddings": False, **settings}  # its embedding is not a plain one
    model = tiny_model(kind, dtype=dtype, **settings)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    twin = copy.deepcopy(model)
    if head.weight is table.weight:
        made = Int8Embedding.from_embedding(table, group_size=8)
        model.set_input_embeddings(made)
        model.set_output_embeddings(Int8TiedLinear(made, head.bias))
    else:
        made = Int8Linear.from_linear(head, group_size=8)
        model.set_output_embeddings(made)
    with torch.no_grad():
        twin.get_output_embeddings().weight.copy_(made.dequantized())
    return model, twin


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: grad_of(param) for name, param in model.named_parameters() if grad_of(param) is not None}


@pytest.mark.parametrize("tile_bytes", [SMALL_TILE, 2**25])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_weights_in_float(kind, dtype, tile_bytes) -> None:
    model, twin = int8_and_float(kind, dtype)
    optimizer = build_optimizer(model, "sgd", lr=1e-3)
    losses = []
    for each in (model, twin):
        use_chunked_loss(each, tile_bytes=tile_bytes)
        loss = each(**tiny_batch()).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=DTYPES[dtype])
    found, expected = gradients_of(model), gradients_of(twin)
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype
        assert (found[name] - gradient).abs().max() <= DTYPES[dtype] * scale, name
    del optimizer


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_every_execution_trains_an_int8_head(kind, execution) -> None:
    """What moves is what the float twin moves, up to the width of a code."""
    moved = []
    for model in int8_and_float(kind):
        use_chunked_loss(model, tile_bytes=SMALL_TILE)
        head = model.get_output_embeddings().weight
        before = weight_of(model, head)
        optimizer = build_optimizer(
            model, "galore", lr=0.05, rank=4, fallback={"name": "sgd", "rounding": "nearest"}
        )
        way = EXECUTIONS[execution](optimizer)
        way.attach(model)
        way.begin_micro_batch(is_first=True, is_last=True)
        model(**tiny_batch()).loss.backward()
        way.finish_backward()
        optimizer.step()
        moved.append(weight_of(model, head) - before)
        assert grad_of(head) is None or execution != "fused"
    codes = weight_of(model, head).abs().max() / 100
    assert (moved[0] - moved[1]).abs().max() <= codes < moved[1].abs().max()


def weight_of(model: nn.Module, param: Tensor) -> Tensor:
    held = getattr(param, "held_weight", None)
    return param.detach().clone() if held is None else held.module.dequantized()


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_agrees_and_leaves_no_trace(kind) -> None:
    model, _ = int8_and_float(kind)
    plain = type(model.get_output_embeddings())
    assert chunked_loss_agrees(model, tiny_batch()) is None
    assert type(model.get_output_embeddings()) is plain
    assert not gradients_of(model)
    assert model.get_output_embeddings().weight.held_weight.trainer is None


@pytest.mark.parametrize("embeddings", [False, True], ids=["float head", "int8 head"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_the_probe_asks_nothing_of_int8_layers_below_the_head(kind, embeddings) -> None:
    """A tied head's gradient goes through all of them, before any optimizer has their weights."""
    model = tiny_model(kind)
    quantize_model_(model, Int8Choice(group_size=16, embeddings=embeddings))
    assert chunked_loss_agrees(model, tiny_batch()) is None
    assert not gradients_of(model)
    assert all(param.requires_grad for param in model.parameters())


def test_the_probe_notices_a_wrong_weight_gradient(monkeypatch) -> None:
    model, _ = int8_and_float("llama")
    held = model.get_output_embeddings().weight.held_weight
    was_called = []

    def wrong(grad: Tensor) -> None:
        was_called.append(grad)
        held.grad = grad * len(was_called)

    monkeypatch.setattr(held, "add_grad_", wrong)
    assert "head's weight" in str(chunked_loss_agrees(model, tiny_batch()))


def test_evaluation_and_generation_see_real_logits_and_undoing_gives_the_head_back() -> None:
    model, _ = int8_and_float("llama_tied")
    batch = tiny_batch()
    plain = model.eval()(**batch)
    use_chunked_loss(model)
    assert torch.equal(model(**batch).logits, plain.logits)
    with torch.no_grad(), loss_only(model):
        assert isinstance(model(**batch).logits, DeferredLogits)
    use_plain_loss(model)
    assert type(model.get_output_embeddings()) is Int8TiedLinear


def test_only_some_rows_of_an_int8_head_are_float_at_one_time(monkeypatch) -> None:
    monkeypatch.setattr("lowmem.quant.int8_weight.TILE_NUMEL", 64 * 16)
    model, _ = int8_and_float("llama", vocab_size=1003)
    model.get_output_embeddings().weight.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(False)
    use_chunked_loss(model)  # as far as logits go, one tile would hold the whole vocabulary
    with AllocationLog() as log:
        model(**tiny_batch()).loss.backward()
    assert max(elements for elements, _ in log.allocations) <= max(64 * 16, 42 * 64)
