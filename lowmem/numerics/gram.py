"""The Gram matrix of a matrix' smaller side, and products with it, from a few rows at a time.

A matrix X (m, n) is known by its rows only: `Rows` gives float32 ones and may make them anew each time. Where X is wide
every row meets every other one, so rows are kept by the slab, k^2 values of them, k = min(m, n): larger than a tile,
and no larger than the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowmem.numerics.sinkhorn import Rows
from lowmem.numerics.tiles import row_slices


def gram_of(
    X: Rows, shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:  # (k, k)
    """X X^T where X is wide or square, X^T X where it is tall; products and sums in `dtype`."""
    m, n = shape
    if m > n:
        tall = torch.zeros(n, n, device=device, dtype=dtype)
        for rows in row_slices(shape):
            block = X(rows).to(dtype)
            tall.addmm_(block.mT, block)
            del block
        return tall
    wide = torch.empty(m, m, device=device, dtype=dtype)
    height = slab_height(shape)
    for start in range(0, m, height):
        slab = slice(start, min(start + height, m))
        block = torch.empty(slab.stop - start, n, device=device, dtype=dtype)
        for rows in _tiles_of(shape, slab):
            block[rows.start - start : rows.stop - start] = X(rows)
        torch.mm(block, block.mT, out=wide[slab, slab])
        for rows in _tiles_of(shape, slice(0, start)):
            torch.mm(block, X(rows).to(dtype).mT, out=wide[slab, rows])
            wide[rows, slab] = wide[slab, rows].mT
        del block
    return wide


def slab_height(shape: tuple[int, int]) -> int:
    """Rows in a slab of a wide matrix: as many as hold k^2 values, and a tile at least; of a tall one, a tile."""
    m, n = shape
    tile = next(row_slices(shape)).stop
    return max(tile, m * m // n) if m <= n else tile


def _tiles_of(shape: tuple[int, int], slab: slice) -> Iterator[slice]:
    for rows in row_slices((slab.stop - slab.start, shape[1])):
        yield slice(slab.start + rows.start, slab.start + rows.stop)


def rows_of_product(Z: Tensor, X: Rows, shape: tuple[int, int], rows: slice) -> Tensor:  # (rows, n)
    """Some rows of Z X where X is wide or square, of X Z^T where it is tall; Z is (k, k)."""
    m, n = shape
    if m > n:
        return X(rows) @ Z.mT
    out = torch.zeros(rows.stop - rows.start, n, device=Z.device, dtype=Z.dtype)
    for others in row_slices(shape):
        out.addmm_(Z[rows, others], X(others))
    return out


def squares_of_product(Z: Tensor, A: Tensor) -> Tensor:
    """The sum of squares of all entries of Z X, a scalar, A (k, k) being the Gram matrix of X: trace(Z A Z^T)."""
    total = torch.zeros((), device=A.device, dtype=A.dtype)
    for rows in row_slices(A.shape):
        total += (Z[rows] @ A).mul_(Z[rows]).sum()
    return total.clamp_min_(0)


def multiply_(M: Tensor, factor: Tensor, *, times: float = 1.0, keep: float = 0.0) -> None:
    """M <- keep M + times M factor, in place and a few rows at a time; both (k, k)."""
    for rows in row_slices(M.shape):
        M[rows] = torch.addmm(M[rows], M[rows], factor, beta=keep, alpha=times)
