"""A two-layer network and one training step, small enough to count by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowmem.memory.measure import Meter
from lowmem.memory.owners import owned_tensors
from lowmem.memory.tracker import ByteTracker

INPUTS, HIDDEN, OUTPUTS = 64, 128, 32
NUM_PARAMETERS = INPUTS * HIDDEN + HIDDEN + HIDDEN * OUTPUTS + OUTPUTS
NUM_TENSORS = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS))


def batch(rows: int) -> Tensor:
    return torch.linspace(-1, 1, rows * INPUTS).reshape(rows, INPUTS)


def exact_tracker(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> ByteTracker:
    """Without rounding, so that bytes are numbers of elements times element size."""
    return ByteTracker(lambda: owned_tensors(model, optimizer), round_to=1)


def train_step(
    model: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer, meter: Meter | ByteTracker
) -> float:
    """One step of a mean square, with the phases marked. Gradients are gone afterwards; the loss is returned."""
    with meter.phase("forward"):
        loss = model(inputs).square().mean()
    with meter.phase("backward"):
        loss.backward()
    value = float(loss.detach())
    del loss
    with meter.phase("optimizer"):
        optimizer.step()
    optimizer.zero_grad()
    return value
