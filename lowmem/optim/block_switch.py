"""Blocks take turns: some have state for a while, the others none."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from lowmem.numerics.seeding import seeded_choice
from lowmem.optim.rule import Rule, Turn

Order = Literal["random", "ascending", "descending", "mirror"]


@dataclass(frozen=True, kw_only=True)
class BlockSwitch(Rule):
    """Gradient splitting by whole tensors (FRUGAL's blockwise mode).

        k = round(density n) of n blocks, at least 1, take `inner`, the others `residual`, until others have their turn

    `random` draws k of n for each turn, by (seed, turn). `ascending` goes through the blocks k by k and begins again,
    `descending` from the last to the first, `mirror` up and down again.
    State: that of `inner` for the blocks whose turn it is, made anew in each turn.

    Source: Zmushko et al., "FRUGAL", arXiv:2411.07837.
    """

    inner: Rule
    residual: Rule
    density: float
    order: Order

    def in_turn(self, turn: Turn) -> Rule:
        k = active_count(self.density, turn.blocks)
        active = active_in_turn(turn.number, turn.blocks, k, self.order, turn.seed)
        return self.inner if turn.block in active else self.residual


def active_count(density: float, blocks: int) -> int:
    """How many of `blocks` have state at the same time, where any has."""
    return max(1, round(density * blocks))


@functools.lru_cache(maxsize=64)
def active_in_turn(turn: int, blocks: int, k: int, order: Order, seed: int) -> frozenset[int]:
    """Which blocks have state in turn 0, 1, ...: k of them, or fewer at the end of a `mirror`'s way."""
    if order == "random":
        return frozenset(seeded_choice(k, blocks, seed, "turn", turn))
    if order == "mirror":
        windows = -(-blocks // k)
        period = max(1, 2 * (windows - 1))
        first = min(turn % period, -turn % period) * k
        return frozenset(range(first, min(first + k, blocks)))
    window = {(turn * k + i) % blocks for i in range(k)}
    return frozenset(window if order == "ascending" else {blocks - 1 - i for i in window})
