"""Which storage lived when, and what the memory held at its fullest moment. Pure Python, no tensors.

A tracker writes births, deaths and resizes as they happen; what a storage *was* is often known only
later (a buffer made in backward turns out to be a gradient), so the sum by part is made at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """One storage: its bytes now (rounded) and the part it belongs to, as far as known.

    `key` is the same for the same storage in the ledgers of several steps; `made_by` says in words what made it.
    """

    nbytes: int
    part: Part
    key: int = 0
    made_by: str = ""
    alive: bool = True
    birth: int = -1
    """Changes of its ledger before it was born; -1 for what was there before."""


Change = tuple[Life, int]
"""A life and the bytes by which it grew: all of them at its birth, all of them negative at its death."""


@dataclass(frozen=True)
class Fullest:
    """The fullest moment of a ledger. The parts sum to `peak_bytes` exactly.

    `phase` is None between phases; `place` is the last that the tracker was told, such as a module's name.
    """

    peak_bytes: int
    parts: dict[Part, int]
    phase: Phase | None = None
    place: str = ""
    lives: tuple[Life, ...] = field(default=(), repr=False, compare=False)
    """What was alive, in order of birth."""


class Ledger:
    """The lives of all storages of one step, in order."""

    def __init__(self) -> None:
        self.residents: list[Change] = []
        self.changes: list[Change] = []
        self._places: list[tuple[int, Phase | None, str]] = [(0, None, "")]

    def found(self, nbytes: int, part: Part, key: int = 0) -> Life:
        """A storage that was there before the step, whenever it was first seen."""
        life = Life(nbytes, part, key)
        self.residents.append((life, nbytes))
        return life

    def born(self, nbytes: int, part: Part, key: int = 0, made_by: str = "") -> Life:
        life = Life(nbytes, part, key, made_by, birth=len(self.changes))
        self.changes.append((life, nbytes))
        return life

    def resized(self, life: Life, nbytes: int) -> None:
        if life.alive and nbytes != life.nbytes:
            self.changes.append((life, nbytes - life.nbytes))
            life.nbytes = nbytes

    def died(self, life: Life) -> None:
        if life.alive:
            self.changes.append((life, -life.nbytes))
            life.alive = False

    def replaced_by(self, life: Life, heir: Life) -> None:
        """`life` has died right after `heir` was born: the storage was in truth handed over, so it died before."""
        self.died(life)
        if len(self.changes) > 1 and self.changes[-2][0] is heir:
            self.changes[-2:] = reversed(self.changes[-2:])

    def at(self, phase: Phase | None, place: str) -> None:
        """What happens from now on happens there."""
        self._places.append((len(self.changes), phase, place))

    def fullest(self) -> Fullest:
        """The first moment at which the most bytes were alive, by part."""
        now = peak = sum(nbytes for _, nbytes in self.residents)
        moment = 0
        for index, (_, change) in enumerate(self.changes, start=1):
            now += change
            if now > peak:
                peak, moment = now, index
        parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
        held: dict[Life, int] = {}
        for life, change in [*self.residents, *self.changes[:moment]]:
            parts[life.part] += change
            held[life] = held.get(life, 0) + change
        _, phase, place = next(entry for entry in reversed(self._places) if entry[0] < max(moment, 1))
        return Fullest(peak, parts, phase, place, tuple(life for life, nbytes in held.items() if nbytes > 0))
