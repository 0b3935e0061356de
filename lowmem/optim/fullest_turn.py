"""Which turn has most state, where parameters have state in turn, and what a step inside it finds: for a simulation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowmem.numerics.held_weights import numel_of
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.optimizer_state import STEPS, turn_length
from lowmem.optim.rule import Rule
from lowmem.optim.without_values import make_state_

TURNS = 256
"""How many are looked at, or as many as there are parameters: all, but where turns are drawn for ever."""


def pretend_fullest_turn_(optimizer: LowMemOptimizer) -> bool:
    """Put the optimizer into the turn with most state, the earliest such; False where no parameter takes turns.

    Its first step has been made if it has another, so that the state is there.
    """
    groups = [group for group in optimizer.param_groups if turn_length(group) is not None]
    if not groups:
        return False
    step = fullest_step(optimizer, groups)
    for group in groups:
        length = turn_length(group)
        assert length is not None
        trained = [param for param in group["params"] if param.requires_grad and numel_of(param)]
        had_gradient = [param for param in trained if optimizer.state[param]]
        for param in trained:
            optimizer._forget_state_of(param)
        is_inside = step % length or length > 1
        group[STEPS] = step + 1 if is_inside else step
        for param in had_gradient if is_inside else []:
            make_state_(optimizer, param, group)
            optimizer._steps[param] = 1
    return True


def fullest_step(optimizer: LowMemOptimizer, groups: list[dict[str, Any]]) -> int:
    """The first step, counted from 0, of the fullest turn of any group; all groups are at the same step."""
    sizes: dict[tuple[Tensor, Rule], int] = {}
    count = max(TURNS, max(len(group["params"]) for group in groups))
    begins = sorted(
        {turn * length for group in groups for turn in range(count) if (length := turn_length(group))}
    )
    fullest, most = 0, -1
    for step in begins[:count]:
        total = sum(_state_bytes_at(step, optimizer, group, sizes) for group in groups)
        if total > most:
            fullest, most = step, total
    return fullest


def _state_bytes_at(
    step: int, optimizer: LowMemOptimizer, group: dict[str, Any], sizes: dict[tuple[Tensor, Rule], int]
) -> int:
    there = {**group, STEPS: step}
    total = 0
    for param in group["params"]:
        rule = optimizer.rule_of(param, there)
        if (param, rule) not in sizes:
            codecs = optimizer._codecs(param, there, rule)
            sizes[param, rule] = sum(codec.nbytes() for codec in codecs.values())
        total += sizes[param, rule] if param.requires_grad else 0
    return total
