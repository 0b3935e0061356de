"""`lowmem.plan`: will it fit, byte by byte, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem.errors import RecipeError, RefusedError
from lowmem.hf.conditions import conditions
from lowmem.hf.config_file import config_file
from lowmem.hf.divided_plan import divided_plan
from lowmem.memory.architecture import Architecture
from lowmem.memory.cards import Card, card, fits
from lowmem.memory.document import BASELINES
from lowmem.memory.estimate import Estimate, estimate, estimate_baseline
from lowmem.memory.plan_document import Change, MemoryPlan, Moment, plan_document
from lowmem.memory.readings import Measured
from lowmem.memory.search import changes_that_fit, search
from lowmem.memory.search_text import search_document
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe

COMPARED = (*BASELINES, "adamw_fp32_master", "bitsandbytes_adamw8bit", "lora_r16", "qlora_r16")


def plan(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    gpu: str | None = None,
    full_rows: bool = False,
    formula: bool = False,
    world: int | None = None,
    strategy: str | None = None,
) -> MemoryPlan:
    """What training `recipe` takes on a GPU, from its model's configuration alone: no weights, no data are read.

    gpu: a size (12GiB) or a card's name (rtx4070), by default the GPU of this machine; with it the plan says
    whether the run fits and, where it does not, which changes would make it. full_rows: rows that need
    neither padding nor packing, so that attention needs no mask. formula: an estimate in a second or two, for
    the families of decoders it knows, instead of a simulation of the steps. world: processes that train together; the
    plan is then of the fullest of them, by formula, under `strategy`, by default the recipe's distributed.strategy.

    The peak and its parts are those of training, as a run measures them; whether it fits is asked of all that
    is simulated, evaluations included.

    Raises RecipeError for a recipe, card or configuration that is wrong, RefusedError for a model that cannot
    be simulated or has no formula.
    """
    device = None if gpu is None else card(gpu)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides, files_must_exist=False)
    if world is not None:
        return divided_plan(recipe, device, world, strategy, full_rows=full_rows)
    if strategy is not None:
        raise RecipeError(f"--strategy {strategy} needs the number of processes: --world 8.")
    return (
        _plan_by_formula(recipe, device, full_rows)
        if formula
        else _plan_by_simulation(recipe, device, full_rows)
    )


def what_fits(recipe: Recipe, *, gpu: str, full_rows: bool = False) -> dict[str, Any]:
    """For every method, the longest row and the largest batches that fit the card, by formula; JSON values."""
    device = card(gpu)
    architecture = Architecture.from_config(config_file(recipe.model))
    found = search(recipe, architecture, device.memory_bytes, masked=not full_rows)
    at = {"model": recipe.model.name_or_path, "dtype": recipe.model.dtype, "attention_mask": not full_rows}
    return search_document(found, device, at)


def _plan_by_simulation(recipe: Recipe, device: Card | None, full_rows: bool) -> MemoryPlan:
    from lowmem.hf.simulated_plan import (
        checkpoint_of,
        fullest_step,
        planned_conditions,
        simulated_plan,
        this_machines_card,
    )

    device = device or this_machines_card()
    run = simulated_plan(recipe, full_rows=full_rows)
    planned = fullest_step(run)
    try:
        architecture = Architecture.from_config(config_file(recipe.model))
    except RefusedError as unknown:
        baselines: Mapping[str, Measured | str] = dict.fromkeys(
            COMPARED, f"no formula for this model ({unknown})"
        )
        changes: list[Change] = []
    else:
        baselines = _baselines(recipe, architecture, full_rows)
        changes = _changes(recipe, architecture, device, planned, full_rows)
    return MemoryPlan(
        plan_document(
            planned,
            run.moments,
            planned_conditions(recipe, run, full_rows=full_rows),
            card=device,
            baselines=baselines,
            checkpoint=checkpoint_of(recipe, run),
            changes=changes,
            notes=run.notes,
            pinned_host_bytes=run.pinned_host_bytes,
        )
    )


def _plan_by_formula(recipe: Recipe, device: Card | None, full_rows: bool) -> MemoryPlan:
    if recipe.model.weights == "int8":
        raise RefusedError(
            "model.weights: int8 has no formula. Leave out --formula: its steps are simulated."
        )
    architecture = Architecture.from_config(config_file(recipe.model))
    masked = not full_rows
    found = estimate(recipe, architecture, masked=masked)
    planned = _measured(found)
    return MemoryPlan(
        plan_document(
            planned,
            [Moment("step", found.peak_bytes, dict(found.parts), found.phase, "", [])],
            conditions(
                recipe,
                parameters=found.conditions["parameters"],
                trained_parameters=found.conditions["trained_parameters"],
                sequence_length=found.conditions["sequence_length"],
                device="cuda",
                torch=None,
            ),
            card=device,
            baselines=_baselines(recipe, architecture, full_rows),
            checkpoint=None,
            changes=_changes(recipe, architecture, device, planned, full_rows),
            notes=[],
            pinned_host_bytes=found.pinned_host_bytes,
        )
    )


def _baselines(recipe: Recipe, architecture: Architecture, full_rows: bool) -> dict[str, Measured | str]:
    return {
        name: _measured(estimate_baseline(name, recipe, architecture, masked=not full_rows))
        for name in COMPARED
    }


def _changes(
    recipe: Recipe, architecture: Architecture, device: Card | None, planned: Measured, full_rows: bool
) -> list[Change]:
    if device is None or planned.reserved_bytes is None or fits(planned.reserved_bytes, device.memory_bytes):
        return []
    return changes_that_fit(
        recipe,
        architecture,
        device.memory_bytes,
        masked=not full_rows,
        planned_reserved_bytes=planned.reserved_bytes,
    )


def _measured(found: Estimate) -> Measured:
    return Measured(found.peak_bytes, found.reserved_bytes, dict(found.parts), 1, "formula")
