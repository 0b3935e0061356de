"""The start-up probe: the chunked loss is used where it equals the model's own, and a reason given elsewhere."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lowmem.hf.chunked_loss import chunked_loss_agrees, use_chunked_loss
from lowmem.hf.deferred_logits import DeferredLogits
from tests.hf.tiny_models import KINDS, tiny_batch, tiny_model

SMALL_TILE = 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_agrees_for_every_kind_of_model(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype=dtype)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    assert chunked_loss_agrees(model, tiny_batch(rows=3, tokens=30)) is None
    assert type(model.lm_head) is nn.Linear
    assert model.training
    assert model.lm_head.weight.grad.eq(1).all()
    use_chunked_loss(model, tile_bytes=SMALL_TILE)
    assert chunked_loss_agrees(model, tiny_batch()) is None
    assert model.lm_head.tile_bytes == SMALL_TILE


class LooksAtItsLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.loss = out.loss + out.logits.logsumexp(-1).square().mean()
        return out


class DoublesRealLogits(LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        out = super().forward(input_ids, **kwargs)
        out.logits = out.logits * 2 if isinstance(out.logits, Tensor) else out.logits
        out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


class DetachesDeferredHidden(LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        out = super().forward(input_ids, **kwargs)
        if isinstance(out.logits, DeferredLogits):
            out.logits = out.logits.then(lambda logits: logits + 0.5 * (logits - logits.detach()))
        out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


class InsistsOnTensors(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if not isinstance(out.logits, Tensor):
            raise TypeError("logits must be a tensor")
        return out


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (LooksAtItsLogits, "computes its whole logits anyway, through Tensor.logsumexp"),
        (DoublesRealLogits, "its loss is"),
        (DetachesDeferredHidden, "its gradient of the hidden states differs from the model's own by 50"),
        (InsistsOnTensors, r"cannot work with it \(TypeError: logits must be a tensor\)"),
    ],
)
def test_the_probe_says_why_a_model_should_keep_its_own_loss(model_class: type, reason: str) -> None:
    model = tiny_model()
    model.__class__ = model_class
    found = chunked_loss_agrees(model, tiny_batch())
    assert found is not None
    assert re.search(reason, found)
    assert type(model.lm_head) is nn.Linear
