"""The recipe's optimizer over a model's trainable parameters."""

from __future__ import annotations

from torch import nn

from lowmem.errors import RecipeError
from lowmem.numerics.held_weights import nbytes_of, numel_of
from lowmem.optim import LowMemOptimizer, build_optimizer
from lowmem.optim.registry import optimizer_class
from lowmem.recipe.half_life import with_beta2
from lowmem.recipe.schema import Recipe


def make_optimizer(
    model: nn.Module, recipe: Recipe, *, tokens_per_step: float | None = None
) -> LowMemOptimizer:
    """tokens_per_step: what a half-life in tokens is divided by; without it, beta2 is the default one.

    Raises RecipeError for settings that do not fit the model, such as a target without a match.
    """
    chosen = recipe.optimizer
    if tokens_per_step is not None:
        rest = "adamw" if optimizer_class(chosen.name).treats_matrices else None
        chosen = with_beta2(chosen, tokens_per_step, rest=rest)
    settings = {"seed": recipe.train.seed, **chosen.settings}
    try:
        return build_optimizer(
            model,
            chosen.name,
            target=chosen.target,
            fallback=chosen.fallback,
            head=chosen.head,
            groups=chosen.groups,
            **settings,
        )
    except ValueError as error:
        raise RecipeError(f"optimizer: {error}") from error


def trainable_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that an optimizer updates."""
    return sum(nbytes_of(param) for param in model.parameters() if param.requires_grad)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters; a tied one counts once."""
    return sum(nbytes_of(param) for param in model.parameters())


def float_bytes(model: nn.Module) -> int:
    """Bytes of all parameters when those in int8 are written in the dtype that they compute in."""
    return sum(numel_of(param) * param.dtype.itemsize for param in model.parameters())
