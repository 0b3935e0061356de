"""The text of a recipe file, or one clear sentence about why there is none."""

from __future__ import annotations

import os
from pathlib import Path

from lowmem.errors import RecipeError
from lowmem.recipe.shipped import find_recipe, recipes_near
from lowmem.recipe.suggest import closest, closest_answer

LARGEST_RECIPE_BYTES = 256 * 1024


def read_recipe_text(path: str | Path) -> tuple[str, str]:
    """The name to show in messages, and the text.

    `path` is a file, or the bare name of a shipped recipe (`quickstart`). Raises RecipeError when there
    is no such file or it is not UTF-8 text.
    """
    found = find_recipe(path)
    if found is None:
        raise RecipeError(_missing(str(path) or '""'))
    name = os.fspath(found)
    if found.is_dir():
        raise RecipeError(f"{name}: is a folder, not a recipe.{_one_of(recipes_near(found / 'x'))}")
    try:
        content = found.read_bytes()
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}.") from None
    if len(content) > LARGEST_RECIPE_BYTES:
        raise RecipeError(
            f"{name}:1: is {len(content):,} bytes long, too long for a recipe. Is it a data file? "
            "A recipe names its data under data.train.path."
        )
    return name, _decoded(name, content)


def _decoded(name: str, content: bytes) -> str:
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise RecipeError(
            f"{name}:{line}: holds a zero byte, so this is a binary file or UTF-16 text. "
            "A recipe is YAML; save it as UTF-8."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise RecipeError(
            f"{name}:{line}: byte 0x{byte:02x} is not UTF-8 text. A recipe is YAML; save it as UTF-8."
        ) from None


def _missing(path: str) -> str:
    near = recipes_near(Path(path))
    close = closest(path, near) or closest_answer(Path(path).name, {Path(each).name: each for each in near})
    if close:
        return f"{path}: there is no such file. Did you mean {close}?"
    return f"{path}: there is no such file.{_one_of(near)}"


def _one_of(recipes: list[str]) -> str:
    if not recipes:
        return " lowmem ls recipes lists the recipes that come with lowmem."
    more = ", ..." if len(recipes) > 8 else ""
    return f" Recipes near-by: {', '.join(recipes[:8])}{more}."
