"""Rows of Parquet files and of data sets on the Hugging Face Hub (both through datasets and its pyarrow)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from lowmem.errors import RecipeError

INSTALL = "pip install datasets"


def parquet_rows(name: str, data: bytes, where: str) -> Iterator[tuple[str, Any, str | None]]:
    """The file's rows as dicts, numbered from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise RecipeError(f"{where}.path: {name} is Parquet, which needs pyarrow: {INSTALL}") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(io.BytesIO(data)).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{name} (row {number})", row, None
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(
            f"{where}.path: {name} is not a readable Parquet file (after {number} rows): {error}"
        ) from error


def hub_rows(hub: str, name: str | None, split: str, where: str) -> Iterator[tuple[str, Any, str | None]]:
    """The rows of one split, numbered from 1. No code that comes with a data set is ever run."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise RecipeError(f"{where}.hub: {hub} needs the package datasets: {INSTALL}") from error
    try:
        rows = datasets.load_dataset(hub, name, split=split)
    except Exception as error:  # the library raises a dozen unrelated types for: missing, private, offline
        reason = " ".join(str(error).split()).rstrip(".") or "no reason given"
        raise RecipeError(
            f"{where}.hub: {hub} (name {name or 'default'}, split {split}) cannot be loaded: "
            f"{type(error).__name__}: {reason}. Check the id, the name and the split, the network, and "
            "HF_TOKEN for a private data set; or download the file and use path."
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{hub}[{split}] (row {number})", row, None
