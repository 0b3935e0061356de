"""Short ways to write the data section of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowmem.data.prepare import Prepared, prepare
from lowmem.recipe.schema import DataRecipe, SourceRecipe


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "prompt_response",
    seed: int = 0,
    **data: Any,
) -> Prepared:
    take = data.pop("take", None)
    source = SourceRecipe(path=str(path), format=format, take=take)  # type: ignore[arg-type]
    return prepare(source, DataRecipe(train=source, **data), tokenizer, seed=seed, where="data.train")
