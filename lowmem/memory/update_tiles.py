"""The tiles that an update works on, and what it takes to round state to its format. Imports no torch.

Codes are made of c = 2^19 values at a time. Bytes of it: 26 c in int8 (shares of the scale, magnitudes, codes, the two
levels around each and random numbers; 21 c without them), 6 c in int4; of reading int8 moments again, 4 c.
"""

from __future__ import annotations

from lowmem.memory.state_formulas import storage_format, stored_itemsize
from lowmem.memory.state_tensors import Settings, StateTensor

TILE_NUMEL = 1 << 21
"""As in `lowmem.numerics.tiles`; a test holds the two equal."""

CODED_NUMEL = 1 << 19
"""Likewise."""


def saving_bytes(tensor: StateTensor, settings: Settings, itemsize: int, numel: int) -> int:
    """Beside the `numel` float32 values of a tensor of state, while they are rounded to its format."""
    is_stochastic = settings["rounding"] == "stochastic" and tensor.role != "basis"
    chosen, coded = storage_format(tensor, settings), min(numel, CODED_NUMEL)
    if chosen == "int8":
        return (26 if is_stochastic else 21) * coded
    if chosen == "int4":
        return 6 * coded
    return 6 * numel if is_stochastic and stored_itemsize(tensor, settings, itemsize) < 4 else 0
