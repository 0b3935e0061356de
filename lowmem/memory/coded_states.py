"""State in bitsandbytes' 8-bit codes. Imports no torch.

    adamw8bit   exp_avg and exp_avg_sq
    lion8bit    exp_avg

of N codes each, or float32 values where a parameter has fewer than `min_8bit_size`.
"""

from __future__ import annotations

import math

from lowmem.memory.architecture import Shape
from lowmem.memory.state_tensors import Settings, State, StateTensor


def adamw8bit_state(settings: Settings, shape: Shape) -> State:
    return {"exp_avg": _moment(settings, shape), "exp_avg_sq": _moment(settings, shape)}


def lion8bit_state(settings: Settings, shape: Shape) -> State:
    return {"exp_avg": _moment(settings, shape)}


def has_codes(settings: Settings, shape: Shape) -> bool:
    return math.prod(shape) >= settings["min_8bit_size"]


def _moment(settings: Settings, shape: Shape) -> StateTensor:
    return StateTensor(math.prod(shape), "codes" if has_codes(settings, shape) else "factor")
