"""Weights that are kept in another format than their parameter's.

Autograd and `torch.optim` know parameters of floating point only. A weight in int8 therefore has an empty
parameter as its handle: it stands in param groups, hooks and names, and its attribute `held_weight` is the
weight itself. The functions here answer for both kinds, so that who updates weights need not know which it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowmem.numerics.packed_weights import packed_numel, scales_of
from lowmem.numerics.row_share import ALL_ROWS, RowShare
from lowmem.numerics.tiles import sum_and_squares

Shape = tuple[int, ...]


class HeldWeight(Protocol):
    """A matrix that is read and written some rows at a time, as float32."""

    shape: tuple[int, int]
    grad: Tensor | None
    """The gradient of the whole weight, summed since it was last dropped."""
    trainer: Any
    """Who updates it; a backward pass without one would lose its gradient."""

    @property
    def nbytes(self) -> int:
        """What the weight takes in its own format."""
        ...

    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that it is kept in."""
        ...

    def load_rows(self, rows: slice) -> Tensor:
        """A float32 copy of `rows`."""
        ...

    def store_rows_(self, rows: slice, wide: Tensor, generator: torch.Generator | None) -> None:
        """Keep float32 `wide` as `rows`, rounded stochastically, or to nearest without a generator."""
        ...

    def add_grad_(self, grad: Tensor) -> None:
        """Add the gradient of one use of the weight."""
        ...

    def row_slices(self, multiple_of: int = 1) -> Iterator[slice]:
        """Cut the rows into slices of a few million values, each but the last of a multiple of so many values."""
        ...


def held_weight(param: Tensor) -> HeldWeight | None:
    """The weight that `param` is the handle of; None for an ordinary parameter."""
    return getattr(param, "held_weight", None)


def shape_of(param: Tensor) -> Shape:
    """The shape of the weight."""
    held = held_weight(param)
    return tuple(param.shape) if held is None else held.shape


def numel_of(param: Tensor) -> int:
    """How many values the weight has."""
    held = held_weight(param)
    if held is not None:
        return held.shape[0] * held.shape[1]
    packed = packed_numel(param)
    return param.numel() if packed is None else packed


def nbytes_of(param: Tensor) -> int:
    """What the weight takes in its own format."""
    held = held_weight(param)
    if held is not None:
        return held.nbytes
    return param.nbytes + sum(scale.nbytes for _, scale in scales_of(param))


def load_rows(param: Tensor, rows: slice) -> Tensor:
    """Rows of the weight in the parameter's dtype: a view of an ordinary parameter, else a copy."""
    held = held_weight(param)
    return param[rows] if held is None else held.load_rows(rows).to(param.dtype)


def grad_nbytes_of(param: Tensor) -> int:
    """What a gradient of the weight takes; it has the parameter's dtype."""
    return numel_of(param) * param.dtype.itemsize


def grad_of(param: Tensor) -> Tensor | None:
    """The gradient of the weight."""
    held = held_weight(param)
    return param.grad if held is None else held.grad


def drop_grad_(param: Tensor) -> None:
    """Free the gradient of the weight."""
    param.grad = None
    if (held := held_weight(param)) is not None:
        held.grad = None


def root_mean_square_of(param: Tensor, share: RowShare = ALL_ROWS) -> Tensor:
    """Of the values of the weight, as a float32 scalar on its device; a slice at a time.

    With a `share` of its rows, that of the whole weight.
    """
    held = held_weight(param)
    slices = [param] if held is None else (held.load_rows(rows) for rows in held.row_slices())
    squares = sum(sum_and_squares(each)[1] for each in slices)
    assert isinstance(squares, Tensor)
    rows = shape_of(param)[0] if shape_of(param) else 1
    numel = numel_of(param) // rows * share.of_all(rows)
    return (share.sum_(squares) / numel).sqrt_().float()


def parameter_count(model: nn.Module, *, only_trained: bool = False) -> int:
    """Values of all weights of `model`, whatever format they are kept in; a tied one counts once."""
    return sum(numel_of(param) for param in model.parameters() if param.requires_grad or not only_trained)


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that held weights of `model` are kept in, by the names of their buffers."""
    stored = {
        id(tensor)
        for param in model.parameters()
        if (held := held_weight(param)) is not None
        for tensor in held.stored()
    }
    return {name: buffer for name, buffer in model.named_buffers() if id(buffer) in stored}
