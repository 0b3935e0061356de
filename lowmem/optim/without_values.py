"""Steps of an optimizer whose tensors hold no values, for a simulation that counts bytes.

Here only counters move and state is allocated; the engine's own `step_param` runs on fake tensors as it is.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from lowmem.numerics.held_weights import grad_of, numel_of, shape_of
from lowmem.optim import registry
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.optimizer_state import STEPS, turn_length
from lowmem.optim.rule import Rule

FARTHEST_REFRESH = 100_000  # steps; who refreshes less often does not refresh in a run


def step_key(optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any]) -> Hashable:
    """What decides which tensors the next half or whole update of `param` makes: equal keys, equal bytes."""
    ctx = optimizer.coming_context(param, group)
    tensors = (param, grad_of(param), optimizer.projected.get(param))
    layouts = [None if each is None else (each.shape, each.stride(), each.dtype) for each in tensors]
    settings = {name: value for name, value in group.items() if name not in ("params", "param_names", STEPS)}
    rule = optimizer.rule_of(param, group)
    is_refresh = rule.needs_refresh(ctx) and optimizer._refreshed.get(param) != ctx.step
    has_sum = param in optimizer.accumulated
    has_state = bool(optimizer.state[param])
    return (repr(settings), rule, shape_of(param), *layouts, has_state, is_refresh, has_sum)


def make_state_(optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any]) -> None:
    """Allocate what an update would, if it is not there yet."""
    optimizer._stored(param, group, optimizer.rule_of(param, group))


def count_step_(optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any]) -> None:
    """Count an update of `param` that is not made."""
    optimizer._next_context(param, group)
    optimizer.accumulated.pop(param, None)


def count_micro_batch_(optimizer: LowMemOptimizer, param: Tensor) -> None:
    """Count a micro-batch that is not added to the state of `param`."""
    optimizer.accumulated[param] = optimizer.accumulated.get(param, 0) + 1


def know_as_(optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any], like: Tensor) -> None:
    """What is remembered of `like`, which has the same rule and has made as many updates, holds for `param`."""
    step = optimizer.coming_context(param, group).step
    optimizer._known[param] = dict(optimizer._known.get(like, {}))
    if optimizer._refreshed.get(like) in (step, step - 1):
        optimizer._refreshed[param] = optimizer._refreshed[like]


def pretend_until_refresh_(optimizer: LowMemOptimizer) -> bool:
    """Count all updates up to just before a refresh; False where none is near.

    Of the steps at which a parameter is refreshed next, the one with the most values to refresh is taken.
    """
    coming: dict[Hashable, int | None] = {}
    due: dict[int, int] = {}
    stepped = [
        (param, group)
        for group in optimizer.param_groups
        for param in group["params"]
        if optimizer.state[param] and turn_length(group) is None
    ]
    for param, group in stepped:
        rule, (_, index, count) = _rule(param, group), optimizer.place_of(param)
        key = (rule, index, count, optimizer._steps[param])
        if key not in coming:
            coming[key] = _next_refresh(optimizer, param, group, rule)
        if (step := coming[key]) is not None:
            due[step] = due.get(step, 0) + numel_of(param)
    if not due:
        return False
    fullest = max(due, key=lambda step: (due[step], -step))
    for param, _ in stepped:
        optimizer._steps[param] = fullest - 1
    return True


def _next_refresh(optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any], rule: Rule) -> int | None:
    if type(rule).needs_refresh is Rule.needs_refresh:
        return None
    done = optimizer._steps[param]
    for step in range(done + 1, done + FARTHEST_REFRESH):
        if rule.needs_refresh(optimizer._context(param, group, step)):
            return step
    return None


def _rule(param: Tensor, group: dict[str, Any]) -> Rule:
    return registry.optimizer_class(group["algorithm"]).rule(group, shape_of(param))
