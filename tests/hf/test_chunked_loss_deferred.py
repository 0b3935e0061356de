"""DeferredLogits stands in for a tensor: it records what is elementwise and becomes real for the rest."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowmem.hf.causal_lm_loss import chunked_causal_lm_loss
from lowmem.hf.deferred_logits import DeferredLogits
from lowmem.hf.deferring_heads import DeferringHead

VOCABULARY = 70


@pytest.fixture
def head() -> DeferringHead:
    torch.manual_seed(0)
    head = nn.Linear(8, VOCABULARY, dtype=torch.float64)
    head.__class__ = DeferringHead
    head.tile_bytes = 1
    return head


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(
        2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()


LABELS = torch.tensor([[1, 2, -100, 69, 64], [0, 63, 5, -100, 7]])

RECORDED = {
    "scale": lambda z: z * 0.25,
    "scale from the left": lambda z: 3 * z,
    "divide": lambda z: z / 7,
    "in place operators": lambda z: _in_place(z),
    "torch.tanh": lambda z: torch.tanh(z / 3) * 3,
    "nn.functional.tanh": lambda z: torch.nn.functional.tanh(z / 3) * 3,
    "method": lambda z: z.tanh().mul(2.0),
    "nn.Tanh": lambda z: nn.Tanh()(z),
    "torch.mul": lambda z: torch.mul(z, 0.5),
    "shift": lambda z: 2 + (z - 1) + 0.5,
    "negate": lambda z: -z,
    "clamp": lambda z: z.clamp(min=-0.4, max=0.4),
    "cast": lambda z: z.to(torch.float32).double(),
    "cast by keyword": lambda z: z.to(dtype=torch.float32),
    "move to the same device": lambda z: z.to(z.device).contiguous(),
    "zero-dimensional tensor": lambda z: z * torch.tensor(0.5, dtype=torch.float64),
}


def _in_place(z):
    z /= 4
    z *= 2
    return z


def loss_and_gradients(logits, leaves: list[Tensor]) -> list[Tensor]:
    loss = chunked_causal_lm_loss(logits, LABELS, VOCABULARY)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def oracle(logits: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=-100)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name", RECORDED)
def test_elementwise_functions_are_recorded_and_differentiated(name: str, head, hidden) -> None:
    function, leaves = RECORDED[name], [hidden, head.weight, head.bias]
    deferred = function(head(hidden))
    assert isinstance(deferred, DeferredLogits)
    real = function(nn.functional.linear(hidden, head.weight, head.bias))
    assert deferred.dtype == real.dtype
    assert deferred.shape == real.shape
    for found, expected in zip(loss_and_gradients(deferred, leaves), oracle(real, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, check_dtype=False)
    assert head.materialised_by is None


def test_shape_questions_do_not_compute_anything(head, hidden) -> None:
    logits = head(hidden)
    assert logits.shape == (2, 5, VOCABULARY)
    assert logits.size() == logits.shape
    assert logits.size(-1) == VOCABULARY
    assert logits.dim() == logits.ndim == 3
    assert logits.device == hidden.device
    assert "shape=(2, 5, 70)" in repr(logits)
    assert logits.is_deferred


LOOKED_AT = {
    "index": lambda z: z[..., :9],
    "method": lambda z: z.logsumexp(-1),
    "view": lambda z: z.view(-1, VOCABULARY),
    "torch function": lambda z: torch.softmax(z, dim=-1),
    "second argument": lambda z: torch.ones(2, 5, VOCABULARY, dtype=torch.float64) * z,
    "inside a list": lambda z: torch.cat([z, z]),
    "keyword": lambda z: torch.argmax(input=z, dim=-1),
    "compare": lambda z: z > 0,
    "power": lambda z: z**2,
    "per token tensor": lambda z: z * torch.arange(VOCABULARY, dtype=torch.float64),
    "attribute": lambda z: z.mT,
    "length": lambda z: torch.tensor(len(z)),
    "iteration": lambda z: torch.stack(list(z)),
    "detach": lambda z: z.detach(),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_anything_else_is_answered_with_the_real_logits(name: str, head, hidden, caplog) -> None:
    function = LOOKED_AT[name]
    logits, real = head(hidden) * 2, nn.functional.linear(hidden, head.weight, head.bias)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(function(logits), function(real * 2))
        function(head(hidden))
    assert len(caplog.records) == 1
    assert "The full logits are computed after all" in caplog.text
    assert head.materialised_by is not None


def test_a_learned_scale_gets_its_gradient(head, hidden) -> None:
    scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    leaves = [hidden, head.weight, scale]
    found = loss_and_gradients(head(hidden) * scale, leaves)
    expected = oracle(nn.functional.linear(hidden, head.weight, head.bias) * scale, leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, check_dtype=False)


def test_changes_in_place_count_in_the_loss(head, hidden) -> None:
    leaves = [hidden, head.weight]
    logits = head(hidden)
    logits[..., 3] = -5.0
    logits.div_(2)
    real = nn.functional.linear(hidden, head.weight, head.bias)
    real = torch.where(torch.arange(VOCABULARY) == 3, -5.0, real) / 2
    for one, other in zip(loss_and_gradients(logits, leaves), oracle(real, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, check_dtype=False)
    assert isinstance(logits * 2, Tensor)


def test_a_loss_over_fewer_tokens_than_the_head_has_rows_is_the_models_own(head, hidden) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        chunked_causal_lm_loss(head(hidden), LABELS, VOCABULARY - 1)
    assert head.materialised_by == "a loss over 69 of 70 logits"


def test_what_a_tensor_does_not_have_deferred_logits_do_not_have_either(head, hidden) -> None:
    logits = head(hidden)
    assert not hasattr(logits, "no_such_thing")
    assert not hasattr(logits, "__array_interface__")
    assert copy.copy(logits).is_deferred
    assert logits.is_deferred


def test_logits_of_minus_infinity_are_survived(head, hidden) -> None:
    with torch.no_grad():
        head.bias[:64] = -torch.inf
    labels = torch.full((2, 5), 66)
    real = nn.functional.linear(hidden, head.weight, head.bias)
    expected = cross_entropy(real[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert chunked_causal_lm_loss(head(hidden), labels, VOCABULARY).item() == pytest.approx(expected.item())


def test_a_nan_is_shown_as_nan(head, hidden) -> None:
    with torch.no_grad():
        head.weight[3] = torch.nan
    assert chunked_causal_lm_loss(head(hidden), LABELS, VOCABULARY).isnan()


@pytest.mark.parametrize("tile_bytes", [1, 2**25])
def test_under_autocast_products_are_taken_in_bfloat16(head, hidden, tile_bytes: int) -> None:
    head.float()
    head.tile_bytes = tile_bytes
    hidden = hidden.detach().float().requires_grad_()
    leaves = [hidden, head.weight, head.bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        deferred = head(hidden) / 2
        assert deferred.dtype == torch.bfloat16
        loss = chunked_causal_lm_loss(deferred, LABELS, VOCABULARY)
        real = nn.functional.linear(hidden, head.weight, head.bias) / 2
        own = cross_entropy(real.float()[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=-100)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(own.item(), rel=1e-6)
    found, expected = torch.autograd.grad(loss, leaves), torch.autograd.grad(own, leaves)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.01 * other.norm()


def test_real_logits_asked_for_later_are_those_of_the_autocast_they_were_made_under(head, hidden) -> None:
    head.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        deferred = head(hidden.float())
        expected = nn.functional.linear(hidden.float(), head.weight, head.bias)
    assert torch.equal(deferred.tensor("a test"), expected)
