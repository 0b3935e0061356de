"""`a.b=c` of the command line, laid over the tree of a file.

The value is read as YAML. Sections on the way are created, the last word on a key wins, and
`a.b=null` takes a value away. Two overrides also clear what they replace in the file, so that they can
be used alone: a new kind of data source (`data.train.path=...` over a recipe with `builtin:`) drops the
keys of the old kind, and a new `optimizer.name` drops the settings that only the old algorithm has and the groups
that name no optimizer of their own. Keys given on the command line are never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowmem.errors import RecipeError
from lowmem.recipe.combinations import KEYS_OF_SOURCE, KINDS_OF_SOURCE, given
from lowmem.recipe.node import Node
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.problems import Place, Problems, shown
from lowmem.recipe.tree import parse_value

OPTIMIZER_SECTIONS = ("optimizer", "optimizer.fallback", "optimizer.head")
"""Those whose `name` is an optimizer's and whose other keys are its settings."""

DOTTED_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def apply_overrides_(root: Node, overrides: Sequence[str], problems: Problems) -> None:
    """Changes `root`, whose value is a section; whatever is wrong is added to `problems`."""
    kinds_in_file = {section: _kinds(given(root, section)) for section in ("data.train", "data.eval")}
    names_in_file = {section: _name(given(root, section)) for section in OPTIMIZER_SECTIONS}
    for override in overrides:
        place = Place(f"command line: {shown(override)}", None)
        parsed = _parsed(override, place, problems)
        if parsed is not None:
            _set_(root, *parsed, problems)
    for section, kinds in kinds_in_file.items():
        _drop_replaced_source_(given(root, section), kinds)
    for section, name in names_in_file.items():
        _drop_replaced_settings_(given(root, section), name)


def _parsed(override: str, place: Place, problems: Problems) -> tuple[str, Node] | None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if key.startswith("-"):
        problems.add(
            place, "is no option. Keys of the recipe are set without dashes, as in optimizer.lr=1e-4."
        )
    elif not equals:
        problems.add(place, "is not of the form key=value, as in optimizer.lr=1e-4 (no blanks around the =).")
    elif not DOTTED_KEY.fullmatch(key):
        problems.add(place, "has no dotted key before the =, as in optimizer.lr=1e-4.")
    elif not text.strip():
        problems.add(place, f"has no value. Write {key}=null to take a value away.")
    else:
        try:
            return key, parse_value(text, place, problems)
        except RecipeError as error:
            reason = str(error).removeprefix(f"{place}: ").split(". Put text")[0].removesuffix(".")
            hint = f"Put text with special characters in quotes twice: '{key}=\"...\"'."
            problems.add(place, f"{reason}. {hint}")
    return None


def _set_(root: Node, key: str, value: Node, problems: Problems) -> None:
    *parents, name = key.split(".")
    section = root
    for parent in parents:
        child = section.value.get(parent)
        if child is None or child.value is None:
            child = section.value[parent] = Node({}, value.place)
        if not isinstance(child.value, dict):
            message = f"{parent} is {child.found()} ({child.place}), not a section that has keys."
            problems.add(value.place, message)
            return
        section = child
    section.value[name] = value


def _kinds(source: Node | None) -> list[str]:
    return [kind for kind in KINDS_OF_SOURCE if source and given(source, kind)]


def _drop_replaced_source_(source: Node | None, kinds_in_file: list[str]) -> None:
    new = [kind for kind in _kinds(source) if source and source.value[kind].place.is_command_line]
    if source is None or len(new) != 1 or new == kinds_in_file:
        return
    replaced = {key for kind in kinds_in_file if kind != new[0] for key in KEYS_OF_SOURCE[kind]}
    kept = ("take", "format") if new[0] in ("path", "hub") else ("take",)
    for key in replaced.difference(kept):
        _drop_if_from_file_(source, key)


def _name(section: Node | None) -> str | None:
    name = given(section, "name") if section else None
    return name.value if name and isinstance(name.value, str) else None


def _drop_replaced_settings_(section: Node | None, name_in_file: str | None) -> None:
    new, table = _name(section), optimizer_table()
    if section is None or new == name_in_file or new not in table or name_in_file not in table:
        return
    for key in table[name_in_file]["settings"]:
        if key not in table[new]["settings"]:
            _drop_if_from_file_(section, key)
    groups = given(section, "groups")
    if groups is not None and isinstance(groups.value, list):
        groups.value = [
            each for each in groups.value if each.place.is_command_line or given(each, "name") is not None
        ]


def _drop_if_from_file_(section: Node, key: str) -> None:
    child = section.value.get(key)
    if child is not None and not child.place.is_command_line:
        del section.value[key]
