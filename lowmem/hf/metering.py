"""Which optimizer steps of a run the memory meter watches, and where their phases begin and end.

Watching slows a step down: the byte tracker of a CPU much, the readings of a GPU's allocator a little. So
three are watched: the first two, in which state is created and bases are computed, and a later one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lowmem.memory.ledger import Phase
from lowmem.memory.measure import Measured, Meter

STEADY_STEP = 4  # steps after the first


def steps_to_watch(first: int, last: int) -> set[int]:
    """1-based steps of a run from `first` to `last` that a slow meter watches."""
    return {first, min(first + 1, last), min(first + STEADY_STEP, last)}


class StepWatch:
    """Feeds `meter` from the Trainer's events. Outside a watched step every method does nothing.

    It watches no step before `choose_steps`. Phases never nest.
    """

    def __init__(self, meter: Meter):
        self.meter = meter
        self.steps: set[int] = set()
        self.watched_any = False
        self.is_on = True
        """Off where the meter would count a library's pieces and buffers wrongly."""
        self._step: ExitStack | None = None
        self._phase: ExitStack | None = None

    def choose_steps(self, first: int, last: int) -> None:
        self.steps = steps_to_watch(first, last) if self.is_on else set()

    def begin_step(self, step: int) -> None:
        if step in self.steps:
            self._step = ExitStack()
            self._step.enter_context(self.meter.step())

    def end_step(self) -> None:
        """Close the phase and the step that are open, in that order."""
        self.end_phase()
        if self._step is not None:
            self._step.close()
            self._step = None
            self.watched_any = True

    def begin_phase(self, name: Phase) -> None:
        assert self._phase is None, f"phase {name} begins inside another"
        if self._step is not None:
            self._phase = ExitStack()
            self._phase.enter_context(self.meter.phase(name))

    def end_phase(self) -> None:
        if self._phase is not None:
            self._phase.close()
            self._phase = None

    def measured(self) -> Measured | None:
        """What the watched steps have shown so far; None before the first has ended."""
        return self.meter.measured() if self.watched_any else None

    @contextmanager
    def closed_at_the_end(self) -> Iterator[None]:
        """A tracker that is left open after an error would watch everything else in the process."""
        try:
            yield
        finally:
            self.end_step()
