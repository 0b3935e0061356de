"""What to say about the size of a step: tokens, the beta2 that they mean, and accumulation that nothing asks for."""

from __future__ import annotations

from collections.abc import Mapping

from lowmem.recipe.half_life import beta2_of, with_second_moment
from lowmem.recipe.schema import Recipe

PAPER = "Marek et al., arXiv:2507.07101"


def tokens_of_a_step(recipe: Recipe, rows: Mapping[str, int], world_size: int) -> float:
    """Tokens of a step on average; `rows` counts those of the training data, and their sequences."""
    train = recipe.train
    sequences = world_size * train.per_device_batch_size * train.gradient_accumulation_steps
    return sequences * rows["tokens"] / max(1, rows["sequences"])


def remarks(recipe: Recipe, tokens_per_step: float, world_size: int) -> list[str]:
    """Lines for the start of a run."""
    lines = []
    half_life = recipe.optimizer.beta2_half_life_tokens
    if half_life is not None:
        beta2 = beta2_of(half_life, tokens_per_step)
        lines.append(
            f"beta2 is {beta2:.6g}: a half-life of {half_life:,.0f} tokens at {tokens_per_step:,.0f} a step"
        )
    steps = recipe.train.gradient_accumulation_steps
    if world_size == 1 and steps > 1 and recipe.lora is None:
        keeps = ""
        if half_life is None and recipe.optimizer.name in with_second_moment():
            keeps = ", and optimizer.beta2_half_life_tokens in place of beta2"
        lines.append(
            f"gradient accumulation: {steps} micro-batches a step on one device. Small batches are reported to train "
            f"as well ({PAPER}), and a gradient can then be freed as it is used: try "
            f"train.gradient_accumulation_steps=1 with a smaller lr{keeps}."
        )
    return lines
