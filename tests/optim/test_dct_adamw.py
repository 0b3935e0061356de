"""DCT-AdamW by which vectors it chooses, what becomes of their moments, and what it loses."""

from __future__ import annotations

import pytest
import torch

from lowmem.optim import DctAdamW, Fira, GaLore
from lowmem.optim.low_rank import _moved_rows
from lowmem.optim.projections import PROJECTIONS
from lowmem.optim.rule import Context
from lowmem.optim.rules.adam import Adam
from tests.numerics.test_dct import whole_basis
from tests.optim.device_calls import WAITS, Calls
from tests.optim.test_fira import gaussian, stepped, wide

each_shape = pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)


def dct(shape, **settings):
    weight = torch.nn.Parameter(torch.zeros(shape))
    return DctAdamW([weight], **{"lr": 1.0, "rank": 4, **settings}), weight


def numbers(optimizer, weight) -> list[int]:
    return optimizer.state[weight]["basis"].int().tolist()


# ------------------------------------------------------------------ which vectors


@each_shape
def test_at_every_step_it_takes_the_vectors_with_most_energy(shape):
    optimizer, weight = dct(shape)
    for seed in range(3):
        G = gaussian(*shape, seed=seed)
        stepped(optimizer, weight, G)
        Q = whole_basis(min(shape))
        energies = (Q.mT @ wide(G).double()).square().sum(dim=1)
        assert numbers(optimizer, weight) == sorted(energies.topk(4).indices.tolist())


@pytest.mark.parametrize("scale", [1e-22, 1e20])
def test_the_choice_does_not_depend_on_the_gradients_size(scale):
    optimizer, weight = dct((12, 20), growth_limit=None)
    other, twin = dct((12, 20), growth_limit=None)
    stepped(optimizer, weight, gaussian(12, 20)), stepped(other, twin, scale * gaussian(12, 20))
    assert numbers(optimizer, weight) == numbers(other, twin)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_tells_nothing_keeps_the_vectors(bad):
    optimizer, weight = dct((12, 20))
    stepped(optimizer, weight, gaussian(12, 20))
    before = numbers(optimizer, weight)
    stepped(optimizer, weight, torch.full((12, 20), bad))
    assert numbers(optimizer, weight) == before


def test_an_expert_without_tokens_keeps_its_vectors_and_stays():
    optimizer, weight = dct((2, 12, 20))
    stepped(optimizer, weight, gaussian(2, 12, 20))
    before, G = numbers(optimizer, weight), gaussian(2, 12, 20, seed=1)
    G[0] = 0
    stepped(optimizer, weight, G)
    after = numbers(optimizer, weight)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert weight.isfinite().all()


def test_no_step_waits_for_the_device():
    weight = torch.nn.Parameter(torch.zeros(12, 20, dtype=torch.bfloat16))
    optimizer = DctAdamW([weight], rank=3)
    for seed in range(3):
        with Calls() as calls:
            stepped(optimizer, weight, gaussian(12, 20, seed=seed).bfloat16())
        assert not calls.names & WAITS


# ------------------------------------------------------------------ moments


def test_moments_of_vectors_that_stay_stay_and_others_begin_at_zero():
    optimizer, weight = dct((12, 20), betas=(0.9, 0.99))
    stepped(optimizer, weight, gaussian(12, 20))
    old = numbers(optimizer, weight)
    moments = {name: optimizer.state[weight][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    G = gaussian(12, 20, seed=1)
    stepped(optimizer, weight, G)
    new = numbers(optimizer, weight)
    R = PROJECTIONS["dct"].vectors(optimizer.state[weight]["basis"], 12).mT @ G
    assert set(new) & set(old)
    assert set(new) - set(old)
    for row, number in enumerate(new):
        m, v = (
            moments[name][old.index(number)] if number in old else torch.zeros(20)
            for name in ("exp_avg", "exp_avg_sq")
        )
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"][row], 0.9 * m + 0.1 * R[row])
        torch.testing.assert_close(
            optimizer.state[weight]["exp_avg_sq"][row], 0.99 * v + 0.01 * R[row].square()
        )


def test_a_selection_of_rows_is_what_ldadams_rule_makes_of_the_product_of_the_bases():
    old, new = torch.tensor([0.0, 3.0, 4.0, 9.0]), torch.tensor([3.0, 5.0, 9.0, 10.0])
    Q = whole_basis(12).float()
    C = Q[:, new.long()].mT @ Q[:, old.long()]
    state = {
        "exp_avg": gaussian(4, 20),
        "exp_avg_sq": gaussian(4, 20, seed=1).square() + gaussian(4, 20) ** 2,
    }
    ctx = Context(step=5, name="w", seed=0, known={})
    expected = Adam().change_basis(state, C, ctx)
    found = PROJECTIONS["dct"].old_numbers(old, new)
    assert found.tolist() == [1, -1, 3, -1]
    for name in state:
        torch.testing.assert_close(_moved_rows(state[name], found), expected[name], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ what it is made of


@each_shape
def test_with_a_residual_it_is_fira_and_without_one_galore_in_the_same_basis(shape):
    for residual, other in (("scaled", Fira), ("none", GaLore)):
        optimizer, weight = dct(shape, residual=residual, refresh_every=3, on_refresh="keep")
        twin = torch.nn.Parameter(torch.zeros(shape))
        expected = other([twin], lr=1.0, rank=4, projection="dct", refresh_every=3)
        for seed in range(7):
            G = gaussian(*shape, seed=seed)
            assert torch.equal(stepped(optimizer, weight, G), stepped(expected, twin, G))


def test_the_residual_keeps_what_the_vectors_leave_out():
    """A gradient without preferred cosines: without the rest, most of it would be lost for good."""
    G, found = gaussian(64, 96), {}
    for residual in ("scaled", "none"):
        optimizer, weight = dct((64, 96), rank=8, residual=residual, growth_limit=None)
        step = stepped(optimizer, weight, G)
        found[residual] = ((step * G).sum() / (step.norm() * G.norm())).item()
        rank = torch.linalg.matrix_rank(step, rtol=1e-4)
        assert rank == (64 if residual == "scaled" else 8)
    assert found["none"] < 0.5
    assert found["scaled"] > 0.9


def test_a_matrix_keeps_two_moments_and_the_numbers_of_its_vectors():
    optimizer, weight = dct((12, 20))
    stepped(optimizer, weight, gaussian(12, 20))
    shapes = {name: tuple(each.shape) for name, each in optimizer.state[weight].items()}
    assert shapes == {
        "basis": (4,), "exp_avg": (4, 20), "exp_avg_sq": (4, 20), "residual_norm": (1,), "step": ()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual": "scale"}, "residual must be one of scaled, none, found 'scale'. Did you mean 'scaled'"),
        ({"refresh_every": 0}, "refresh_every must be a whole number >= 1"),
    ],
)
def test_wrong_settings_are_one_clear_error_at_construction(changes, words):
    with pytest.raises(ValueError, match=words):
        DctAdamW([torch.nn.Parameter(torch.zeros(8, 8))], **changes)
