"""The gradient itself, its columns as long as an inner rule makes those of a random projection of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowmem.optim.channel_scaling import lengthening, norms_of, scaled_row_makers
from lowmem.optim.matrices import matrix_count
from lowmem.optim.norm_growth import limited_growth
from lowmem.optim.projected_gradient import projected, sides_of
from lowmem.optim.refresh import Refresh
from lowmem.optim.rule import Context, Direction, OnRows, RowBlocks, Rule, Scope, Shape, Slot, State

NORM = "scaled_norm"


@dataclass(frozen=True, kw_only=True)
class ProjectionScaled(Rule):
    """Scale the gradient by what `inner` does to a random projection of it (APOLLO).

        P <- normal numbers / sqrt(r)             anew when `redraw` is due      (m, r)
        R <- P^T G                                                               (r, n)
        N <- inner(R)                                                            (r, n)
        phi_j <- |N_j| / |R_j|                    scaling "channel"              (n,)
        phi_j <- |N| / |R|                        scaling "tensor"
        S <- G diag(phi), |S| at most growth |S_before|                          (m, n)
        U <- scale S

    P is made of (seed, parameter name, the step at which it was drawn) in every update and never kept.
    G is (m, n) with m <= n; others are transposed on the way in and out. Leading dimensions are a batch of matrices.
    S is made a block of rows at a time, twice: once for its norm and once for the weight.
    State: inner's on (r, n), and |S| of each matrix as a float32 number. It is kept when P changes: second moments
    have the same expectation in any projection, and first ones are forgotten in a few steps.

    Source: Zhu et al., "APOLLO", arXiv:2412.05270.
    """

    scope: ClassVar[Scope] = "matrix"

    inner: Rule
    rank: int
    redraw: Refresh
    scaling: Literal["channel", "tensor"] = "channel"
    scale: float = 1.0
    growth: float | None = 1.01
    columns: int | None = None
    """Of a gradient that is some rows of a taller one, which its own shape does not tell."""

    def slots(self, shape: Shape) -> dict[str, Slot]:
        norm = {} if self.growth is None else {NORM: Slot((matrix_count(shape),), "scalar")}
        return {**self.inner.slots((*shape[:-2], self.rank, self._sides(shape)[1])), **norm}

    def on_rows(self, shape: Shape) -> OnRows | None:
        """Rows of a matrix that is not wide need no more of each other than norms."""
        rows, columns = shape
        if rows < columns:
            return None
        norms = (self.growth is not None) + 2 * (self.scaling == "tensor")
        return OnRows(replace(self, columns=columns), summed=norms)

    def _sides(self, shape: Shape) -> tuple[int, int]:
        """m and n."""
        return sides_of(shape, self.columns)

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        phi, changed = self._factors(grad, state, ctx)
        if self.growth is not None:
            norms = norms_of(scaled_row_makers(grad, phi), grad, ctx.share)
            factors, changed[NORM] = limited_growth(norms, state[NORM], self.growth)
            phi.mul_(factors.view(*grad.shape[:-2], 1))
        S = scaled_row_makers(grad, phi.mul_(self.scale))
        return RowBlocks(lambda index, rows: S[index](rows)), changed

    def _factors(self, grad: Tensor, state: State, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """phi, and inner's new state."""
        R = projected(grad, self._drawn(grad, ctx))
        N, changed = self.inner.update(R, state, ctx)
        assert isinstance(N, Tensor)
        if self.scaling == "channel":
            return lengthening(N, R), changed
        whole = lengthening(N.flatten(-2).unsqueeze(-1), R.flatten(-2).unsqueeze(-1), ctx.share)  # (..., 1)
        return whole.expand(*R.shape[:-2], R.shape[-1]).clone(), changed

    def _drawn(self, grad: Tensor, ctx: Context) -> Tensor:
        """The projection of this step."""
        drawn_at = ctx.at_step(ctx.step - self.redraw.steps_since(ctx) + 1)
        generator = drawn_at.generator(grad.device, "projection")
        shape = (*grad.shape[:-2], self._sides(tuple(grad.shape))[0], self.rank)
        P = torch.randn(shape, device=grad.device, dtype=torch.float32, generator=generator)
        return P.mul_(1 / math.sqrt(self.rank))
