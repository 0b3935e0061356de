"""Blocks take turns: some have state for a while, the others none."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from lowmem.numerics.seeding import seeded_choice, seeded_permutation
from lowmem.optim.rule import Rule, Turn

Order = Literal["random", "shuffled", "ascending", "descending", "mirror"]


@dataclass(frozen=True, kw_only=True)
class BlockSwitch(Rule):
    """Blocks that have state and blocks that have none (FRUGAL's blockwise mode, BAdam).

        k of n blocks take `inner`, the others `residual`, until others have their turn
        k = `count`, or round(`density` n), at least 1 and at most n

    `random` draws k of n for each turn, by (seed, turn). `shuffled` goes through all blocks k by k, each time in an
    order drawn by (seed, how often that was done). `ascending` goes through them k by k and begins again,
    `descending` from the last to the first, `mirror` up and down again.
    State: that of `inner` for the blocks whose turn it is, made anew in each turn.

    Source: Zmushko et al., "FRUGAL", arXiv:2411.07837; Luo, Yu and Li, "BAdam", arXiv:2404.02827.
    """

    inner: Rule
    residual: Rule
    order: Order
    density: float = 0.0
    count: int = 1

    def in_turn(self, turn: Turn) -> Rule:
        k = active_count(self.density, turn.blocks, at_least=self.count)
        active = active_in_turn(turn.number, turn.blocks, k, self.order, turn.seed)
        return self.inner if turn.block in active else self.residual


def active_count(density: float, blocks: int, *, at_least: int = 1) -> int:
    """How many of `blocks` have state at the same time."""
    return min(blocks, max(at_least, round(density * blocks)))


@functools.lru_cache(maxsize=64)
def active_in_turn(turn: int, blocks: int, k: int, order: Order, seed: int) -> frozenset[int]:
    """Which blocks have state in turn 0, 1, ...: k of them, or fewer at the end of a way through all."""
    if order == "random":
        return frozenset(seeded_choice(k, blocks, seed, "turn", turn))
    windows = -(-blocks // k)
    if order == "shuffled":
        number, place = divmod(turn, windows)
        return frozenset(seeded_permutation(blocks, seed, "order", number)[place * k : (place + 1) * k])
    if order == "mirror":
        period = max(1, 2 * (windows - 1))
        first = min(turn % period, -turn % period) * k
        return frozenset(range(first, min(first + k, blocks)))
    window = {(turn * k + i) % blocks for i in range(k)}
    return frozenset(window if order == "ascending" else {blocks - 1 - i for i in window})
