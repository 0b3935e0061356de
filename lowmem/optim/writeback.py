"""The last act of a step: w <- w - lr * (direction + weight_decay * w), in the weight's own format.

The only place where a learning rate meets a weight. bfloat16 weights are updated in float32, slice by
slice, and rounded stochastically or to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.numerics.rounding import bf16_stochastic
from lowmem.numerics.tiles import row_slices
from lowmem.optim.rule import Direction, Factors


def write_(
    weight: Tensor, direction: Direction, *, lr: float, weight_decay: float, generator: torch.Generator | None
) -> None:
    """Subtract lr * direction and decay. `generator` rounds bfloat16 stochastically, None to nearest."""
    if isinstance(direction, Factors):
        _write_factors_(weight, direction, lr=lr, weight_decay=weight_decay, generator=generator)
        return
    wide = weight.float() if weight.dtype != torch.float64 else weight
    if weight_decay:
        wide.mul_(1 - lr * weight_decay)
    wide.add_(direction, alpha=-lr)
    _store_(weight, wide, generator)


def _write_factors_(
    weight: Tensor,  # (..., rows, columns)
    factors: Factors,
    *,
    lr: float,
    weight_decay: float,
    generator: torch.Generator | None,
) -> None:
    """Subtract scale * left @ right by row tiles; the product is never held whole."""
    if weight.dim() > 2:
        for index in range(weight.shape[0]):
            each = Factors(factors.left[index], factors.right[index], factors.scale)
            _write_factors_(weight[index], each, lr=lr, weight_decay=weight_decay, generator=generator)
        return
    keep, subtract = 1 - lr * weight_decay, -lr * factors.scale
    if weight.dtype == torch.float32:
        weight.addmm_(factors.left, factors.right, beta=keep, alpha=subtract)
        return
    for rows in row_slices(weight.shape):
        wide = weight[rows].float()
        wide.addmm_(factors.left[rows], factors.right, beta=keep, alpha=subtract)
        _store_(weight[rows], wide, generator)


def _store_(weight: Tensor, wide: Tensor, generator: torch.Generator | None) -> None:
    if weight.dtype == wide.dtype:
        return
    if generator is not None and weight.dtype == torch.bfloat16:
        weight.copy_(bf16_stochastic(wide, generator))
    else:
        weight.copy_(wide)
