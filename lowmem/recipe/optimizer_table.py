"""What settings each optimizer has: a table generated from the algorithms, readable without torch."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

TABLE_FILE = Path(__file__).with_name("optimizers.json")


@functools.cache
def optimizer_table() -> dict[str, dict[str, Any]]:
    """name -> {"summary": str, "settings": {name: {"type", "optional", "default", bounds, "doc"}}}."""
    table: dict[str, dict[str, Any]] = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
    return table
