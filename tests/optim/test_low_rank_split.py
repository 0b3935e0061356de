"""A gradient split along a subspace: what moves inside and outside of it, and when it changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.optim import FRUGAL
from tests.optim.live_bytes import PeakOfNewBytes

MIB = 1 << 20
PROJECTIONS = ["subspace", "svd", "random"]
each_projection = pytest.mark.parametrize("projection", PROJECTIONS)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


def stepped(optimizer: FRUGAL, weight: torch.nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
    """What one update subtracts from the weight."""
    before = weight.detach().clone()
    weight.grad = grad
    optimizer.step()
    return before - weight.detach()


@each_projection
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_inside_the_subspace_adam_moves_and_outside_a_tenth_of_the_gradient(shape, projection):
    weight = weight_of(*shape)
    optimizer = FRUGAL([weight], lr=1.0, projection=projection, residual="sgd")
    m = v = 0.0
    for t in range(1, 4):
        G = gaussian(*shape, seed=t)
        U = stepped(optimizer, weight, G)
        U, G = (U, G) if shape[0] < shape[1] else (U.T, G.T)
        P = optimizer.state[weight]["basis"]
        assert P.shape == (12, 3)
        torch.testing.assert_close(P.T @ P, torch.eye(3), atol=1e-5, rtol=0)
        R = P.T @ G
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R**2
        adam = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(P.T @ U, adam, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(U - P @ (P.T @ U), 0.1 * (G - P @ R), atol=1e-5, rtol=1e-4)


@each_projection
def test_the_sign_is_that_of_what_the_subspace_leaves_out(projection):
    weight, G = weight_of(12, 20), gaussian(12, 20)
    optimizer = FRUGAL([weight], lr=1.0, projection=projection)
    U = stepped(optimizer, weight, G)
    P = optimizer.state[weight]["basis"]
    R = P.T @ G
    torch.testing.assert_close(U, P @ R.sign() + 0.1 * (G - P @ R).sign(), atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(2, 9), min_size=2, max_size=3).map(tuple),
    density=st.floats(0.01, 0.99),
    projection=st.sampled_from(PROJECTIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_gradient_in_both_parts_adds_up_to_itself(shape, density, projection, dtype):
    """The running mean begins with the gradient, so at a refresh both parts move by it: gradient descent."""
    weight, G = weight_of(*shape, dtype=dtype), gaussian(*shape).to(dtype)
    optimizer = FRUGAL(
        [weight], lr=1.0, projection=projection, density=density, inner="momentum", residual="sgd",
        residual_scale=1.0, rounding="nearest", refresh_every=1,
        storage={"basis": "fp32"},
    )  # fmt: skip
    for _ in range(2):
        step = stepped(optimizer, weight, G)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(step, G, atol=tolerance, rtol=tolerance)


@each_projection
def test_at_a_refresh_the_moments_start_anew(projection):
    weight = weight_of(12, 20)
    optimizer = FRUGAL([weight], lr=1.0, projection=projection, refresh_every=3)
    bases = []
    for t in range(7):
        G = gaussian(12, 20, seed=t)
        stepped(optimizer, weight, G)
        state = optimizer.state[weight]
        bases.append(state["basis"].clone())
        if t % 3 == 0:
            torch.testing.assert_close(state["exp_avg"], 0.1 * (bases[-1].T @ G), atol=1e-5, rtol=1e-4)
    assert torch.equal(bases[0], bases[2])
    assert torch.equal(bases[3], bases[5])
    assert not torch.allclose(bases[2], bases[3], atol=1e-3)


def test_a_random_subspace_depends_on_seed_name_and_step_and_not_on_the_gradient():
    def drawn(name: str, *, seed: int = 0, gradient: int = 0) -> torch.Tensor:
        weight = weight_of(12, 20)
        optimizer = FRUGAL([(name, weight)], projection="random", seed=seed, refresh_every=2)
        for t in range(3):
            stepped(optimizer, weight, gaussian(12, 20, seed=gradient + t))
        return optimizer.state[weight]["basis"]

    one = drawn("q_proj")
    assert torch.equal(one, drawn("q_proj", gradient=10))
    assert not torch.equal(one, drawn("q_proj", seed=1))
    assert not torch.equal(one, drawn("k_proj"))


@pytest.mark.parametrize("projection", ["subspace", "random"])
def test_a_step_holds_a_few_tiles_also_at_a_refresh(projection):
    weight = weight_of(2048, 8192, dtype=torch.bfloat16)
    weight.grad = gaussian(1, 8192).bfloat16().expand(2048, 8192).contiguous()
    optimizer = FRUGAL([weight], projection=projection, density=0.01, refresh_every=2)
    for _ in range(3):
        with PeakOfNewBytes() as seen:
            optimizer.step()
        assert seen.peak <= 40 * MIB, "a float32 copy of the gradient alone is 64"


def test_a_subspace_leaves_out_at_least_one_direction_and_has_at_least_one():
    for density, rank in ((0.001, 1), (0.5, 6), (0.999, 11)):
        weight = weight_of(12, 20)
        optimizer = FRUGAL([weight], projection="subspace", density=density)
        stepped(optimizer, weight, gaussian(12, 20))
        assert optimizer.state[weight]["basis"].shape == (12, rank)
