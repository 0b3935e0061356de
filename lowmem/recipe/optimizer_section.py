"""The `optimizer:` section: its own keys from the schema, all others from the chosen algorithm's table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal

from lowmem.recipe.keys import annotations_of, report_unknown_key
from lowmem.recipe.node import Node
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.problems import Problems, shown
from lowmem.recipe.schema import OptimizerRecipe
from lowmem.recipe.sections import read_key
from lowmem.recipe.suggest import closest, did_you_mean
from lowmem.recipe.values import Limits, expected

SCHEMA_KEYS = {each.name: each for each in fields(OptimizerRecipe) if each.name != "settings"}


def read_optimizer(node: Node, dotted: str, problems: Problems) -> OptimizerRecipe | None:
    """The section, or None when something in it was wrong (then `problems` has grown)."""
    before = len(problems)
    name = _read_name(node, dotted, problems)
    written = {key: child for key, child in node.value.items() if key not in SCHEMA_KEYS}
    settings = _read_settings(written, name, dotted, SCHEMA_KEYS, problems)
    if "lr" not in written:
        message = f"{dotted}.lr is missing. Add it under {dotted}:, for example lr: 1.0e-4."
        problems.add(node.place, message)
    arguments: dict[str, Any] = {}
    if "target" in node.value:
        annotation, metadata = annotations_of(OptimizerRecipe)["target"], SCHEMA_KEYS["target"].metadata
        child = node.value["target"]
        arguments["target"] = read_key(annotation, metadata, child, f"{dotted}.target", problems)
        if arguments["target"] == []:
            problems.add(child.place, f"{dotted}.target is empty. Name modules, as in [attn, mlp].")
    for key in ("clip", "refresh_from", "beta2_half_life_tokens"):
        if key in node.value:
            annotation, metadata = annotations_of(OptimizerRecipe)[key], SCHEMA_KEYS[key].metadata
            arguments[key] = read_key(annotation, metadata, node.value[key], f"{dotted}.{key}", problems)
    for key in ("fallback", "head"):
        if key in node.value:
            arguments[key] = _read_other(node.value[key], f"{dotted}.{key}", problems)
    if "groups" in node.value:
        arguments["groups"] = _read_groups(node.value["groups"], f"{dotted}.groups", name, problems)
    if len(problems) > before:
        return None
    return OptimizerRecipe(name=str(name), settings=settings, **arguments)


def _read_other(node: Node, dotted: str, problems: Problems) -> dict[str, Any] | None:
    """{name, settings as written}; lr may be left out and is then the main one."""
    if node.value is None:
        return None
    if not isinstance(node.value, dict):
        hint = f" Write {{name: {node.found()}}}." if isinstance(node.value, str) else ""
        message = f"{dotted} is {node.found()}; it must be a section with a name and settings, or null.{hint}"
        problems.add(node.place, message)
        return None
    name = _read_name(node, dotted, problems)
    written = {key: child for key, child in node.value.items() if key != "name"}
    return {"name": name, **_read_settings(written, name, dotted, ["name"], problems)}


def _read_groups(node: Node, dotted: str, main: str | None, problems: Problems) -> list[dict[str, Any]]:
    """[{match, settings as written}], with `name` where that is written."""
    if not isinstance(node.value, list):
        example = "[{match: [v_proj], lr: 1.0e-5}]"
        problems.add(
            node.place, f"{dotted} is {node.found()}; it must be a list of sections, as in {example}."
        )
        return []
    return [_read_group(each, f"{dotted}[{i}]", main, problems) for i, each in enumerate(node.value)]


def _read_group(node: Node, dotted: str, main: str | None, problems: Problems) -> dict[str, Any]:
    if not isinstance(node.value, dict):
        problems.add(node.place, f"{dotted} is {node.found()}; it must be a section with match and settings.")
        return {}
    if "match" not in node.value:
        message = (
            f"{dotted}.match is missing: parts of the names of the group's parameters, as in match: [v_proj]."
        )
        problems.add(node.place, message)
        return {}
    child = node.value["match"]
    match = read_key(list[str], {}, child, f"{dotted}.match", problems)
    if match is not None and (not match or not all(match)):
        problems.add(
            child.place, f"{dotted}.match is empty. Name parts of parameters' names, as in [v_proj]."
        )
    name = _read_name(node, dotted, problems) if "name" in node.value else main
    written = {key: child for key, child in node.value.items() if key not in ("match", "name")}
    named = {"name": name} if "name" in node.value else {}
    settings = _read_settings(written, name, dotted, ["match", "name"], problems)
    return {"match": match, **named, **settings}


def _read_name(node: Node, dotted: str, problems: Problems) -> str | None:
    if "name" not in node.value:
        known = ", ".join(optimizer_table())
        problems.add(node.place, f"{dotted}.name is missing. Add it under {dotted}: one of {known}.")
        return None
    child = node.value["name"]
    if isinstance(child.value, str) and child.value in optimizer_table():
        return child.value
    hint = f"{did_you_mean(child.text, optimizer_table())} Known: {', '.join(optimizer_table())}."
    problems.add(child.place, f"{dotted}.name is {child.found()}, which is no optimizer.{hint}")
    return None


def _read_settings(
    written: dict[str, Node], name: str | None, dotted: str, own_keys: Iterable[str], problems: Problems
) -> dict[str, Any]:
    """Settings of the algorithm `name`; where that is unknown, only keys that no algorithm has are wrong."""
    known: dict[str, Any] = {}
    for owner, entry in optimizer_table().items():
        if name is None or owner == name:
            known.update(entry["settings"])
    values: dict[str, Any] = {}
    for key, node in written.items():
        if key not in known:
            _report_unknown_setting(key, node, name, dotted, [*own_keys, *known], problems)
        elif name is not None:
            values[key] = _read_setting(known[key], node, f"{dotted}.{key}", problems)
    return values


def _report_unknown_setting(
    key: str, node: Node, name: str | None, dotted: str, allowed: list[str], problems: Problems
) -> None:
    owners = [other for other, entry in optimizer_table().items() if key in entry["settings"]]
    if key == "settings":
        message = f"{dotted}.settings is not a key. Write the settings directly under {dotted}:."
        problems.add(node.place, message)
    elif owners and closest(key, allowed, cutoff=0.8) is None:
        mine = ", ".join(each for each in allowed if each not in SCHEMA_KEYS)
        message = f"{dotted}.{key} is a setting of {', '.join(owners)}, not of {name}."
        problems.add(node.place, f"{message} Settings of {name}: {mine}.")
    else:
        is_section = isinstance(node.value, dict)
        report_unknown_key(dotted, key, is_section, allowed, node.place, problems)


def _read_setting(description: dict[str, Any], node: Node, dotted: str, problems: Problems) -> Any:
    kind = description["type"]
    if node.value is None and description["optional"]:
        return None
    if kind == "storage":
        return _read_storage(description["roles"], node, dotted, problems)
    if kind == "float_pair":
        return _read_pair(description, node, dotted, problems)
    annotation: Any = {"int": int, "float": float, "bool": bool, "str": str}[kind]
    if "choices" in description:
        annotation = Literal[tuple(description["choices"])]
    if description["optional"]:
        annotation = annotation | None
    return read_key(annotation, description, node, dotted, problems)


def _read_pair(
    description: dict[str, Any], node: Node, dotted: str, problems: Problems
) -> list[float] | None:
    if isinstance(node.value, list) and len(node.value) == 2:
        return [read_key(float, description, item, dotted, problems) for item in node.value]
    pair = expected(float, Limits.of(description)).replace("a number", "two numbers")
    example = description["default"]
    problems.add(node.place, f"{dotted} is {node.found()}; it must be {pair}, as in {example}.")
    return None


def _read_storage(
    roles: dict[str, list[str]], node: Node, dotted: str, problems: Problems
) -> dict[str, str] | None:
    if not isinstance(node.value, dict):
        example = f"{{{next(iter(roles))}: {roles[next(iter(roles))][-1]}}}"
        message = f"{dotted} is {node.found()}; it must be a section from role to format, as in {example}."
        problems.add(node.place, message)
        return None
    chosen: dict[str, str] = {}
    for role, child in node.value.items():
        if role in roles:
            formats: Any = Literal[tuple(roles[role])]
            chosen[role] = read_key(formats, {}, child, f"{dotted}.{role}", problems)
        else:
            hint = f"{did_you_mean(role, roles)} Roles: {', '.join(roles)}."
            problems.add(child.place, f"{dotted}.{shown(role)} is not a role of state.{hint}")
    return chosen
