"""Muon by what its step is, and against PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch

from lowmem.optim import Muon


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)], ids=str)
def test_steps_are_those_of_torch_up_to_its_rounding_to_bfloat16(shape, nesterov, adjust):
    ours, theirs = (torch.nn.Parameter(gaussian(*shape, seed=9)) for _ in range(2))
    start = ours.detach().clone()
    a = Muon([ours], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr=adjust)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust)
    for step in range(10):
        ours.grad = gaussian(*shape, seed=step)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    torch.testing.assert_close(a.state[ours]["momentum_buffer"], b.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize(("adjust", "factor"), [("original", math.sqrt(3)), ("match_rms_adamw", 0.2 * 6)])
def test_singular_values_of_a_step_are_one_times_the_factor_of_the_shape(adjust, factor):
    weight = torch.nn.Parameter(torch.zeros(36, 12))
    weight.grad = gaussian(36, 12)
    Muon([weight], lr=1.0, adjust_lr=adjust, whitening="eigh").step()
    values = torch.linalg.svdvals(weight.detach())
    torch.testing.assert_close(values, torch.full_like(values, factor), rtol=1e-3, atol=0)


def test_a_tiny_gradient_makes_a_step_as_long_as_any():
    """torch divides by a norm that is at least 1e-7, so its step of this one is nearly nothing."""
    steps = []
    for make in (lambda p: Muon(p, lr=1.0), lambda p: torch.optim.Muon(p, lr=1.0)):
        weight = torch.nn.Parameter(torch.zeros(16, 24))
        weight.grad = gaussian(16, 24) * 1e-22
        make([weight]).step()
        steps.append(torch.linalg.svdvals(weight.detach()).max())
    assert steps[0] > 0.5
    assert steps[1] < 1e-6


def test_what_is_no_matrix_takes_adam_where_torch_refuses_it():
    bias = torch.nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match="only supports 2D"):
        torch.optim.Muon([bias])
    optimizer = Muon([bias], lr=0.1)
    bias.grad = gaussian(7)
    optimizer.step()
    assert set(optimizer.state[bias]) == {"exp_avg", "exp_avg_sq", "step"}
    torch.testing.assert_close(bias.detach(), -0.1 * bias.grad.sign())


def test_experts_are_whitened_one_by_one_and_keep_their_momentum_in_few_bits():
    weight = torch.nn.Parameter(torch.zeros(3, 16, 24))
    optimizer = Muon([weight], lr=1.0, momentum=0.9, storage={"moment": "int8"})
    for seed in range(3):
        weight.grad = gaussian(3, 16, 24, seed=seed)
        before = weight.detach().clone()
        optimizer.step()
    step = before - weight.detach()
    for each in step:
        values = torch.linalg.svdvals(each) / (0.2 * math.sqrt(24))
        assert values.median() == pytest.approx(0.95, abs=0.25)
    assert optimizer.state_bytes() < weight.numel() * 1.1
