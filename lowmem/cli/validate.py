"""`lowmem validate`: everything that is wrong with a recipe, or what it is going to do."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_columns, print_json
from lowmem.errors import RecipeError
from lowmem.recipe.load import load_recipe
from lowmem.recipe.schema import Recipe, SourceRecipe


def run(arguments: Sequence[str]) -> int:
    parser = Arguments("validate", "Check a recipe. Every problem is named with its line; loads no model.")
    parser.add_recipe()
    parser.add_overrides()
    parser.add_json()
    options = parser.read(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except RecipeError as error:
        if not options.json:
            raise
        print_json({"recipe": options.recipe, "valid": False, "problems": error.problems})
        return error.exit_code
    if options.json:
        print_json({"recipe": options.recipe, "valid": True, "problems": []})
        return 0
    print(f"{options.recipe} is valid.")
    print_columns(_summary(recipe))
    print("Start it: lowmem train " + " ".join([options.recipe, *options.overrides]))
    return 0


def _summary(recipe: Recipe) -> list[tuple[str, str]]:
    trained = "every parameter trained" if recipe.lora is None else f"LoRA adapters of rank {recipe.lora.r}"
    train = recipe.train
    length = f"{train.epochs:g} epoch{'' if train.epochs == 1 else 's'}"
    if train.max_steps:
        length = f"{train.max_steps} steps"
    batch = f"{train.per_device_batch_size} x {train.gradient_accumulation_steps} sequences a step and device"
    settings = ", ".join(f"{name} {value}" for name, value in recipe.optimizer.settings.items())
    held_out = f"; held out: {_source(recipe.data.eval)}" if recipe.data.eval else "; no held-out rows"
    return [
        ("model", f"{recipe.model.name_or_path}, {recipe.model.dtype}, {trained}"),
        ("data", f"{_source(recipe.data.train)}{held_out}"),
        ("optimizer", f"{recipe.optimizer.name}: {settings}"),
        ("length", f"{length}, {batch}, each up to {recipe.data.max_length} tokens"),
        ("run folder", str(recipe.save.dir)),
    ]


def _source(source: SourceRecipe) -> str:
    if source.builtin:
        return f"{source.builtin} ({source.split or 'train'}, generated)"
    return f"{source.path or source.hub} ({source.format})"
