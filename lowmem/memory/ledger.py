"""Which storage lived when, and what the memory held at its fullest moment. Pure Python, no tensors.

A tracker writes births, deaths and resizes as they happen; what a storage *was* is often known only
later (a buffer made in backward turns out to be a gradient), so the sum by part is made at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["weights", "gradients", "optimizer_state", "activations", "temporary", "other"]
PARTS: tuple[Part, ...] = ("weights", "gradients", "optimizer_state", "activations", "temporary", "other")

Phase = Literal["forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")

ALLOCATION_BYTES = 512
"""CUDA's caching allocator hands out multiples of this, so a storage is counted as the next one."""


def rounded(nbytes: int, round_to: int = ALLOCATION_BYTES) -> int:
    """`nbytes` up to the next multiple of `round_to`."""
    return -(-nbytes // round_to) * round_to


@dataclass(eq=False)
class Life:
    """One storage: its bytes now (rounded) and the part it belongs to, as far as known."""

    nbytes: int
    part: Part
    alive: bool = True


@dataclass(frozen=True)
class Fullest:
    """The fullest moment of a ledger. The parts sum to `peak_bytes` exactly."""

    peak_bytes: int
    parts: dict[Part, int]


class Ledger:
    """The lives of all storages of one step, in order."""

    def __init__(self) -> None:
        self._residents: list[tuple[Life, int]] = []
        self._changes: list[tuple[Life, int]] = []

    def found(self, nbytes: int, part: Part) -> Life:
        """A storage that was there before the step, whenever it was first seen."""
        life = Life(nbytes, part)
        self._residents.append((life, nbytes))
        return life

    def born(self, nbytes: int, part: Part) -> Life:
        life = Life(nbytes, part)
        self._changes.append((life, nbytes))
        return life

    def resized(self, life: Life, nbytes: int) -> None:
        if life.alive and nbytes != life.nbytes:
            self._changes.append((life, nbytes - life.nbytes))
            life.nbytes = nbytes

    def died(self, life: Life) -> None:
        if life.alive:
            self._changes.append((life, -life.nbytes))
            life.alive = False

    def fullest(self) -> Fullest:
        """The first moment at which the most bytes were alive, by part."""
        now = peak = sum(nbytes for _, nbytes in self._residents)
        moment = 0
        for index, (_, change) in enumerate(self._changes, start=1):
            now += change
            if now > peak:
                peak, moment = now, index
        parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
        for life, change in [*self._residents, *self._changes[:moment]]:
            parts[life.part] += change
        return Fullest(peak, parts)
