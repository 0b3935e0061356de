"""State of the optimizers that work in a subspace of each matrix' gradient. Imports no torch.

optimizer   state of a matrix (m, n) with m <= n and rank r < m; of every other parameter as adamw
galore      basis m r, exp_avg r n, exp_avg_sq r n
q_galore    as galore, and 3 + similarity_window in float32 while it is lazy
fira        as galore, and 1 of each matrix in float32, unless growth_limit is None
    apollo      as fira, without a basis
    dct_adamw   as fira, or as galore where residual is none, with the basis "dct"

The basis "dct" is r in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lowmem.memory.architecture import Shape
from lowmem.memory.state_tensors import Settings, State, StateTensor, adamw_state, is_low_rank


def _galore(settings: Settings, shape: Shape) -> State:
    if not is_low_rank(settings, shape):
        return adamw_state(settings, shape)
    *batch, rows, columns = shape
    short, long = min(rows, columns), max(rows, columns)
    numel = math.prod(batch) * settings["rank"]
    is_cosine = settings["projection"] == "dct"
    basis = StateTensor(numel, "factor") if is_cosine else StateTensor(numel * short, "basis")
    return {"basis": basis, **adamw_state(settings, (*batch, settings["rank"], long))}


def _q_galore(settings: Settings, shape: Shape) -> State:
    state = _galore(settings, shape)
    if not (settings["lazy"] and is_low_rank(settings, shape)):
        return state
    window = StateTensor(settings["similarity_window"], "scalar")
    return {**state, "refresh_schedule": StateTensor(3, "scalar"), "similarities": window}


def _fira(settings: Settings, shape: Shape) -> State:
    return {**_galore(settings, shape), **_limiter("residual_norm", settings, shape)}


def _apollo(settings: Settings, shape: Shape) -> State:
    state = _galore({**settings, "projection": "none"}, shape)
    state.pop("basis", None)
    return {**state, **_limiter("scaled_norm", settings, shape)}


def _dct_adamw(settings: Settings, shape: Shape) -> State:
    in_cosines = {**settings, "projection": "dct"}
    return (_galore if settings["residual"] == "none" else _fira)(in_cosines, shape)


def _limiter(name: str, settings: Settings, shape: Shape) -> State:
    """Of the growth of a direction."""
    if settings["growth_limit"] is None or not is_low_rank(settings, shape):
        return {}
    return {name: StateTensor(math.prod(shape[:-2]), "scalar")}


LOW_RANK_STATES: dict[str, Callable[[Settings, Shape], State]] = {
    "galore": _galore,
    "q_galore": _q_galore,
    "fira": _fira,
    "apollo": _apollo,
    "dct_adamw": _dct_adamw,
}
"""By the name of the optimizer."""
