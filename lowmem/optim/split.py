"""Run a rule with state on some columns or rows of the gradient and one without on the rest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowmem.numerics.seeding import seeded_choice
from lowmem.optim.matrices import matrix_count
from lowmem.optim.refresh import Refresh
from lowmem.optim.rule import Context, Direction, OnRows, RowBlocks, Rule, Scope, Shape, Slot, State
from lowmem.optim.rules.stateless import Stateless

CHOSEN = "chosen"


@dataclass(frozen=True, kw_only=True)
class Split(Rule):
    """Gradient splitting along coordinates (FRUGAL, algorithm 1).

        J <- k columns, drawn at random          when `refresh_every` is due; moments and step of `inner` restart
        U[:, J]     <- inner(G[:, J])            inner's state is on (m, k)
        U[:, not J] <- residual(G[:, not J])     no state

    With `along="rows"` the same of rows, state on (k, n). k = round(density n), at least 1. Leading dimensions are a
    batch of matrices, each with columns of its own. `inner` is an element rule.
    J depends on (seed, parameter name, step) alone. It is part of the state, so that no step needs the host.
    Everything is made a block of rows at a time: see RowBlocks.

    Source: Zmushko et al., "FRUGAL", arXiv:2411.07837.
    """

    scope: ClassVar[Scope] = "matrix"
    refreshes_from_gradient: ClassVar[bool] = False

    inner: Rule
    residual: Stateless
    along: Literal["columns", "rows"]
    density: float
    refresh_every: Refresh

    @property
    def takes_rows(self) -> bool:
        return True

    def slots(self, shape: Shape) -> dict[str, Slot]:
        *batch, m, n = shape
        k = chosen_count(self.density, self._side(shape))
        inner = self.inner.slots((*batch, m, k) if self.along == "columns" else (*batch, k, n))
        return {CHOSEN: Slot((*batch, k), "factor"), **inner}

    def on_rows(self, shape: Shape) -> OnRows | None:
        """Rows need nothing of each other where columns are chosen, which every process does alike."""
        if self.along == "rows":
            return None
        return OnRows(self, repeated=chosen_count(self.density, shape[-1]))

    def needs_refresh(self, ctx: Context) -> bool:
        return self.refresh_every.is_due(ctx)

    def begin_refresh_(self, state: State, ctx: Context) -> None:
        if ctx.step > 1:
            for name in state:
                state.zero_(name)

    def refresh(self, grad: Tensor, state: State, ctx: Context) -> dict[str, Tensor]:
        shape = tuple(grad.shape)
        k = chosen_count(self.density, self._side(shape))
        numbers = [
            seeded_choice(k, self._side(shape), ctx.seed, ctx.name, ctx.step, CHOSEN, index)
            for index in range(matrix_count(shape))
        ]
        ctx.remember(CHOSEN, tuple(number for each in numbers for number in each))
        chosen = torch.tensor(numbers, device=grad.device, dtype=torch.float32)
        return {CHOSEN: chosen.view(*shape[:-2], k)}

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        inner_ctx = ctx.at_step(self.refresh_every.steps_since(ctx))
        count = matrix_count(tuple(grad.shape))
        J = state[CHOSEN].long().view(count, -1)  # (matrices, k)

        def columns(index: int, rows: slice) -> Tensor:
            G = _rows_of(grad, index, rows)
            N = self._inner_step(G.index_select(1, J[index]).float(), state, index, rows, inner_ctx)
            return self.residual.of(G).index_copy_(1, J[index], N)

        if self.along == "columns":
            return RowBlocks(columns), {}
        k = J.shape[1]
        numbers = ctx.numbers(CHOSEN, count * k)

        def rows_(index: int, rows: slice) -> Tensor:
            G = _rows_of(grad, index, rows)
            own = numbers[index * k : (index + 1) * k]
            inside = slice(bisect_left(own, rows.start), bisect_left(own, rows.stop))
            if inside.start == inside.stop:
                return self.residual.of(G)
            places = J[index, inside] - rows.start
            N = self._inner_step(G.index_select(0, places).float(), state, index, inside, inner_ctx)
            return self.residual.of(G).index_copy_(0, places, N)

        return RowBlocks(rows_), {}

    def _inner_step(self, grad: Tensor, state: State, index: int, rows: slice, ctx: Context) -> Tensor:
        """inner's direction for some rows of its part of the gradient; its state moves on."""
        part = _RowsOf(state, index, rows)
        direction, changed = self.inner.update(grad, part, ctx)
        for name, value in changed.items():
            state.save_rows_(name, index, rows, value)
        assert isinstance(direction, Tensor)
        return direction

    def _side(self, shape: Shape) -> int:
        return shape[-1] if self.along == "columns" else shape[-2]


class _RowsOf(State):
    """Some rows of inner's state."""

    def __init__(self, state: State, index: int, rows: slice):
        self._state, self._index, self._rows = state, index, rows

    def __getitem__(self, name: str) -> Tensor:
        return self._state.rows(name, self._index, self._rows)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._state if name != CHOSEN)

    def __len__(self) -> int:
        return len(self._state) - 1


def chosen_count(density: float, side: int) -> int:
    """How many of `side` columns or rows have state, where any has."""
    return max(1, round(density * side))


def _rows_of(grad: Tensor, index: int, rows: slice) -> Tensor:
    """Rows of one matrix of a gradient in its own dtype."""
    return grad[index][rows] if len(grad.shape) == 3 else grad[rows]
