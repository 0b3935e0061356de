"""Run a rule with state in a subspace of the gradient and one without on what the subspace leaves out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.low_rank import BASIS, LowRank
from lowmem.optim.projected_gradient import is_right_of, projected
from lowmem.optim.rule import Context, Direction, RowBlocks, State
from lowmem.optim.rules.stateless import Stateless


@dataclass(frozen=True, kw_only=True)
class LowRankSplit(LowRank):
    """Gradient splitting along a subspace (FRUGAL, algorithm 1).

        R, N as in LowRank                                                       (r, n)
        U <- P N + residual(G - P R)              never formed: see RowBlocks    (m, n)

    G - P R is orthogonal to the subspace; a residual that is a sign is not, so it moves inside of it, too. Its size
    is then the same however little the subspace leaves out: of a gradient of rank r or less it is rounding alone.
    State: LowRank's. A block of rows of the direction is made at a time, so no float32 copy of G is.

    Source: Zmushko et al., "FRUGAL", arXiv:2411.07837.
    """

    is_projected: ClassVar[bool] = False

    residual: Stateless

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        if self.residual.form == "none":
            return super().update(grad, state, ctx)
        P = self._vectors(state[BASIS], tuple(grad.shape))
        R = projected(grad, P)
        N, changed = self._inner_step(R, state, ctx)
        if grad.dim() == 2:
            blocks = [self._rows_of(grad, P, R, N)]
        else:
            blocks = [self._rows_of(*each) for each in zip(grad, P, R, N, strict=True)]
        return RowBlocks(lambda index, rows: blocks[index](rows)), changed

    def begin_refresh_(self, state: State, ctx: Context) -> None:
        """Zeros without a tensor of them, of which there would be one for each moment."""
        if self.on_refresh == "reset" and self.refresh_is_due(ctx):
            for name in self._inner_state(state):
                state.zero_(name)

    def _reset(self, state: State) -> dict[str, Tensor]:
        return {}

    def _rows_of(self, G: Tensor, P: Tensor, R: Tensor, N: Tensor) -> Callable[[slice], Tensor]:
        """Who makes rows of the direction for one matrix."""
        is_right = is_right_of(P, tuple(G.shape))

        def rows_of(rows: slice) -> Tensor:
            E = G[rows].to(torch.float32, copy=True)
            if is_right:
                E = self.residual.of_(E.addmm_(R.mT[rows], P.mT, alpha=-1))
                return E.addmm_(N.mT[rows], P.mT)
            E = self.residual.of_(E.addmm_(P[rows], R, alpha=-1))
            return E.addmm_(P[rows], N)

        return rows_of
