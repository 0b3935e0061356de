"""What a meter found: one reading a step, and the result over all measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lowmem.memory.ledger import Part

Source = Literal["tracked", "allocator", "simulated", "formula"]


@dataclass(frozen=True)
class Reading:
    """The fullest moment of one step. The parts sum to `peak_bytes`."""

    peak_bytes: int
    parts: dict[Part, int]
    reserved_bytes: int | None = None
    driver_bytes: int | None = None


@dataclass(frozen=True)
class Measured:
    """Memory of a few optimizer steps, in bytes; `Measured(**dataclasses.asdict(m))` makes it again.

    `parts` is the composition of the fullest step and sums to `peak_bytes`. `steady_peak_bytes` leaves
    out the first measured step, in which state is created; it is None when only one was measured.
    `reserved_bytes` is what the allocator took from the device, None on a CPU; `driver_bytes` is what the
    driver counts for all processes on the device, CUDA's context included.
    """

    peak_bytes: int
    reserved_bytes: int | None
    parts: dict[Part, int]
    steps: int
    source: Source
    steady_peak_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)
    driver_bytes: int | None = None


def over_steps(readings: Sequence[Reading], source: Source, warnings: Sequence[str]) -> Measured:
    """The fullest step stands for all. Raises ValueError when no step was measured."""
    if not readings:
        raise ValueError("no step was measured: run at least one inside `with meter.step():`")
    # Of equals the last: what libraries took for good in the first step is told from activations by then.
    fullest = max(reversed(readings), key=lambda reading: reading.peak_bytes)
    reserved = [reading.reserved_bytes for reading in readings if reading.reserved_bytes is not None]
    driver = [reading.driver_bytes for reading in readings if reading.driver_bytes is not None]
    return Measured(
        peak_bytes=fullest.peak_bytes,
        reserved_bytes=max(reserved, default=None),
        parts=dict(fullest.parts),
        steps=len(readings),
        source=source,
        steady_peak_bytes=max((reading.peak_bytes for reading in readings[1:]), default=None),
        warnings=list(warnings),
        driver_bytes=max(driver, default=None),
    )
