"""A Trainer's optimizer on a model that Accelerate is about to divide."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowmem.errors import RefusedError
from lowmem.optim.engine import LowMemOptimizer
from lowmem.run.layouts.attach import StepsInPieces, attach_to_fsdp2, attach_to_zero


def in_pieces(
    trainer: Any, optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[StepsInPieces | None, str]:
    """The steps of `optimizer` in pieces, and what to say of them; None for one that is not ours, or attached already.

    Raises RefusedError for what pieces cannot do: FSDP's first version, another execution, clipping each gradient.
    """
    ours = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(ours, LowMemOptimizer):
        return None, "execution: plain"
    if trainer.requested_execution not in ("auto", "plain"):
        raise RefusedError(
            f"train.execution: {trainer.requested_execution} frees gradients before they are reduced over processes. "
            "Set train.execution: auto; a model in pieces has its gradients in pieces too."
        )
    if trainer.clip == "tensor" and trainer.args.max_grad_norm:
        raise RefusedError(
            "optimizer.clip: tensor needs whole gradients, and a process has pieces. Set optimizer.clip: full."
        )
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled and getattr(state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise RefusedError(
            "FSDP's first version has flat parameters that no rule for matrices can use. Set fsdp_version: 2."
        )
    if isinstance(ours.steps_in_pieces, StepsInPieces):
        return ours.steps_in_pieces, trainer.execution_summary
    steps = attach_to_zero(ours) if trainer.is_deepspeed_enabled else attach_to_fsdp2(ours, model)
    name = f"ZeRO-{state.deepspeed_plugin.zero_stage}" if trainer.is_deepspeed_enabled else "FSDP2"
    clips = "; max_grad_norm limits the norm of the whole gradients" if trainer.args.max_grad_norm else ""
    processes = trainer.args.world_size
    return steps, (
        f"execution: {name} over {processes} processes; a matrix is stepped whole at one of them, all else in pieces"
        f"{clips}"
    )
