"""The recipes that come with lowmem, and how a bare name such as `quickstart` finds one."""

from __future__ import annotations

import os
from pathlib import Path

import lowmem


def shipped_folder() -> Path | None:
    """`recipes/` of the checkout, or of the working directory; None when neither is there.

    A wheel holds no recipes, and a folder that merely lies beside an installed package is somebody
    else's, hence the look at pyproject.toml.
    """
    checkout = Path(lowmem.__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "recipes").is_dir():
        return checkout / "recipes"
    working = Path.cwd() / "recipes"
    return working if working.is_dir() else None


LAUNCH_FILES = "accelerate"
"""The folder beside the recipes for Accelerate's launcher."""


def shipped_recipes() -> list[Path]:
    """Every shipped recipe, as short a path as names it from the working directory."""
    folder = shipped_folder()
    if folder is None:
        return []
    found = sorted(path for path in folder.rglob("*.yaml") if path.parent.name != LAUNCH_FILES)
    return [_short(path) for path in found]


def find_recipe(path: str | Path) -> Path | None:
    """The file that `path` names: itself where it exists, else the shipped recipe of that bare name."""
    if os.path.isfile(path):
        return Path(path)
    bare = os.fspath(path)
    if os.sep not in bare:
        for each in shipped_recipes():
            if bare in (each.stem, each.name):
                return each
    return Path(path) if os.path.lexists(path) else None


def recipes_near(path: Path) -> list[str]:
    """YAML files in the folder `path` would lie in, then the names of shipped recipes."""
    folder = path.parent
    beside: list[str] = []
    if os.path.isdir(folder):
        beside = sorted(str(each) for each in folder.iterdir() if each.suffix in (".yaml", ".yml"))
    shipped = [each.stem for each in shipped_recipes() if str(each) not in beside]
    return beside + shipped


def _short(path: Path) -> Path:
    working = Path.cwd()
    return path.relative_to(working) if path.is_relative_to(working) else path
