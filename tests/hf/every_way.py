"""Every registered optimizer in every execution that goes with it, on matrices of a few rows."""

from __future__ import annotations

from typing import Any

import torch

from lowmem.optim.registry import OPTIMIZERS, optimizer_class
from lowmem.optim.settings import settings_of
from lowmem.run.choose import EXECUTIONS, objection, situation_of


def settings_for(name: str) -> dict[str, Any]:
    """With a basis that fits small matrices and is refreshed on the way, and with momentum."""
    wanted = {"lr": 3e-3, "rank": 4, "refresh_every": 3, "momentum": 0.9}
    return {key: value for key, value in wanted.items() if key in settings_of(optimizer_class(name))}


def every_way() -> list[tuple[str, str]]:
    """(optimizer, execution), without global clipping."""
    ways = []
    for name in sorted(OPTIMIZERS):
        one = torch.nn.Parameter(torch.empty(16, 24))
        optimizer = optimizer_class(name)([one], **settings_for(name))
        at = situation_of(optimizer, micro_batches=2, clip="applied", max_norm=None)
        ways += [(name, mode) for mode in EXECUTIONS if objection(mode, at) is None]
    return ways
