"""State of FRUGAL's parameters. Imports no torch.

    columns, rows   chosen k in float32, and inner's state (as adamw, momentum_buffer, exp_avg, or none) on (m, k) or
                    (k, n) of k = density n columns or density m rows of a matrix (m, n)
    subspace, svd, random    basis m r, and inner's state on (r, n), m <= n, of r = density m directions, at most m - 1
    dct             likewise, with r in float32 for a basis
    block           inner's state on all N values of the tensors whose turn it is, none of the others
    density 0       nothing for a matrix; density 1: inner's state on N

What is no matrix has inner's state on N, or its turn as a block.
"""

from __future__ import annotations

import math

from lowmem.memory.architecture import Shape
from lowmem.memory.state_tensors import Settings, State, StateTensor, is_matrix

_INNER = {
    "adam": {"exp_avg": "moment", "exp_avg_sq": "variance"},
    "lion": {"exp_avg": "moment"},
    "momentum": {"momentum_buffer": "moment"},
    "sign": {},
}


SUBSPACES = frozenset({"subspace", "svd", "random", "dct"})
"""Projections that split along a basis, which is stored, or of which the numbers of its vectors are."""


def frugal_state(settings: Settings, shape: Shape) -> State:
    rule, numel = frugal_rule(settings, shape), math.prod(shape)
    if rule != "split":
        return {name: StateTensor(numel, role) for name, role in _INNER[rule].items()}
    if settings["projection"] in SUBSPACES:
        rank = subspace_rank(settings, shape)
        vectors = math.prod(shape[:-2]) * rank
        is_cosine = settings["projection"] == "dct"
        basis = (
            StateTensor(vectors, "factor") if is_cosine else StateTensor(vectors * min(shape[-2:]), "basis")
        )
        return {"basis": basis, **_inner(settings, numel // min(shape[-2:]) * rank)}
    k = chosen_count(settings, shape)
    chosen = StateTensor(math.prod(shape[:-2]) * k, "factor")
    return {"chosen": chosen, **_inner(settings, numel // shape[_split_side(settings)] * k)}


def _inner(settings: Settings, numel: int) -> State:
    return {name: StateTensor(numel, role) for name, role in _INNER[settings["inner"]].items()}


def frugal_rule(settings: Settings, shape: Shape) -> str:
    """Which rule treats a parameter: "split", "sign" (without state, whatever the residual), or the inner one."""
    if settings["projection"] == "block" and 0 < settings["density"] < 1:
        return "sign" if settings.get("rests") else settings["inner"]
    if not is_matrix(shape) or settings["density"] == 1:
        return settings["inner"]
    return "split" if settings["density"] else "sign"


def subspace_rank(settings: Settings, shape: Shape) -> int:
    """How many directions of a matrix that is split along a subspace have state."""
    side = min(shape[-2:])
    return min(max(1, round(settings["density"] * side)), side - 1)


def chosen_count(settings: Settings, shape: Shape) -> int:
    """How many columns or rows of a split matrix have state."""
    return max(1, round(settings["density"] * shape[_split_side(settings)]))


def _split_side(settings: Settings) -> int:
    return -1 if settings["projection"] == "columns" else -2
