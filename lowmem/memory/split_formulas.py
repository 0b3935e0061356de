"""What the update of a matrix (m, n) holds of which k columns, or rows, have state (frugal). Imports no torch.

A tile is as many rows as hold 2^21 values, t in all; s of them have state: k columns of these rows, or the rows of them
that were drawn. Bytes:

    numbers      8 k, of every matrix of a batch, through the whole update
    select       the part in the gradient's dtype, and in float32 if that is another, 4 s
    inner rule   the part, each state that is not float32, the direction (none with momentum): 4 s each
    save         these, beside the rounding of a bfloat16 state, or the coding of an int8 one
    put          the direction of the part 4 s into that of the tile 4 t
    write back   the direction 4 t; a bfloat16 weight 4 t, its noise 4 t, its rounded copy 2 t
"""

from __future__ import annotations

import math

from lowmem.memory import update_tiles
from lowmem.memory.architecture import Shape
from lowmem.memory.frugal_states import SUBSPACES, chosen_count
from lowmem.memory.low_rank_split_formulas import low_rank_split_bytes
from lowmem.memory.state_formulas import (
    INT8_BLOCK,
    state_values,
    storage_format,
    stored_itemsize,
)
from lowmem.memory.state_tensors import Settings
from lowmem.memory.update_tiles import saving_bytes


def split_bytes(settings: Settings, shape: Shape, itemsize: int, *, on_cuda: bool) -> int:
    """Temporaries at the fullest moment of updating a matrix or a batch of matrices."""
    if settings["projection"] in SUBSPACES:
        return low_rank_split_bytes(settings, shape, itemsize, on_cuda=on_cuda)
    *_, m, n = shape
    rows = min(m, max(1, update_tiles.TILE_NUMEL // n))
    k = chosen_count(settings, shape)
    t = rows * n
    s = rows * k if settings["projection"] == "columns" else _rows_in_a_tile(rows, k, m) * n
    states = [each for each in state_values("frugal", settings, shape).values() if each.role != "factor"]
    direction = 0 if settings["inner"] == "momentum" else 4 * s
    coded = [each for each in states if storage_format(each, settings) == "int8"]
    cuts_blocks = coded and s % INT8_BLOCK and rows < m
    whole = s + INT8_BLOCK if cuts_blocks else s  # with what shares a block with them
    loaded = 4 * whole * sum(stored_itemsize(each, settings, itemsize) < 4 for each in states)
    saving = max((saving_bytes(each, settings, itemsize, whole) for each in states), default=0)
    if cuts_blocks:
        saving += 4 * whole
    narrow = 4 if itemsize < 4 else 0
    select = (itemsize + narrow) * s
    inner = 4 * s + loaded + max(direction, 4 * min(s, update_tiles.CODED_NUMEL) if coded else 0)
    save = 4 * s + loaded + direction + saving
    put = (direction or loaded) + 4 * t
    written = (4 + narrow + (6 if narrow and settings["rounding"] == "stochastic" else 0)) * t
    return number_bytes(settings, shape) + max(select, inner, save, put, written)


def _rows_in_a_tile(rows: int, k: int, m: int) -> int:
    """Of k rows drawn from m, how many are in the tile that has most: the mean and two standard deviations."""
    variance = rows * (k / m) * (1 - k / m) * (m - rows) / max(1, m - 1)
    return min(k, rows, math.ceil(rows * k / m + 2 * math.sqrt(variance)))


def number_bytes(settings: Settings, shape: Shape) -> int:
    """Of the numbers of columns or rows, from an update's first block to its last."""
    if settings["projection"] in SUBSPACES:
        return 0  # a whole gradient is wanted
    return 8 * math.prod(shape[:-2]) * chosen_count(settings, shape)
