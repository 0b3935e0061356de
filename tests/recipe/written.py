"""Recipes written to disk for tests, and what loading says about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.errors import RecipeError
from lowmem.recipe.load import load_recipe

SMALL = """\
model: {name_or_path: builtin:tiny-llama}
data:
  train: {builtin: arithmetic}
optimizer:
  name: galore
  lr: 1.0e-3
"""


def write(text: str | bytes, name: str = "r.yaml") -> Path:
    """A file in the working directory (tests change to a temporary one), named as a user would name it."""
    path = Path(name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems_of(text: str | bytes, *overrides: str) -> list[str]:
    """The problems that loading `text` raises; the test fails when it raises none."""
    with pytest.raises(RecipeError) as raised:
        load_recipe(write(text), overrides)
    return raised.value.problems


def with_lines(text: str) -> str:
    """SMALL with more lines; the first of them is line 7."""
    return SMALL + text
