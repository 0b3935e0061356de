"""`lowmem show`: a recipe as written, as it comes out with every default, or every key there is."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_json
from lowmem.cli.schema_text import schema_document, schema_text
from lowmem.errors import RecipeError
from lowmem.recipe.dump import dump_recipe, recipe_document
from lowmem.recipe.load import load_recipe
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.schema import OptimizerRecipe
from lowmem.recipe.source_text import read_recipe_text


def run(arguments: Sequence[str]) -> int:
    parser = Arguments("show", "Print a recipe as it is written; --json gives the checked, resolved one.")
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a recipe file, or a name of lowmem ls recipes"
    )
    parser.add_overrides()
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resolved", action="store_true", help="check it and print every key, defaults too")
    how.add_argument("--schema", action="store_true", help="print every key, its type, default and meaning")
    parser.add_json()
    options = parser.read(arguments)
    if options.schema and options.json:
        print_json(schema_document())
    elif options.schema:
        print(schema_text())
    elif options.recipe is None:
        raise RecipeError("lowmem show: name a recipe (lowmem ls recipes lists them), or ask for --schema.")
    elif options.json:
        print_json(recipe_document(load_recipe(options.recipe, options.overrides)))
    elif options.resolved:
        recipe = load_recipe(options.recipe, options.overrides)
        print(dump_recipe(recipe) + _left_at_defaults(recipe.optimizer))
    elif options.overrides:
        raise RecipeError(
            f"lowmem show: {options.overrides[0]} changes the recipe; add --resolved to see it."
        )
    else:
        print(read_recipe_text(options.recipe)[1].rstrip("\n"))
    return 0


def _left_at_defaults(optimizer: OptimizerRecipe) -> str:
    """A comment; as keys they would hide that optimizer.seed follows train.seed unless it is written."""
    known = optimizer_table()[optimizer.name]["settings"]
    left = {name: entry["default"] for name, entry in known.items() if name not in optimizer.settings}
    left.pop("seed", None)
    if not left:
        return ""
    text = yaml.safe_dump(left, default_flow_style=None, sort_keys=False)
    lines = "".join(f"#   {line}\n" for line in text.splitlines())
    return f"# Settings of {optimizer.name} that the recipe leaves at their defaults:\n{lines}".rstrip("\n")
