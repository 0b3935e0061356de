"""`lowmem train`: the whole run of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.cli.arguments import Arguments
from lowmem.recipe.load import load_recipe
from lowmem.run.one_voice import all_or_none, one_tells


def run(arguments: Sequence[str]) -> int:
    parser = Arguments(
        "train",
        "Fine-tune the model of a recipe; Ctrl-C saves a checkpoint that the same command continues from. "
        "For several GPUs: accelerate launch -m lowmem.train RECIPE [a.b=c ...]",
    )
    parser.add_recipe()
    parser.add_overrides()
    options = parser.read(arguments)
    with one_tells(), all_or_none():
        recipe = load_recipe(options.recipe, options.overrides)
    from lowmem.hf.flow import train

    return train(recipe)
