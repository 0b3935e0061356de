"""Steps of an optimizer whose tensors hold no values, for a simulation that counts bytes.

Here only counters move and state is allocated; the engine's own `step_param` runs on fake tensors as it is.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from lowmem.optim import registry
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.rule import Rule

FARTHEST_REFRESH = 100_000  # steps; who refreshes less often does not refresh in a run


def step_key(optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any]) -> Hashable:
    """What decides which tensors the next update of `param` makes: equal keys, equal bytes."""
    known = optimizer._known.get(param, set())
    ctx = optimizer._context(param, group, optimizer._steps.get(param, 0) + 1, known)
    layouts = [
        (tensor.shape, tensor.stride(), tensor.dtype) for tensor in (param, param.grad) if tensor is not None
    ]
    settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    is_refresh = _rule(param, group).needs_refresh(ctx)
    return (repr(settings), *layouts, param in optimizer._steps, is_refresh)


def pretend_step_(optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any], like: Tensor) -> None:
    """Leave `param`'s state and counters as an update equal to the last one of `like` would."""
    optimizer._stored(param, group, _rule(param, group))
    optimizer._next_context(param, group)
    optimizer._known[param] = set(optimizer._known[like])


def pretend_until_refresh_(optimizer: LowMemOptimizer) -> bool:
    """Count the updates of every parameter up to just before its next refresh; False where none is near."""
    coming: dict[Hashable, int | None] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param not in optimizer._steps:
                continue
            rule, done = _rule(param, group), optimizer._steps[param]
            key = (rule, done)
            if key not in coming:
                coming[key] = _next_refresh(optimizer, param, group, rule, done)
            step = coming[key]
            if step is not None:
                optimizer._steps[param] = step - 1
    return any(step is not None for step in coming.values())


def _next_refresh(
    optimizer: LowMemOptimizer, param: Tensor, group: dict[str, Any], rule: Rule, done: int
) -> int | None:
    if type(rule).needs_refresh is Rule.needs_refresh:
        return None
    for step in range(done + 1, done + FARTHEST_REFRESH):
        if rule.needs_refresh(optimizer._context(param, group, step, optimizer._known[param])):
            return step
    return None


def _rule(param: Tensor, group: dict[str, Any]) -> Rule:
    return registry.optimizer_class(group["algorithm"]).rule(group, tuple(param.shape))
