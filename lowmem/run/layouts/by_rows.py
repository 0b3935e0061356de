"""Which matrices are updated by the rows that each process has, which whole at one process, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from lowmem.numerics.row_share import RowShare
from lowmem.optim.rule import OnRows, Rule, Shape
from lowmem.run.layouts.exchange import device_to_talk_on
from lowmem.run.layouts.pieces import Piece

MOST_REPEATED = 4
"""State that every process has is at most this part of its share of a matrix."""


class Way(NamedTuple):
    """`on_rows` is None where the matrix is updated whole."""

    on_rows: OnRows | None
    reason: str


def way_of(piece: Piece, rule: Rule) -> Way:
    """The cheaper way for a matrix of (m, n) that W processes have pieces of.

    Whole at its owner, it has each process send 3 m n / W values in a step (see `PieceOptimizer`); adding up k values
    has it send 2 k, and a gradient that comes to every process every g steps 2 m n / g; all times (W - 1) / W. State
    that every process has must be no more than a quarter of its share of the matrix, m n / W: memory comes first.
    """
    processes = len(piece.ranges)
    if len(piece.holders) == 1:
        return Way(None, "it has all of them")
    if not has_whole_rows(piece):
        return Way(None, "rows are cut, or a process has none")
    found = rule.on_rows(piece.shape)
    if found is None:
        return Way(None, "their rule needs all rows at once")
    added = found.summed + (piece.numel / found.whole_every if found.whole_every else 0)
    if 2 * added * processes > 3 * piece.numel:
        return Way(None, "to add up what rows need would send more")
    if MOST_REPEATED * found.repeated * processes > piece.numel:
        return Way(None, "state that every process would have is more than a quarter of its share")
    return Way(found, "little is to be sent")


def has_whole_rows(piece: Piece) -> bool:
    """Whether it is a matrix of which every process has rows, at least one, and no part of one."""
    if len(piece.shape) != 2 or not all(piece.shape):
        return False
    columns = piece.shape[1]
    return all(start < stop and start % columns == 0 and stop % columns == 0 for start, stop in piece.ranges)


def rows_at(piece: Piece, rank: int) -> Shape:
    """The shape of what a process has of a matrix."""
    return (piece.numel_at(rank) // piece.shape[1], piece.shape[1])


def refreshes_together(rule: Rule) -> bool:
    """Whether all processes take part in a refresh: it wants a whole gradient, or sums of one."""
    is_refreshed = type(rule).refresh is not Rule.refresh
    return is_refreshed and (rule.refreshes_from_gradient or rule.sums_in_refresh > 0)


class DividedRows(RowShare):
    """Rows of a matrix, or values, over the processes of `group`. `summed` counts what was added up here."""

    def __init__(self, rows: int, group: dist.ProcessGroup | None):
        self._rows, self._group = rows, group
        self.summed = 0

    def sum_(self, x: Tensor) -> Tensor:
        return self._reduced_(x, dist.ReduceOp.SUM)

    def max_(self, x: Tensor) -> Tensor:
        return self._reduced_(x, dist.ReduceOp.MAX)

    def of_all(self, rows: int) -> int:
        return self._rows

    def _reduced_(self, x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        self.summed += x.numel()
        sent = x.to(device_to_talk_on(x.device, self._group)).contiguous()
        dist.all_reduce(sent, how, group=self._group)
        return x if sent is x else x.copy_(sent)


def described_ways(ways: Iterable[Way]) -> list[str]:
    """How many parameters of rules for matrices go which way, and why, a line each."""
    lines = []
    for (is_by_rows, reason), count in Counter(
        (each.on_rows is not None, each.reason) for each in ways
    ).items():
        how = "stepped where their rows are" if is_by_rows else "stepped whole, each at one process"
        lines.append(f"{count} matrices {how}: {reason}")
    return lines
