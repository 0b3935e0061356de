"""LoRA's adapters, and a base in 4-bit codes, as parameters and bytes. Imports no torch."""

from __future__ import annotations

from lowmem.errors import RecipeError
from lowmem.memory.architecture import Architecture, Parameter
from lowmem.memory.ledger import rounded
from lowmem.recipe.schema import LoraRecipe


def lora_targets(lora: LoraRecipe, shape: Architecture) -> frozenset[str] | None:
    """Last names of the adapted layers, None for all linear ones."""
    if lora.target == "all-linear":
        return None
    names = [lora.target] if isinstance(lora.target, str) else lora.target
    known = {module_name(each) for each in shape.parameters if each.is_linear}
    last_names = frozenset(name.rpartition(".")[2] for name in names)
    if unknown := sorted(last_names - known):
        raise RecipeError(
            f"lora.target: {', '.join(unknown)} names no linear layer that the memory formulas know. "
            f"Allowed: all-linear, or names out of {', '.join(sorted(known))}."
        )
    return last_names


def adapted(shape: Architecture, targets: frozenset[str] | None) -> list[Parameter]:
    """The matrices that have adapters."""
    return [
        each
        for each in shape.parameters
        if each.is_linear and (targets is None or module_name(each) in targets)
    ]


def adapters_of(base: Parameter, rank: int) -> tuple[Parameter, Parameter]:
    """A (rank, inputs) and B (outputs, rank)."""
    outputs, inputs = base.shape
    path = base.name.removesuffix(".weight")
    return (
        Parameter(f"{path}.lora_A.weight", (rank, inputs), is_linear=True, layer=base.layer),
        Parameter(f"{path}.lora_B.weight", (outputs, rank), is_linear=True, layer=base.layer),
    )


def nf4_bytes(numel: int) -> int:
    """A packed matrix: its codes, their scales, the scales of those, and for each matrix two tables and an offset."""
    scales = -(-numel // 64)
    return sum(
        rounded(nbytes) for nbytes in (-(-numel // 2), scales, 4 * -(-scales // 256), 4 * 16, 4 * 256, 4)
    )


def module_name(parameter: Parameter) -> str:
    """q_proj for model.layers.0.self_attn.q_proj.weight."""
    return parameter.name.split(".")[-2]
