"""Every key of a recipe, as YAML with comments and as plain data."""

from __future__ import annotations

import typing
from dataclasses import MISSING, Field
from typing import Any, Literal

import yaml

from lowmem.recipe.keys import schema_keys, section_of
from lowmem.recipe.optimizer_table import optimizer_table
from lowmem.recipe.values import Limits, expected, members_of

COMMENT_COLUMN = 44


def schema_text() -> str:
    """A recipe in which every key stands at its default, with its type and meaning beside it."""
    lines = ["# Every key of a recipe at its default. Keys marked required have none."]
    for dotted, annotation, each in schema_keys():
        if dotted.startswith("data.eval."):
            continue  # the keys of data.train once more
        depth, name = dotted.count("."), dotted.rpartition(".")[2]
        if depth == 0:
            lines.append("")
        start = "  " * depth + f"{name}:"
        is_section = section_of(annotation) is not None
        default = MISSING if is_section else _default(annotation, each)
        lines.append(_line(start, default, _about(annotation, each)))
        if dotted == "optimizer.fallback":
            for optimizer, entry in optimizer_table().items():
                lines += ["", f"  # optimizer.name: {optimizer}  ({entry['summary']})"]
                lines += [_setting_line(setting, about) for setting, about in entry["settings"].items()]
    return "\n".join(lines)


def schema_document() -> dict[str, Any]:
    """{"keys": [{"key", "type", "required", "default", "doc"}], "optimizers": the settings' table}."""
    keys = []
    for dotted, annotation, each in schema_keys():
        entry: dict[str, Any] = {"key": dotted, "type": _kind(annotation, each.metadata), "required": False}
        default = _default(annotation, each)
        entry.update({"required": True} if default is MISSING else {"default": default})
        keys.append({**entry, "doc": each.metadata["doc"]})
    return {"keys": keys, "optimizers": optimizer_table()}


def _default(annotation: Any, each: Field[Any]) -> Any:
    """MISSING when required; sections that are not optional have no value of their own: {}."""
    if section_of(annotation) is annotation:
        return {}
    if each.default_factory is not MISSING:
        return each.default_factory()
    return each.default


def _about(annotation: Any, each: Field[Any]) -> str:
    if section_of(annotation) is not None:
        words = "optional; " if each.default is None else ""
        same = "; the same keys as train" if each.name == "eval" and each.default is None else ""
        return f"{words}{each.metadata['doc']}{same}"
    required = "required, " if _default(annotation, each) is MISSING else ""
    return f"{required}{_kind(annotation, each.metadata)}; {each.metadata['doc']}"


def _kind(annotation: Any, metadata: Any) -> str:
    if section_of(annotation) is not None:
        return "section"
    if dict in [typing.get_origin(member) for member in members_of(annotation)]:
        return "a section, or null"
    return expected(annotation, Limits.of(metadata))


def _line(start: str, default: Any, about: str) -> str:
    written = "" if default is MISSING or default == {} else f" {_in_yaml(default)}"
    return f"{start + written:<{COMMENT_COLUMN}}  # {about}"


def _setting_line(name: str, about: dict[str, Any]) -> str:
    kinds = {"int": int, "float": float, "bool": bool, "str": str, "float_pair": float, "storage": str}
    kind: Any = Literal[tuple(about["choices"])] if "choices" in about else kinds[about["type"]]
    words = expected(kind, Limits.of(about))
    if about["type"] == "float_pair":
        words = words.replace("a number", "two numbers")
    if about["type"] == "storage":
        words = "; ".join(f"{role}: {' | '.join(formats)}" for role, formats in about["roles"].items())
    required = "required, " if name == "lr" else ""
    null = ", or null" if about["optional"] else ""
    return _line(f"  # {name}:", about["default"], f"{required}{words}{null}; {about['doc']}")


def _in_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
