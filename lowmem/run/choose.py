"""Which way a step is made, why, and what its gradients take: `train.execution`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lowmem.errors import RefusedError
from lowmem.optim.engine import LowMemOptimizer, accumulator_dtype
from lowmem.run.accumulate import ProjectInBackward
from lowmem.run.execution import Clip, Execution, Mode
from lowmem.run.fused_backward import FusedBackward

Requested = Literal["auto", "plain", "project", "fused"]

EXECUTIONS: dict[Mode, Callable[..., Execution]] = {
    "plain": Execution,
    "project": ProjectInBackward,
    "fused": FusedBackward,
}


@dataclass(frozen=True)
class Situation:
    """What the choice depends on."""

    is_projected: bool
    """Whether some parameter has a low-rank rule that sees its gradient through a projection only."""
    micro_batches: int
    clip: Clip
    clips: bool

    @property
    def clips_globally(self) -> bool:
        return self.clips and self.clip != "tensor"


def objection(mode: Mode, at: Situation) -> str | None:
    """Why `mode` cannot give what is asked for, and the nearest settings that do; None where it can."""
    if mode == "fused" and at.clips_globally:
        return (
            "train.execution: fused updates each parameter before the norm of all gradients is known, so "
            "train.max_grad_norm cannot clip by it. Use optimizer.clip: tensor, train.max_grad_norm: null, or "
            f"train.execution: {'project' if at.is_projected else 'plain'}."
        )
    if mode == "project" and not at.is_projected:
        return (
            "train.execution: project needs an optimizer that projects gradients, such as galore. Use "
            "train.execution: fused or plain."
        )
    if mode == "project" and at.clips and at.clip == "full" and at.micro_batches > 1:
        return (
            "optimizer.clip: full needs the norm of the whole step's gradient, which train.execution: project never "
            "holds over several micro-batches. Use optimizer.clip: applied or tensor, or train.execution: plain."
        )
    return None


def chosen_mode(requested: Requested, at: Situation) -> Mode:
    """auto: fused for one micro-batch a step without global clipping, else project where it can be, else plain.

    Raises RefusedError for a way that was asked for by name and cannot give what is asked for.
    """
    if requested != "auto":
        if (reason := objection(requested, at)) is not None:
            raise RefusedError(reason)
        return requested
    if at.micro_batches == 1 and objection("fused", at) is None:
        return "fused"
    return "project" if objection("project", at) is None else "plain"


def situation_of(
    optimizer: LowMemOptimizer, *, micro_batches: int, clip: Clip, max_norm: float | None
) -> Situation:
    rules = [optimizer.rule_of(p, group) for group in optimizer.param_groups for p in group["params"]]
    return Situation(any(rule.is_projected for rule in rules), micro_batches, clip, max_norm is not None)


def gradient_bytes(optimizer: LowMemOptimizer, mode: Mode, *, micro_batches: int) -> int:
    """What gradients and their sums take at most, refreshes and the gradient under way aside."""
    total = largest = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not param.requires_grad:
                continue
            rule = optimizer.rule_of(param, group)
            largest = max(largest, param.nbytes)
            if mode == "project" and rule.is_projected:
                values = rule.projected_numel(tuple(param.shape))
                total += values * accumulator_dtype(group["accumulator"], param.dtype).itemsize
            else:
                total += param.nbytes
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
