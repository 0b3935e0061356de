"""SGD-SaI: the ratio is taken once, from the right gradient, and kept."""

from __future__ import annotations

import io
import math

import pytest
import torch

from lowmem.numerics.tiles import sum_and_squares
from lowmem.optim import SGDSaI
from lowmem.optim.rules.snr_scaled import signal_to_noise


def ratio(optimizer, param):
    return optimizer.state[param]["gsnr"].item()


def step(optimizer, param, grad):
    param.grad = grad
    optimizer.step()


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e6])
def test_the_ratio_is_norm_over_std_whatever_the_gradients_scale(scale):
    grad = torch.randn(70, 90, generator=torch.Generator().manual_seed(0)) + 0.1
    param = torch.nn.Parameter(torch.zeros(70, 90))
    optimizer = SGDSaI([param], lr=0.0)
    step(optimizer, param, grad * scale)
    assert ratio(optimizer, param) == pytest.approx(
        (grad.double().norm() / grad.double().std()).item(), rel=1e-5
    )


def test_a_bfloat16_gradient_gives_the_ratio_of_its_exact_values():
    grad = torch.randn(3000, 900).bfloat16()
    param = torch.nn.Parameter(torch.zeros(3000, 900, dtype=torch.bfloat16))
    optimizer = SGDSaI([param], lr=0.0)
    step(optimizer, param, grad)
    assert ratio(optimizer, param) == pytest.approx(
        (grad.double().norm() / grad.double().std()).item(), rel=1e-5
    )


def test_the_sum_of_shards_gives_the_ratio_of_the_whole():
    grad = torch.randn(64, 50)
    whole = signal_to_noise(*sum_and_squares(grad), grad.numel())
    sums = [sum_and_squares(part) for part in grad.split(10)]
    together = signal_to_noise(sum(s for s, _ in sums), sum(q for _, q in sums), grad.numel())
    torch.testing.assert_close(whole, together)


def test_lora_a_moves_although_its_first_gradient_is_zero():
    """With B = 0 the gradient of A vanishes at step 1; a ratio of 0 kept for ever would freeze it."""
    torch.manual_seed(0)
    A, B = torch.nn.Parameter(torch.randn(4, 16)), torch.nn.Parameter(torch.zeros(8, 4))
    x, y = torch.randn(32, 16), torch.randn(32, 8)
    start = A.detach().clone()
    optimizer = SGDSaI([A, B], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        ((x @ A.T @ B.T - y) ** 2).mean().backward()
        optimizer.step()
    assert (A - start).abs().max() > 1e-4


@pytest.mark.parametrize(
    "grad",
    [torch.tensor([2.0]), torch.full((50,), 3.0), torch.zeros(9).index_fill(0, torch.tensor([4]), 1.0)],
)
def test_tensors_without_spread_take_a_bounded_ratio(grad):
    param = torch.nn.Parameter(torch.zeros_like(grad))
    optimizer = SGDSaI([param], lr=1.0, weight_decay=0.0)
    step(optimizer, param, grad)
    usual = math.sqrt(grad.numel())
    assert 0.5 * usual <= ratio(optimizer, param) <= 4 * usual
    assert param.abs().max() <= 4 * usual * grad.abs().max()


def test_a_late_gradient_takes_its_ratio_then():
    early, late = torch.nn.Parameter(torch.zeros(30)), torch.nn.Parameter(torch.zeros(40))
    optimizer = SGDSaI([early, late], lr=1e-2)
    early.grad = torch.randn(30)
    optimizer.step()
    assert late not in optimizer.state
    late.grad = torch.randn(40)
    optimizer.step()
    assert ratio(optimizer, late) == pytest.approx((late.grad.norm() / late.grad.std()).item(), rel=1e-5)


def test_a_non_finite_first_gradient_gives_no_ratio():
    param = torch.nn.Parameter(torch.zeros(30))
    optimizer = SGDSaI([param], lr=0.0, momentum=0.0)
    step(optimizer, param, torch.full((30,), float("nan")))
    assert ratio(optimizer, param) == 0
    grad = torch.randn(30)
    step(optimizer, param, grad)
    assert ratio(optimizer, param) == pytest.approx((grad.norm() / grad.std()).item(), rel=1e-5)


def test_the_ratio_is_kept_over_steps_and_a_resume():
    param = torch.nn.Parameter(torch.zeros(30))
    optimizer = SGDSaI([param], lr=1e-2)
    step(optimizer, param, torch.randn(30) + 1)
    first = ratio(optimizer, param)
    step(optimizer, param, torch.randn(30) * 5)
    assert ratio(optimizer, param) == first
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = SGDSaI([param], lr=1e-2)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    step(resumed, param, torch.randn(30) * 7 - 3)
    assert ratio(resumed, param) == first


def test_paper_mode_divides_the_step_by_the_largest_ratio():
    grads = [torch.randn(40, 50), torch.randn(7)]
    moved = {}
    for mode in ("code", "paper"):
        params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        optimizer = SGDSaI(params, lr=1.0, weight_decay=0.0, gsnr=mode)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        moved[mode] = params
    largest = max((grad.norm() / grad.std()).item() for grad in grads)
    for code, paper in zip(moved["code"], moved["paper"], strict=True):
        torch.testing.assert_close(code / largest, paper, rtol=1e-3, atol=1e-7)


def test_it_agrees_with_sgd_sai_where_that_is_right(capsys):
    sgd_sai = pytest.importorskip("sgd_sai", reason="needs the extra [peers]")
    ours, theirs = torch.nn.Parameter(torch.ones(30, 20)), torch.nn.Parameter(torch.ones(30, 20))
    a, b = SGDSaI([ours], lr=1e-3, weight_decay=0.0), sgd_sai.SGD_sai([theirs], lr=1e-3, weight_decay=0.0)
    for number in range(20):
        grad = torch.randn(30, 20, generator=torch.Generator().manual_seed(number))
        ours.grad, theirs.grad = grad, grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_first_gradient_moves_weights_ten_times_as_far_as_the_same_gradient_later():
    """Momentum begins with g itself and takes (1 - momentum) g of any later one, as in the authors' code.

    Where it begins with zero, all gradients weigh alike.
    """
    grad = torch.randn(30, generator=torch.Generator().manual_seed(0))
    usual = (grad.norm() / grad.std()).item() * grad
    for before, times, start in (
        (0, 10.0, "gradient"),
        (5, 1.0, "gradient"),
        (0, 1.0, "zero"),
        (5, 1.0, "zero"),
    ):
        param = torch.nn.Parameter(torch.zeros(30))
        optimizer = SGDSaI([param], lr=1.0, weight_decay=0.0, momentum_start=start)
        for number in range(before + 300):
            step(optimizer, param, grad if number == before else torch.zeros(30))
        torch.testing.assert_close(param.detach(), -times * usual, rtol=1e-4, atol=1e-5)
