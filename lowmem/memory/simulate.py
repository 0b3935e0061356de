"""Count the bytes of a training step that never runs: the real code on tensors without contents.

    simulation = Simulation()
    with simulation.tensors():
        model = ...                                  # whatever makes it; no memory is taken
        meter = SimulatedMeter(model, on_cuda=True)
        meter.watch(optimizer)
        with meter.step("first step"): ...           # as with any meter
    meter.measured(), meter.moments

Everything that PyTorch's dispatcher sees is exact: the tracker of a CPU run counts the same bytes. For
CUDA three things are added that no operator shows: the libraries' workspaces (`workspaces.py`), and what
the caching allocator reserves for such a sequence of blocks (`caching_allocator.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.memory.known_values import KnownValues
from lowmem.memory.ledger import Life, Part
from lowmem.memory.measure import TrackedMeter
from lowmem.memory.owners import owned_tensors
from lowmem.memory.places import follow_places
from lowmem.memory.plan_document import Held, Moment
from lowmem.memory.readings import Measured, Reading, over_steps
from lowmem.memory.repeated_steps import RepeatedSteps
from lowmem.memory.replayed_allocator import ReplayedAllocator
from lowmem.memory.tracker import ByteTracker
from lowmem.memory.workspaces import CUBLAS_BYTES, cuda_workspace_bytes
from lowmem.optim.engine import LowMemOptimizer

_NOT_A_STORAGE = -1
_BATCHES_LEFT_OUT = -2


class Simulation:
    """Tensors with shapes, types and strides, but without contents."""

    def __init__(self) -> None:
        self._fake_mode = FakeTensorMode(
            allow_non_fake_inputs=True,
            allow_fallback_kernels=False,  # they would allocate real tensors of the model's sizes
        )
        self._values = KnownValues(self._fake_mode)

    @contextmanager
    def tensors(self) -> Iterator[None]:
        """Every tensor made inside is without contents."""
        apply = nn.Module._apply
        nn.Module._apply = _apply_to_fakes  # type: ignore[method-assign]
        try:
            with self._fake_mode, self._values:
                yield
        finally:
            nn.Module._apply = apply  # type: ignore[method-assign]

    def batch(self, real: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of integers without contents, about which the model may still ask."""
        return {name: self._values.fake(value) for name, value in real.items()}


class SimulatedMeter(TrackedMeter):
    """A meter of simulated steps; parts and bytes are those of the CPU's tracker.

    `on_cuda` adds workspaces and the allocator's reserve. `batches_left_out_bytes` are held by micro-batches
    of a step that are not simulated because they repeat another.
    """

    def __init__(self, model: nn.Module, *, on_cuda: bool, batches_left_out_bytes: int = 0):
        super().__init__(model)
        self.moments: list[Moment] = []
        self._on_cuda = on_cuda
        self._batches_left_out_bytes = batches_left_out_bytes
        self._device = ReplayedAllocator()
        self._next_name = "step 1"
        follow_places(model, self._at)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        super().watch(optimizer)
        if isinstance(optimizer, LowMemOptimizer):
            RepeatedSteps(
                optimizer, lambda: None if self._tracker is None else self._tracker.ledger, self._at
            )

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        return self._optimizer

    def name_next(self, name: str) -> None:
        """What the next step is called in `moments`."""
        self._next_name = name

    def measured(self) -> Measured:
        return over_steps(self._readings, "simulated", sorted(self._warnings))

    def _at(self, place: str) -> None:
        if self._tracker is not None:
            self._tracker.at(place)

    def _new_tracker(self) -> ByteTracker:
        tracker = ByteTracker(
            lambda: owned_tensors(self._model, self._optimizer),
            scratch_bytes=cuda_workspace_bytes if self._on_cuda else None,
            names_makers=True,
            adds_in_place=self._on_cuda,
        )
        if self._on_cuda:
            tracker.ledger.found(CUBLAS_BYTES, "other", _NOT_A_STORAGE).made_by = "workspace of cuBLAS"
        if self._batches_left_out_bytes:
            left_out = tracker.ledger.found(self._batches_left_out_bytes, "other", _BATCHES_LEFT_OUT)
            left_out.made_by = "micro-batches of the step"
        return tracker

    def _reading(self, tracker: ByteTracker) -> Reading:
        fullest = tracker.fullest()
        parts, peak_bytes, reserved_bytes = dict(fullest.parts), fullest.peak_bytes, None
        held = held_at(fullest.lives)
        if self._on_cuda:
            allocated, reserved_bytes = self._device.after_step(tracker.ledger)
            unsplit = max(allocated - peak_bytes, 0)
            held.append(Held("blocks of the allocator beyond their tensors", "other", 1, unsplit))
            parts["other"] += unsplit
            peak_bytes += unsplit
        self.moments.append(Moment(self._next_name, peak_bytes, parts, fullest.phase, fullest.place, held))
        self._next_name = f"step {len(self.moments) + 1}"
        return Reading(peak_bytes, parts, reserved_bytes)


def _apply_to_fakes(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which swaps the contents of parameters: a fake one that is referred to cannot be swapped."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, param in module._parameters.items():
        with torch.no_grad():
            if param is not None and (applied := fn(param)) is not param:
                module._parameters[name] = nn.Parameter(applied.detach(), param.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def held_at(lives: Sequence[Life]) -> list[Held]:
    """Kinds of live tensors, largest first; the layers' numbers are left out, so that their tensors add up."""
    kinds: dict[tuple[str, Part], list[int]] = {}
    for life in lives:
        kinds.setdefault((_without_numbers(life.made_by), life.part), []).append(life.nbytes)
    held = [Held(what, part, len(sizes), sum(sizes)) for (what, part), sizes in kinds.items()]
    return sorted(held, key=lambda each: -each.nbytes)


def _without_numbers(name: str) -> str:
    """model.layers.*.mlp for model.layers.7.mlp; shapes keep their numbers."""
    path, space, shape = name.partition(" (")
    return re.sub(r"(?<![^ .])\d+(?=\.)", "*", path) + space + shape
