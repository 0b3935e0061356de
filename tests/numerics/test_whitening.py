"""Whitening by singular values: what each method promises, and matrices that break iterations."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lowmem.numerics import tiles
from lowmem.numerics.exact_products import exact_products
from lowmem.numerics.gram import gram_of, rows_of_product, squares_of_product
from lowmem.numerics.standard_rows import rows_over_largest, standard_rows
from lowmem.numerics.whitening import METHODS, inverse_root_

CPU = torch.device("cpu")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def harmonic(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Singular values 1, 1/2, 1/3, ..."""
    U, S, Vh = torch.linalg.svd(gaussian(m, n, seed=seed), full_matrices=False)
    return U / torch.arange(1, len(S) + 1) @ Vh


def whitened(X: torch.Tensor, method: str, iterations: int | None = None) -> torch.Tensor:
    """Through the Gram matrix of float32 rows, as a rule does it."""
    X = X.float()
    shape = (X.shape[0], X.shape[1])
    dtype = torch.float64 if method == "eigh" else torch.float32
    Z = inverse_root_(gram_of(lambda rows: X[rows], shape, CPU, dtype), method, iterations)
    return rows_of_product(Z.float(), lambda rows: X[rows], shape, slice(0, shape[0]))


def spread(U: torch.Tensor) -> tuple[float, float]:
    values = torch.linalg.svdvals(U.double())
    return (values.min() / values.median()).item(), (values.max() / values.median()).item()


SPECTRA = {
    "gaussian, wide": gaussian(64, 128),
    "gaussian, tall": gaussian(200, 96),
    "1/i, wide": harmonic(96, 160),
    "1/i, tall": harmonic(160, 96),
    "1/i, square, larger": harmonic(300, 300),
}


@pytest.mark.parametrize("size", [1e-22, 1.0, 1e6])
@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_end_within_a_tenth_of_their_median(spectrum, method, size):
    G = (SPECTRA[spectrum] * size).float()
    X = rows_over_largest(lambda rows: G[rows], tuple(G.shape), CPU)(slice(0, G.shape[0]))
    low, high = spread(whitened(X, method))
    assert 0.9 < low <= high < 1.1
    if method == "eigh":
        assert 0.999 < low <= high < 1.001


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_quintic_brings_them_less_close_and_says_so(spectrum):
    low, high = spread(whitened(SPECTRA[spectrum], "quintic"))
    assert 0.6 < low < 0.95
    assert 1.1 < high < 1.5


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_diagonal_substitution_shortens_large_ones_by_a_factor_below_two_and_a_half(spectrum):
    """It turns no direction around and does not whiten: the ratio of the extremes falls, but never to a half."""
    X = SPECTRA[spectrum]
    before = torch.linalg.svdvals(X)
    after = torch.linalg.svdvals(whitened(X, "nsds").double())
    gain = (before.max() / before.min()) / (after.max() / after.min())
    assert 1.0 < gain < 2.5
    assert (whitened(X, "nsds").double() * X).sum() > 0


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_quintic_on_the_gram_matrix_is_the_one_on_the_matrix_itself(spectrum):
    X = SPECTRA[spectrum] if "tall" not in spectrum else SPECTRA[spectrum].mT
    direct = X / X.norm()
    for _ in range(5):
        A = direct @ direct.mT
        direct = 3.4445 * direct + (-4.7750 * A + 2.0315 * A @ A) @ direct
    found = whitened(X, "quintic").double()
    assert (found - direct).norm() < 0.02 * direct.norm()


def test_a_z_from_the_old_y_would_not_settle():
    """Why the second line of the iteration uses the first one's new value."""
    X = SPECTRA["1/i, wide"]
    Y = X @ X.mT / (X @ X.mT).norm()
    Z = identity = torch.eye(len(Y), dtype=torch.float64)
    for _ in range(10):
        T = 3 * identity - Z @ Y
        Y, Z = 0.8 * Y @ T, 0.8 * T @ Z
    low, high = spread(Z @ X)
    assert low < 0.7 or high > 1.2


def test_the_iteration_as_printed_on_a_gram_matrix_of_trace_mn_diverges():
    """Why the Gram matrix is divided by its norm: rows of variance 1 give eigenvalues far above 3."""
    X = standard_rows(lambda rows: SPECTRA["gaussian, wide"].float()[rows], (64, 128), CPU)(slice(0, 64))
    Y, Z = X @ X.mT, torch.eye(64)
    for _ in range(10):
        Y = 0.8 * Y @ (3 * torch.eye(64) - Z @ Y)
        Z = 0.8 * (3 * torch.eye(64) - Z @ Y) @ Z
    assert not Z.isfinite().all()


@pytest.mark.parametrize("rank", [0, 1, 3, 20])
@pytest.mark.parametrize("shape", [(96, 96), (96, 200), (200, 96)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_matrices_without_full_rank_stay_so_and_finite(method, shape, rank):
    """Half of the rounding errors in place of zero eigenvalues are negative; an iteration must not blow them up."""
    X = gaussian(shape[0], rank) @ gaussian(rank, shape[1], seed=1)
    U = whitened(X, method)
    assert U.isfinite().all()
    values = torch.linalg.svdvals(U.double())
    assert (values[rank:] < 0.02).all()
    if method in ("newton_schulz", "eigh") and rank:
        assert values[:rank].min() > 0.9 * values[:rank].max()


@pytest.mark.parametrize("method", ["newton_schulz", "quintic"])
def test_more_iterations_than_needed_do_no_harm(method):
    U = whitened(gaussian(96, 8) @ gaussian(8, 200, seed=1), method, 40)
    assert U.isfinite().all()
    assert torch.linalg.svdvals(U.double()).max() < 1.6


@settings(deadline=None, max_examples=40)
@given(m=st.integers(2, 40), n=st.integers(2, 40), tile=st.integers(1, 300), seed=st.integers(0, 3))
def test_tiles_and_slabs_make_the_gram_matrix_and_the_product_of_the_whole(m, n, tile, seed):
    X, Z = gaussian(m, n, seed=seed).float(), gaussian(min(m, n), min(m, n), seed=seed + 1).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_NUMEL", tile)
        A = gram_of(lambda rows: X[rows], (m, n), CPU)
        rows = slice(m // 3, m)
        part = rows_of_product(Z, lambda rows: X[rows], (m, n), rows)
        squares = squares_of_product(Z, A)
    product = X @ Z.mT if m > n else Z @ X
    torch.testing.assert_close(A, X.mT @ X if m > n else X @ X.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part, product[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares, product.square().sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e22])
def test_standard_rows_have_mean_zero_and_variance_one_at_any_size(size):
    G = ((gaussian(30, 40) + 3) * size * torch.logspace(-6, 0, 30, dtype=torch.float64)[:, None]).float()
    X = standard_rows(lambda rows: G[rows], (30, 40), CPU)(slice(0, 30))
    assert X.mean(1).abs().max() < 1e-5
    assert X.square().mean(1).sub(1).abs().max() < 1e-4


def test_rows_of_zeros_and_rows_that_are_all_alike_become_zeros():
    G = gaussian(6, 37).float()
    G[1], G[2], G[3] = 0, 0.1, -1e-20
    X = standard_rows(lambda rows: G[rows], (6, 37), CPU)(slice(0, 6))
    assert X[1:4].abs().max() < 1e-3
    assert X[[0, 4, 5]].square().mean(1).sub(1).abs().max() < 1e-4


@pytest.mark.parametrize("new_setting", [False, True])
def test_products_are_exact_for_a_while_and_the_choice_of_the_program_comes_back(new_setting):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if new_setting:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("medium")
        with exact_products():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        if not new_setting:
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"
