"""Every optimizer computes what its paper says: held against a plain twin, itself held against float64."""

from __future__ import annotations

import importlib

import pytest
import torch

from lowmem.optim.registry import optimizer_class
from tests.optim.cases import TWIN_CASES, as_parameters, case_id, gradients, make, weights

STEPS = 60


def run_reference(name, settings, dtype):
    module = importlib.import_module(f"tests.reference.{name}")
    params = [weight.to(dtype) for weight in weights()]
    twin = module.reference(params, **settings)
    for step in range(STEPS):
        twin.step(gradients(step, dtype))
    return params


def distance(found, expected):
    """Largest difference relative to how far the weights moved, beyond float32's rounding of a weight."""
    worst = 0.0
    for a, b, start in zip(found, expected, weights(), strict=True):
        moved = (b.double() - start.double()).abs().max().clamp_min(1e-12)
        beyond_rounding = ((a.double() - b.double()).abs().max() - 2e-6).clamp_min(0)
        worst = max(worst, (beyond_rounding / moved).item())
    return worst


@pytest.mark.parametrize("case", TWIN_CASES, ids=case_id)
def test_sixty_steps_equal_the_plain_reference(case):
    name, settings = case
    params = as_parameters(weights())
    optimizer = make(case, params)
    for step in range(STEPS):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
    expected = run_reference(name, settings, torch.float64)
    assert distance([param.detach() for param in params], expected) < 2e-4


@pytest.mark.parametrize("case", TWIN_CASES, ids=case_id)
def test_the_reference_itself_is_stable_between_float32_and_float64(case):
    name, settings = case
    assert (
        distance(run_reference(name, settings, torch.float32), run_reference(name, settings, torch.float64))
        < 2e-4
    )


def test_adamw_equals_torch():
    ours, theirs = as_parameters(weights()), as_parameters(weights())
    a = optimizer_class("adamw")(ours, lr=1e-2, weight_decay=0.1)
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(STEPS):
        for mine, other, grad in zip(ours, theirs, gradients(step), strict=True):
            mine.grad, other.grad = grad, grad.clone()
        a.step(), b.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_sgd_without_decay_equals_torch():
    ours, theirs = as_parameters(weights()), as_parameters(weights())
    a = optimizer_class("sgd")(ours, lr=1e-2, momentum=0.9, nesterov=True)
    b = torch.optim.SGD(theirs, lr=1e-2, momentum=0.9, nesterov=True)
    for step in range(STEPS):
        for mine, other, grad in zip(ours, theirs, gradients(step), strict=True):
            mine.grad, other.grad = grad, grad.clone()
        a.step(), b.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
