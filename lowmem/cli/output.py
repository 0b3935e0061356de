"""How results are printed: aligned columns for people, JSON for programs."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Iterable
from typing import Any


def print_json(document: Any) -> None:
    """JSON has no NaN or infinity; they are printed as the texts NaN, Infinity and -Infinity."""
    print(json.dumps(_in_json(document), indent=2, ensure_ascii=False, allow_nan=False))


def _in_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _in_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_in_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


def print_columns(rows: Iterable[tuple[str, str]], indent: int = 2) -> None:
    """Two columns; the second is wrapped to the width of the terminal."""
    rows = list(rows)
    left = max((len(name) for name, _ in rows), default=0)
    room = max(40, shutil.get_terminal_size().columns - left - indent - 2)
    for name, text in rows:
        first, *more = textwrap.wrap(text, room) or [""]
        print(f"{'':{indent}}{name:<{left}}  {first}".rstrip())
        for line in more:
            print(f"{'':{indent + left + 2}}{line}")
