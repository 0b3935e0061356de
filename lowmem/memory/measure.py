"""Meters: what a training step needs, in bytes, by part.

A meter wraps whole optimizer steps and the phases inside them:

    meter = meter_for(model, device)
    meter.watch(optimizer)
    with meter.step():
        with meter.phase("forward"): ...
        with meter.phase("backward"): ...
        with meter.phase("optimizer"): ...
    meter.measured()

Measure the first step, in which optimizer state is created and bases are computed, and a few later ones.
On every device `activations` are what forward leaves alive for backward; what backward recomputes under
activation checkpointing is `temporary`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from lowmem.memory.allocator import AllocatorMeter, CudaAllocator
from lowmem.memory.ledger import Phase
from lowmem.memory.owners import owned_tensors
from lowmem.memory.readings import Measured, Reading, over_steps
from lowmem.memory.tracker import ByteTracker

__all__ = ["AllocatorMeter", "Measured", "Meter", "TrackedMeter", "meter_for"]


class Meter(Protocol):
    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Say whose state counts as `optimizer_state`. Call it before the first step."""

    def step(self) -> AbstractContextManager[None]:
        """Measure one optimizer step: all its micro-batches and the update. A step that raises is left out."""

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Say which phase of the step the work inside is. Outside a step it does nothing."""

    def last_peak_bytes(self) -> int | None:
        """Peak of the last measured step, None before the first."""

    def measured(self) -> Measured:
        """The result so far. Raises ValueError before the first step."""


def note_landings(model: nn.Module, meter: TrackedMeter) -> None:
    """Tell `meter` of each gradient that lands; before any other hook, which may use and free it.

    The hooks do not keep the meter alive: a tensor's hooks are hidden from the garbage collector.
    """
    reference = weakref.ref(meter)

    def landed(param: Tensor) -> None:
        if (alive := reference()) is not None:
            alive.note_gradient(param)

    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(landed)


class TrackedMeter:
    """Counts live tensors exactly, operator by operator: the same bytes on every run. Slow: for a CPU."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._optimizer: torch.optim.Optimizer | None = None
        self._tracker: ByteTracker | None = None
        self._readings: list[Reading] = []
        self._warnings: set[str] = set()
        note_landings(model, self)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @contextmanager
    def step(self) -> Iterator[None]:
        tracker = self._new_tracker()
        self._tracker = tracker
        try:
            with tracker:
                yield
        finally:
            self._tracker = None
        self._readings.append(self._reading(tracker))
        self._warnings |= tracker.uncounted

    def note_gradient(self, param: Tensor) -> None:
        if self._tracker is not None:
            self._tracker.note_gradient(param)

    def _new_tracker(self) -> ByteTracker:
        return ByteTracker(lambda: owned_tensors(self._model, self._optimizer))

    def _reading(self, tracker: ByteTracker) -> Reading:
        fullest = tracker.fullest()
        return Reading(fullest.peak_bytes, fullest.parts)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        if self._tracker is None:
            yield
            return
        with self._tracker.phase(name):
            yield

    def last_peak_bytes(self) -> int | None:
        return self._readings[-1].peak_bytes if self._readings else None

    def measured(self) -> Measured:
        return over_steps(self._readings, "tracked", sorted(self._warnings))


def meter_for(model: nn.Module, device: torch.device | str) -> Meter:
    """The meter for a model trained on `device`: the allocator's own counters on CUDA, the tracker on a CPU.

    Raises ValueError for another kind of device.
    """
    device = torch.device(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        return AllocatorMeter(model, device, CudaAllocator(device))
    if device.type == "cpu":
        return TrackedMeter(model)
    raise ValueError(f"memory can be measured on cpu and cuda devices, not on {device.type}")
