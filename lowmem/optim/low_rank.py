"""Run any rule on a low-rank projection of the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowmem.numerics.tiles import largest_magnitude, sum_and_squares
from lowmem.optim.projected_gradient import is_right_of, projected, sides_of, wide
from lowmem.optim.projections.projection import Projection
from lowmem.optim.refresh import Refresh
from lowmem.optim.rule import Context, Direction, Factors, OnRows, Rule, Scope, Shape, Slot, State

BASIS = "basis"


@dataclass(frozen=True, kw_only=True)
class LowRank(Rule):
    """Run `inner` in a rank-r subspace of the gradient (GaLore, algorithm 2).

        P <- leading left singular vectors of G      when `refresh` is due       (m, r)
        R <- P^T G                                                               (r, n)
        N <- inner(R)                                                            (r, n)
        U <- scale P N                               never formed: see Factors   (m, n)

    G is (m, n) with m <= n. A gradient with at least as many rows as columns is transposed on the way
    in and out, so a square matrix is projected on its right side, as the authors' code does.
    Leading dimensions are a batch of matrices, each with its own basis.
    State: P is m*r values and inner's slots are on (r, n), against 2*m*n for Adam.

    At a refresh the moments live in coordinates that change. `on_refresh`:
      keep    leave them (the authors' code)
      reset   zero them and restart inner's step count
      rotate  express them in the new basis through C = P_new^T P_old
    A gradient that is zero or not finite, or whose decomposition does not converge, cannot give a basis:
    the old one stays, and where there is none yet the next step tries again.

    Source: Zhao et al., "GaLore", arXiv:2403.03507.
    """

    scope: ClassVar[Scope] = "matrix"
    is_projected: ClassVar[bool] = True

    inner: Rule
    projection: Projection
    rank: int
    refresh_every: Refresh
    scale: float = 1.0
    on_refresh: Literal["keep", "reset", "rotate"] = "keep"
    columns: int | None = None
    """Of a gradient that is some rows of a taller one, which its own shape does not tell."""

    def slots(self, shape: Shape) -> dict[str, Slot]:
        batch, (m, n) = shape[:-2], self._sides(shape)
        return {
            BASIS: self.projection.slot(tuple(batch), m, self.rank),
            **self.inner.slots((*batch, self.rank, n)),
            **self.refresh_every.slots(),
        }

    def on_rows(self, shape: Shape) -> OnRows | None:
        """Rows of a matrix that is not wide need the basis and nothing else of each other."""
        rows, columns = shape
        if rows < columns or not self.projection.may_be_repeated:
            return None
        basis = self.projection.slot((), columns, self.rank)
        rule = replace(self, columns=columns)
        return OnRows(rule, repeated=math.prod(basis.shape), whole_every=self.refresh_every.shortest_gap)

    def _sides(self, shape: Shape) -> tuple[int, int]:
        """(m, n): the length of a basis vector, and the other side."""
        return sides_of(shape, self.columns)

    def recall(self, state: State, ctx: Context) -> None:
        if self.projection.always_fits or ctx.ask(state[BASIS].any(), assume=True):
            ctx.remember(BASIS)

    def needs_refresh(self, ctx: Context) -> bool:
        return self.refresh_is_due(ctx) or not ctx.knows(BASIS)

    def refresh_is_due(self, ctx: Context) -> bool:
        return self.refresh_every.is_due(ctx)

    def refresh(self, grad: Tensor, state: State, ctx: Context) -> dict[str, Tensor]:
        old = state[BASIS]
        has_basis = ctx.step > 1 and ctx.knows(BASIS)
        is_due = self.refresh_is_due(ctx)
        if has_basis and not is_due:
            return {}
        changed = self._reset(state) if is_due and self.on_refresh == "reset" else {}
        if not (self.projection.always_fits or _is_usable(grad, ctx)):
            return changed
        try:
            new = self._fit(wide(grad), old if has_basis else None, ctx)
        except torch.linalg.LinAlgError as error:
            ctx.failed(str(error))
            return changed
        ctx.remember(BASIS)
        if not has_basis:
            return {BASIS: new, **changed}
        if self.on_refresh == "rotate":
            changed = self._rotated(state, old, new, tuple(grad.shape), ctx.at_step(ctx.step - 1))
        P_old, P = (partial(self._vectors, each, tuple(grad.shape)) for each in (old, new))
        changed |= self.refresh_every.adapt(lambda: self._similarity(grad, P_old(), P()), state, ctx)
        return {BASIS: new, **changed}

    def _rotated(
        self, state: State, old: Tensor, new: Tensor, shape: Shape, ctx: Context
    ) -> dict[str, Tensor]:
        """inner's state in the new basis."""
        inner = self._inner_state(state)
        numbers = self.projection.old_numbers(old, new)
        if numbers is None:
            P_old, P = (self._vectors(each, shape) for each in (old, new))
            return self.inner.change_basis(inner, P.mT @ P_old, ctx)
        # Where C is a selection of unit vectors, C m is a selection of rows of m, and LDAdam's v is one of v.
        return {name: _moved_rows(inner[name], numbers) for name in inner}

    def _vectors(self, kept: Tensor, shape: Shape) -> Tensor:  # (..., m, r)
        return self.projection.vectors(kept, self._sides(shape)[0])

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        P = self._vectors(state[BASIS], tuple(grad.shape))  # once, as it may mean decoding or making it
        return self._direction(projected(grad, P), tuple(grad.shape), P, state, ctx)

    def project(self, grad: Tensor, state: State) -> Tensor:  # (..., r, n)
        return projected(grad, self._vectors(state[BASIS], tuple(grad.shape)))

    def projected_numel(self, shape: Shape) -> int:
        return math.prod(shape[:-2]) * self.rank * self._sides(shape)[1]

    def update_projected(
        self, projected: Tensor, shape: Shape, state: State, ctx: Context
    ) -> tuple[Direction, dict[str, Tensor]]:
        return self._direction(projected, shape, self._vectors(state[BASIS], shape), state, ctx)

    def _direction(
        self, R: Tensor, shape: Shape, P: Tensor, state: State, ctx: Context
    ) -> tuple[Direction, dict[str, Tensor]]:
        N, inner_state = self._inner_step(R, state, ctx)
        left, right = (N.mT, P.mT) if is_right_of(P, shape) else (P, N)
        return Factors(left, right, self.scale), inner_state

    def _inner_step(self, R: Tensor, state: State, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """inner's direction in the subspace, and its new state."""
        N, inner_state = self.inner.update(R, self._inner_state(state), self._inner_context(ctx))
        assert isinstance(N, Tensor)
        return N, inner_state

    def _fit(self, G: Tensor, start: Tensor | None, ctx: Context) -> Tensor:
        generator = ctx.generator(G.device, "basis")
        if G.dim() == 2:
            return self.projection.fit(G, self.rank, start=start, generator=generator)
        starts = [None] * len(G) if start is None else list(start)
        fits = [self._fit_one(G_e, P_e, generator) for G_e, P_e in zip(G, starts, strict=True)]
        return torch.stack(fits)

    def _fit_one(self, G: Tensor, start: Tensor | None, generator: torch.Generator) -> Tensor:
        """One matrix of a batch; an expert that saw no token has a zero gradient and takes unit vectors."""
        if self.projection.always_fits:
            return self.projection.fit(G, self.rank, start=start, generator=generator)
        safe = torch.where(largest_magnitude(G) > 0, G, torch.eye(*G.shape, device=G.device, dtype=G.dtype))
        return self.projection.fit(safe, self.rank, start=start, generator=generator)

    def _similarity(self, grad: Tensor, P_old: Tensor, P: Tensor) -> Tensor:
        """How much of P's advantage over a random subspace P_old has on this gradient, from 0 to 1.

            (|P_old^T G|^2 - c |G|^2) / (|P^T G|^2 - c |G|^2)        c = r / m, what a random one holds

        It asks for what the bases do and not for their angles: a warm start copies old directions of little
        energy into the new basis, which would look alike, and signs and order of the vectors do not matter.
        """
        total = sum_and_squares(grad)[1]
        at_random = total * (self.rank / min(grad.shape[-2:]))
        old, new = (sum_and_squares(projected(grad, basis))[1] - at_random for basis in (P_old, P))
        # A gradient without preferred directions is served by any basis.
        return torch.where(new > 1e-3 * total, old / new, torch.ones_like(new)).clamp(0, 1).float()

    def _inner_context(self, ctx: Context) -> Context:
        return ctx.at_step(self.refresh_every.steps_since(ctx)) if self.on_refresh == "reset" else ctx

    def _inner_state(self, state: State) -> State:
        return _Without(state, self._not_inner())

    def _not_inner(self) -> set[str]:
        """The slots that are not inner's."""
        return {BASIS, *self.refresh_every.slots()}

    def _reset(self, state: State) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in self._inner_state(state).items()}


class _Without(State):
    """A state without some of its slots, still loaded only when asked for."""

    def __init__(self, state: State, hidden: set[str]):
        self._state, self._hidden = state, hidden

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    def __iter__(self):
        return (name for name in self._state if name not in self._hidden)

    def __len__(self) -> int:
        return len(self._state) - len(self._hidden)


def _is_usable(grad: Tensor, ctx: Context) -> bool:
    """Whether a basis can be fitted to it."""
    largest = largest_magnitude(grad)
    return ctx.ask(torch.isfinite(largest) & (largest > 0), assume=True)


def _moved_rows(
    x: Tensor,  # (..., r, n)
    numbers: Tensor,  # (..., r)  of the row that each is to be, -1 for zeros
) -> Tensor:
    if x.dim() > 2:
        return torch.stack([_moved_rows(*each) for each in zip(x, numbers, strict=True)])
    return x.index_select(0, numbers.clamp_min(0)).mul_((numbers >= 0).unsqueeze(1))
