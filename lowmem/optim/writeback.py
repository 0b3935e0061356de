"""The last act of a step: w <- w - lr * (direction + weight_decay * w), in the weight's own format.

The only place where a learning rate meets a weight. bfloat16 weights are updated in float32, slice by
slice, and rounded stochastically or to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lowmem.numerics.held_weights import HeldWeight, held_weight
from lowmem.numerics.rounding import bf16_stochastic
from lowmem.numerics.row_gradients import RowGradient
from lowmem.numerics.tiles import SLICES_START_AT, matching_parts, row_slices, state_row_slices
from lowmem.optim.rule import Direction, Factors, RowBlocks


def write_(
    weight: Tensor, direction: Direction, *, lr: float, weight_decay: float, generator: torch.Generator | None
) -> None:
    """Subtract lr * direction and decay. `generator` rounds bfloat16 stochastically, None to nearest."""
    if (held := held_weight(weight)) is not None:
        for rows in held.row_slices():
            _write_held_rows_(
                direction, held=held, rows=rows, lr=lr, weight_decay=weight_decay, generator=generator
            )
        return
    if isinstance(direction, Factors):
        _write_factors_(weight, direction, lr=lr, weight_decay=weight_decay, generator=generator)
        return
    if isinstance(direction, RowBlocks):
        _write_row_blocks_(weight, direction, lr=lr, weight_decay=weight_decay, generator=generator)
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


def _write_row_blocks_(
    weight: Tensor,  # (rows, columns), or a batch of such
    blocks: RowBlocks,
    *,
    lr: float,
    weight_decay: float,
    generator: torch.Generator | None,
) -> None:
    """Write each block of rows as it is made."""
    for index in range(weight.shape[0] if weight.dim() > 2 else 1):
        matrix = weight[index] if weight.dim() > 2 else weight
        for rows in row_slices(matrix.shape):
            write_(
                matrix[rows],
                blocks.of(index, rows),
                lr=lr,
                weight_decay=weight_decay,
                generator=generator,
            )


def _store_(weight: Tensor, wide: Tensor, generator: torch.Generator | None) -> None:
    if weight.dtype == wide.dtype:
        return
    if generator is not None and weight.dtype == torch.bfloat16:
        weight.copy_(bf16_stochastic(wide, generator))
    else:
        weight.copy_(wide)


WritePart = Callable[..., None]
"""`write_` on a part of a weight: (direction of the part, lr=, weight_decay=, generator=)."""


def parts_of(param: Tensor, grad: Tensor | RowGradient | None) -> Iterator[tuple[slice, Tensor, WritePart]]:
    """(flat slice, the gradient's values in it, what writes a direction into it) of a weight, for element rules.

    Without a gradient the values are those of nothing.
    """
    held = held_weight(param)
    if held is None and isinstance(grad, RowGradient):
        for part, weight, values in matching_rows(param, grad):
            yield part, values, partial(write_, weight)
        return
    if held is None:
        assert not isinstance(grad, RowGradient)
        for part, weight, values in matching_parts(param, param if grad is None else grad):
            yield part, param.new_empty(0) if grad is None else values, partial(write_, weight)
        return
    columns = held.shape[1]
    for rows in held.row_slices(multiple_of=SLICES_START_AT):
        part = slice(rows.start * columns, rows.stop * columns)
        values = param.new_empty(0) if grad is None else grad[rows].reshape(-1)
        yield part, values, partial(_write_held_rows_, held=held, rows=rows, is_part=True)


def matching_rows(param: Tensor, grad: RowGradient) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(flat slice, parameter, gradient) of an ordinary matrix, flat and some rows at a time."""
    flat, columns = param.view(-1), param.shape[1]
    for rows in state_row_slices(param.shape):
        part = slice(rows.start * columns, rows.stop * columns)
        yield part, flat[part], grad[rows].view(-1)


def _write_held_rows_(
    direction: Direction,
    *,
    held: HeldWeight,
    rows: slice,
    lr: float,
    weight_decay: float,
    generator: torch.Generator | None,
    is_part: bool = False,
) -> None:
    """Subtract the rows `rows` of a direction, or with `is_part` one that has these rows only."""
    wide = held.load_rows(rows)
    if isinstance(direction, Factors):
        keep, subtract = 1 - lr * weight_decay, -lr * direction.scale
        wide.addmm_(direction.left[rows], direction.right, beta=keep, alpha=subtract)
    else:
        if weight_decay:
            wide.mul_(1 - lr * weight_decay)
        if isinstance(direction, RowBlocks):
            step = direction.of(0, rows)
        else:
            step = direction.view_as(wide) if is_part else direction[rows]
        wide.add_(step, alpha=-lr)
    held.store_rows_(rows, wide, generator)
