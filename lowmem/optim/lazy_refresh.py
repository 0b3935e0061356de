"""Refresh less often where a basis lasts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.refresh import Every, falls_due, steps_since
from lowmem.optim.rule import Context, Slot, State

SCHEDULE, SIMILARITIES = "refresh_schedule", "similarities"


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """Each matrix has a gap of its own, which grows while its bases stay alike.

        s <- similarity of the old basis and the new one           at a refresh after a whole gap
        queue <- the last `window` of s
        if the queue is full and its mean exceeds `threshold`:
            k <- k + 1;  queue <- empty
        gap <- min(growth^k first.gap, longest_gap), rounded down

    The first gap is `first.gap`, from `first`'s turn on, so refreshes stay spread over the steps. A basis that
    was replaced sooner than a whole gap, as the first one is with `staggers`, says nothing and is not counted.

    State: `refresh_schedule` holds how often the gap has grown, the step it has held from (0 before it grew) and
    how many similarities are in the queue; `similarities` holds the queue, newest last. The schedule is mirrored
    in Python, so a step asks nothing of the device and a refresh at most one truth value. Where tensors
    hold no values the gap does not grow.

    Source: Zhang et al., "Q-GaLore", arXiv:2407.08296, section 3.2. The authors' code never empties the queue, so
    that a gap that grew once doubles at every later refresh, and bounds no gap.
    """

    first: Every
    threshold: float
    growth: float
    longest_gap: int
    window: int

    @property
    def shortest_gap(self) -> int:
        return self.first.gap

    def slots(self) -> dict[str, Slot]:
        return {SCHEDULE: Slot((3,), "scalar"), SIMILARITIES: Slot((self.window,), "scalar")}

    def is_due(self, ctx: Context) -> bool:
        return falls_due(ctx.step, *self._gap_and_turn(ctx))

    def steps_since(self, ctx: Context) -> int:
        return steps_since(ctx.step, *self._gap_and_turn(ctx))

    def adapt(self, similarity: Callable[[], Tensor], state: State, ctx: Context) -> dict[str, Tensor]:
        gap, turn = self._gap_and_turn(ctx)
        if ctx.step - gap < turn or gap == self.longest_gap:
            return {}
        times_grown, holds_from, held = ctx.numbers(SCHEDULE, 3)
        queue = torch.cat([state[SIMILARITIES][1:], similarity().reshape(1)])
        held = min(held + 1, self.window)
        if held == self.window and ctx.ask(queue.mean() > self.threshold, assume=False):
            times_grown, holds_from, held = times_grown + 1, ctx.step, 0
            queue = torch.zeros_like(queue)
        ctx.remember(SCHEDULE, (times_grown, holds_from, held))
        schedule = torch.tensor([times_grown, holds_from, held], dtype=torch.float32, device=queue.device)
        return {SCHEDULE: schedule, SIMILARITIES: queue}

    def _gap_and_turn(self, ctx: Context) -> tuple[int, int]:
        times_grown, holds_from, _ = ctx.numbers(SCHEDULE, 3)
        gap = min(int(self.first.gap * self.growth**times_grown), self.longest_gap)
        return gap, holds_from or self.first.first_turn(ctx)
