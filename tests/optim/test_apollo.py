"""APOLLO by the direction and the length of its steps, and by what it keeps."""

from __future__ import annotations

import itertools

import pytest
import torch

from lowmem.optim import AdamW, Apollo
from lowmem.optim.projection_scaled import ProjectionScaled
from tests.optim.device_calls import WAITS, Calls
from tests.optim.live_bytes import PeakOfNewBytes
from tests.optim.test_fira import gaussian, stepped, wide

MINI = {"rank": 1, "scaling": "tensor"}
each_kind = pytest.mark.parametrize("settings", [{"rank": 4}, MINI], ids=["channel", "mini"])


def apollo(shape, **settings):
    weight = torch.nn.Parameter(torch.zeros(shape))
    return Apollo([weight], **{"lr": 1.0, **settings}), weight


# ------------------------------------------------------------------ direction and length


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)
@each_kind
def test_every_column_moves_along_its_gradient(shape, settings):
    optimizer, weight = apollo(shape, **settings)
    for seed in range(3):
        step = stepped(optimizer, weight, gaussian(*shape, seed=seed))
        factors = step / wide(weight.grad)
        torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-3, atol=1e-5)
        assert (factors > 0).all()
        assert (factors.std() < 1e-4 * factors.mean()) == (settings is MINI), "one factor for all columns"


def test_a_projection_as_wide_as_the_matrix_makes_columns_nearly_as_long_as_adam():
    """The smaller the rank, the less certain; with all but one direction the two agree within a few percent."""
    optimizer, weight = apollo((64, 400), rank=63, scale=1.0, growth_limit=None)
    other = torch.nn.Parameter(torch.zeros(64, 400))
    adam = AdamW([other], lr=1.0, weight_decay=0.0)
    for seed in range(8):
        ours = stepped(optimizer, weight, gaussian(64, 400, seed=seed)).norm(dim=0)
        theirs = stepped(adam, other, gaussian(64, 400, seed=seed)).norm(dim=0)
        assert (ours / theirs).mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("settings", [{"rank": 8}, {"rank": 32}, MINI], ids=str)
def test_by_default_a_step_is_about_as_long_as_adams_at_any_rank(settings):
    optimizer, weight = apollo((64, 400), growth_limit=None, **settings)
    other = torch.nn.Parameter(torch.zeros(64, 400))
    adam = AdamW([other], lr=1.0, weight_decay=0.0)
    for seed in range(8):
        ours = stepped(optimizer, weight, gaussian(64, 400, seed=seed)).norm()
        theirs = stepped(adam, other, gaussian(64, 400, seed=seed)).norm()
        assert (ours / theirs).item() == pytest.approx(1, abs=0.2)


def test_the_step_is_multiplied_by_the_root_of_scale():
    (one, weight), (four, other) = apollo((12, 20), rank=4, scale=1.0), apollo((12, 20), rank=4, scale=4.0)
    G = gaussian(12, 20)
    torch.testing.assert_close(2 * stepped(one, weight, G), stepped(four, other, G))


@each_kind
def test_steps_do_not_depend_on_the_size_of_gradients(settings):
    """Where the authors' code adds 1e-8 to |R|, a thousandth of the gradient gives another step."""
    (small, weight), (large, other) = (apollo((12, 20), eps=1e-30, **settings) for _ in range(2))
    for seed in range(3):
        G = gaussian(12, 20, seed=seed)
        torch.testing.assert_close(
            stepped(small, weight, 1e-9 * G), stepped(large, other, 1e3 * G), rtol=1e-4, atol=1e-5
        )


@each_kind
def test_the_step_grows_by_a_hundredth_at_most(settings):
    """Small gradients, then one a hundred times as large: Adam's first moment is short and then long."""
    optimizer, weight = apollo((12, 20), **settings)
    grads = [gaussian(12, 20), *(-gaussian(12, 20) / 100 for _ in range(3)), *([100 * gaussian(12, 20)] * 2)]
    norms = [stepped(optimizer, weight, grad).norm().item() for grad in grads]
    (free, other), found = apollo((12, 20), growth_limit=None, **settings), []
    for grad in grads:
        found.append(stepped(free, other, grad).norm().item())
    limited, unlimited = (
        max(after / before for before, after in itertools.pairwise(each)) for each in (norms, found)
    )
    assert limited == pytest.approx(1.01, rel=1e-3)
    assert unlimited > 1.25


@each_kind
def test_a_step_without_a_gradient_does_not_hold_back_the_next(settings):
    optimizer, weight = apollo((12, 20), **settings)
    first = stepped(optimizer, weight, gaussian(12, 20)).norm()
    assert not stepped(optimizer, weight, torch.zeros(12, 20)).any()
    assert stepped(optimizer, weight, gaussian(12, 20)).norm() > 0.2 * first


# ------------------------------------------------------------------ what is kept and drawn


def test_a_matrix_keeps_two_moments_of_the_rank_and_no_projection():
    optimizer, weight = apollo((12, 20), rank=4)
    stepped(optimizer, weight, gaussian(12, 20))
    shapes = {name: tuple(each.shape) for name, each in optimizer.state[weight].items()}
    assert shapes == {"exp_avg": (4, 20), "exp_avg_sq": (4, 20), "scaled_norm": (1,), "step": ()}


def first_factors(name: str, *, seed: int = 0, steps: int = 1, refresh_every: int = 3) -> list[torch.Tensor]:
    """Factors of columns in steps of which each makes its moments anew, so that only the projection differs."""
    weight = torch.nn.Parameter(torch.zeros(12, 20))
    optimizer = Apollo(
        [(name, weight)],
        lr=1.0,
        rank=4,
        betas=(0.0, 0.0),
        seed=seed,
        refresh_every=refresh_every,
        growth_limit=None,
    )
    G = gaussian(12, 20)
    return [stepped(optimizer, weight, G)[0] / G[0] for _ in range(steps)]


def test_the_projection_is_one_of_seed_name_and_turn():
    factors = first_factors("q_proj", steps=7)
    assert [torch.allclose(factors[0], each, rtol=1e-3) for each in factors] == [True] * 3 + [False] * 4
    assert [torch.allclose(factors[3], each, rtol=1e-3) for each in factors[3:]] == [True] * 3 + [False]
    (same,), (other_name,), (other_seed,) = (
        first_factors("q_proj"),
        first_factors("k_proj"),
        first_factors("q_proj", seed=1),
    )
    assert torch.equal(same, factors[0])
    assert not torch.allclose(other_name, same, rtol=1e-3)
    assert not torch.allclose(other_seed, same, rtol=1e-3)


def test_no_step_waits_for_the_device():
    """Not even the first, and not the one with a new projection."""
    weight = torch.nn.Parameter(torch.zeros(12, 20, dtype=torch.bfloat16))
    optimizer = Apollo([weight], rank=3, refresh_every=2)
    for seed in range(3):
        with Calls() as calls:
            stepped(optimizer, weight, gaussian(12, 20, seed=seed).bfloat16())
        assert not calls.names & WAITS


def test_mini_needs_a_few_tiles_for_a_large_matrix():
    weight = torch.nn.Parameter(torch.zeros(2048, 8192, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = Apollo([weight], **MINI)
    optimizer.step()
    with PeakOfNewBytes() as seen:
        optimizer.step()
    assert seen.peak <= 34 << 20
    assert optimizer.state_bytes() == 2 * 8192 * 2 + 4 + 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scaling": "matrix"}, "scaling must be one of channel, tensor, found 'matrix'"),
        ({"scale": 0.0}, "scale must be a finite number > 0 or None, found 0.0"),
        ({"growth_limit": 0.99}, "growth_limit must be a finite number >= 1 or None"),
    ],
)
def test_wrong_settings_are_one_clear_error_at_construction(changes, words):
    with pytest.raises(ValueError, match=words):
        Apollo([torch.nn.Parameter(torch.zeros(8, 8))], **changes)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)
@each_kind
def test_it_agrees_with_apollo_torch_in_the_same_projection(monkeypatch, shape, settings):
    """Their limiter is off: it sees Adam's step before its bias is corrected."""
    apollo_torch = pytest.importorskip("apollo_torch", reason="needs the extra [peers]")
    from apollo_torch.random_projector import GradientProjector

    rank, scaling = settings["rank"], settings.get("scaling", "channel")
    P = gaussian(min(shape), rank) / rank**0.5
    monkeypatch.setattr(ProjectionScaled, "_drawn", lambda self, G, ctx: P)
    monkeypatch.setattr(
        GradientProjector,
        "get_orthogonal_matrix",
        lambda self, weights, rank, type, seed: P if type == "left" else P.T,
    )
    ours, theirs = torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(shape))
    a = Apollo([ours], lr=1e-2, eps=1e-12, scale=4.0, growth_limit=None, **settings)
    group = {"params": [theirs], "rank": rank, "update_proj_gap": 200, "scale": 4.0}
    group |= {"proj": "random", "proj_type": "std", "scale_type": scaling}
    b = apollo_torch.APOLLOAdamW([group], lr=1e-2, eps=1e-12, disable_nl=True, no_deprecation_warning=True)
    for step in range(10):
        grad = gaussian(*shape, seed=step)
        ours.grad, theirs.grad = grad, grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
