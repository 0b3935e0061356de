"""Adafactor's direction: the second moment of a matrix kept as the means of its rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.numerics.row_share import RowShare
from lowmem.numerics.tiles import row_slices
from lowmem.optim.matrices import matrix_count, rows_of
from lowmem.optim.rule import Context, Direction, OnRows, RowBlocks, Rule, Scope, Shape, Slot, State

ROWS, COLUMNS, WHOLE, MOMENT = "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg"


@dataclass(frozen=True, kw_only=True)
class RelativeToSecondMoment(Rule):
    """What the two rules of Adafactor share: how the second moment ages, clipping, the relative step size.

    b <- beta2 (1 - beta2^(t-1)) / (1 - beta2^t)     an exponential mean without its bias, or
    b <- 1 - t^-beta2_power                          where beta2 is None
    """

    scope: ClassVar[Scope] = "matrix"

    beta1: float = 0.0
    beta2: float | None = None
    beta2_power: float = 0.8
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float | None = 1.0
    is_relative: bool = False

    def beta2_at(self, step: int) -> float:
        """How much of the second moment stays at update `step`; nothing at the first."""
        if self.beta2 is None:
            return 1 - step**-self.beta2_power
        return self.beta2 * (1 - self.beta2 ** (step - 1)) / (1 - self.beta2**step)

    def clipping(self, squares: Tensor, numel: int) -> Tensor:
        """1 / max(1, RMS(U) / clip_threshold), from the sum of the squares of U."""
        assert self.clip_threshold is not None
        return (squares / numel).sqrt_().div_(self.clip_threshold).clamp_min_(1.0).reciprocal_()

    def step_size(self, ctx: Context) -> Tensor | None:
        """max(eps2, RMS(W)), or None where the learning rate is absolute."""
        return ctx.weight_rms().clamp_min(self.eps[1]) if self.is_relative else None


@dataclass(frozen=True, kw_only=True)
class Factored(RelativeToSecondMoment):
    """Adafactor for matrices (m, n) and batches of them.

        R <- b R + (1 - b) mean_j (G_ij^2 + eps1)              exp_avg_sq_row    (m,)
        C <- b C + (1 - b) mean_i (G_ij^2 + eps1)              exp_avg_sq_col    (n,)
        U <- G / sqrt(R C^T / mean(R))                         never held: see RowBlocks
        U <- U / max(1, RMS(U) / clip_threshold)
        M <- beta1 M + (1 - beta1) U                           exp_avg, with beta1 only
        U <- max(eps2, RMS(W)) U                               if relative

    The gradient is gone through some rows at a time: once for R and C, once for RMS(U), once to write the weight.
    State: m + n values in float32, with beta1 one tensor of the parameter's shape besides.
    """

    @property
    def takes_rows(self) -> bool:
        return True

    def slots(self, shape: Shape) -> dict[str, Slot]:
        factors = {
            ROWS: Slot(shape[:-1], "factor"),
            COLUMNS: Slot((*shape[:-2], shape[-1]), "factor"),
        }
        return {**factors, MOMENT: Slot(shape)} if self.beta1 else factors

    def on_rows(self, shape: Shape) -> OnRows:
        """Rows need the means of columns, that of R, and RMS(U) and RMS(W) where these are asked for."""
        numbers = 1 + (self.clip_threshold is not None) + self.is_relative
        return OnRows(self, summed=shape[-1] + numbers, repeated=shape[-1])

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        shape = tuple(grad.shape)
        count = matrix_count(shape)
        R, C = state[ROWS], state[COLUMNS]
        share, rows_of_all = ctx.share, ctx.share.of_all(shape[-2])
        self._age_(grad, R.view(count, -1), C.view(count, -1), self.beta2_at(ctx.step), share)
        mean = share.sum_(R.sum(-1, keepdim=True)).div_(rows_of_all)
        r = (R / mean).rsqrt_().view(count, -1, 1)
        c = C.rsqrt().view(count, -1)
        if self.clip_threshold is not None:
            squares = torch.zeros((), device=grad.device, dtype=torch.float32)
            for index in range(count):
                for rows in row_slices(shape[-2:]):
                    squares += torch.linalg.vector_norm(_scaled(grad, index, rows, r, c)).square_()
            numel = grad.numel() // shape[-2] * rows_of_all
            r.mul_(self.clipping(share.sum_(squares), numel))
        alpha = self.step_size(ctx)
        return RowBlocks(self._blocks(grad, state, r, c, alpha)), {ROWS: R, COLUMNS: C}

    def _age_(self, grad: Tensor, R: Tensor, C: Tensor, b: float, share: RowShare) -> None:
        """Bring the means of rows and columns up to date."""
        m, n = grad.shape[-2:]
        for index in range(len(R)):
            sums = torch.zeros(n, device=grad.device, dtype=torch.float32)
            for rows in row_slices((m, n)):
                squares = rows_of(grad, index)(rows).square()
                R[index, rows].lerp_(squares.mean(1).add_(self.eps[0]), 1 - b)
                sums.add_(squares.sum(0))
                del squares
            C[index].lerp_(share.sum_(sums).div_(share.of_all(m)).add_(self.eps[0]), 1 - b)

    def _blocks(
        self, grad: Tensor, state: State, r: Tensor, c: Tensor, alpha: Tensor | None
    ) -> Callable[[int, slice], Tensor]:
        if self.beta1:
            for index in range(matrix_count(tuple(grad.shape))):
                for rows in row_slices(grad.shape[-2:]):
                    U = _scaled(grad, index, rows, r, c)
                    M = state.rows(MOMENT, index, rows).lerp_(U, 1 - self.beta1)
                    state.save_rows_(MOMENT, index, rows, M)
                    del U, M
            if alpha is None:
                return lambda index, rows: state.rows(MOMENT, index, rows)
            return lambda index, rows: state.rows(MOMENT, index, rows) * alpha
        if alpha is not None:
            r.mul_(alpha)
        return lambda index, rows: _scaled(grad, index, rows, r, c)


def _scaled(grad: Tensor, index: int, rows: slice, r: Tensor, c: Tensor) -> Tensor:
    return (rows_of(grad, index)(rows) * r[index, rows]).mul_(c[index])


@dataclass(frozen=True, kw_only=True)
class Unfactored(RelativeToSecondMoment):
    """Adafactor for norms and biases, whose second moment is kept whole.

    V <- b V + (1 - b) (g^2 + eps1)                        exp_avg_sq, float32
    U <- g / sqrt(V), then as for matrices
    """

    def slots(self, shape: Shape) -> dict[str, Slot]:
        whole = {WHOLE: Slot(shape, "factor")}
        return {**whole, MOMENT: Slot(shape)} if self.beta1 else whole

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        g, V = grad.float(), state[WHOLE]
        V.lerp_(g.square().add_(self.eps[0]), 1 - self.beta2_at(ctx.step))
        changed = {WHOLE: V}
        U = V.rsqrt().mul_(g)
        if self.clip_threshold is not None:
            U.mul_(self.clipping(torch.linalg.vector_norm(U).square_(), g.numel()))
        if self.beta1:
            U = changed[MOMENT] = state[MOMENT].lerp_(U, 1 - self.beta1)
        alpha = self.step_size(ctx)
        return (U if alpha is None else U * alpha), changed
