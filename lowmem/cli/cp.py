"""`lowmem cp`: a shipped recipe as a file of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowmem.cli.arguments import Arguments
from lowmem.cli.output import print_json
from lowmem.errors import FaultError, RecipeError
from lowmem.recipe.source_text import read_recipe_text


def run(arguments: Sequence[str]) -> int:
    parser = Arguments("cp", "Copy a recipe, to change it. A file that exists is never overwritten.")
    parser.add_recipe()
    parser.add_argument("destination", metavar="DEST", help="the new file, or a folder to put it in")
    parser.add_json()
    options = parser.read(arguments)
    source, text = read_recipe_text(options.recipe)
    destination = Path(options.destination)
    if destination.is_dir():
        destination = destination / Path(source).name
    if not destination.parent.is_dir():
        raise RecipeError(f"{destination}: the folder {destination.parent} does not exist. Make it first.")
    try:
        with destination.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{destination}: exists and is not overwritten. Choose another name.") from None
    except OSError as error:
        raise FaultError(f"{destination}: cannot be written: {error.strerror}.") from None
    if options.json:
        print_json({"source": source, "destination": str(destination)})
    else:
        print(f"copied {source} to {destination}")
        print(f"Change it, then: lowmem train {destination}")
    return 0
