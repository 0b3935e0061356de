"""The cosine basis against its definition in float64."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lowmem.numerics import tiles
from lowmem.numerics.dct import cosine_energies, cosine_vectors
from tests.optim.live_bytes import PeakOfNewBytes


def whole_basis(m: int) -> torch.Tensor:
    """Every vector of the DCT-II as a column, from its definition."""
    Q = torch.tensor(
        [[math.cos(math.pi * k * (2 * j + 1) / (2 * m)) for k in range(m)] for j in range(m)],
        dtype=torch.float64,
    )
    return Q / Q.norm(dim=0)


@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 45, 64])
def test_vectors_are_those_of_the_definition_and_orthonormal(m):
    vectors = cosine_vectors(torch.arange(m), m).double()
    torch.testing.assert_close(vectors, whole_basis(m), rtol=0, atol=1e-6)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(m, dtype=torch.float64), rtol=0, atol=1e-5)


def test_vectors_of_large_numbers_are_as_exact_as_others():
    """In float32 the angle of the last ones would be off by a hundredth."""
    m, numbers = 11008, [1, 5503, 11007]
    vectors = cosine_vectors(torch.tensor(numbers), m)
    expected = torch.tensor(
        [
            [math.sqrt(2 / m) * math.cos(math.pi * k * (2 * j + 1) / (2 * m)) for k in numbers]
            for j in range(m)
        ]
    )
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-8)


def test_vectors_of_a_batch_are_made_one_by_one():
    numbers = torch.tensor([[0.0, 3.0], [2.0, 4.0]])
    vectors = cosine_vectors(numbers, 5)
    assert vectors.shape == (2, 5, 2)
    assert torch.equal(vectors[1], cosine_vectors(numbers[1], 5))


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 33),
    n=st.integers(1, 40),
    tile=st.integers(1, 200),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_energies_are_those_of_the_products_with_every_vector(m, n, tile, transposed, dtype):
    generator = torch.Generator().manual_seed(m * 41 + n)
    G = torch.randn(m, n, generator=generator).to(dtype)
    G = G.mT.contiguous().mT if transposed else G
    expected = (whole_basis(m).mT @ G.double()).square().sum(dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_NUMEL", tile)
        found = cosine_energies(G, torch.tensor(0.5))
    torch.testing.assert_close(found.double(), expected / 4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_energies_of_a_large_matrix_take_two_tiles(dtype):
    G = torch.ones(2048, 8192, dtype=dtype)
    with PeakOfNewBytes() as seen:
        cosine_energies(G, torch.tensor(1.0))
    assert seen.peak <= 2.1 * 4 * tiles.TILE_NUMEL
