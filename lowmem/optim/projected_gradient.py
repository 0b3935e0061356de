"""A gradient on a few directions of its shorter side."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.numerics.tiles import matmul_transposed_fp32
from lowmem.optim.rule import Shape


def is_wide(grad: Tensor) -> bool:
    """Whether it has more columns than rows; a square one does not, as in GaLore's code."""
    return grad.shape[-2] < grad.shape[-1]


def wide(grad: Tensor) -> Tensor:  # (..., m, n)  m <= n
    """The gradient itself when it has more columns than rows, else its transpose."""
    return grad if is_wide(grad) else grad.mT


def is_right_of(P: Tensor, shape: Shape) -> bool:
    """Whether a basis of a gradient is one of its columns: where it, or what it is some rows of, is not wide."""
    return P.shape[-2] == shape[-1]


def sides_of(shape: Shape, columns: int | None = None) -> tuple[int, int]:
    """(m, n), the shorter side first; of some rows of a taller gradient its `columns`, which are given then."""
    if columns is not None:
        return columns, shape[-2]
    return min(shape[-2:]), max(shape[-2:])


def projected(
    grad: Tensor,  # (..., rows, columns)  any float dtype
    P: Tensor,  # (..., m, r)
) -> Tensor:  # (..., r, n)  float32
    """P^T G, G having the side of P first: its shorter one, where it is whole."""
    G = grad.mT if is_right_of(P, tuple(grad.shape)) else grad
    if G.dim() == 2:
        return matmul_transposed_fp32(G, P)
    return torch.stack([matmul_transposed_fp32(G_e, P_e) for G_e, P_e in zip(G, P, strict=True)])
