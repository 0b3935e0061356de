"""Tensors of optimizer state in numbers, and which matrices a rule for matrices treats. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.memory.architecture import Shape

Settings = Mapping[str, Any]

UNLOADED = ("scalar", "codes")
"""Roles of which an update makes no float32 tensor: single numbers, and what a library's kernel reads by itself."""


@dataclass(frozen=True)
class StateTensor:
    """Values of one tensor of state; the role decides their storage format."""

    numel: int
    role: str = "moment"


State = dict[str, StateTensor]


def adamw_state(settings: Settings, shape: Shape) -> State:
    """Adam's two moments."""
    numel = math.prod(shape)
    return {"exp_avg": StateTensor(numel), "exp_avg_sq": StateTensor(numel, "variance")}


def is_matrix(shape: Shape) -> bool:
    """Whether a parameter is a matrix, or a batch of them, with more than one row and column."""
    return len(shape) in (2, 3) and min(shape[-2:]) > 1


def is_low_rank(settings: Settings, shape: Shape) -> bool:
    """Whether a parameter is a matrix, or a batch of them, whose smaller side exceeds `rank`."""
    rank = settings["rank"]
    return rank is not None and len(shape) in (2, 3) and min(shape[-2:]) > rank
