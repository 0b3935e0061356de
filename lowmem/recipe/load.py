"""A recipe file and the overrides of the command line to a checked `Recipe`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lowmem.errors import RecipeError
from lowmem.recipe.combinations import check_combinations
from lowmem.recipe.keys import schema_keys
from lowmem.recipe.optimizer_section import read_optimizer
from lowmem.recipe.overrides import apply_overrides_
from lowmem.recipe.problems import Problems
from lowmem.recipe.schema import OptimizerRecipe, Recipe
from lowmem.recipe.sections import read_section
from lowmem.recipe.source_text import read_recipe_text
from lowmem.recipe.tree import parse


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, files_must_exist: bool = True) -> Recipe:
    """The recipe in the file `path` (or the shipped recipe of that bare name) with `overrides`
    (`"optimizer.lr=1e-4"`) laid over it.

    `save.dir` is filled in (runs/<name of the file>). `files_must_exist=False` leaves data, template and
    checkpoint paths unchecked, for reading the recipe of a finished run whose data may be gone.
    Raises RecipeError with every problem of the file and the overrides, one line each:
    `recipes/x.yaml:14: optimizer.ranks is not a key. Did you mean optimizer.rank?`
    """
    source, text = read_recipe_text(path)
    problems = Problems()
    root = parse(text, source, problems)
    if not isinstance(root.value, dict):
        _refuse_as_recipe(source, root.value is None)
    apply_overrides_(root, overrides, problems)
    recipe = read_section(Recipe, root, "", problems, {OptimizerRecipe: read_optimizer})
    check_combinations(root, problems, files_must_exist=files_must_exist)
    problems.raise_if_any()
    if recipe.save.dir is None:
        recipe = replace(recipe, save=replace(recipe.save, dir=f"runs/{Path(source).stem}"))
    return recipe


def _refuse_as_recipe(source: str, is_empty: bool) -> None:
    found = "is empty" if is_empty else "holds a list or a single value, not keys"
    raise RecipeError(f"{source}:1: {found}. {_needed()}")


@functools.cache
def _needed() -> str:
    sections = ", ".join(dotted for dotted, _, _ in schema_keys() if "." not in dotted)
    return f"A recipe has the keys {sections}; lowmem show quickstart prints one."
