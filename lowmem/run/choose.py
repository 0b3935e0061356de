"""Which way a step is made, why, and what its gradients take: `train.execution`."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from lowmem.numerics.held_weights import grad_nbytes_of, shape_of
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.storage import accumulator_dtype
from lowmem.recipe.execution_choice import Clip, Mode, Requested, Situation, chosen_mode, objection
from lowmem.run.accumulate import ProjectInBackward
from lowmem.run.execution import Execution
from lowmem.run.fused_backward import FusedBackward

__all__ = [
    "EXECUTIONS",
    "Requested",
    "Situation",
    "chosen_mode",
    "consequences",
    "gradient_bytes",
    "objection",
    "situation_of",
]

EXECUTIONS: dict[Mode, Callable[..., Execution]] = {
    "plain": Execution,
    "project": ProjectInBackward,
    "fused": FusedBackward,
}


def situation_of(
    optimizer: LowMemOptimizer, *, micro_batches: int, clip: Clip, max_norm: float | None
) -> Situation:
    rules = [optimizer.rule_of(p, group) for group in optimizer.param_groups for p in group["params"]]
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    is_projected = any(rule.is_projected for rule in rules)
    return Situation(is_projected, micro_batches, clip, max_norm is not None, processes)


def gradient_bytes(optimizer: LowMemOptimizer, mode: Mode, *, micro_batches: int) -> int:
    """What gradients and their sums take at most, refreshes and the gradient under way aside."""
    total = largest = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not param.requires_grad:
                continue
            rule = optimizer.rule_of(param, group)
            largest = max(largest, grad_nbytes_of(param))
            if mode == "project" and rule.is_projected:
                values = rule.projected_numel(shape_of(param))
                total += values * accumulator_dtype(group["accumulator"], param.dtype).itemsize
            else:
                total += grad_nbytes_of(param)
    return largest if mode == "fused" and micro_batches == 1 else total


def consequences(mode: Mode, at: Situation) -> str:
    """What a user should know about `mode`, in a sentence."""
    if mode == "plain":
        return "every gradient stays until the step"
    if mode == "project":
        return "gradients of matrices are projected as they arrive and freed; the others stay until the step"
    if at.micro_batches > 1:
        return "gradients are added up over the micro-batches and used and freed in the last one"
    return (
        "each parameter is updated as its gradient arrives, and the gradient is freed; its norm is not known"
    )
