"""Which matrices each process updates by the rows that it has, and what that takes. Imports no torch.

A rule whose rows need little of each other runs on the rows of each process; a few values are added up over all:

    optimizer                                    added up                  state that every process has
    sinkgd, columns or rows too                  n an iteration            none
    adafactor                                    n and up to 3 numbers     exp_avg_sq_col, n
    frugal in columns                            nothing                   chosen, k
    galore, q_galore, fira, dct_adamw, frugal    fira 1 number             the basis; and the whole gradient comes to
      in a subspace; of matrices with m >= n                               every process when a basis is refreshed
    apollo, of matrices with m >= n              1 to 3 numbers            none

A twin of `lowmem.run.layouts.by_rows` and of the rules' `on_rows`; the tests hold both equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from lowmem.memory.architecture import Shape
from lowmem.memory.frugal_states import SUBSPACES, chosen_count, frugal_rule, subspace_rank
from lowmem.memory.low_rank_states import LOW_RANK_STATES
from lowmem.memory.state_tensors import Settings, StateTensor, is_low_rank, is_matrix

MOST_REPEATED = 4
"""State that every process has is at most this part of its share of a matrix."""

_OF_EVERY_PROCESS = frozenset({"basis", "chosen", "exp_avg_sq_col"})


class OnRows(NamedTuple):
    """As `lowmem.optim.rule.OnRows`, of values."""

    summed: int = 0
    repeated: int = 0
    whole_every: int = 0


def by_rows(algorithm: str, settings: Settings, shape: Shape, sizes: Sequence[int]) -> OnRows | None:
    """How a parameter, of which process k has `sizes[k]` values, is updated by rows; None where it is not.

    settings: with their defaults.
    """
    if len(shape) != 2 or sum(1 for size in sizes if size) == 1:
        return None
    if not all(size and size % shape[1] == 0 for size in sizes):
        return None
    found = _on_rows(algorithm, settings, shape)
    if found is None:
        return None
    processes, numel = len(sizes), math.prod(shape)
    added = found.summed + (numel / found.whole_every if found.whole_every else 0)
    if 2 * added * processes > 3 * numel or MOST_REPEATED * found.repeated * processes > numel:
        return None
    return found


def of_rows(name: str, tensor: StateTensor, shape: Shape, rows: int) -> StateTensor:
    """What a process with `rows` rows keeps of a tensor of state of a matrix of `shape`."""
    if name in _OF_EVERY_PROCESS or tensor.role == "scalar":
        return tensor
    return replace(tensor, numel=tensor.numel // shape[0] * rows)


def _on_rows(algorithm: str, settings: Settings, shape: Shape) -> OnRows | None:
    rows, columns = shape
    if algorithm == "sinkgd":
        sums = {"row": 0, "column": 2, "sinkhorn": settings["iterations"]}
        return OnRows(summed=sums[settings["normalize"]] * columns)
    if algorithm == "adafactor" and is_matrix(shape):
        numbers = 1 + (settings["clip_threshold"] is not None) + bool(settings["relative"])
        return OnRows(summed=columns + numbers, repeated=columns)
    if algorithm == "frugal":
        return _frugal(settings, shape)
    if algorithm not in LOW_RANK_STATES or rows < columns or not is_low_rank(settings, shape):
        return None
    if algorithm == "apollo":
        norms = (settings["growth_limit"] is not None) + 2 * (settings["scaling"] == "tensor")
        return OnRows(summed=norms)
    projection = "dct" if algorithm == "dct_adamw" else settings["projection"]
    has_limiter = algorithm == "fira" or (algorithm == "dct_adamw" and settings["residual"] != "none")
    found = _in_subspace(projection, settings["rank"], settings["refresh_every"], columns)
    limited = has_limiter and settings["growth_limit"] is not None
    return found and found._replace(summed=int(limited))


def _frugal(settings: Settings, shape: Shape) -> OnRows | None:
    if frugal_rule(settings, shape) != "split":
        return None
    if settings["projection"] in SUBSPACES:
        rank = subspace_rank(settings, shape)
        is_wide = shape[0] < shape[1]
        return (
            None
            if is_wide
            else _in_subspace(settings["projection"], rank, settings["refresh_every"], shape[1])
        )
    return OnRows(repeated=chosen_count(settings, shape)) if settings["projection"] == "columns" else None


def _in_subspace(projection: str, rank: int, refresh_every: int, columns: int) -> OnRows | None:
    """Decompositions (svd) take too long to be made by every process."""
    if projection == "svd":
        return None
    return OnRows(repeated=rank if projection == "dct" else columns * rank, whole_every=refresh_every)
