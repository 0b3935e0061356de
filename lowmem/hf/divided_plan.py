"""`lowmem.plan(..., world=N)`: what each of several processes needs, by formula."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lowmem.errors import RecipeError, RefusedError
from lowmem.hf.conditions import conditions
from lowmem.hf.config_file import config_file
from lowmem.hf.launch import SHARDED, refuse_what_pieces_cannot_do
from lowmem.memory.architecture import Architecture
from lowmem.memory.cards import Card, fits
from lowmem.memory.divided_estimate import DividedEstimate, divided_estimate
from lowmem.memory.divided_pieces import STRATEGIES, Strategy
from lowmem.memory.document import HEADLINE
from lowmem.memory.plan_document import Change, MemoryPlan, Moment, plan_document
from lowmem.memory.readings import Measured
from lowmem.recipe.schema import OptimizerRecipe, Recipe

LARGEST_WORLD = 16384

NOTES = (
    "the plan by formula is of the fullest process; a simulation, which lowmem plan makes without --world, is of one "
    "device",
    "unknown and not in these numbers: NCCL's buffers, and what a process holds while it loads the model. Temporary "
    "has bounds from reading the libraries' code; no GPU was used",
)


def divided_plan(
    recipe: Recipe, device: Card | None, world: int, strategy: str | None, *, full_rows: bool
) -> MemoryPlan:
    """Raises RecipeError for a number of processes or a strategy that is none, RefusedError for one that the recipe
    cannot be trained by and for what has no formula."""
    chosen = _strategy(recipe, world, strategy)
    _refuse(recipe, chosen)
    architecture = Architecture.from_config(config_file(recipe.model))
    found = divided_estimate(recipe, architecture, chosen, world, masked=not full_rows)
    at = found.fullest.conditions
    moment = Moment(
        "step", found.fullest.peak_bytes, dict(found.fullest.parts), found.fullest.phase, "", found.held
    )
    document = plan_document(
        _measured(found),
        [moment],
        conditions(
            recipe,
            parameters=at["parameters"],
            trained_parameters=at["trained_parameters"],
            sequence_length=at["sequence_length"],
            device="cuda",
            world_size=world,
            torch=None,
        ),
        card=device,
        baselines=_adamw(recipe, architecture, chosen, world, full_rows),
        checkpoint=None,
        changes=_changes(recipe, architecture, device, found, chosen, world, full_rows),
        notes=NOTES,
        pinned_host_bytes=found.fullest.pinned_host_bytes,
    )
    return MemoryPlan(document | {"processes": _processes(found, chosen, world)})


def _strategy(recipe: Recipe, world: int, strategy: str | None) -> Strategy:
    if not 1 <= world <= LARGEST_WORLD:
        raise RecipeError(
            f"--world {world}: the number of processes, one a GPU, is from 1 to {LARGEST_WORLD}."
        )
    wanted = strategy or recipe.distributed.strategy
    for known in STRATEGIES:
        if wanted == known:
            return known
    if strategy is not None:
        raise RecipeError(f"--strategy {strategy} is not known; strategies are {', '.join(STRATEGIES)}.")
    raise RecipeError(
        "distributed.strategy is auto, which takes what the launcher starts; a plan needs a name. "
        f"Add --strategy with one of {', '.join(STRATEGIES)}."
    )


def _refuse(recipe: Recipe, strategy: Strategy) -> None:
    if recipe.model.weights == "int8" and strategy not in SHARDED:
        raise RefusedError(
            "model.weights: int8 has no formula, and so no plan for several processes. Leave out --world: under ddp "
            "each needs what the simulation of one device says, and buckets of the gradients that are reduced."
        )
    if strategy in SHARDED:
        refuse_what_pieces_cannot_do(recipe, strategy)


def _processes(found: DividedEstimate, strategy: Strategy, world: int) -> dict[str, Any]:
    return {
        "world": world,
        "strategy": strategy,
        "optimizer_state_bytes": {"least": min(found.state), "most": max(found.state)},
        "matrices_updated": {"least": min(found.matrices), "most": max(found.matrices)},
        "matrices_by_rows": found.by_rows,
        "sent_bytes_a_step": {
            "for_matrices": {"least": min(found.sent), "most": max(found.sent)},
            "by_the_strategy": found.strategy_sent,
        },
    }


def _adamw(
    recipe: Recipe, architecture: Architecture, strategy: Strategy, world: int, full_rows: bool
) -> dict[str, Measured | str]:
    """Under the same strategy."""
    adamw = OptimizerRecipe(name="adamw", settings={"lr": 1e-4, "rounding": "nearest"})
    plain = replace(recipe, optimizer=adamw, train=replace(recipe.train, execution="plain"))
    return {HEADLINE: _measured(divided_estimate(plain, architecture, strategy, world, masked=not full_rows))}


def _changes(
    recipe: Recipe,
    architecture: Architecture,
    device: Card | None,
    found: DividedEstimate,
    strategy: Strategy,
    world: int,
    full_rows: bool,
) -> list[Change]:
    """For each strategy that the recipe can use the fewest processes, doubled, with which it fits."""
    if device is None or fits(found.fullest.reserved_bytes, device.memory_bytes):
        return []
    changes = []
    for other in STRATEGIES:
        for number in _doubled(world, begins_above=other == strategy):
            try:
                _refuse(recipe, other)
                fullest = divided_estimate(recipe, architecture, other, number, masked=not full_rows).fullest
            except RefusedError:
                break
            if fits(fullest.reserved_bytes, device.memory_bytes):
                overrides = [f"--strategy {other}", f"--world {number}"]
                changes.append(Change(overrides, fullest.peak_bytes, fullest.reserved_bytes))
                break
            if other == "ddp":
                break
    return changes


def _doubled(world: int, *, begins_above: bool) -> Iterator[int]:
    number = 2 * world if begins_above else world
    while number <= 1024:
        yield number
        number *= 2


def _measured(found: DividedEstimate) -> Measured:
    fullest = found.fullest
    return Measured(fullest.peak_bytes, fullest.reserved_bytes, dict(fullest.parts), 1, "formula")
