"""Which turns hold most, where parameters have state in turn, and what a step inside of one finds: for a simulation."""

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


ALIKE = 0.99
"""Turns with this share of the most state are as full: in a step they differ by what backward needs."""


def fullest_turns(optimizer: LowMemOptimizer) -> list[int]:
    """First steps, counted from 0, of the turns that may hold most; none where no parameter takes turns.

    The first is one with most state, and of several one with the first parameter that needs a gradient: to it backward
    goes farthest. The second is one to whose parameters it goes farther, if there is one.
    """
    groups = turning_groups(optimizer)
    if not groups:
        return []
    sizes: dict[tuple[Tensor, Rule], int] = {}
    count = max(TURNS, max(len(group["params"]) for group in groups))
    begins = {turn * length for group in groups for turn in range(count) if (length := turn_length(group))}
    found = {step: _bytes_and_depth_at(step, optimizer, groups, sizes) for step in sorted(begins)[:count]}
    most = max(nbytes for nbytes, _ in found.values())
    full = [step for step, (nbytes, _) in found.items() if nbytes >= ALIKE * most]
    first = max(full, key=lambda step: (found[step][1], -step))
    deeper = [step for step, (_, depth) in found.items() if depth > found[first][1]]
    return [first, *([max(deeper, key=lambda step: (found[step], -step))] if deeper else [])]


def turning_groups(optimizer: LowMemOptimizer) -> list[dict[str, Any]]:
    """Those whose parameters have state in turn."""
    return [group for group in optimizer.param_groups if turn_length(group) is not None]


def pretend_turn_(optimizer: LowMemOptimizer, step: int) -> None:
    """Put the optimizer into the turn that begins with `step`.

    Its first step has been made if it has another, so that the state is there.
    """
    for group in turning_groups(optimizer):
        length = turn_length(group)
        assert length is not None
        trained = [param for param in group["params"] if param.requires_grad and numel_of(param)]
        # Who rested may have had a gradient, who did not and has no state had none.
        may_step = [
            p for p in trained if optimizer.state[p] or not optimizer.rule_of(p, group).needs_gradient
        ]
        for param in trained:
            optimizer._forget_state_of(param)
        is_inside = step % length or length > 1
        group[STEPS] = step + 1 if is_inside else step
        for param in may_step if is_inside else []:
            if optimizer.rule_of(param, group).needs_gradient:
                make_state_(optimizer, param, group)
                optimizer._steps[param] = 1


def _bytes_and_depth_at(
    step: int, optimizer: LowMemOptimizer, groups: list[dict[str, Any]], sizes: dict[tuple[Tensor, Rule], int]
) -> tuple[int, int]:
    """Bytes of state in the turn that has the step, and how far from the last parameter the first active one is."""
    total, depth = 0, 0
    for group in groups:
        there = {**group, STEPS: step}
        for index, param in enumerate(group["params"]):
            rule = optimizer.rule_of(param, there)
            if not param.requires_grad or not rule.needs_gradient:
                continue
            if (param, rule) not in sizes:
                codecs = optimizer._codecs(param, there, rule)
                sizes[param, rule] = sum(codec.nbytes() for codec in codecs.values())
            total += sizes[param, rule]
            depth = max(depth, len(group["params"]) - index)
    return total, depth
