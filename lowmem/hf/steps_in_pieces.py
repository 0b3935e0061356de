"""A Trainer's optimizer on a model that Accelerate is about to divide."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowmem.errors import RefusedError
from lowmem.optim.engine import LowMemOptimizer
from lowmem.run.layouts.attach import StepsInPieces, attach_to_fsdp2, attach_to_zero

REPLACES = "zero_force_ds_cpu_optimizer"


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
    if trainer.is_deepspeed_enabled:
        keep_optimizer_when_offloaded_(state.deepspeed_plugin.deepspeed_config)
    steps = attach_to_zero(ours) if trainer.is_deepspeed_enabled else attach_to_fsdp2(ours, model)
    name = f"ZeRO-{state.deepspeed_plugin.zero_stage}" if trainer.is_deepspeed_enabled else "FSDP2"
    clips = "; max_grad_norm limits the norm of the whole gradients" if trainer.args.max_grad_norm else ""
    processes = trainer.args.world_size
    return steps, (
        f"execution: {name} over {processes} processes; what needs a whole matrix is stepped at one of them"
        f"{clips}"
    )


def keep_optimizer_when_offloaded_(config: dict[str, Any]) -> None:
    """Accelerate replaces an optimizer whose state DeepSpeed keeps on the host by DeepSpeed's Adam, without a word.

    Raises RefusedError where DeepSpeed's configuration asks for that, and for weights or state that are offloaded to
    other places, which was never tried.
    """
    if config.get(REPLACES, False):
        raise RefusedError(
            f"{REPLACES}: true replaces the recipe's optimizer by DeepSpeed's Adam where its state is offloaded. Set "
            "it to false, or leave it out."
        )
    config[REPLACES] = False
    zero = config.get("zero_optimization", {})
    for key, known in (("offload_optimizer", ("none", "cpu")), ("offload_param", ("none",))):
        device = (zero.get(key) or {}).get("device") or "none"
        if device not in known:
            raise RefusedError(
                f"{key}: {{device: {device}}} was never tried. Set its device to {' or '.join(known)}; what works is "
                "offload_optimizer: {device: cpu}, or --offload_optimizer_device cpu."
            )
