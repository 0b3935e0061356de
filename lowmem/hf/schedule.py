"""Learning-rate schedules. The factor is never 0 while steps remain, so that no step is wasted."""

from __future__ import annotations

import math
from collections.abc import Callable

from lowmem.recipe.schema import SchedulerRecipe


def warmup_steps(schedule: SchedulerRecipe, total_steps: int) -> int:
    """How many of `total_steps` warm up; at least one step is left at the full rate."""
    if schedule.warmup_steps is not None:
        steps = schedule.warmup_steps
    else:
        steps = math.ceil(schedule.warmup_ratio * total_steps)
    return min(steps, total_steps - 1)


def learning_rate_factor(schedule: SchedulerRecipe, total_steps: int) -> Callable[[int], float]:
    """What `lr` is multiplied by at step 0, 1, ..., total_steps - 1.

    Warm-up rises linearly from 1 / (warm-up + 1); the step after it runs at 1. From there `linear` and
    `cosine` fall towards 0, which they would reach one step after the last.
    """
    warmup = warmup_steps(schedule, total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / (total_steps - warmup))
        if schedule.name == "linear":
            return 1.0 - progress
        if schedule.name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return factor
