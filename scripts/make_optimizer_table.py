"""Write lowmem/recipe/optimizers.json: every optimizer's settings, read from the algorithm files.

`lowmem validate` checks recipes against this table without importing torch; a test holds the two equal.

    python scripts/make_optimizer_table.py
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.optim.settings import described

TABLE = Path(__file__).parent.parent / "lowmem" / "recipe" / "optimizers.json"


def optimizer_table() -> str:
    """The table as JSON text."""
    table = {}
    for name in OPTIMIZERS:
        owner = optimizer_class(name)
        summary = (inspect.getdoc(owner) or "").split("\n", 1)[0]
        table[name] = {"summary": summary, "settings": described(owner)}
    return json.dumps(table, indent=1) + "\n"


if __name__ == "__main__":
    TABLE.write_text(optimizer_table())
    print(f"wrote {TABLE}")
