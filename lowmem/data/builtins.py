"""Instruction data that needs no download: small problems, drawn from a seed, with their answers.

A set is an endless stream of problems; a split keeps those that belong to it. Which split a problem
belongs to is decided by a stable hash of its key (the two numbers, the letters, the word) and by nothing
else, so no held-out problem can be in a training set of whatever size and seed, not even asked for in
other words or in another order. Of each key a data set holds one row, and a smaller data set is the
beginning of a larger one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Literal

from lowmem.data.builtins_arithmetic import addition
from lowmem.data.builtins_problem import Problem, Rolls
from lowmem.data.builtins_rewriting import rewriting
from lowmem.data.builtins_sorting import sorting
from lowmem.errors import RecipeError
from lowmem.recipe.suggest import did_you_mean

Split = Literal["train", "held_out"]

BUILTINS: dict[str, str] = {
    "arithmetic": "add two numbers of two or three digits, column by column with the carry written out",
    "sorting": "put five to seven letters in order, from a to z or from z to a",
    "rewriting": "write a made-up word backwards, in capitals, without vowels or with every letter twice",
}
DRAW: dict[str, Callable[[Rolls], Problem]] = {
    "arithmetic": addition,
    "sorting": sorting,
    "rewriting": rewriting,
}
USUAL_SIZE: dict[Split, int] = {"train": 10_000, "held_out": 200}
LARGEST_SIZE: dict[Split, int] = {"train": 100_000, "held_out": 10_000}
HELD_OUT_PERCENT = 10


def generate(name: str, *, split: Split, size: int | None, seed: int) -> list[dict[str, str]]:
    """`size` rows {"prompt": ..., "response": ...} of the data set `name`, no problem twice.

    The same arguments give the same rows on every machine. `size` None is 10,000 rows for train and 200
    for held_out. Raises RecipeError for an unknown name or split, and for a size below 1 or above 100,000
    (train) or 10,000 (held_out).
    """
    if name not in BUILTINS:
        raise RecipeError(
            f"builtin: {name} is not a generated data set.{did_you_mean(name, BUILTINS)} "
            f"Known: {', '.join(BUILTINS)}."
        )
    if split not in LARGEST_SIZE:
        raise RecipeError(
            f"split: {split} is not a split of a builtin.{did_you_mean(split, LARGEST_SIZE)} "
            f"Known: {', '.join(LARGEST_SIZE)}."
        )
    if size is None:
        size = USUAL_SIZE[split]
    if not 1 <= size <= LARGEST_SIZE[split]:
        raise RecipeError(
            f"size: {size} rows of {name} were asked for; the split {split} holds 1 to "
            f"{LARGEST_SIZE[split]:,}. Name a size in that range."
        )
    rows: dict[str, dict[str, str]] = {}
    for problem in _problems(name, split, seed):
        if problem.key not in rows and is_held_out(name, problem.key) == (split == "held_out"):
            rows[problem.key] = {"prompt": problem.prompt, "response": problem.response}
            if len(rows) == size:
                break
    return list(rows.values())


def is_held_out(name: str, key: str) -> bool:
    """Whether the problem `key` of the set `name` is one of the tenth that is never trained on."""
    return _number(name, "split", key) % 100 < HELD_OUT_PERCENT


def _problems(name: str, split: Split, seed: int) -> Iterator[Problem]:
    # random() is the only method whose sequence Python promises to keep from version to version.
    rolls = Rolls(random.Random(_number(name, split, str(seed))).random)
    while True:
        yield DRAW[name](rolls)


def _number(*parts: str) -> int:
    """64 bits that depend on `parts` alone: hash() differs from process to process."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
