"""Rows and columns of a matrix brought to one root mean square, by two vectors of factors.

The iterates of Sinkhorn's algorithm on G always have the form diag(r) G diag(c), so the two vectors are iterated
and never the matrix: a pass reads G some rows at a time and keeps m + n numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem.numerics.row_share import ALL_ROWS, RowShare
from lowmem.numerics.tiles import row_slices

Rows = Callable[[slice], Tensor]  # -> (rows, n) float32; may be somebody's memory, so never changed in place

SMALLEST_MEAN_SQUARE = 1e-30
"""Of a row or column that is normalised, its rows divided by their largest entry; smaller ones stay nearly zero."""


class Scalings(NamedTuple):
    """X = diag(rows) (G / peaks) diag(columns)."""

    peaks: Tensor  # (m, 1)  the largest magnitude of each row, 1 for a row of zeros
    rows: Tensor  # (m, 1)
    columns: Tensor  # (n,)

    def apply(self, G: Tensor, rows: slice) -> Tensor:
        """The rows of X, given those of G."""
        return (G / self.peaks[rows]).mul_(self.rows[rows]).mul_(self.columns)


def sinkhorn_scalings(
    rows_of: Rows,  # of G, (m, n)
    shape: tuple[int, int],
    *,
    iterations: int,
    device: torch.device,
    share: RowShare = ALL_ROWS,
) -> Scalings:
    """Rows to root mean square 1, then columns, `iterations` times.

        r_i^2 <- 1 / mean_j (G_ij^2 c_j^2)
        c_j^2 <- 1 / mean_i (G_ij^2 r_i^2)        c = 1 at first

    One pass over G an iteration: the factor of a row needs nothing of the other rows. Each row is divided by its
    largest magnitude first, which the row's factor makes up for: the squares of gradients of 1e-22 or 1e22 are no
    numbers in float32. Rows and columns of zeros stay zero. With a `share` of the rows, n values are added up in each
    iteration.
    """
    m, n = shape
    peaks = torch.empty(m, 1, device=device, dtype=torch.float32)
    row_squares = torch.empty(m, device=device, dtype=torch.float32)
    column_squares = torch.ones(n, device=device, dtype=torch.float32)
    for iteration in range(iterations):
        sums = torch.zeros(n, device=device, dtype=torch.float32)
        for rows in row_slices(shape):
            G = rows_of(rows)
            if iteration == 0:
                peaks[rows] = row_peaks(G)
            A = (G / peaks[rows]).square_()
            del G
            row_squares[rows] = _inverse(torch.mv(A, column_squares).div_(n))
            sums.addmv_(A.mT, row_squares[rows])
            del A
        column_squares = _inverse(share.sum_(sums).div_(share.of_all(m)))
    return Scalings(peaks, row_squares.sqrt_().unsqueeze(1), column_squares.sqrt_())


def unit_rows(G: Tensor) -> Tensor:
    """Each row of G at root mean square 1; rows of zeros stay zero."""
    X = G / row_peaks(G)
    squares = torch.linalg.vector_norm(X, dim=1, keepdim=True).square_().div_(G.shape[1])
    return X.mul_(_inverse(squares).sqrt_())


def unit_columns(
    rows_of: Rows, shape: tuple[int, int], device: torch.device, share: RowShare = ALL_ROWS
) -> Rows:
    """Each column of G at root mean square 1, some rows at a time; columns of zeros stay zero. Keeps 2 n numbers."""
    peaks = torch.zeros(shape[1], device=device, dtype=torch.float32)
    for rows in row_slices(shape):
        peaks = torch.maximum(peaks, torch.linalg.vector_norm(rows_of(rows), ord=float("inf"), dim=0))
    share.max_(peaks).masked_fill_(peaks == 0, 1.0)
    squares = torch.zeros_like(peaks)
    for rows in row_slices(shape):
        squares += (rows_of(rows) / peaks).square_().sum(0)
    factors = _inverse(share.sum_(squares).div_(share.of_all(shape[0]))).sqrt_()
    return lambda rows: (rows_of(rows) / peaks).mul_(factors)


def row_peaks(G: Tensor) -> Tensor:  # (rows, 1)
    """The largest magnitude of each row, 1 for a row of zeros."""
    peaks = torch.linalg.vector_norm(G, ord=float("inf"), dim=1, keepdim=True)
    return peaks.masked_fill_(peaks == 0, 1.0)


def _inverse(mean_squares: Tensor) -> Tensor:
    return mean_squares.clamp_min_(SMALLEST_MEAN_SQUARE).reciprocal_()
