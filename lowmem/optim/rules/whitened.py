"""The gradient, or its running mean, with singular values of one size (SWAN, Muon)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.numerics.exact_products import exact_products
from lowmem.numerics.gram import gram_of, rows_of_product, slab_height, squares_of_product
from lowmem.numerics.sinkhorn import Rows
from lowmem.numerics.standard_rows import rows_over_largest, standard_rows
from lowmem.numerics.tiles import row_slices
from lowmem.numerics.whitening import Method, inverse_root_
from lowmem.optim.matrices import matrix_count, rows_of
from lowmem.optim.rule import Context, Direction, RowBlocks, Rule, Scope, Shape, Slot, State

BUFFER = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class WhitenedGradient(Rule):
    """Rows on one scale, then singular values on one scale; the size of the gradient does not matter.

        B <- momentum B + (1 - momentum) G           or G without momentum            (m, n)
        M <- (1 - momentum) G + momentum B           with Nesterov's form, else B
        X <- rows of M with mean 0 and variance 1    with `standardize`, else M
        U <- (X X^T)^(-1/2) X                        X (X^T X)^(-1/2) where m > n
        U <- scale sqrt(m n) U / |U|                 with `rescale`, else scale U

    Leading dimensions are a batch of matrices, each on its own and one at a time.
    State: none, or B, one tensor of the parameter's shape.
    Held while a matrix is updated: three float32 matrices of its smaller side squared and one more with `rescale`,
    never a float32 copy of it.
    """

    scope: ClassVar[Scope] = "matrix"

    whitening: Method = "quintic"
    iterations: int | None = None
    standardize: bool = False
    rescale: bool = False
    scale: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {BUFFER: Slot(shape)} if self.momentum else {}

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        shape = (grad.shape[-2], grad.shape[-1])
        matrices = [self._rows(grad, state, index) for index in range(matrix_count(tuple(grad.shape)))]
        return RowBlocks(_OneAtATime(self, matrices, shape, grad.device)), {}

    def _rows(self, grad: Tensor, state: State, index: int) -> Rows:
        """Those of M, once B took G in."""
        G = rows_of(grad, index)
        if not self.momentum:
            return G
        for rows in row_slices(grad.shape[-2:]):
            B = state.rows(BUFFER, index, rows).lerp_(G(rows), 1 - self.momentum)
            state.save_rows_(BUFFER, index, rows, B)
            del B
        if not self.nesterov:
            return lambda rows: state.rows(BUFFER, index, rows)
        return lambda rows: torch.lerp(G(rows), state.rows(BUFFER, index, rows), self.momentum)

    def whiten(self, M: Rows, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Rows]:
        """Z (k, k) of the smaller side and the rows of X, so that the direction is Z X, or X Z^T where m > n."""
        X = (standard_rows if self.standardize else rows_over_largest)(M, shape, device)
        dtype = torch.float64 if self.whitening == "eigh" else torch.float32
        with exact_products():
            A = gram_of(X, shape, device, dtype)
            Z = inverse_root_(A.clone() if self.rescale else A, self.whitening, self.iterations)
            if self.rescale:
                size = squares_of_product(Z, A).sqrt_()
                Z.div_(torch.where(size > 0, size, torch.ones_like(size))).mul_(math.sqrt(math.prod(shape)))
        return Z.mul_(self.scale).float(), X


class _OneAtATime:
    """The rows of the directions of a batch of matrices, asked for in order: one Z and one slab of rows exist."""

    def __init__(
        self, rule: WhitenedGradient, matrices: list[Rows], shape: tuple[int, int], device: torch.device
    ):
        self._rule, self._matrices, self._shape, self._device = rule, matrices, shape, device
        self._index = -1
        self._whitened: tuple[Tensor, Rows] | None = None
        self._slab, self._rows = slice(0, 0), torch.empty(0)

    def __call__(self, index: int, rows: slice) -> Tensor:
        if index != self._index:
            self._whitened, self._slab, self._rows = None, slice(0, 0), torch.empty(0)
            self._whitened = self._rule.whiten(self._matrices[index], self._shape, self._device)
            self._index = index
        if rows.start < self._slab.start or rows.stop > self._slab.stop:
            assert self._whitened is not None
            Z, X = self._whitened
            self._rows = torch.empty(0)
            highest = max(rows.stop, rows.start + slab_height(self._shape))
            self._slab = slice(rows.start, min(highest, self._shape[0]))
            self._rows = rows_of_product(Z, X, self._shape, self._slab)
        return self._rows[rows.start - self._slab.start : rows.stop - self._slab.start]
