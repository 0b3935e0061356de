"""Write the pages of docs/ that come from the code: recipe keys, optimizers and their settings, executions.

    python scripts/make_reference_pages.py

A test holds the pages equal to what this script gives.
"""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path

from lowmem.cli.schema_text import schema_document
from lowmem.optim.registry import OPTIMIZERS, optimizer_class

DOCS = Path(__file__).parent.parent / "docs"


def as_code(value: object) -> str:
    """A default as it stands in YAML."""
    words = {None: "null", True: "true", False: "false"}
    return "`" + (words[value] if isinstance(value, (bool, type(None))) else str(value)) + "`"  # type: ignore[index]


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def recipe_page() -> str:
    """Every key of a recipe as a table, one table a section."""
    lines = [
        "# Every key of a recipe",
        "",
        "Made by `make docs` from `lowmem/recipe/schema.py`. `lowmem show --schema` prints the same as YAML. A key",
        "that is not here does not exist. The settings of an optimizer stand directly under `optimizer:`; see",
        "[optimizers.md](optimizers.md).",
    ]
    section = None
    for entry in schema_document()["keys"]:
        top = entry["key"].split(".")[0]
        if top != section:
            section = top
            lines += ["", f"## {top}", "", "| key | what | default | meaning |", "|---|---|---|---|"]
        default = "required" if entry["required"] else as_code(entry["default"])
        lines.append(row(f"`{entry['key']}`", entry["type"], default, entry["doc"]))
    return "\n".join([*lines, ""])


def optimizer_page() -> str:
    """Every optimizer: its documentation and its settings."""
    lines = ["# The optimizers", "", "Made by `make docs` from `lowmem/optim/algorithms/`."]
    table = schema_document()["optimizers"]
    for name in OPTIMIZERS:
        owner = optimizer_class(name)
        lines += ["", f"## {name}", "", f"`lowmem.optim.{owner.__name__}`", "", "```text"]
        lines += [inspect.getdoc(owner) or "", "```", "", "| setting | default | meaning |", "|---|---|---|"]
        for setting, about in table[name]["settings"].items():
            choices = f" ({', '.join(about['choices'])})" if "choices" in about else ""
            lines.append(row(f"`{setting}`", as_code(about["default"]), about["doc"] + choices))
    return "\n".join([*lines, ""])


PAGES = {
    DOCS / "recipe.md": recipe_page,
    DOCS / "optimizers.md": optimizer_page,
    DOCS / "execution.md": runpy.run_path(str(Path(__file__).parent / "execution_page.py"))["execution_page"],
}

if __name__ == "__main__":
    for path, make in PAGES.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(make())
        print(f"wrote {path}")
