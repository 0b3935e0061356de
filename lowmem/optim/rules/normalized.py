"""The gradient with its rows, or its rows and columns, brought to one size: no state, no second moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lowmem.numerics.row_share import RowShare
from lowmem.numerics.sinkhorn import Rows, sinkhorn_scalings, unit_columns, unit_rows
from lowmem.numerics.tiles import row_slices
from lowmem.optim.matrices import matrix_count, rows_of
from lowmem.optim.rule import Context, Direction, OnRows, RowBlocks, Rule, Scope, Shape, Slot, State

BUFFER = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class NormalizedGradient(Rule):
    """Every row and column of the direction has root mean square `scale`, whatever the size of the gradient.

        M <- momentum M + (1 - momentum) G       or G without momentum            (m, n)
        X <- rows of M to root mean square 1, then columns, `iterations` times    "sinkhorn"
        X <- rows of M to root mean square 1                                      "row"
        X <- columns of M to root mean square 1                                   "column"
        U <- scale X

    A row is what one output of a linear layer does with its inputs. Leading dimensions are a batch of matrices,
    each on its own. Rows and columns of zeros stay zero. X is never held: see `sinkhorn_scalings` and `RowBlocks`.
    State: none, or M, one tensor of the parameter's shape.
    """

    scope: ClassVar[Scope] = "matrix"

    normalize: Literal["sinkhorn", "row", "column"] = "sinkhorn"
    iterations: int = 5
    scale: float = 1.0
    momentum: float = 0.0

    @property
    def takes_rows(self) -> bool:
        return True

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {BUFFER: Slot(shape)} if self.momentum else {}

    def on_rows(self, shape: Shape) -> OnRows:
        """Sums of columns are all that rows need of each other."""
        sums = {"row": 0, "column": 2, "sinkhorn": self.iterations}
        return OnRows(self, summed=sums[self.normalize] * shape[-1])

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        shape = tuple(grad.shape)
        blocks = [
            self._normalized(self._rows(grad, state, index), shape, grad, ctx.share)
            for index in range(matrix_count(shape))
        ]
        return RowBlocks(lambda index, rows: blocks[index](rows)), {}

    def _rows(self, grad: Tensor, state: State, index: int) -> Rows:
        """Those of G, or of M once it took G in."""
        G = rows_of(grad, index)
        if not self.momentum:
            return G
        for rows in row_slices(grad.shape[-2:]):
            M = state.rows(BUFFER, index, rows).lerp_(G(rows), 1 - self.momentum)
            state.save_rows_(BUFFER, index, rows, M)
            del M
        return lambda rows: state.rows(BUFFER, index, rows)

    def _normalized(self, M: Rows, shape: Shape, grad: Tensor, share: RowShare) -> Callable[[slice], Tensor]:
        if self.normalize == "row":
            return lambda rows: unit_rows(M(rows)).mul_(self.scale)
        matrix = (shape[-2], shape[-1])
        if self.normalize == "column":
            X = unit_columns(M, matrix, grad.device, share)
            return lambda rows: X(rows).mul_(self.scale)
        scalings = sinkhorn_scalings(M, matrix, iterations=self.iterations, device=grad.device, share=share)
        scalings.rows.mul_(self.scale)
        return lambda rows: scalings.apply(M(rows), rows)
