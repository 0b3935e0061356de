"""What the update of a matrix holds that is split along a subspace (frugal). Imports no torch.

For a matrix (m, n) with m <= n, a subspace of r = density m directions and tiles of t values, bytes:

    project      as in `low_rank_formulas`
    inner rule   basis 4 m r; R, each state and the direction (none with momentum) 4 r n each
    save         these, beside the rounding of a bfloat16 state, or the coding of an int8 one
    write back   these, and a tile of the direction 4 t; a bfloat16 weight 4 t, its noise 4 t, its rounded copy 2 t
    refresh      as in `low_rank_formulas`; a random basis is the old one, a Gaussian one and what qr makes of it

State that is float32 already is used as it is. Without a residual the direction is a product, and its tiles are made in
those of the weight.
"""

from __future__ import annotations

import math

from lowmem.memory.architecture import Shape
from lowmem.memory.frugal_states import subspace_rank
from lowmem.memory.low_rank_formulas import (
    QR_COPIES,
    narrow_weight_bytes,
    project_bytes,
    refresh_bytes,
    tile_of_rows,
)
from lowmem.memory.state_formulas import state_values, stored_itemsize
from lowmem.memory.state_tensors import Settings, StateTensor
from lowmem.memory.update_tiles import saving_bytes


def low_rank_split_bytes(settings: Settings, shape: Shape, itemsize: int, *, on_cuda: bool) -> int:
    """Temporaries at the fullest moment of updating a matrix or a batch of matrices, a refresh included."""
    rank = subspace_rank(settings, shape)
    ranked = {**settings, "rank": rank}
    states = state_values("frugal", settings, shape)
    kept = states.pop("basis")
    basis = StateTensor(math.prod(shape[:-2]) * min(shape[-2:]) * rank, "basis")
    low = 4 * basis.numel // min(shape[-2:]) * max(shape[-2:])
    held = sum(4 * each.numel for each in states.values() if _is_copied(each, settings, itemsize))
    if settings["projection"] == "dct" or _is_copied(kept, settings, itemsize):
        held += 4 * basis.numel
    direction = 0 if settings["inner"] == "momentum" else low
    saving = max((saving_bytes(each, settings, itemsize, each.numel) for each in states.values()), default=0)
    has_residual = settings["residual"] != "none"
    written = direction + (low + 4 * tile_of_rows(shape) if has_residual else 0)
    written += narrow_weight_bytes(settings, shape, itemsize)
    refresh = (
        _drawing_bytes(basis, on_cuda=on_cuda)
        if settings["projection"] == "random"
        else refresh_bytes(ranked, shape, itemsize, on_cuda)
    )
    return max(
        project_bytes(ranked, shape, itemsize),
        held + direction + low + (saving if has_residual else 0),
        held + direction + saving,
        held + written,
        refresh,
    )


def _drawing_bytes(basis: StateTensor, *, on_cuda: bool) -> int:
    """Of a random basis beside the old one: a Gaussian matrix, its factor, and its signs or qr's workspace."""
    return (3 + (QR_COPIES if on_cuda else 1)) * 4 * basis.numel


def _is_copied(tensor: StateTensor, settings: Settings, itemsize: int) -> bool:
    return stored_itemsize(tensor, settings, itemsize) < 4
