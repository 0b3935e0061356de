"""What a number of memory.json depends on. Imports no torch."""

from __future__ import annotations

from typing import Any

from lowmem.recipe.schema import Recipe


def conditions(
    recipe: Recipe,
    *,
    parameters: int,
    trained_parameters: int,
    sequence_length: int,
    device: str,
    world_size: int = 1,
    torch: str | None,
) -> dict[str, Any]:
    """`sequence_length` is in tokens, padding included; `device` and `torch` name what it ran on, or is planned for.

    On a CPU activations are not offloaded, whatever the recipe says.
    """
    train = recipe.train
    return {
        "model": recipe.model.name_or_path,
        "parameters": parameters,
        "trained_parameters": trained_parameters,
        "dtype": recipe.model.dtype,
        "weights": recipe.model.weights,
        "optimizer": recipe.optimizer.name,
        "lora": recipe.lora is not None,
        "sequence_length": sequence_length,
        "per_device_batch_size": train.per_device_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "packing": recipe.data.packing,
        "activation_checkpointing": train.activation_checkpointing,
        "activation_offload": train.activation_offload and device != "cpu",
        "loss": train.loss,
        "attn": recipe.model.attn,
        "device": device,
        "world_size": world_size,
        "torch": torch,
    }
