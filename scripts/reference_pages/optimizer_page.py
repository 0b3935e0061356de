"""docs/optimizers/NAME.md: an optimizer's documentation, settings, bytes, executions and recipes.

When to use it and its known limits are written by hand, into the page itself.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from reference_pages.execution_page import HEAD, SETTINGS, combinations_of, numbered
from reference_pages.hand_written import hand_written
from reference_pages.llama_state import SIZES, settings_shown, state_bytes
from reference_pages.markdown import as_code, row, table

from lowmem.cli.schema_text import schema_document
from lowmem.memory.wording import size
from lowmem.optim.registry import OPTIMIZERS, optimizer_class

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "docs" / "optimizers"
WRITTEN_BY_HAND = ("When to use it", "Known limits")


def page_of(name: str) -> Path:
    return FOLDER / f"{name}.md"


def optimizer_page(name: str) -> str:
    """The page of an optimizer, with what is written by hand in it."""
    owner = optimizer_class(name)
    summary, _, text = (inspect.getdoc(owner) or "").partition("\n")
    lines = [
        f"# {name}",
        "",
        summary,
        "",
        f"`optimizer: {{name: {name}, lr: ...}}` in a recipe, `lowmem.optim.{owner.__name__}` in Python. "
        "[All optimizers](README.md).",
        "",
        *hand_written(page_of(name), WRITTEN_BY_HAND),
        "",
        "## What it does",
        "",
        *linked(text.strip("\n")).split("\n"),
        *settings_section(name),
        *state_section(name),
        *execution_section(name),
        *recipe_section(name),
        "",
        f"Made by `make docs` from `{module_path(name)}`, but for what stands between the markers.",
        "",
    ]
    return "\n".join(lines)


def linked(text: str) -> str:
    """arXiv ids as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def module_path(name: str) -> str:
    return OPTIMIZERS[name].split(":")[0].replace(".", "/") + ".py"


def settings_section(name: str) -> list[str]:
    lines = ["", "## Settings", "", "| setting | default | meaning |", "|---|---|---|"]
    for setting, about in schema_document()["optimizers"][name]["settings"].items():
        choices = f" ({', '.join(about['choices'])})" if "choices" in about else ""
        lines.append(row(f"`{setting}`", as_code(about["default"]), about["doc"] + choices))
    return lines


def state_section(name: str) -> list[str]:
    """Bytes of state, counted; AdamW's come first."""
    shown: list[tuple[str, dict[str, Any]]] = [] if name == "adamw" else [("adamw", {})]
    shown += [(name, settings) for settings in settings_shown(name)]
    rows = [
        (
            as_code(in_yaml({"name": each, **settings})),
            *(size(state_bytes(at, each, settings)) for at in SIZES),
        )
        for each, settings in shown
    ]
    return [
        "",
        "## Bytes of state",
        "",
        "For LLaMA with weights in bfloat16 and 32,000 tokens, head and embedding apart, counted by `state_bytes()`.",
        "What is not said is at its default: a `fallback` is AdamW in the weight's dtype. `lowmem plan` counts yours.",
        "",
        *table(("optimizer", *SIZES), rows),
    ]


def in_yaml(value: Any) -> str:
    """{name: galore, rank: 256}"""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip()


def execution_section(name: str) -> list[str]:
    reasons: list[str] = []
    rows = [
        ([label] if has_variants(name) else []) + each.cells(reasons)
        for label, owner, settings in SETTINGS
        if owner == name
        for each in combinations_of(name, settings)
    ]
    head = (["settings"] if has_variants(name) else []) + list(HEAD)
    return [
        "",
        "## Executions",
        "",
        "Which [executions](../execution.md) work, by micro-batches a step and clipping, and what `auto` takes.",
        "",
        *table(head, rows),
        "",
        *numbered(reasons),
    ]


def has_variants(name: str) -> bool:
    return sum(owner == name for _, owner, _ in SETTINGS) > 1


def recipe_section(name: str) -> list[str]:
    """The shipped recipes whose matrices, or whose other parameters, are trained by it."""
    lines = []
    for path, what, optimizer in shipped_recipes():
        others = [key for key in ("fallback", "head") if (optimizer.get(key) or {}).get("name") == name]
        if optimizer["name"] == name or others:
            role = "" if optimizer["name"] == name else f" As `{others[0]}`."
            lines.append(f"- [{path.name}](../../recipes/{path.name}): {what}{role}")
    return ["", "## Recipes", "", *(lines or ["None has it."])]


@cache
def shipped_recipes() -> list[tuple[Path, str, dict[str, Any]]]:
    """Each with its first line and its optimizer."""
    texts = [(path, path.read_text()) for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    return [
        (path, text.split("\n", 1)[0].removeprefix("# "), yaml.safe_load(text)["optimizer"])
        for path, text in texts
    ]
