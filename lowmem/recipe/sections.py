"""A section of the tree against its dataclass: unknown keys, missing keys, wrong values, all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from lowmem.recipe.keys import annotations_of, report_unknown_key, section_of
from lowmem.recipe.node import Node
from lowmem.recipe.problems import Problems
from lowmem.recipe.values import Limits, NotAllowedError, expected, read_value

SectionReader = Callable[[Node, str, Problems], Any]


def read_section(
    section: type, node: Node, dotted: str, problems: Problems, special: Mapping[type, SectionReader]
) -> Any:
    """An instance of `section`, or None when something in it was wrong (then `problems` has grown).

    `special` holds the readers of sections whose keys are not all in the dataclass.
    """
    before = len(problems)
    known = {each.name: each for each in fields(section)}
    arguments: dict[str, Any] = {}
    for key, child in node.value.items():
        if key not in known:
            report_unknown_key(dotted, key, isinstance(child.value, dict), known, child.place, problems)
            continue
        annotation = annotations_of(section)[key]
        inner = section_of(annotation)
        name = f"{dotted}.{key}" if dotted else key
        if inner is None:
            arguments[key] = read_key(annotation, known[key].metadata, child, name, problems)
        else:
            arguments[key] = read_subsection(annotation, child, name, problems, special)
    for name, each in known.items():
        if name not in node.value and is_required(each):
            report_missing(f"{dotted}.{name}" if dotted else name, each, node, problems)
    return section(**arguments) if len(problems) == before else None


def read_key(annotation: Any, limits: Mapping[str, Any], node: Node, dotted: str, problems: Problems) -> Any:
    """The value of one key; None, and a problem added, when it is not allowed."""
    bounds = Limits.of(limits)
    try:
        return read_value(annotation, bounds, node)
    except NotAllowedError as hint:
        message = f"{dotted} is {node.found()}; it must be {expected(annotation, bounds)}."
        problems.add(node.place, f"{message} {hint}".rstrip())
        return None


def read_subsection(
    annotation: Any, node: Node, dotted: str, problems: Problems, special: Mapping[type, SectionReader]
) -> Any:
    section = section_of(annotation)
    assert section is not None
    is_optional = section is not annotation
    if node.value is None and node.text and is_optional:
        return None
    if is_section(node, section, dotted, is_optional, problems):
        if section in special:
            return special[section](node, dotted, problems)
        return read_section(section, node, dotted, problems, special)
    return None


def is_section(node: Node, section: type, dotted: str, is_optional: bool, problems: Problems) -> bool:
    """Whether `node` has keys under it; a problem is added when it does not."""
    if isinstance(node.value, dict):
        return True
    known = [each.name for each in fields(section) if each.name != "settings"]
    name = dotted.rpartition(".")[2]
    if node.value is None:
        mend = f"Delete the line, or give it keys: {', '.join(known)}."
        if is_optional:
            mend = f"Write {name}: {{}} for its defaults, or {name}: null to leave it out."
        if any(is_required(each) for each in fields(section)):
            mend = f"Its keys: {', '.join(known)}."
        problems.add(node.place, f"{dotted} is {node.found()}. {mend}")
        return False
    message = f"{dotted} is {node.found()}; it must be a section with keys: {', '.join(known)}."
    if "name" in known and isinstance(node.value, str):
        message += f" Write {name}: {{name: {node.found()}}}."
    problems.add(node.place, message)
    return False


def is_required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def report_missing(dotted: str, each: Field[Any], section: Node, problems: Problems) -> None:
    parent = dotted.rpartition(".")[0]
    where = f"under {parent}" if parent else "at the top level"
    problems.add(section.place, f"{dotted} is missing. Add it {where} ({each.metadata['doc']}).")
