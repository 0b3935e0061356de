"""Write the pages of docs/ that come from the code: recipe keys, optimizers and their settings, executions.

    python scripts/make_reference_pages.py

A test holds the pages equal to what this script gives. What stands between the markers of a page is written by hand and
kept.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from reference_pages.execution_page import execution_page
from reference_pages.optimizer_index import INDEX, optimizer_index
from reference_pages.optimizer_page import optimizer_page, page_of
from reference_pages.recipe_page import recipe_page

from lowmem.optim.registry import OPTIMIZERS

DOCS = Path(__file__).resolve().parent.parent / "docs"

PAGES = {
    DOCS / "recipe.md": recipe_page,
    DOCS / "execution.md": execution_page,
    INDEX: optimizer_index,
    **{page_of(name): partial(optimizer_page, name) for name in OPTIMIZERS},
}

if __name__ == "__main__":
    for path, make in PAGES.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(make())
        print(f"wrote {path}")
