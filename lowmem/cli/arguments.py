"""Command-line arguments of a verb: argparse, with errors that are printed like all others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from lowmem.errors import RecipeError

RECIPE = "a recipe file, or the name of one that comes with lowmem (lowmem ls recipes)"
OVERRIDE = "a key of the recipe and its new value, such as optimizer.lr=1e-4; null takes a value away"


class Arguments(argparse.ArgumentParser):
    """A parser that raises RecipeError instead of leaving the program, and lets options stand anywhere."""

    def __init__(self, verb: str, description: str):
        super().__init__(prog=f"lowmem {verb}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: -") and "." in message:
            hint = "Keys of the recipe are set without dashes, as in optimizer.lr=1e-4.\n"
        raise RecipeError(f"{self.prog}: {message}\n{hint}{self.format_usage().strip()}")

    def add_recipe(self) -> None:
        self.add_argument("recipe", metavar="RECIPE", help=RECIPE)

    def add_target(self) -> None:
        self.add_argument(
            "target",
            metavar="RUN_OR_RECIPE",
            help=f"a run folder, or, for the model before training, {RECIPE}",
        )

    def add_overrides(self) -> None:
        self.add_argument("overrides", metavar="a.b=c", nargs="*", default=[], help=OVERRIDE)

    def add_json(self) -> None:
        self.add_argument("--json", action="store_true", help="print the result as JSON")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        return self.parse_intermixed_args(list(arguments))
