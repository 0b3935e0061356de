"""Adafactor against PyTorch's and Transformers' where their conventions agree, and where they differ from ours."""

from __future__ import annotations

import pytest
import torch
from transformers.optimization import Adafactor as TransformersAdafactor

from lowmem.optim import Adafactor
from tests.optim.cases import as_parameters, gradients, weights
from tests.optim.live_bytes import PeakOfNewBytes

MIB = 1 << 20
STEPS = 40


def trained(optimizer_of, *, steps: int = STEPS, start=None, dtype=torch.float32):
    params = as_parameters(start or weights(dtype))
    optimizer = optimizer_of(params)
    for step in range(steps):
        for param, grad in zip(params, gradients(step, dtype), strict=True):
            param.grad = grad
        optimizer.step()
    return [param.detach() for param in params], optimizer


def assert_same(ours, theirs, *, rtol=2e-5, atol=2e-5):
    for mine, other in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip_threshold", [1.0, 1.2])
def test_relative_steps_equal_pytorchs(clip_threshold, weight_decay):
    """PyTorch's rate is min(lr, 1 / sqrt(t)), so this one stays below that."""
    theirs = trained(
        lambda params: torch.optim.Adafactor(
            params, lr=1e-2, eps=(None, 1e-3), d=clip_threshold, weight_decay=weight_decay, foreach=False
        )
    )
    ours = trained(
        lambda params: Adafactor(
            params, lr=1e-2, relative=True, clip_threshold=clip_threshold, weight_decay=weight_decay
        )
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("power", [0.8, 0.5])
def test_absolute_and_relative_steps_equal_transformers(relative, power):
    theirs = trained(
        lambda params: TransformersAdafactor(
            params, lr=1e-2, scale_parameter=relative, relative_step=False, decay_rate=-power
        )
    )
    assert_same(
        trained(lambda params: Adafactor(params, lr=1e-2, relative=relative, beta2_power=power)), theirs
    )


def test_momentum_and_decay_equal_transformers_at_a_constant_absolute_rate():
    theirs = trained(
        lambda params: TransformersAdafactor(
            params, lr=1e-2, scale_parameter=False, relative_step=False, beta1=0.9, weight_decay=0.1
        )
    )
    assert_same(trained(lambda params: Adafactor(params, lr=1e-2, beta1=0.9, weight_decay=0.1)), theirs)


def test_a_constant_beta2_gives_the_exponential_mean_without_its_bias():
    """On a vector, and on a matrix of rank one, that is Adam without its first moment and eps."""
    vector, row = torch.zeros(9), torch.linspace(1, 2, 6)
    column = torch.linspace(-3, -1, 8)
    params = as_parameters([vector, torch.zeros(8, 6)])
    twins = as_parameters([vector, torch.zeros(8, 6)])
    ours = Adafactor(params, lr=1e-2, beta2=0.95, clip_threshold=None)
    adam = torch.optim.Adam(twins, lr=1e-2, betas=(0.0, 0.95), eps=1e-30, foreach=False)
    for step in range(1, 20):
        grads = [torch.linspace(1, 2, 9).roll(step) / step, torch.outer(column, row) / step]
        for param, twin, grad in zip(params, twins, grads, strict=True):
            param.grad, twin.grad = grad, grad.clone()
        ours.step(), adam.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


def test_a_step_is_never_larger_than_the_threshold_allows():
    weight = torch.nn.Parameter(torch.zeros(40, 30))
    optimizer = Adafactor([weight], lr=1.0, clip_threshold=0.5)
    for step, size in enumerate((1e-3, 1.0, 1e3)):
        before = weight.detach().clone()
        weight.grad = gradients(step, shapes=[(40, 30)])[0] * size
        optimizer.step()
        moved = (weight.detach() - before).square().mean().sqrt().item()
        assert moved <= 0.5 * (1 + 1e-5)
    assert moved == pytest.approx(0.5, rel=1e-4), "a gradient a thousand times larger must meet the limit"


def test_a_matrix_has_a_row_and_a_column_of_float32_whatever_the_storage():
    weight = torch.nn.Parameter(torch.zeros(300, 40, dtype=torch.bfloat16))
    experts = torch.nn.Parameter(torch.zeros(3, 30, 40, dtype=torch.bfloat16))
    optimizer = Adafactor([weight, experts], storage={"variance": "bf16", "moment": "bf16"})
    weight.grad, experts.grad = torch.ones_like(weight), torch.ones_like(experts)
    optimizer.step()
    assert {tensor.dtype for state in optimizer.state.values() for tensor in state.values()} == {
        torch.float32
    }
    assert optimizer.state_bytes() == 4 * (300 + 40) + 4 * 3 * (30 + 40) + 2 * 4


def test_rows_that_get_no_gradient_do_not_move():
    """An embedding: most tokens are absent from most batches."""
    weight = torch.nn.Parameter(torch.ones(50, 8))
    optimizer = Adafactor([weight], lr=1e-2, beta2=0.9)
    for step in range(30):
        weight.grad = torch.zeros(50, 8)
        weight.grad[step % 5] = torch.linspace(-1, 1, 8)
        optimizer.step()
    assert torch.equal(weight[5:].detach(), torch.ones(45, 8))
    assert weight.isfinite().all()
    assert (weight[:5] != 1).all()


def test_a_relative_rate_follows_the_weight_down_to_its_least():
    moves = []
    for size in (0.0, 1e-2, 1.0):
        weight = torch.nn.Parameter(torch.full((6, 8), size))
        weight.grad = gradients(0, shapes=[(6, 8)])[0]
        Adafactor([weight], lr=1e-2, relative=True, eps=(1e-30, 1e-3)).step()
        moves.append((weight.detach() - size).square().mean().sqrt().item())
    assert moves[1] == pytest.approx(10 * moves[0], rel=1e-3)
    assert moves[2] == pytest.approx(1000 * moves[0], rel=1e-3)


def test_bfloat16_weights_follow_float32_ones_on_average():
    """A step of 1e-4 of a weight is a fortieth of bfloat16's last place: to nearest, nothing would move."""
    ends = {}
    for dtype, rounding in (
        (torch.float32, "nearest"),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "stochastic"),
    ):
        weight = torch.nn.Parameter(torch.full((128, 128), 1.5, dtype=dtype))
        optimizer = Adafactor([weight], lr=1e-4, rounding=rounding)
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends[dtype, rounding] = weight.detach().double().mean().item()
    assert ends[torch.float32, "nearest"] == pytest.approx(1.5 - 50e-4, rel=1e-5)
    assert ends[torch.bfloat16, "nearest"] == 1.5
    assert ends[torch.bfloat16, "stochastic"] == pytest.approx(1.5 - 50e-4, abs=3e-4)


@pytest.mark.parametrize("settings", [{}, {"beta1": 0.9}, {"relative": True}], ids=str)
def test_passes_over_a_large_matrix_hold_a_few_tiles(settings):
    weight = torch.nn.Parameter(torch.zeros(2048, 8192, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = Adafactor([weight], **settings)
    optimizer.step()
    with PeakOfNewBytes() as seen:
        optimizer.step()
    assert seen.peak <= 34 * MIB
