"""Head and embedding updated some rows at a time: what their gradients by rows hold, in place of V x H values.

A block is as many rows as hold 2^21 values, n in all, v rows; T tokens, width H, d bytes a value of the model:

    until all parts are there     hidden states T H d and log-sum-exp 4 T of the head, output gradients T H d of the
                                  embedding
    rows of the head              d n; of their logits d T v, float32 4 T v, gradient d T v (4 T v in float32)
    rows of the embedding         d (n + H), and beside those of a head tied to it
    an update                     the rows, d n, beside what an update of a block takes; a pass of `row_block_formulas`
                                  holds them as float32, 4 n, where it would have had a view of the whole gradient
    the next rows                 what the update before has left (see `step_formulas`), its rows, and making them

Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowmem.memory import update_tiles
from lowmem.memory.architecture import Shape
from lowmem.memory.frugal_states import SUBSPACES, frugal_rule
from lowmem.memory.low_rank_formulas import LOW_RANK
from lowmem.memory.row_block_formulas import ROW_BLOCKS, vector_bytes
from lowmem.memory.split_formulas import number_bytes
from lowmem.memory.state_formulas import with_defaults
from lowmem.memory.state_tensors import Settings, is_low_rank, is_matrix
from lowmem.memory.step_formulas import left_by_a_tile, update_bytes
from lowmem.memory.whitened_formulas import WHITENED

SLICES_START_AT = 256
"""As in `lowmem.numerics.tiles`; a test holds the two equal."""


@dataclass(frozen=True)
class RowUpdate:
    """Bytes of temporaries while a weight is updated some rows at a time."""

    beside: int
    """... of a block, the rows of its gradient included."""
    left: int
    """... of the block before, while the next rows are made."""


def takes_rows(algorithm: str, settings: Settings, shape: Shape) -> bool:
    """Whether the rule of a matrix can do with some rows of its gradient at a time."""
    settings = with_defaults(algorithm, settings)
    if algorithm in LOW_RANK:
        return not is_low_rank(settings, shape)
    if algorithm == "frugal" and frugal_rule(settings, shape) == "split":
        return settings["projection"] not in SUBSPACES
    return algorithm not in WHITENED or not is_matrix(shape)


def row_update(
    algorithm: str, settings: Settings, shape: Shape, itemsize: int, *, on_cuda: bool
) -> RowUpdate:
    settings = with_defaults(algorithm, settings)
    values = rows_in_a_block(shape) * shape[1]
    if algorithm in ROW_BLOCKS:
        update = update_bytes(algorithm, settings, shape, itemsize, on_cuda=on_cuda)
        vectors = vector_bytes(algorithm, settings, 1, *shape)
        return RowUpdate(beside=update + (4 * values if itemsize == 4 else 0), left=vectors)
    update = update_bytes(algorithm, settings, shape, itemsize, on_cuda=on_cuda)
    if algorithm == "frugal" and frugal_rule(settings, shape) == "split":
        return RowUpdate(beside=itemsize * values + update, left=number_bytes(settings, shape))
    left = left_by_a_tile(algorithm, settings, shape, itemsize) or 0
    return RowUpdate(beside=itemsize * values + update, left=(itemsize + left) * values)


def rows_in_a_block(shape: Shape) -> int:
    """As `lowmem.numerics.tiles.state_row_slices` cuts a matrix; a test holds the two equal."""
    rows, columns = shape
    unit = SLICES_START_AT // math.gcd(SLICES_START_AT, columns)
    return min(rows, max(unit, update_tiles.TILE_NUMEL // columns // unit * unit))


def head_rows_bytes(shape: Shape, tokens: int, itemsize: int, *, has_functions: bool) -> int:
    """Of making a block of the head's gradient, the rows included."""
    rows = rows_in_a_block(shape)
    logits = 4 if itemsize == 4 else 2 * itemsize + 4
    if has_functions:
        logits = 2 * itemsize + 8 + (itemsize if itemsize != 4 else 0)
    return itemsize * rows * shape[1] + logits * tokens * rows


def embedding_rows_bytes(shape: Shape, itemsize: int) -> int:
    """Of making a block of the embedding's gradient."""
    return itemsize * (rows_in_a_block(shape) + 1) * shape[1]
