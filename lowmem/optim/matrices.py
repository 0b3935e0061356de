"""What rules for matrices ask of a shape and of a gradient."""

from __future__ import annotations

from torch import Tensor

from lowmem.numerics.sinkhorn import Rows
from lowmem.optim.rule import Shape


def is_matrix(shape: Shape) -> bool:
    """Whether a parameter is a matrix, or a batch of them, with more than one row and column."""
    return len(shape) in (2, 3) and min(shape[-2:]) > 1


def matrix_count(shape: Shape) -> int:
    """How many matrices a parameter is."""
    return shape[0] if len(shape) == 3 else 1


def rows_of(grad: Tensor, index: int) -> Rows:
    """The float32 rows of one matrix of a gradient.

    Nothing but `grad.shape` and slices of it are asked for, so the gradient need not exist as one tensor.
    """
    matrix = grad[index] if len(grad.shape) == 3 else grad
    return lambda rows: matrix[rows].float()
