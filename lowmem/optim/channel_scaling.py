"""How much an inner rule lengthens the columns of a projected gradient, and gradients scaled by that."""

from __future__ import annotations

import torch
from torch import Tensor


def lengthening(
    N: Tensor,  # (..., r, n)  the inner rule's direction
    R: Tensor,  # (..., r, n)  the projected gradient that it was made of
) -> Tensor:  # (..., n)
    """|N_j| / |R_j| for every column j; 0 where there is no gradient."""
    before = torch.linalg.vector_norm(R, dim=-2)
    return torch.where(before > 0, torch.linalg.vector_norm(N, dim=-2) / before, torch.zeros_like(before))


def scaled_rows(
    G: Tensor,  # (rows, columns)  any float dtype
    rows: slice,
    phi: Tensor,  # (columns,) or, for a factor of each row, (rows, 1)
) -> Tensor:
    """A float32 copy of some rows of G, times phi."""
    factor = phi[rows] if phi.dim() == 2 else phi
    return G[rows].to(torch.float32, copy=True).mul_(factor)
