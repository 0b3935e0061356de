"""All the dotted keys there are, and where a key that does not exist was probably meant to go."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any

from lowmem.recipe.foreign import FOREIGN_NAMES
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.problems import Place, Problems, shown
from lowmem.recipe.schema import OptimizerRecipe, Recipe
from lowmem.recipe.suggest import closest, closest_answer
from lowmem.recipe.values import members_of


def section_of(annotation: Any) -> type[Any] | None:
    """The dataclass in `X` or `X | None`, or None for a plain value."""
    for each in members_of(annotation):
        if isinstance(each, type) and is_dataclass(each):
            return each
    return None


@functools.cache
def annotations_of(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def schema_keys(section: type = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """(dotted key, annotation, dataclass field) of every key, sections before their keys."""
    for each in fields(section):
        if section is OptimizerRecipe and each.name == "settings":
            continue
        annotation = annotations_of(section)[each.name]
        yield prefix + each.name, annotation, each
        inner = section_of(annotation)
        if inner is not None:
            yield from schema_keys(inner, f"{prefix}{each.name}.")


@functools.cache
def every_dotted_key() -> tuple[str, ...]:
    settings = dict.fromkeys(name for entry in optimizer_table().values() for name in entry["settings"])
    return (*(dotted for dotted, _, _ in schema_keys()), *(f"optimizer.{name}" for name in settings))


def report_unknown_key(
    section: str, key: str, is_section: bool, allowed: Iterable[str], place: Place, problems: Problems
) -> None:
    """`section` is dotted ('' at the top); `allowed` are the names it knows."""
    allowed = list(allowed)
    dotted = f"{section}.{shown(key)}" if section else (shown(key) or '""')
    if key in every_dotted_key() and "." in key:
        parent, _, name = key.rpartition(".")
        problems.add(place, f"{dotted} is not a key: a recipe is nested. Write {name} inside {parent}:.")
        return
    meant = _meant(section, key, is_section, allowed)
    if meant:
        problems.add(place, f"{dotted} is not a key. Did you mean {meant}?")
    else:
        where = f"Keys of {section}" if section else "Keys at the top level"
        problems.add(place, f"{dotted} is not a key. {where}: {', '.join(allowed)}.")


def _meant(section: str, key: str, is_section: bool, allowed: list[str]) -> str | None:
    def here(name: str | None) -> str | None:
        return name and (f"{section}.{name}" if section else name)

    others = [dotted for dotted in every_dotted_key() if dotted.rpartition(".")[0] != section]
    elsewhere = [dotted for dotted in others if dotted.rpartition(".")[2] == key]
    typo = closest(key, allowed, cutoff=0.8)
    plain = key.lower().replace("-", "_")
    foreign = FOREIGN_NAMES.get(f"{section}.{plain}") or FOREIGN_NAMES.get(plain)
    if is_section:  # `optim:` with keys under it is a misspelt section, not the other tools' optim
        return here(typo) or here(closest(key, allowed)) or foreign
    return (
        foreign
        or here(typo)
        or " or ".join(elsewhere[:3])
        or here(closest(key, allowed))
        or closest_answer(key, {dotted.rpartition(".")[2]: dotted for dotted in others}, cutoff=0.75)
    )
