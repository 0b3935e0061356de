"""What `lowmem compare --with` names: optimizers, each with settings of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lowmem.errors import RecipeError
from lowmem.memory.comparison import RECIPE, TORCH_ADAMWS, Method
from lowmem.recipe.load import load_recipe
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.problems import shown
from lowmem.recipe.schema import Recipe
from lowmem.recipe.suggest import did_you_mean

Say = Callable[[str], Any]

SETTINGS_OF_TORCH = ("lr", "weight_decay")
HEAD = re.compile(r"\s*([\w.-]+)\s*(=|:|$)")


def read_methods(
    recipe: Recipe, path: str, overrides: Sequence[str], wanted: Sequence[str], *, say: Say
) -> list[Method]:
    """The recipe's own optimizer and those of --with; one that is named twice is measured once.

    Raises RecipeError with every problem of --with, settings checked as those of a recipe are.
    """
    methods, problems = [Method(RECIPE, recipe)], []
    try:
        named = [each for text in wanted for each in names_and_settings(text)]
    except RecipeError as error:
        raise RecipeError(f"lowmem compare: {error}") from error
    if not named:
        raise RecipeError(f"lowmem compare: --with names no optimizer. Known: {', '.join(_known())}.")
    for name, settings in named:
        label = name + (f":{','.join(settings)}" if settings else "")
        try:
            method = _method(label, name, settings, recipe, path, overrides)
        except RecipeError as error:
            problems += [f"lowmem compare: --with {shown(label)}: {problem}" for problem in error.problems]
            continue
        same = next((each for each in methods if _is_same(each, method)), None)
        if same is None:
            methods.append(method)
        elif name != RECIPE:
            say(f"{label} is the same as {same.title}, and is measured once")
    if problems:
        raise RecipeError(problems)
    return methods


def names_and_settings(text: str) -> Iterator[tuple[str, list[str]]]:
    """("galore", ["lr=1e-3", "rank=64"]) and so on, of "galore:lr=1e-3,rank=64,adamw"."""
    name = ""
    settings: list[str] = []
    for piece in _pieces(text):
        head = HEAD.match(piece)
        if head is None:
            raise RecipeError(f"--with {shown(text)}: {shown(piece)} is neither a name nor key=value.")
        if head[2] != "=":
            if name:
                yield name, settings
            name, settings = head[1], []
            piece = piece[head.end() :]
        elif not name:
            raise RecipeError(
                f"--with {shown(text)}: {shown(piece)} stands before any name. Write galore:{shown(piece)}."
            )
        if piece.strip():
            settings.append(piece.strip())
    if name:
        yield name, settings


def _pieces(text: str) -> list[str]:
    """`text` divided at its commas, but not at those inside brackets; empty pieces are left out."""
    pieces, depth = [""], 0
    for char in text:
        depth += (char in "[{(") - (char in ")}]")
        if char == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += char
    return [piece for piece in pieces if piece.strip()]


def _known() -> list[str]:
    return [RECIPE, *optimizer_table(), *TORCH_ADAMWS]


def _method(
    label: str, name: str, settings: list[str], recipe: Recipe, path: str, overrides: Sequence[str]
) -> Method:
    """`settings` are laid over the recipe's where that has the same optimizer, else over the defaults."""
    own = recipe.optimizer
    if name not in _known():
        raise RecipeError(
            f"{shown(name)} is no optimizer.{did_you_mean(name, _known())} Known: {', '.join(_known())}."
        )
    section: dict[str, object] = {"name": name, "lr": own.settings["lr"], "target": own.target}
    if name in TORCH_ADAMWS:
        section = {"name": "adamw", "lr": own.settings["lr"]}
        section["weight_decay"] = own.settings.get("weight_decay", 0.0)  # as in the report of a run
        for setting in settings:
            if (key := setting.partition("=")[0].strip()) not in SETTINGS_OF_TORCH:
                raise RecipeError(
                    f"{shown(key)} is no setting of {name}. It is torch's own and takes "
                    f"{' and '.join(SETTINGS_OF_TORCH)}."
                )
    replaced = [] if name in (RECIPE, own.name) else [f"optimizer={json.dumps(section)}"]
    changed = [f"optimizer.{setting}" for setting in settings]
    if any(setting.startswith("name=") for setting in settings):
        raise RecipeError(f"the name stands before the colon. Write {settings[0].partition('=')[2]} there.")
    return Method(
        label,
        load_recipe(path, [*overrides, *replaced, *changed]),
        torch_variant=name if name in TORCH_ADAMWS else None,
    )


def _is_same(one: Method, other: Method) -> bool:
    return one.recipe.optimizer == other.recipe.optimizer and one.torch_variant == other.torch_variant
