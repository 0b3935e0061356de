"""Rows from files, from the Hub or from a generator, each with the place it came from.

| file              | rows                                                                              |
|-------------------|-----------------------------------------------------------------------------------|
| .jsonl .ndjson    | one object a line                                                                 |
| .json             | a list of objects, an object with one list in it, or one object a line            |
| .parquet          | its rows (needs pyarrow, which comes with datasets)                                |
| .txt, format text | documents divided by lines that hold only <|endoftext|>; without, the whole file  |

A text file is one document because blank lines divide paragraphs in most texts, and an end-of-text
token after each paragraph would teach a model to stop there. Any of these may be gzip, whatever the name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lowmem.data.file_bytes import open_lines, read_bytes
from lowmem.data.json_rows import json_lines, json_rows
from lowmem.data.table_rows import hub_rows, parquet_rows
from lowmem.data.text_rows import text_documents
from lowmem.errors import RecipeError
from lowmem.recipe.schema import SourceRecipe


@dataclass(frozen=True)
class Row:
    """One row as found. `problem` says why `value` could not be read."""

    place: str
    value: Any = None
    problem: str | None = None


def read_rows(source: SourceRecipe, *, seed: int, where: str) -> list[Row]:
    """All rows of `source`, after `skip` and `take`. Rows that cannot be read come with a `problem`.

    Raises RecipeError when the source itself is missing, empty or damaged.
    """
    kinds = [name for name in ("path", "hub", "builtin") if getattr(source, name) is not None]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        raise RecipeError(f"{where}: needs exactly one of path, hub and builtin; found {found}.")
    if source.builtin is None and source.format is None:
        raise RecipeError(
            f"{where}.format: is needed with {kinds[0]}; it is alpaca, sharegpt, messages, prompt_response or text."
        )
    name = str(getattr(source, kinds[0]))
    rows = _part(_rows(source, seed, where), source, where)
    if not rows:
        left = "holds no rows" if not source.skip else f"has no rows left after {where}.skip: {source.skip:g}"
        raise RecipeError(f"{where}: {name} {left}.")
    return rows


def _rows(source: SourceRecipe, seed: int, where: str) -> Iterator[Row]:
    if source.path is not None:
        found = _file_rows(Path(source.path).expanduser(), source.format, where)
    elif source.hub is not None:
        found = hub_rows(source.hub, source.name, source.split or "train", where)
    else:
        assert source.builtin is not None
        found = _builtin_rows(source.builtin, source.split, source.size, seed, where)
    return itertools.starmap(Row, found)


def _part(rows: Iterator[Row], source: SourceRecipe, where: str) -> list[Row]:
    """The rows after `skip`, at most `take` of them; a number below 1 is a fraction of all rows."""
    for name in ("skip", "take"):
        count = getattr(source, name)
        if count is not None and count > 1 and count != int(count):
            raise RecipeError(
                f"{where}.{name}: {count} is neither a whole number of rows nor a fraction below 1."
            )
    skip, take = float(source.skip or 0), source.take
    if skip.is_integer() and (take is None or take >= 1):
        return list(itertools.islice(rows, int(skip), None if take is None else int(skip + take)))
    everything = list(rows)
    start = _count(skip, len(everything))
    return everything[start:] if take is None else everything[start : start + _count(take, len(everything))]


def _count(number: float, all_rows: int) -> int:
    """A count as it is; a fraction of `all_rows`, at least one, so that skip and take of the same part meet."""
    return int(number) if number >= 1 or number == 0 else max(1, int(number * all_rows))


def _file_rows(path: Path, format: str | None, where: str) -> Iterator[tuple[str, Any, str | None]]:
    kind = _kind(path, format, where)
    if kind == "jsonl":
        return json_lines(str(path), open_lines(path, where))
    if kind == "json":
        return json_rows(str(path), read_bytes(path, where))
    if kind == "parquet":
        return parquet_rows(str(path), read_bytes(path, where), where)
    return text_documents(str(path), read_bytes(path, where))


def _kind(path: Path, format: str | None, where: str) -> str:
    """The kind of file, by its name and, where the name does not tell, by its first bytes."""
    if not path.exists():
        near = get_close_matches(path.name, _names_in(path.parent), n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise RecipeError(f"{where}.path: {path} does not exist (looked in {Path.cwd()}).{hint}")
    if path.is_dir():
        raise RecipeError(f"{where}.path: {path} is a folder; name one file in it.")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    known = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
    if suffix in known:
        return known[suffix]
    if format == "text":
        return "text"
    start = next(iter(open_lines(path, where)), b"").removeprefix(b"\xef\xbb\xbf").lstrip()
    for mark, kind in ((b"PAR1", "parquet"), (b"{", "jsonl"), (b"[", "json")):
        if start.startswith(mark):
            return kind
    raise RecipeError(
        f"{where}.path: {path} is neither JSONL, JSON nor Parquet. If it is plain text, set format: text."
    )


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _builtin_rows(
    name: str, split: str | None, size: int | None, seed: int, where: str
) -> Iterator[tuple[str, Any, str | None]]:
    from lowmem.data.builtins import BUILTINS, generate

    if name not in BUILTINS:
        near = get_close_matches(name, BUILTINS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"{where}.builtin: {name} is not a generated data set.{hint} Known: {', '.join(BUILTINS)}."
        )
    chosen = split or "train"
    if chosen not in ("train", "held_out"):
        raise RecipeError(f"{where}.split: {chosen} is not a split of a builtin; train or held_out.")
    rows = generate(name, split="train" if chosen == "train" else "held_out", size=size, seed=seed)
    for number, row in enumerate(rows, 1):
        yield f"builtin:{name} (row {number})", row, None
