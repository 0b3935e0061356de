"""One value of a recipe file with the place it was written at, and what unquoted text means.

Numbers are read here and not by PyYAML, because YAML 1.1 takes 1e-4 for text, 010 for eight and 1:30
for ninety.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lowmem.recipe.problems import Place, shown

WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
DECIMAL = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass
class Node:
    """One value: None, bool, int, float, str, list[Node] or dict[str, Node], and how it was written."""

    value: Any
    place: Place
    text: str = ""
    is_plain: bool = False  # written without quotes

    def found(self) -> str:
        """What a message says was found."""
        if isinstance(self.value, dict):
            keys = ", ".join(shown(key) for key in list(self.value)[:6])
            return f"a section with {keys or 'nothing in it'}"
        if isinstance(self.value, list):
            return f"[{shown(', '.join(item.text or '...' for item in self.value[:20]))}]"
        if self.value is None:
            return self.text or "empty"
        return shown(self.text) if self.is_plain else f'"{shown(self.text)}"'


def number_from(text: str) -> int | float | None:
    """The number that unquoted `text` means to a person, 1e-4 included, or None."""
    if WHOLE.fullmatch(text):
        digits = text.replace("_", "")
        return int(digits) if len(digits) < 40 else float(digits)
    if DECIMAL.fullmatch(text) and not re.match(r"[-+]?0[0-9]", text):
        return float(text.replace("_", ""))
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return None
