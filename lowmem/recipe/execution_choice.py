"""Which way a step is made, from the recipe and its optimizer alone. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowmem.errors import RefusedError

Mode = Literal["plain", "project", "fused"]
Requested = Literal["auto", "plain", "project", "fused"]
HeadGradient = Literal["auto", "whole"]
Clip = Literal["applied", "full", "tensor"]


@dataclass(frozen=True)
class Situation:
    """What the choice depends on."""

    is_projected: bool
    """Whether some parameter has a low-rank rule that sees its gradient through a projection only."""
    micro_batches: int
    clip: Clip
    clips: bool
    processes: int = 1
    """Of data parallel training."""
    accumulates: bool = False
    """Whether the rule of every parameter can add micro-batches to its momentum as they arrive."""
    keeps_gradients: str | None = None
    """Why all gradients are there at the step whatever is done with them, and how to do without; a clause."""

    @property
    def clips_globally(self) -> bool:
        return self.clips and self.clip != "tensor"

    @property
    def fused_holds_one_gradient(self) -> bool:
        """Whether fused holds one gradient at a time, and not the sums of several micro-batches."""
        return self.micro_batches == 1 or (self.accumulates and not self.clips)


def objection(mode: Mode, at: Situation) -> str | None:
    """Why `mode` cannot give what is asked for, and the nearest settings that do; None where it can."""
    if mode != "plain" and at.keeps_gradients is not None:
        return (
            f"train.execution: {mode} frees each gradient as it arrives, and {at.keeps_gradients}, or use "
            "train.execution: plain."
        )
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
    if mode == "project" and at.clips and at.clip == "full" and at.micro_batches * at.processes > 1:
        return (
            "optimizer.clip: full needs the norm of the whole step's gradient, which train.execution: project never "
            "holds over several micro-batches or processes. Use optimizer.clip: applied or tensor, or "
            "train.execution: plain."
        )
    return None


def chosen_mode(requested: Requested, at: Situation) -> Mode:
    """auto: fused where it holds one gradient at a time and can clip as asked, else project or plain.

    Raises RefusedError for a way that was asked for by name and cannot give what is asked for.
    """
    if requested != "auto":
        if (reason := objection(requested, at)) is not None:
            raise RefusedError(reason)
        return requested
    if at.fused_holds_one_gradient and objection("fused", at) is None:
        return "fused"
    return "project" if objection("project", at) is None else "plain"
