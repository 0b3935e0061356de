"""Measuring on CUDA with the caching allocator's own counters, which cost almost nothing.

The allocator knows totals, not meanings. Weights, gradients and optimizer state are counted from the
tensors, and which of them lived at the peak follows from reading the counters between phases and
whenever a gradient has landed on its parameter. So the total is exact, gradients are true to within one
parameter, activations are at most what forward left behind, and what nothing explains is temporary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from lowmem.memory.ledger import PARTS, Part, Phase, rounded
from lowmem.memory.owners import owned_bytes
from lowmem.memory.readings import Measured, Reading, over_steps
from lowmem.numerics.held_weights import grad_of


class Allocator(Protocol):
    """The counters of one device, in bytes."""

    def wait(self) -> None:
        """Until the device has done all work."""

    def allocated(self) -> tuple[int, int]:
        """Bytes in tensors now, and the most since the last reset."""

    def peak_reserved(self) -> int:
        """The most bytes taken from the device since the last reset."""

    def reset_peaks(self) -> None:
        """The peaks start again at what there is now."""

    def num_retries(self) -> int:
        """How often, ever, the device was full and cached blocks had to be given back first."""

    def device_used(self) -> int:
        """Bytes of the device that are taken now by all processes, CUDA's context and libraries included."""


class CudaAllocator:
    def __init__(self, device: torch.device):
        self.device = device

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def allocated(self) -> tuple[int, int]:
        stats = torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]
        return stats["current"], stats["peak"]

    def peak_reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)

    def reset_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def num_retries(self) -> int:
        return int(torch.cuda.memory_stats(self.device)["num_alloc_retries"])

    def device_used(self) -> int:
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
        return total_bytes - free_bytes


class AllocatorMeter:
    """Peak allocated and reserved bytes of whole steps, each measured from its own start."""

    def __init__(self, model: nn.Module, device: torch.device, allocator: Allocator):
        self._model = model
        self._device = device
        self._allocator = allocator
        self._optimizer: torch.optim.Optimizer | None = None
        self._step: _Step | None = None
        self._readings: list[Reading] = []
        self._retries = 0

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @contextmanager
    def step(self) -> Iterator[None]:
        self._allocator.wait()
        retries = self._allocator.num_retries()
        self._allocator.reset_peaks()
        self._step = step = _Step(self._allocator, self._owned())
        try:
            yield
            self._allocator.wait()
            step.read(self._owned())
        finally:
            self._step = None
        self._retries += self._allocator.num_retries() - retries
        # The allocator keeps what it has reserved, so the driver's number after a step is that of its peak.
        reserved, driver = self._allocator.peak_reserved(), self._allocator.device_used()
        self._readings.append(Reading(step.peak_bytes, step.parts, reserved, driver))

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        step = self._step
        if step is None:
            yield
            return
        step.read(self._owned())
        with self._watching_gradients(step) if name == "backward" else step.in_phase(name):
            yield
            step.read(self._owned())

    def last_peak_bytes(self) -> int | None:
        return self._readings[-1].peak_bytes if self._readings else None

    def measured(self) -> Measured:
        warnings = []
        if self._retries:
            warnings.append(
                f"the device was full {self._retries} time(s) and cached memory had to be given back "
                "(num_alloc_retries): the run works at the card's limit and its peak compares badly"
            )
        return over_steps(self._readings, "allocator", warnings)

    def _owned(self) -> dict[Part, int]:
        return owned_bytes(self._model, self._optimizer, self._device)

    @contextmanager
    def _watching_gradients(self, step: _Step) -> Iterator[None]:
        """Read the counters each time a gradient that was not there before has landed."""
        owned = self._owned()

        def landed(param: Tensor) -> None:
            if (grad := grad_of(param)) is not None:
                owned["gradients"] += rounded(grad.untyped_storage().nbytes())
            step.read(owned)

        waiting = [p for p in self._model.parameters() if p.requires_grad and grad_of(p) is None]
        handles = [param.register_post_accumulate_grad_hook(landed) for param in waiting]
        try:
            with step.in_phase("backward"):
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Step:
    """One step under way: what is known of its fullest moment so far."""

    def __init__(self, allocator: Allocator, owned: dict[Part, int]):
        self._allocator = allocator
        allocated, self.peak_bytes = allocator.allocated()
        self._owned = dict(owned)
        self._resident = max(allocated - sum(owned.values()), 0)  # batches, caches of libraries
        self._unexplained = 0
        self._left_by_forward = 0
        self._phase: Phase | None = None
        self.parts = self._split(owned, activations=0)

    @contextmanager
    def in_phase(self, name: Phase) -> Iterator[None]:
        self._phase = name
        try:
            yield
        finally:
            self._phase = None

    def read(self, owned: dict[Part, int]) -> None:
        """Look at the counters. A new peak belongs to the time since the last look.

        Activations and temporaries that `owned` does not explain only bound the activations: from above
        by what there is when forward ends and, as backward frees them, by what there was a look ago.
        """
        allocated, peak_bytes = self._allocator.allocated()
        unexplained = max(allocated - sum(owned.values()) - self._resident, 0)
        if self._phase == "forward":
            self._left_by_forward = self._unexplained = unexplained
        if peak_bytes > self.peak_bytes:
            self.peak_bytes = peak_bytes
            # A part may have been freed (zero_grad) or made (optimizer state) since the last look.
            present = {part: max(owned[part], self._owned[part]) for part in owned}
            self.parts = self._split(present, min(self._left_by_forward, self._unexplained))
        self._owned, self._unexplained = dict(owned), unexplained

    def _split(self, owned: dict[Part, int], activations: int) -> dict[Part, int]:
        parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
        rest = self.peak_bytes
        claims: list[tuple[Part, int]] = [
            ("weights", owned["weights"]),
            ("optimizer_state", owned["optimizer_state"]),
            ("other", self._resident),
            ("gradients", owned["gradients"]),
            ("activations", activations),
        ]
        for part, claim in claims:
            parts[part] = min(claim, rest)
            rest -= parts[part]
        parts["temporary"] = rest
        return parts
