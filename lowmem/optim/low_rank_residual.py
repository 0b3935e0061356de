"""Run any rule on a low-rank projection of the gradient, and scale what the projection leaves out alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowmem.optim.channel_scaling import lengthening, norms_of, scaled_row_makers
from lowmem.optim.low_rank import BASIS, LowRank
from lowmem.optim.matrices import matrix_count
from lowmem.optim.norm_growth import limited_growth
from lowmem.optim.projected_gradient import projected
from lowmem.optim.rule import Context, Direction, OnRows, RowBlocks, Shape, Slot, State

NORM = "residual_norm"


@dataclass(frozen=True, kw_only=True)
class LowRankWithResidual(LowRank):
    """`LowRank`, and beside it the rest of the gradient with the inner rule's scaling (Fira).

        R, N       as in LowRank                                                 (r, n)
        phi_j <- |N_j| / |R_j|                    columns; 0 where R_j is        (n,)
        S <- (G - share P R) diag(phi)            never formed: see RowBlocks    (m, n)
        S <- S min(1, growth |S_before| / |S|)    |S_before| of the step before
        U <- scale P N + S                                                       (m, n)

    `share` is 1, which makes S orthogonal to the subspace. `growth` None leaves S as long as it is.
    S is made a block of rows at a time, twice: once for its norm and once for the weight. The norm is measured and
    not derived from |G|^2 - |R|^2, which would cancel where a basis holds nearly all of a gradient.
    State: LowRank's, and |S| of each matrix as a float32 number.

    Source: Chen et al., "Fira", arXiv:2410.01623.
    """

    is_projected: ClassVar[bool] = False

    share: float = 1.0
    growth: float | None = 1.01

    def slots(self, shape: Shape) -> dict[str, Slot]:
        norm = {} if self.growth is None else {NORM: Slot((matrix_count(shape),), "scalar")}
        return {**super().slots(shape), **norm}

    def on_rows(self, shape: Shape) -> OnRows | None:
        found = super().on_rows(shape)
        return found and found._replace(summed=int(self.growth is not None))

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        P = self._vectors(state[BASIS], tuple(grad.shape))
        R = projected(grad, P)
        N, changed = self._inner_step(R, state, ctx)
        phi = lengthening(N, R)
        taken = R.mul_(phi.unsqueeze(-2)).mul_(-self.share)  # -share R diag(phi), in R's memory
        if self.growth is not None:
            S = scaled_row_makers(grad, phi, (P, taken))
            factors, norms = limited_growth(norms_of(S, grad, ctx.share), state[NORM], self.growth)
            factors = factors.view(*grad.shape[:-2], 1)
            phi, taken = phi.mul_(factors), taken.mul_(factors.unsqueeze(-1))
            changed = {**changed, NORM: norms}
        U = scaled_row_makers(grad, phi, (P, taken.add_(N, alpha=self.scale)))
        return RowBlocks(lambda index, rows: U[index](rows)), changed

    def _not_inner(self) -> set[str]:
        return {*super()._not_inner(), NORM}
