"""SWAN by what its step is."""

from __future__ import annotations

import pytest
import torch

from lowmem.numerics import tiles
from lowmem.optim import Swan, build_optimizer
from tests.reference.swan import SwanReference

WHITENINGS = ["quintic", "newton_schulz", "nsds", "eigh"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_of(G: torch.Tensor, **settings) -> torch.Tensor:
    """What one update subtracts from a float32 weight of zeros, over lr."""
    weight = torch.nn.Parameter(torch.zeros(G.shape))
    weight.grad = G.clone()
    Swan([weight], lr=1.0, **{"scale": 1.0, **settings}).step()
    return -weight.detach()


@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (2, 9), (3, 16, 20)], ids=str)
@pytest.mark.parametrize("scale", [0.05, 0.2])
def test_the_root_mean_square_of_a_step_is_scale_whatever_the_gradient(shape, scale, whitening):
    for size in (1e-22, 1.0, 1e15):
        U = step_of(gaussian(*shape) * size, scale=scale, whitening=whitening)
        squares = U.square().mean((-2, -1))
        torch.testing.assert_close(squares.sqrt(), torch.full_like(squares, scale), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)], ids=str)
def test_singular_values_of_a_step_end_within_a_tenth_of_their_median(shape):
    values = torch.linalg.svdvals(step_of(gaussian(*shape), whitening="newton_schulz"))
    if shape[0] > shape[1]:  # centred rows are one direction short
        assert values[-1] < 1e-2 * values[0]
        values = values[:-1]
    assert values.min() > 0.9 * values.median()
    assert values.max() < 1.1 * values.median()


@pytest.mark.parametrize("whitening", ["quintic", "newton_schulz", "eigh"])
@pytest.mark.parametrize("shape", [(20, 50), (50, 20)], ids=str)
@pytest.mark.parametrize("standardize", [True, False])
def test_a_step_is_that_of_singular_values_in_float64(shape, standardize, whitening, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_NUMEL", 200)
    G = gaussian(*shape) + 0.5
    twin = SwanReference([], lr=0, whitening=whitening, standardize=standardize, scale=1.0)
    found = step_of(G, whitening=whitening, standardize=standardize).double()
    expected = twin.direction(G.double())
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("pattern", ["zeros", "rank one", "one entry", "one row", "a dead row", "alike"])
def test_gradients_that_have_no_inverse_root_give_finite_steps(pattern, whitening):
    G = torch.zeros(24, 32)
    if pattern == "rank one":
        G = torch.outer(gaussian(24), gaussian(32, seed=1))
    elif pattern == "one entry":
        G[3, 4] = 1
    elif pattern == "one row":
        G[5] = gaussian(32)
    elif pattern == "a dead row":
        G = gaussian(24, 32)
        G[7] = 0
    elif pattern == "alike":
        G += 0.3
    U = step_of(G, whitening=whitening)
    assert U.isfinite().all()
    if pattern in ("zeros", "alike"):
        assert not U.any()
    if pattern == "a dead row":
        assert U[7].abs().max() < 1e-3


def test_a_batch_of_experts_is_a_matrix_each_and_an_idle_one_stays():
    G = gaussian(3, 10, 14)
    G[1] = 0
    U = step_of(G)
    assert not U[1].any()
    for index in (0, 2):
        torch.testing.assert_close(U[index], step_of(G[index]))


def test_a_gradient_in_bfloat16_is_whitened_in_float32():
    G = gaussian(48, 64).bfloat16()
    weight = torch.nn.Parameter(torch.zeros(48, 64, dtype=torch.bfloat16))
    weight.grad = G
    Swan([weight], lr=1.0, scale=1.0, rounding="nearest").step()
    torch.testing.assert_close(-weight.detach().float(), step_of(G.float()), rtol=1e-2, atol=1e-2)


def test_matrices_have_no_state_and_the_rest_takes_the_fallback():
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 12), "embed": torch.nn.Embedding(20, 8)})
    fallback = {"name": "sinkgd", "normalize": "row", "momentum": 0.9, "storage": {"moment": "bf16"}}
    optimizer = build_optimizer(model, "swan", lr=1e-3, target=["mlp"], fallback=fallback)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert set(optimizer.state[model["mlp"].weight]) == {"step"}
    momentum = optimizer.state[model["embed"].weight]["momentum_buffer"]
    assert momentum.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fallback", "bytes_a_value"),
    [
        ({"name": "adamw", "storage": {"moment": "fp32", "variance": "fp32"}}, 8),
        ({"name": "adamw"}, 4),
        ({"name": "adamw", "storage": {"moment": "int8", "variance": "int8"}}, 2),
        ({"name": "sinkgd", "normalize": "row", "momentum": 0.9}, 2),
        ({"name": "adafactor"}, 0),
        ({"name": "sinkgd", "normalize": "row"}, 0),
        ({"name": "sgd"}, 0),
    ],
    ids=str,
)
def test_the_fallback_decides_what_a_large_vocabulary_costs(fallback, bytes_a_value):
    """The figures of the docstring, for bfloat16 weights."""
    with torch.device("meta"):
        model = torch.nn.ModuleDict(
            {"mlp": torch.nn.Linear(4, 4), "embed": torch.nn.Embedding(128_256, 4096, dtype=torch.bfloat16)}
        )
    optimizer = build_optimizer(model, "swan", lr=1e-3, target=["mlp"], fallback=fallback)
    values = 128_256 * 4096
    assert optimizer.state_bytes() / values == pytest.approx(bytes_a_value, abs=0.04)
    if bytes_a_value == 8:
        assert optimizer.state_bytes() / 2**30 == pytest.approx(3.9, abs=0.05)
