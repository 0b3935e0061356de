"""What fits a card: the longest sequences and the largest batches of each method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lowmem.memory.architecture import Architecture
from lowmem.memory.cards import margin_bytes
from lowmem.memory.estimate import estimate_method
from lowmem.memory.estimate_method import BASELINES, Method, baseline_method, recipe_method
from lowmem.memory.search_changes import LENGTH_STEP, changes_that_fit, largest, with_optimizer
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import Recipe

__all__ = ["Found", "changes_that_fit", "search"]

LENGTHS = (512, 1024, 2048)
"""At which the largest batch is looked for."""

LONGEST, LARGEST_BATCH = 2**20, 2**12


@dataclass(frozen=True)
class Found:
    """What one method reaches on a card with the leanest execution and the chunked loss."""

    method: str
    """An optimizer's name, or one of BASELINES."""
    activation_checkpointing: bool
    longest: int
    """Tokens of one row; a multiple of LENGTH_STEP, 0 where none fits."""
    batches: dict[int, int]
    """Length -> the most rows at once, 0 where none fits or the model does not know so long a sequence."""


def search(
    recipe: Recipe, architecture: Architecture, card_bytes: int, *, masked: bool = True
) -> list[Found]:
    """Every optimizer and baseline, with and without activation checkpointing, without accumulation.

    The recipe's own optimizer keeps its settings; another one shares those that it has too. Each gradient is used
    and freed as it arrives, so it is clipped by itself. A recipe with `lora` is searched with its adapters.
    """
    recipe = leanest_execution(recipe)
    methods: dict[str, Method] = {
        name: recipe_method(with_optimizer(recipe, name), architecture, on_cuda=True)
        for name in optimizer_table()
    }
    methods |= {name: baseline_method(name, recipe, architecture) for name in BASELINES}
    return [
        _found(
            name, method, _with_train(recipe, activation_checkpointing=on), architecture, card_bytes, masked
        )
        for name, method in methods.items()
        for on in (False, True)
    ]


def leanest_execution(recipe: Recipe) -> Recipe:
    """The recipe with one micro-batch, chunked loss, and each gradient clipped by itself, so `auto` takes fused."""
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, clip="tensor"))
    return _with_train(recipe, gradient_accumulation_steps=1, loss="chunked", execution="auto")


def _found(
    name: str, method: Method, recipe: Recipe, architecture: Architecture, card_bytes: int, masked: bool
) -> Found:
    limit = architecture.longest or LONGEST

    def room(tokens: int, rows: int) -> int:
        work = _with_train(recipe, per_device_batch_size=rows)
        needed = estimate_method(method, work, architecture, sequence_length=tokens, masked=masked)
        return margin_bytes(needed.reserved_bytes, card_bytes)

    longest = LENGTH_STEP * largest(lambda steps: room(LENGTH_STEP * steps, 1), limit // LENGTH_STEP)
    batches = {
        tokens: 0 if tokens > longest else largest(partial(room, tokens), LARGEST_BATCH) for tokens in LENGTHS
    }
    return Found(name, recipe.train.activation_checkpointing, longest, batches)


def _with_train(recipe: Recipe, **keys: Any) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **keys))
