"""Pieces of Markdown that several pages are made of."""

from __future__ import annotations

from collections.abc import Sequence


def as_code(value: object) -> str:
    """A default as it stands in YAML."""
    words = {None: "null", True: "true", False: "false"}
    return "`" + (words[value] if isinstance(value, (bool, type(None))) else str(value)) + "`"  # type: ignore[index]


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [row(*head), "|" + "---|" * len(head), *(row(*cells) for cells in rows)]
