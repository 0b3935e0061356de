"""docs/recipe.md: every key of a recipe, from lowmem/recipe/schema.py."""

from __future__ import annotations

from reference_pages.markdown import as_code, row

from lowmem.cli.schema_text import schema_document


def recipe_page() -> str:
    """Every key of a recipe as a table, one table a section."""
    lines = [
        "# Every key of a recipe",
        "",
        "Made by `make docs` from `lowmem/recipe/schema.py`. `lowmem show --schema` prints the same as YAML. A key",
        "that is not here does not exist. The settings of an optimizer stand directly under `optimizer:`; see",
        "[the optimizers](optimizers/README.md).",
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
