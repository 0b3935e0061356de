"""GaLore: what its subspace captures, costs and survives."""

from __future__ import annotations

import logging

import pytest
import torch

from lowmem.numerics.linalg import canonical_signs, leading_subspace, top_singular_vectors
from lowmem.optim import AdamW, GaLore
from lowmem.optim.registry import optimizer_class
from tests.optim.cases import FLOAT


def slow_spectrum(m, n, k, power, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, k, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    return (left * torch.arange(1, k + 1).float() ** -power) @ right.mT


def energy(G, P):
    return ((P.mT @ G).square().sum() / G.square().sum()).item()


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("shape", [(512, 512), (256, 700), (100, 1000)])
def test_the_randomised_subspace_holds_98_5_percent_of_the_svds_energy(shape, start):
    G = slow_spectrum(*shape, k=min(shape), power=0.5)
    rank = min(shape) // 8
    exact = top_singular_vectors(G, rank)
    generator = torch.Generator().manual_seed(1)
    old = None
    if start == "warm":
        old = torch.linalg.qr(exact + 0.3 / shape[0] ** 0.5 * torch.randn(exact.shape, generator=generator)).Q
    P = leading_subspace(G, rank, start=old, generator=generator)
    assert energy(G, P) >= 0.985 * energy(G, exact)
    torch.testing.assert_close(P.mT @ P, torch.eye(rank), atol=1e-5, rtol=0)


def test_bases_have_canonical_signs_and_own_their_memory():
    G = slow_spectrum(64, 128, 64, 1.0)
    for P in (
        top_singular_vectors(G, 4),
        leading_subspace(G, 4, start=None, generator=torch.Generator().manual_seed(0)),
    ):
        assert (P.gather(0, P.abs().argmax(0, keepdim=True)) > 0).all()
        assert P.untyped_storage().nbytes() == P.numel() * P.element_size()
        torch.testing.assert_close(canonical_signs(-P), P)


@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e20])
def test_the_subspace_does_not_depend_on_the_gradients_scale(scale):
    G = slow_spectrum(48, 96, 48, 1.0)
    expected = top_singular_vectors(G, 8)
    P = leading_subspace(G * scale, 8, start=None, generator=torch.Generator().manual_seed(0))
    assert (P.mT @ expected).square().sum().item() == pytest.approx(8, abs=0.02)


def test_a_rank_not_below_the_smaller_side_is_plain_adam_and_said_once(caplog):
    ours, theirs = torch.nn.Parameter(torch.ones(8, 20)), torch.nn.Parameter(torch.ones(8, 20))
    with caplog.at_level(logging.WARNING, "lowmem"):
        a, b = GaLore([ours], lr=1e-2, rank=8, scale=0.25), AdamW([theirs], lr=1e-2, weight_decay=0.0)
        for step in range(5):
            grad = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
            ours.grad, theirs.grad = grad, grad
            a.step(), b.step()
    assert torch.equal(ours, theirs)
    assert [record.getMessage() for record in caplog.records] == [
        "galore: matrices whose smaller side is not larger than rank 8 take full-rank Adam (1 of 1 parameters)"
    ]


def test_rank_none_makes_a_group_full_rank():
    ours, theirs = torch.nn.Parameter(torch.ones(30, 20)), torch.nn.Parameter(torch.ones(30, 20))
    a, b = GaLore([{"params": [ours], "rank": None}], lr=1e-2), AdamW([theirs], lr=1e-2, weight_decay=0.0)
    ours.grad = theirs.grad = torch.randn(30, 20)
    a.step(), b.step()
    assert torch.equal(ours, theirs)


def test_groups_may_have_their_own_rank():
    first, second = torch.nn.Parameter(torch.ones(30, 20)), torch.nn.Parameter(torch.ones(30, 20))
    optimizer = GaLore([{"params": [first], "rank": 2}, {"params": [second], "rank": 5}], lr=1e-2, rank=3)
    first.grad = second.grad = torch.randn(30, 20)
    optimizer.step()
    assert optimizer.state[first]["basis"].shape == (20, 2)
    assert optimizer.state[second]["basis"].shape == (20, 5)


def test_the_update_lies_in_a_subspace_of_the_given_rank():
    param = torch.nn.Parameter(torch.zeros(30, 20))
    optimizer = GaLore([param], lr=1e-2, rank=3)
    param.grad = torch.randn(30, 20)
    optimizer.step()
    assert torch.linalg.matrix_rank(param.detach(), rtol=1e-4) == 3


@pytest.mark.parametrize("projection", ["svd", "subspace"])
def test_a_zero_first_gradient_only_delays_the_basis(projection):
    """LoRA's A has a zero gradient at step 1; a basis of nothing would hold for a whole period."""
    param = torch.nn.Parameter(torch.zeros(30, 20))
    optimizer = GaLore([param], lr=1e-2, rank=3, projection=projection, refresh_every=100)
    param.grad = torch.zeros(30, 20)
    optimizer.step()
    assert not optimizer.state[param]["basis"].any()
    G = slow_spectrum(30, 20, 3, 0.5)
    param.grad = G
    optimizer.step()
    assert energy(G.mT, optimizer.state[param]["basis"]) > 0.999


@pytest.mark.parametrize("projection", ["svd", "subspace"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_keeps_the_old_basis(projection, bad):
    param = torch.nn.Parameter(torch.zeros(30, 20))
    optimizer = GaLore([param], lr=1e-2, rank=3, projection=projection, refresh_every=1)
    param.grad = torch.randn(30, 20)
    optimizer.step()
    basis = optimizer.state[param]["basis"].clone()
    param.grad = torch.full((30, 20), bad)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["basis"], basis)


def test_an_expert_without_tokens_does_not_spoil_the_others():
    param = torch.nn.Parameter(torch.zeros(3, 30, 20))
    optimizer = GaLore([param], lr=1e-2, rank=3)
    param.grad = torch.randn(3, 30, 20)
    param.grad[1] = 0
    optimizer.step()
    assert param.isfinite().all()
    assert not param[1].any()
    assert param[0].any()
    assert param[2].any()


def test_a_resumed_run_between_two_refreshes_does_not_refresh_early():
    param = torch.nn.Parameter(torch.zeros(30, 20))
    optimizer = GaLore([param], lr=1e-2, rank=3, refresh_every=10)
    for _ in range(3):
        param.grad = torch.randn(30, 20)
        optimizer.step()
    copy = torch.nn.Parameter(param.detach().clone())
    resumed = GaLore([copy], lr=1e-2, rank=3, refresh_every=10)
    resumed.load_state_dict(optimizer.state_dict())
    copy.grad = torch.randn(30, 20)
    resumed.step()
    assert torch.equal(resumed.state[copy]["basis"], optimizer.state[param]["basis"])


def test_it_agrees_with_galore_torch_where_that_is_right():
    """Same side, refresh and moments as the authors' package; eps and decay differ by design, so they vanish."""
    galore_torch = pytest.importorskip("galore_torch", reason="needs the extra [peers]")
    ours, theirs = torch.nn.Parameter(torch.ones(30, 20)), torch.nn.Parameter(torch.ones(30, 20))
    a = GaLore([ours], lr=1e-2, rank=4, scale=0.25, refresh_every=50, eps=1e-12, projection="svd")
    group = {"params": [theirs], "rank": 4, "update_proj_gap": 50, "scale": 0.25, "proj_type": "std"}
    b = galore_torch.GaLoreAdamW([group], lr=1e-2, eps=1e-12, no_deprecation_warning=True)
    for step in range(20):
        grad = slow_spectrum(30, 20, 20, 0.5, seed=step)
        ours.grad, theirs.grad = grad, grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("projection", "decomposition"), [("svd", "svd"), ("subspace", "eigh")])
@pytest.mark.parametrize("name", ["galore", "q_galore"])
def test_a_decomposition_that_does_not_converge_keeps_the_old_basis_and_is_counted(
    monkeypatch, caplog, name, projection, decomposition
):
    weight = torch.nn.Parameter(torch.randn(12, 20, generator=torch.Generator().manual_seed(0)))
    settings = dict(lr=1e-2, rank=4, refresh_every=2, projection=projection, storage=FLOAT)
    optimizer = optimizer_class(name)([("mlp.weight", weight)], **settings)

    def step(number: int) -> None:
        weight.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(number))
        optimizer.step()

    for number in range(2):
        step(number)
    basis = optimizer.state[weight]["basis"].clone()

    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError(f"linalg.{decomposition}: the algorithm failed to converge")

    with monkeypatch.context() as broken:
        broken.setattr(torch.linalg, decomposition, fails)
        before = weight.detach().clone()
        step(2)
    assert torch.equal(optimizer.state[weight]["basis"], basis)
    assert not torch.equal(weight, before), "the step itself is made"
    assert optimizer.failed_refreshes == {"mlp.weight": 1}
    assert f"the old basis of mlp.weight stays: linalg.{decomposition}" in caplog.text
    step(3)
    step(4)
    assert not torch.equal(optimizer.state[weight]["basis"], basis)
