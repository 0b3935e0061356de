"""How many CPU threads a model is worth."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from lowmem.numerics.held_weights import numel_of

TINY_PARAMETERS = 4_000_000


def use_one_thread_for_tiny_model(model: nn.Module, say: Callable[[str], object]) -> None:
    """Train a model below `TINY_PARAMETERS` on one CPU thread, unless OMP_NUM_THREADS says otherwise.

    Its operators last microseconds, and threads that wait for each other gain nothing; on a machine that
    does something else as well they lose most of the time to spinning. Does nothing on other devices.
    """
    params = list(model.parameters())
    if params[0].device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == 1:
        return
    if sum(numel_of(param) for param in params) < TINY_PARAMETERS:
        torch.set_num_threads(1)
        say("threads: 1, which suits a model this small; OMP_NUM_THREADS sets another number")
