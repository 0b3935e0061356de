"""Which way a step is made, why, and what its gradients take: `train.execution`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lowmem.numerics.held_weights import grad_nbytes_of, held_weight, shape_of
from lowmem.numerics.row_gradients import is_by_rows
from lowmem.numerics.tiles import SLICES_START_AT, state_row_slices
from lowmem.optim.engine import LowMemOptimizer
from lowmem.optim.micro_batches import accumulates
from lowmem.optim.storage import accumulator_dtype
from lowmem.recipe.execution_choice import (
    Clip,
    HeadGradient,
    Mode,
    Requested,
    Situation,
    chosen_mode,
    objection,
)
from lowmem.run.accumulate import ProjectInBackward
from lowmem.run.execution import Execution
from lowmem.run.fused_backward import FusedBackward
from lowmem.run.fused_by_rows import FusedByRows

__all__ = [
    "EXECUTIONS",
    "Requested",
    "Situation",
    "chosen_mode",
    "consequences",
    "execution_class",
    "gradient_bytes",
    "objection",
    "remark_on_rows",
    "situation_of",
]

EXECUTIONS: dict[Mode, Callable[..., Execution]] = {
    "plain": Execution,
    "project": ProjectInBackward,
    "fused": FusedByRows,
}


def execution_class(mode: Mode, head_gradient: HeadGradient) -> Callable[..., Execution]:
    """What makes the steps of `mode`."""
    return FusedBackward if mode == "fused" and head_gradient == "whole" else EXECUTIONS[mode]


def situation_of(
    optimizer: LowMemOptimizer,
    *,
    micro_batches: int,
    clip: Clip,
    max_norm: float | None,
    keeps_gradients: str | None = None,
) -> Situation:
    trained = _trained(optimizer)
    return Situation(
        is_projected=any(optimizer.rule_of(param, group).is_projected for param, group in trained),
        micro_batches=micro_batches,
        clip=clip,
        clips=max_norm is not None,
        processes=dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
        accumulates=all(accumulates(optimizer, param, group) for param, group in trained),
        keeps_gradients=keeps_gradients,
    )


COMPILED_AS_A_WHOLE = (
    "a model compiled as a whole makes all of them at once. Compile the layers one by one (accelerate's regional "
    "compilation)"
)
SCALED = "a GradScaler can unscale only what is there at the step. Train in bfloat16"


def gradient_bytes(optimizer: LowMemOptimizer, mode: Mode, at: Situation) -> int:
    """What gradients and their sums take at most, refreshes and the gradient under way aside.

    To be asked when the execution is attached to its model, which is when it is known what can be made by rows.
    """
    held = largest = 0
    for param, group in _trained(optimizer):
        rule = optimizer.rule_of(param, group)
        if not rule.needs_gradient:
            continue
        largest = max(largest, _largest_piece(param, at) if mode == "fused" else grad_nbytes_of(param))
        adds_to_state = not at.clips and accumulates(optimizer, param, group)
        if mode == "project" and rule.is_projected:
            values = rule.projected_numel(shape_of(param))
            held += values * accumulator_dtype(group["accumulator"], param.dtype).itemsize
        elif mode != "fused" or not (at.micro_batches == 1 or adds_to_state):
            held += grad_nbytes_of(param)
    return max(held, largest) if mode == "fused" else held


def remark_on_rows(optimizer: LowMemOptimizer, mode: Mode, at: Situation) -> str:
    """Whose gradients are made some rows at a time, or whose is the largest that is not, to end a sentence with."""
    if mode != "fused" or at.micro_batches > 1:
        return ""
    params = sorted((param for param, _ in _trained(optimizer)), key=grad_nbytes_of, reverse=True)
    names = [optimizer.place_of(param)[0] for param in params if is_by_rows(param)]
    by_rows = (
        f"; made and used some rows at a time: the gradient of {' and of '.join(names)}" if names else ""
    )
    if not params or is_by_rows(params[0]):
        return by_rows
    return f"{by_rows}; the largest is that of {optimizer.place_of(params[0])[0]}, whole"


def _largest_piece(param: Tensor, at: Situation) -> int:
    """Bytes of the gradient, or of the rows that are there at one time."""
    if at.micro_batches > 1 or not is_by_rows(param):
        return grad_nbytes_of(param)
    held, shape = held_weight(param), shape_of(param)
    slices = state_row_slices(shape) if held is None else held.row_slices(multiple_of=SLICES_START_AT)
    return next(slices).stop * shape[1] * param.dtype.itemsize


def _trained(optimizer: LowMemOptimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    return [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def consequences(mode: Mode, at: Situation) -> str:
    """What a user should know about `mode`, in a sentence."""
    if mode == "plain":
        return "every gradient stays until the step"
    if mode == "project":
        return "gradients of matrices are projected as they arrive and freed; the others stay until the step"
    if at.micro_batches == 1:
        return "each parameter is updated as its gradient arrives, and the gradient is freed; its norm is not known"
    if at.fused_holds_one_gradient:
        return (
            "each gradient is added to its momentum as it arrives and freed, and the last micro-batch moves the "
            "weights; their norm is not known"
        )
    return "gradients are added up over the micro-batches and used and freed in the last one"
