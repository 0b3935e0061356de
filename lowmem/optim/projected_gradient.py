"""A gradient on a few directions of its shorter side."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.numerics.tiles import matmul_transposed_fp32


def is_wide(grad: Tensor) -> bool:
    """Whether it has more columns than rows; a square one does not, as in GaLore's code."""
    return grad.shape[-2] < grad.shape[-1]


def wide(grad: Tensor) -> Tensor:  # (..., m, n)  m <= n
    """The gradient itself when it has more columns than rows, else its transpose."""
    return grad if is_wide(grad) else grad.mT


def projected(
    grad: Tensor,  # (..., rows, columns)  any float dtype
    P: Tensor,  # (..., m, r)
) -> Tensor:  # (..., r, n)  float32
    """P^T G, G having its longer side last."""
    G = wide(grad)
    if G.dim() == 2:
        return matmul_transposed_fp32(G, P)
    return torch.stack([matmul_transposed_fp32(G_e, P_e) for G_e, P_e in zip(G, P, strict=True)])
