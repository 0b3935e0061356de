"""When a basis is fitted anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowmem.optim.rule import Context, Slot, State


class Refresh(Protocol):
    """Decides at which of a parameter's steps its basis is fitted anew; step 1 is always one."""

    @property
    def shortest_gap(self) -> int:
        """Steps between two of them, at least, a first one apart that is early."""
        ...

    def slots(self) -> dict[str, Slot]:
        """What has to be known after a resume."""
        ...

    def is_due(self, ctx: Context) -> bool:
        """Whether this step fits a new basis. The same answer before and after it was fitted."""
        ...

    def steps_since(self, ctx: Context) -> int:
        """Updates made with the current basis, this one included."""
        ...

    def adapt(self, similarity: Callable[[], Tensor], state: State, ctx: Context) -> dict[str, Tensor]:
        """Learn from a basis that was due and has replaced another; returns the slots that changed.

        `similarity` computes how much of the new basis' worth the old one still had, from 0 to 1.
        """
        ...


@dataclass(frozen=True)
class Every:
    """At a parameter's first step and every `gap` steps after it: steps 1, 1 + gap, 1 + 2 gap, ...

    With `staggers` the refreshes after the first are spread: parameter i of n in its group takes those of
    steps 1 + offset + k gap, offset = floor(i gap / n), so that each step has few of them.
    """

    gap: int
    staggers: bool = False

    @property
    def shortest_gap(self) -> int:
        return self.gap

    def slots(self) -> dict[str, Slot]:
        return {}

    def is_due(self, ctx: Context) -> bool:
        return falls_due(ctx.step, self.gap, self.first_turn(ctx))

    def steps_since(self, ctx: Context) -> int:
        return steps_since(ctx.step, self.gap, self.first_turn(ctx))

    def adapt(self, similarity: Callable[[], Tensor], state: State, ctx: Context) -> dict[str, Tensor]:
        return {}

    def first_turn(self, ctx: Context) -> int:
        """The step from which refreshes follow each other at the gap."""
        return 1 + (ctx.index * self.gap // ctx.count if self.staggers else 0)


def falls_due(step: int, gap: int, turn: int) -> bool:
    """Whether `step` is the first or one of turn + k gap, k any whole number."""
    return step == 1 or (step > 1 and (step - turn) % gap == 0)


def steps_since(step: int, gap: int, turn: int) -> int:
    """Steps from the last one that fell due to `step`, both included."""
    return min((step - turn) % gap + 1, step)
