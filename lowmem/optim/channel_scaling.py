"""Gradients with their columns scaled as an inner rule scales those of a projection, some rows at a time.

Shapes are those of a gradient with its longer side last, (m, n) with m <= n; rows that are made are the weight's own.
Of some rows of a taller gradient n is how many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem.numerics.row_share import ALL_ROWS, RowShare
from lowmem.numerics.tiles import row_slices

RowMaker = Callable[[slice], Tensor]  # -> (rows, columns) float32, nobody else's memory


def lengthening(
    N: Tensor,  # (..., r, n)  the inner rule's direction
    R: Tensor,  # (..., r, n)  the projected gradient that it was made of
    share: RowShare = ALL_ROWS,
) -> Tensor:  # (..., n)
    """|N_j| / |R_j| for every column j; 0 where there is no gradient. Of a `share` of a column, that of the whole."""
    before, after = (_norms(x, share) for x in (R, N))
    return torch.where(before > 0, after / before, torch.zeros_like(before))


def _norms(x: Tensor, share: RowShare) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=-2)
    return norms if share is ALL_ROWS else share.sum_(norms.square_()).sqrt_()


def scaled_row_makers(
    grad: Tensor,  # (..., rows, columns)  any float dtype
    phi: Tensor,  # (..., n)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., m, r), (..., r, n)
) -> list[RowMaker]:
    """Who makes rows of G diag(phi) + P K, P and K being `low_rank`; one for each matrix of a batch."""
    if grad.dim() == 2:
        return [_row_maker(grad, phi, low_rank)]
    return [
        _row_maker(grad[i], phi[i], None if low_rank is None else (low_rank[0][i], low_rank[1][i]))
        for i in range(len(grad))
    ]


def _row_maker(G: Tensor, phi: Tensor, low_rank: tuple[Tensor, Tensor] | None) -> RowMaker:
    is_transposed = len(phi) == len(G)

    def scaled(rows: slice) -> Tensor:
        return G[rows].to(torch.float32, copy=True).mul_(phi[rows].unsqueeze(1) if is_transposed else phi)

    if low_rank is None:
        return scaled
    P, K = low_rank
    left, right = (K.mT, P.mT) if is_transposed else (P, K)
    return lambda rows: scaled(rows).addmm_(left[rows], right)


def norms_of(makers: Sequence[RowMaker], grad: Tensor, share: RowShare = ALL_ROWS) -> Tensor:  # (matrices,)
    """Of directions of the shape of `grad`, a float32 number each; with a `share` of their rows, of whole ones."""
    norms = torch.zeros(len(makers), device=grad.device, dtype=torch.float32)
    for norm, rows_of in zip(norms, makers, strict=True):
        for rows in row_slices(grad.shape[-2:]):
            norm += torch.linalg.vector_norm(rows_of(rows)).square_()
    return share.sum_(norms).sqrt_()
