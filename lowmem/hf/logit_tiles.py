"""One tile of a head's logits, some columns of the vocabulary wide: made, summed up, differentiated."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowmem.numerics.held_weights import load_rows

Elementwise = Callable[[Tensor], Tensor]


def scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    functions: tuple[Elementwise, ...],
    tiles: list[slice],
    keeps_tile: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp and label logit of each token, (T,) each, and the last tile of raw logits, (T, v).

    That tile is destroyed unless `keeps_tile`.
    """
    highest = total = label_logit = torch.empty(0)
    for tile in tiles:
        z = linear(x, load_rows(weight, tile), None if bias is None else bias[tile])
        y = upcast(applied(functions, z))
        if tile.start == 0:
            # Not -inf: a tile of nothing but -inf would then give inf - inf.
            highest = y.new_full((y.shape[0],), torch.finfo(y.dtype).min)
            total, label_logit = torch.zeros_like(highest), torch.zeros_like(highest)
        column, is_here = label_column(labels, tile)
        label_logit += torch.where(is_here, y.gather(1, column).squeeze(1), 0.0)
        before, highest = highest, torch.maximum(highest, y.amax(1))
        total *= torch.exp(before - highest)
        shifted = y - highest[:, None] if keeps_tile else y.sub_(highest[:, None])
        total += shifted.exp_().sum(1)
        del y, shifted
    return total.log_().add_(highest), label_logit, z


def logit_grad(
    z: Tensor,  # (T, v)  destroyed
    functions: tuple[Elementwise, ...],
    labels: Tensor,
    log_sum_exp: Tensor,
    tile: slice,
    scale: Tensor | None,
) -> Tensor:
    """`scale` times the gradient of the summed loss at one tile of raw logits, (T, v), in their dtype."""
    if functions:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = upcast(applied(functions, z))
        dy = (y.detach() - log_sum_exp[:, None]).exp_()
    else:
        dy = upcast(z).sub_(log_sum_exp[:, None]).exp_()
    column, is_here = label_column(labels, tile)
    dy.scatter_(1, column, dy.gather(1, column) - is_here[:, None].to(dy.dtype))
    if scale is not None:
        dy *= scale
    if functions:
        return torch.autograd.grad(y, z, dy)[0]
    return dy.to(z.dtype)


def label_column(labels: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Column (T, 1) of each token's label in this tile, and whether it is in this tile at all, (T,)."""
    is_here = (labels >= tile.start) & (labels < tile.stop)
    return (labels - tile.start).clamp(0, tile.stop - tile.start - 1)[:, None], is_here


def applied(functions: tuple[Elementwise, ...], z: Tensor) -> Tensor:
    return reduce(lambda y, function: function(y), functions, z)


def upcast(y: Tensor) -> Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float32))


def store_product_(target: Tensor, left: Tensor, right: Tensor) -> None:
    if target.dtype == left.dtype:
        torch.mm(left, right, out=target)
    else:
        target.copy_(left @ right)


def add_product_(total: Tensor | None, left: Tensor, right: Tensor, *, several: bool) -> Tensor:
    """`total + left @ right`, summed in fp32 when there are several terms."""
    if not several:
        return left @ right
    dtype = torch.promote_types(left.dtype, torch.float32)
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)
