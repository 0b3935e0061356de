"""Fira by what it does in the subspace, outside of it, and from one step to the next."""

from __future__ import annotations

import pytest
import torch

from lowmem.optim import Fira, GaLore
from lowmem.optim.norm_growth import limited_growth
from tests.optim.device_calls import WAITS, Calls

SETTINGS = {"rank": 3, "projection": "svd", "refresh_every": 100}
each_shape = pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stepped(optimizer, weight: torch.nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
    """What one update subtracts from the weight, wide side last."""
    before = weight.detach().clone()
    weight.grad = grad
    optimizer.step()
    return wide(before - weight.detach())


def wide(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.shape[-2] < matrix.shape[-1] else matrix.mT


def both(shape, **settings):
    ours, theirs = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(shape))
    common = {"lr": 1.0, **SETTINGS, **settings}
    galore = {key: value for key, value in common.items() if key not in ("growth_limit", "compat")}
    return (Fira([ours], **common), ours), (GaLore([theirs], **galore), theirs)


# ------------------------------------------------------------------ where it moves


@each_shape
def test_in_the_subspace_it_makes_galores_step(shape):
    (fira, ours), (galore, theirs) = both(shape, scale=0.25)
    for seed in range(5):
        step, low = (
            stepped(fira, ours, gaussian(*shape, seed=seed)),
            stepped(galore, theirs, gaussian(*shape, seed=seed)),
        )
        P = fira.state[ours]["basis"]
        torch.testing.assert_close(P.mT @ step, P.mT @ low, rtol=1e-4, atol=1e-5)


@each_shape
def test_outside_of_it_every_column_is_lengthened_as_adam_lengthens_its_projection(shape):
    (fira, ours), (galore, theirs) = both(shape, growth_limit=None)
    for seed in range(5):
        G = gaussian(*shape, seed=seed)
        low = stepped(galore, theirs, G)
        rest = stepped(fira, ours, G) - low
        P, G = fira.state[ours]["basis"], wide(G)
        residual, R, N = G - P @ (P.mT @ G), P.mT @ G, P.mT @ low
        torch.testing.assert_close(rest, residual * (N.norm(dim=0) / R.norm(dim=0)), rtol=1e-3, atol=1e-4)


def test_a_gradient_that_the_subspace_holds_leaves_no_residual():
    (fira, ours), (galore, theirs) = both((12, 20))
    G = gaussian(12, 3) @ gaussian(3, 20, seed=1)
    for _ in range(4):
        torch.testing.assert_close(stepped(fira, ours, G), stepped(galore, theirs, G), rtol=1e-4, atol=1e-4)


def test_the_step_has_full_rank():
    (fira, ours), (galore, theirs) = both((12, 20))
    step, low = stepped(fira, ours, gaussian(12, 20)), stepped(galore, theirs, gaussian(12, 20))
    assert torch.linalg.matrix_rank(step) == 12
    assert torch.linalg.matrix_rank(low, rtol=1e-4) == 3


def test_with_compat_a_share_of_the_projected_gradient_is_applied_once_more():
    """The defect of the authors' code that ours does not have: with scale 1/4, three quarters of P R diag(phi)."""
    shape, scale = (12, 20), 0.25
    (faithful, ours), _ = both(shape, scale=scale, growth_limit=None)
    (compatible, theirs), _ = both(shape, scale=scale, growth_limit=None, compat=True)
    G = gaussian(*shape)
    more = stepped(compatible, theirs, G) - stepped(faithful, ours, G)
    P = faithful.state[ours]["basis"]
    R = P.mT @ G
    N = R.sign()  # Adam's first step
    expected = (1 - scale) * (P @ R) * (N.norm(dim=0) / R.norm(dim=0))
    torch.testing.assert_close(more, expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ from step to step


def residual_norms(optimizer: Fira, weight: torch.nn.Parameter, grads) -> list[float]:
    """|S| of each step, from the weight's movement outside of the subspace."""
    found = []
    for grad in grads:
        step = stepped(optimizer, weight, grad)
        P = optimizer.state[weight]["basis"]
        found.append((step - P @ (P.mT @ step)).norm().item())
    return found


def test_the_residual_grows_by_a_hundredth_a_step_at_most():
    """Random gradients scale as Adam settles; one that has most of its energy outside of the subspace is held back."""
    grads = [gaussian(12, 20, seed=seed) for seed in range(3)]
    (fira, weight), _ = both((12, 20))
    norms = residual_norms(fira, weight, grads)
    P = fira.state[weight]["basis"]
    spike = grads[0] - 0.99 * P @ (P.mT @ grads[0])
    norms += residual_norms(fira, weight, [spike, spike])
    (free, other), _ = both((12, 20), growth_limit=None)
    unlimited = residual_norms(free, other, [*grads, spike, spike])
    assert unlimited[3] > 5 * unlimited[2]
    assert norms[3] == pytest.approx(1.01 * norms[2], rel=1e-3)
    assert norms[4] == pytest.approx(1.01 * norms[3], rel=1e-3)
    assert fira.state[weight]["residual_norm"].item() == pytest.approx(norms[4], rel=1e-3)


def test_a_step_without_a_gradient_does_not_hold_back_the_next():
    (fira, weight), _ = both((12, 20))
    before, _, after = residual_norms(
        fira, weight, [gaussian(12, 20), torch.zeros(12, 20), gaussian(12, 20, seed=1)]
    )
    assert after > 0.2 * before


def test_each_matrix_of_a_batch_has_a_limiter_of_its_own():
    (fira, weight), _ = both((2, 12, 20), growth_limit=1.0)
    G = gaussian(2, 12, 20)
    stepped(fira, weight, G)
    first = fira.state[weight]["residual_norm"].clone()
    P = fira.state[weight]["basis"]
    G[1] -= 0.99 * P[1] @ (P[1].mT @ G[1])
    stepped(fira, weight, G)
    factors = fira.state[weight]["residual_norm"] / first
    assert factors[1].item() == pytest.approx(1)
    assert factors[0].item() == pytest.approx(1, abs=1e-3)


def test_the_limiter_in_numbers():
    before = torch.tensor([0.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    norm = torch.tensor([9.0, 1.0, 3.0, 0.0, float("nan"), float("inf")])
    factors, remembered = limited_growth(norm, before, 1.1)
    assert factors[:4].tolist() == pytest.approx([1, 1, 2.2 / 3, 1])
    assert remembered.tolist() == pytest.approx([9, 1, 2.2, 2, 2, 2])


def test_between_refreshes_no_step_waits_for_the_device():
    weight = torch.nn.Parameter(torch.zeros(12, 20, dtype=torch.bfloat16))
    fira = Fira([weight], lr=1e-3, rank=3, refresh_every=3)
    seen = []
    for seed in range(3):
        with Calls() as calls:
            stepped(fira, weight, gaussian(12, 20, seed=seed).bfloat16())
        seen.append(calls.names & WAITS)
    assert seen[1] == seen[2] == set()
    assert seen[0], "the first basis does ask whether its gradient is finite"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"growth_limit": 0.5}, "growth_limit must be a finite number >= 1 or None, found 0.5"),
        ({"projection": "random"}, "projection must be one of"),
        ({"rank": 0}, "rank must be a whole number >= 1"),
    ],
)
def test_wrong_settings_are_one_clear_error_at_construction(changes, words):
    with pytest.raises(ValueError, match=words):
        Fira([torch.nn.Parameter(torch.zeros(8, 8))], **changes)


@each_shape
def test_it_agrees_with_fira_where_that_is_right(shape):
    """With their residual (`compat`) and eps small; their limiter sees Adam's step before its bias is corrected."""
    fira = pytest.importorskip("fira", reason="needs the extra [peers]")
    settings = {"rank": 3, "projection": "svd", "refresh_every": 4, "stagger": False, "scale": 0.25}
    ours, theirs = torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(shape))
    a = Fira([ours], lr=1e-2, eps=1e-12, betas=(0.0, 0.999), compat=True, growth_limit=None, **settings)
    group = {"params": [theirs], "rank": 3, "update_proj_gap": 4, "alpha": 0.25, "proj_type": "std"}
    b = fira.FiraAdamW([group], lr=1e-2, eps=1e-12, betas=(0.0, 0.999), no_deprecation_warning=True)
    for step in range(10):
        # Growing too slowly for a limiter to see it, and so that no singular value is another's equal.
        grad = gaussian(*shape, seed=step) * torch.linspace(1, 3, shape[1]) * 0.9**step
        ours.grad, theirs.grad = grad, grad.clone()
        b.state[theirs].pop("scaling_grad", None)
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
