"""SGD-SaI's direction: momentum, scaled once and for all by the gradient's signal-to-noise ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.numerics.tiles import sum_and_squares
from lowmem.optim.rule import Context, Direction, Rule, Shape, Slot, State
from lowmem.optim.rules.momentum import BUFFER, add_to_momentum_

LOWEST, HIGHEST = 0.5, 4.0
"""Bounds of g-SNR in units of sqrt(numel): outside them the ratio is an accident of few or equal entries."""


@dataclass(frozen=True, kw_only=True)
class SnrScaledMomentum(Rule):
    """Momentum times a per-tensor constant, the g-SNR of the first usable gradient.

        s <- ||g||_2 / std(g)                        once: the first finite, non-zero gradient
        m <- g                                       first step, where it `starts_whole`
        m <- momentum m + (1 - momentum) g           later
        U <- (s / normalizer) m

    State: one tensor of the parameter's shape (none when momentum is 0) and one number.
    """

    refreshes_from_gradient: ClassVar[bool] = False
    sums_in_refresh: ClassVar[int] = 2

    momentum: float = 0.9
    normalizer: float = 1.0
    starts_whole: bool = True

    def slots(self, shape: Shape) -> dict[str, Slot]:
        ratio = {"gsnr": Slot((), "scalar")}
        return {BUFFER: Slot(shape), **ratio} if self.momentum else ratio

    def needs_refresh(self, ctx: Context) -> bool:
        return not ctx.knows("gsnr")

    @property
    def takes_rows(self) -> bool:
        return True

    def refresh(self, grad: Tensor, state: State, ctx: Context) -> dict[str, Tensor]:
        total, squares = ctx.share.sum_(torch.stack(sum_and_squares(grad)))
        if self._has_ratio(state, ctx):
            return {}
        if not ctx.ask(torch.isfinite(squares) & (squares > 0), assume=True):
            return {}
        ctx.remember("gsnr")
        return {"gsnr": signal_to_noise(total, squares, ctx.share.of_all(grad.numel()))}

    def update(self, grad: Tensor, state: State, ctx: Context) -> tuple[Direction, dict[str, Tensor]]:
        if not self.momentum:
            return self.direction_of(grad, state), {}
        changed = self.accumulate(grad, state, ctx, is_first=True)
        return self.direction_of(changed[BUFFER], state), changed

    @property
    def accumulates_in(self) -> str | None:
        return BUFFER if self.momentum else None

    def may_accumulate(self, state: Mapping[str, Tensor], ctx: Context) -> bool:
        """The ratio is that of a whole step's gradient, so the steps up to the first usable one need that."""
        return self._has_ratio(state, ctx)

    def accumulate(self, grad: Tensor, state: State, ctx: Context, *, is_first: bool) -> dict[str, Tensor]:
        m = add_to_momentum_(
            state[BUFFER],
            grad,
            step=ctx.step,
            is_first=is_first,
            momentum=self.momentum,
            dampening=self.momentum,
            starts_whole=self.starts_whole,
        )
        return {BUFFER: m}

    def direction_of(self, accumulated: Tensor, state: State) -> Direction:
        return accumulated * (state["gsnr"] / self.normalizer)

    def _has_ratio(self, state: Mapping[str, Tensor], ctx: Context) -> bool:
        if ctx.knows("gsnr"):
            return True
        if ctx.step == 1 or not ctx.ask(state["gsnr"] > 0, assume=True):
            return False
        ctx.remember("gsnr")
        return True


def signal_to_noise(total: Tensor, squares: Tensor, numel: int) -> Tensor:
    """||g|| / std(g) from the sum of the entries and of their squares (std unbiased, as torch's).

    For a gradient with mean near zero this is sqrt(numel) whatever the gradient. One entry, or equal
    entries, have no spread: there sqrt(numel) is taken, and everywhere the ratio stays within
    [0.5, 4] sqrt(numel). From two sums, so that shards can add theirs.
    """
    usual = math.sqrt(numel)
    if numel == 1:
        return torch.ones_like(total).float()
    variance = (squares - total.square() / numel) / (numel - 1)
    has_spread = variance > 1e-12 * squares / numel
    ratio = squares.sqrt() / torch.where(has_spread, variance, torch.ones_like(variance)).sqrt()
    ratio = torch.where(has_spread, ratio, torch.full_like(ratio, usual))
    return ratio.clamp(LOWEST * usual, HIGHEST * usual).float()
