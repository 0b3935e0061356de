"""Rows of a matrix on one scale, made anew each time they are asked for, so that the scaled matrix is never held."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.numerics.sinkhorn import Rows, row_peaks
from lowmem.numerics.tiles import row_slices

SMALLEST_VARIANCE = 1e-12
"""Of a row over its largest magnitude; what is smaller is the rounding of a row whose entries are all alike."""


def standard_rows(rows_of: Rows, shape: tuple[int, int], device: torch.device) -> Rows:
    """Each row with mean 0 and variance 1 over its columns.

        X_i <- (G_i - mean(G_i)) / sqrt(mean((G_i - mean(G_i))^2))

    Rows are divided by their largest magnitude first, so gradients of 1e-22 or 1e22 are as good as any. A row whose
    entries are all alike has nothing but its mean and becomes zeros. Keeps 3 m numbers.
    """
    m = shape[0]
    peaks, means, inverses = (torch.empty(m, 1, device=device, dtype=torch.float32) for _ in range(3))
    for rows in row_slices(shape):
        G = rows_of(rows)
        peaks[rows] = row_peaks(G)
        X = G / peaks[rows]
        del G
        means[rows] = X.mean(1, keepdim=True)
        X.sub_(means[rows])
        squares = torch.linalg.vector_norm(X, dim=1, keepdim=True).square_().div_(shape[1])
        del X
        inverses[rows] = squares.clamp_min_(SMALLEST_VARIANCE).rsqrt_()

    def standardised(rows: slice) -> Tensor:
        return (rows_of(rows) / peaks[rows]).sub_(means[rows]).mul_(inverses[rows])

    return standardised


def rows_over_largest(rows_of: Rows, shape: tuple[int, int], device: torch.device) -> Rows:
    """All rows divided by the largest magnitude of the matrix; zeros stay zeros. Keeps one number."""
    largest = torch.zeros((), device=device, dtype=torch.float32)
    for rows in row_slices(shape):
        largest = torch.maximum(largest, torch.linalg.vector_norm(rows_of(rows), ord=float("inf")))
    divisor = torch.where(largest == 0, torch.ones_like(largest), largest)
    return lambda rows: rows_of(rows) / divisor
