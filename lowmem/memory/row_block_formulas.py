"""What an update holds whose direction is made a block of rows at a time (adafactor, sinkgd). Imports no torch.

A tile is as many rows as hold 2^21 values, t in all; bytes, for a matrix (m, n):

    vectors      sinkgd: peaks 4 m, rows 4 m, columns 4 n, of every matrix of a batch, and one more of each length; two
                 of columns 4 n where columns alone are normalised, and one more;
                 adafactor: factors of rows 4 m and columns 4 n, and one sum of columns
    passes       a bfloat16 gradient (or a running mean that is not float32) 4 t, its squares or scaled rows 4 t
    running mean what goes into it and the mean, if not float32, 4 t each; the rounding to its format
    write back   the direction 4 t; a bfloat16 weight 4 t, its noise 4 t, its rounded copy 2 t

adafactor's vectors (norms, biases) are updated whole: gradient, squares and step 4 N each.
"""

from __future__ import annotations

import math

from lowmem.memory import update_tiles
from lowmem.memory.architecture import Shape
from lowmem.memory.state_formulas import (
    INT8_BLOCK,
    state_values,
    storage_format,
    stored_itemsize,
)
from lowmem.memory.state_tensors import Settings, StateTensor
from lowmem.memory.update_tiles import saving_bytes

ROW_BLOCKS = frozenset({"adafactor", "sinkgd"})
"""Optimizers of which `row_block_bytes` knows what a matrix takes."""


def row_block_bytes(algorithm: str, settings: Settings, shape: Shape, itemsize: int) -> int:
    """Temporaries at the fullest moment of updating a matrix or a batch of matrices."""
    *batch, m, n = shape
    t = min(m, max(1, update_tiles.TILE_NUMEL // n)) * n
    narrow = 4 if itemsize < 4 else 0
    moment = _moment(algorithm, settings, shape)
    if moment is None:
        passes, averaged, direction = narrow + 4, 0, 4
    else:
        loaded = 4 if stored_itemsize(moment, settings, itemsize) < 4 else 0
        saving = saving_bytes(moment, settings, itemsize, t)
        if _is_int8(moment, settings) and t < m * n and t % INT8_BLOCK:
            saving += 4 * t  # the rows with what shares a block with them
        if algorithm == "adafactor":
            passes, averaged = narrow + 4, (4 + loaded) * t + saving
            direction = max(loaded, 4 if settings["relative"] else 0)
        else:
            passes, averaged, direction = loaded + 4, loaded * t + max(narrow * t, saving), 4
    written = (direction + narrow + (6 if narrow and settings["rounding"] == "stochastic" else 0)) * t
    return max(
        max(passes * t, averaged, written) + vector_bytes(algorithm, settings, math.prod(batch), m, n),
        _weight_rms_bytes(settings, shape, itemsize),
    )


def unfactored_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """... of updating a parameter of which the second moment is kept whole."""
    numel, narrow = math.prod(shape), 4 if itemsize < 4 else 0
    moment = _moment("adafactor", settings, shape)
    is_loaded = moment is not None and stored_itemsize(moment, settings, itemsize) < 4
    step = 8 if is_loaded or (settings["relative"] and moment is None) else 4
    decoded = 4 * min(numel, update_tiles.CODED_NUMEL) if is_loaded and _is_int8(moment, settings) else 0
    saving = 0 if moment is None else saving_bytes(moment, settings, itemsize, numel)
    written = (4 + narrow + (6 if narrow and settings["rounding"] == "stochastic" else 0)) * numel
    return max((narrow + step) * numel + decoded, (4 if is_loaded else 0) * numel + saving, written)


def _moment(algorithm: str, settings: Settings, shape: Shape) -> StateTensor | None:
    tensors = state_values(algorithm, settings, shape).values()
    return next((each for each in tensors if each.role == "moment"), None)


def _is_int8(moment: StateTensor | None, settings: Settings) -> bool:
    return moment is not None and storage_format(moment, settings) == "int8"


def _weight_rms_bytes(settings: Settings, shape: Shape, itemsize: int) -> int:
    """Of a relative learning rate: a float32 slice of the weight, and one scaled for its squares."""
    each = (4 if itemsize < 4 else 0) + 4
    return min(math.prod(shape), update_tiles.TILE_NUMEL) * each if settings.get("relative") else 0


def vector_bytes(algorithm: str, settings: Settings, count: int, m: int, n: int) -> int:
    """Of an update's rows and columns, from its first pass to its last."""
    if algorithm == "adafactor":
        return 4 * count * (m + n) + 4 * n
    if settings["normalize"] == "column":
        return 8 * count * n + 4 * n
    return 4 * count * (2 * m + n) + 4 * (m + n) if settings["normalize"] == "sinkhorn" else 0
