"""Work on large tensors a few megabytes at a time.

A bfloat16 matrix of 4096 x 11008 is 86 MiB and its float32 copy 172 MiB. The functions here convert
a slice, use it, and drop it, so the temporary memory of a step does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

TILE_NUMEL = 1 << 21
"""Elements in one slice: 8 MiB as float32."""

CODED_NUMEL = 1 << 19
"""Elements that are turned into codes of few bits at one time, which needs several times their memory."""

SLICES_START_AT = 256
"""Slices of a weight's state start at multiples of this, so that blocks of low-bit state are never cut in two."""


def flat_slices(numel: int) -> Iterator[slice]:
    """Cut `numel` elements into slices of at most `TILE_NUMEL`."""
    for start in range(0, numel, TILE_NUMEL):
        yield slice(start, min(start + TILE_NUMEL, numel))


def row_slices(shape: torch.Size | tuple[int, ...], *, multiple_of: int = 1) -> Iterator[slice]:
    """Cut the rows of a (rows, columns) matrix so that a slice holds about `TILE_NUMEL` elements.

    Each slice but the last holds a multiple of `multiple_of` elements.
    """
    rows, columns = shape
    unit = multiple_of // math.gcd(multiple_of, columns)
    step = max(unit, TILE_NUMEL // max(1, columns) // unit * unit)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def state_row_slices(shape: torch.Size | tuple[int, ...]) -> Iterator[slice]:
    """Those of a matrix that has state of its own shape."""
    return row_slices(shape, multiple_of=SLICES_START_AT)


def matmul_fp32(
    G: Tensor,  # (m, n)  any float dtype
    X: Tensor,  # (n, k)  float32
) -> Tensor:  # (m, k)  float32
    """G X with float32 products and sums, converting G slice by slice."""
    if G.dtype == torch.float32:
        return G @ X
    out = torch.empty(G.shape[0], X.shape[1], device=G.device, dtype=torch.float32)
    for rows in row_slices(G.shape):
        torch.mm(G[rows].float(), X, out=out[rows])
    return out


def matmul_transposed_fp32(
    G: Tensor,  # (m, n)  any float dtype
    Y: Tensor,  # (m, k)  float32
) -> Tensor:  # (k, n)  float32
    """Y^T G with float32 products and sums, converting G slice by slice."""
    Y_t = Y.mT.contiguous()  # the tall factor is small, and BLAS is a tenth faster on it than on its view
    if G.dtype == torch.float32:
        return Y_t @ G
    out = torch.zeros(Y.shape[1], G.shape[1], device=G.device, dtype=torch.float32)
    for rows in row_slices(G.shape):
        out.addmm_(Y_t[:, rows], G[rows].float())
    return out


def sum_and_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the entries of `x` and of their squares, as float64 scalars on its device.

    Of something else than a tensor, such as a gradient by rows, only `x.shape` and `x[rows]` are asked for.
    """
    total = torch.zeros((), device=x.device, dtype=torch.float64)
    squares = torch.zeros((), device=x.device, dtype=torch.float64)
    for part in _pieces(x):
        piece = part.double() if part.dtype == torch.float64 else part.float()
        total += piece.sum(dtype=torch.float64)
        squares += piece.double().square().sum() if piece.numel() < 4096 else _squares(piece)
    return total, squares


def _pieces(x: Tensor) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        flat = x.reshape(-1)
        yield from (flat[part] for part in flat_slices(flat.numel()))
    else:
        yield from (x[rows].reshape(-1) for rows in row_slices(x.shape))


def _squares(piece: Tensor) -> Tensor:
    """Sum of squares of a slice; scaled by its largest entry so that float32 neither over- nor underflows."""
    largest = torch.linalg.vector_norm(piece, ord=float("inf"))
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return torch.linalg.vector_norm(piece / scale).double().square() * scale.double().square()


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x| as a scalar tensor, without a copy of `x`. NaN where x holds a NaN."""
    low, high = torch.aminmax(x)
    return torch.maximum(low.abs(), high.abs())


def matching_parts(param: Tensor, grad: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Flat slices of a parameter and its gradient; the whole tensor where its memory has gaps."""
    if not (param.is_contiguous() and grad.is_contiguous()):
        yield slice(None), param, grad
        return
    flat_param, flat_grad = param.view(-1), grad.view(-1)
    for part in flat_slices(param.numel()):
        yield part, flat_param[part], flat_grad[part]
