"""Parameters of which each process has a piece.

FSDP2 gives a process some rows of every parameter, ZeRO-3 a slice of every parameter, ZeRO-1 and 2 a slice of all
parameters laid end to end. In all of them a process has one contiguous range of the flat, row-major parameter, which
may be empty and may be all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """This process' piece of a parameter, and where those of the others are.

    ranges: [start, stop) of every process in the flat parameter; together they cover it once. `weight()` and `grad()`
    give this process' values, flat; the weight's memory is the one that training reads.
    """

    name: str
    shape: Shape
    ranges: tuple[tuple[int, int], ...]
    weight: Callable[[], Tensor]
    grad: Callable[[], Tensor | None]

    @property
    def numel(self) -> int:
        """Of the whole parameter."""
        return math.prod(self.shape)

    def numel_at(self, rank: int) -> int:
        start, stop = self.ranges[rank]
        return stop - start

    @property
    def holders(self) -> list[int]:
        """Processes whose piece is not empty."""
        return [rank for rank in range(len(self.ranges)) if self.numel_at(rank)]


class Layout(Protocol):
    """Finds the pieces behind the tensors that an optimizer's param groups hold once training is sharded."""

    always_has_gradients: bool
    """Whether no process can lack a gradient that another has."""
    keeps_finer_weights: bool
    """Whether what it gives as weights is in another dtype than the model's, which is rounded from it."""

    def pieces_of(self, param: Tensor) -> Sequence[Piece]:
        """Of one tensor in a param group, in the same order on every process."""
        ...


def refuse_gaps(piece: Piece) -> None:
    """Raises AssertionError unless the ranges cover the parameter exactly once."""
    at = 0
    for start, stop in sorted(each for each in piece.ranges if each[0] < each[1]):
        assert start == at, f"{piece.name}: values {at} to {start} belong to no process, or to two"
        at = stop
    assert at == piece.numel, f"{piece.name}: its last {piece.numel - at} values belong to no process"


def owners_of(pieces: Sequence[Piece], processes: int) -> list[int]:
    """Which process updates each matrix: the only holder, or that of its holders which has the least to do so far."""
    load = [0] * processes
    owners = []
    for piece in pieces:
        owner = min(piece.holders or [0], key=lambda rank: (load[rank], rank))
        load[owner] += piece.numel
        owners.append(owner)
    return owners
