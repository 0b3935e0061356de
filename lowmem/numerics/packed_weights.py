"""Weights in bitsandbytes' 4-bit codes: a parameter of bytes, and its scales in an attribute of it.

`quant_state` holds the shape of the weight, the scales of its blocks, which are 8-bit codes themselves under
double quantisation, and the two tables that codes are looked up in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor


def packed_numel(param: Tensor) -> int | None:
    """How many values are packed in `param`; None for one that is not packed."""
    state = getattr(param, "quant_state", None)
    return None if state is None else math.prod(state.shape)


def scales_of(param: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything that is kept beside the codes; nothing for a parameter that is not packed."""
    state, prefix = getattr(param, "quant_state", None), ""
    while state is not None:
        for name in ("absmax", "code", "offset"):
            tensor = getattr(state, name, None)
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor
        state, prefix = getattr(state, "state2", None), "scales' "
