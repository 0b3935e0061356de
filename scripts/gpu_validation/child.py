"""What one child process does: one task, its findings written to a file as they come."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpu_validation.allocator_events import MIB, CudaTensors, compare_all
from gpu_validation.configurations import configuration
from gpu_validation.document import (
    ALLOCATORS,
    CONDITIONS,
    FAILED,
    LOSS_CURVES,
    MEASURED,
    NOT_RUN,
    OPERATORS,
    write_json,
)
from gpu_validation.driver import bytes_in_use, conditions, free_bytes, settled
from lowmem.memory.cards import CONTEXT_BYTES, USABLE, fits
from lowmem.memory.wording import size

LARGEST_EVENTS_BYTES = 8 * 2**10 * MIB
EVENTS_SHARE = 4
"""Of the free memory a fourth at most: fragments come on top."""

REHEARSED_STEPS = 1
LONGEST_REASON = 400


class Findings:
    """A task's report; whoever started the process reads the file, however it ended."""

    def __init__(self, path: Path):
        self._path = path
        self.content: dict[str, Any] = {"status": FAILED}

    def say(self, **found: Any) -> None:
        self.content |= found
        write_json(self._path, self.content)

    def failed(self, what: str, error: BaseException) -> None:
        self.say(status=FAILED, reason=f"{what}: {explained(error)}", where=place_of(error))


def run_task(task: str, device: str, findings: Findings, lock: Path, limit_seconds: float) -> None:
    """Do `task`, on the card only while no other process holds `lock`; each stage has `limit_seconds`."""
    stages = Stages(findings, lock, limit_seconds)
    try:
        if task == CONDITIONS:
            with stages.on_the_card("reading the conditions"):
                idle = settled(bytes_in_use) if device == "cuda" else None
                findings.say(**conditions(), idle_bytes=idle, status=MEASURED)
        elif task == OPERATORS:
            _operators(device, findings, stages)
        elif task == LOSS_CURVES:
            _loss_curves(device, findings, stages)
        elif task in ALLOCATORS:
            _allocator(device, findings, stages, expandable=task == ALLOCATORS[1])
        else:
            _configuration(task, device, findings, stages)
    except Exception as error:
        findings.failed(str(findings.content.get("stage", "starting")), error)


class Stages:
    """Names what a process is doing, and ends it when that takes too long, even inside a library."""

    def __init__(self, findings: Findings, lock: Path, limit_seconds: float):
        self._findings = findings
        self._lock = lock
        self._limit_seconds = limit_seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._findings.say(stage=name)
        faulthandler.dump_traceback_later(self._limit_seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def on_the_card(self, name: str) -> Iterator[None]:
        """Waits for its turn without a limit; the end of the process gives the card to the next."""
        self._findings.say(stage="waiting for the card")
        never_closed = os.open(self._lock, os.O_RDWR | os.O_CREAT)
        fcntl.flock(never_closed, fcntl.LOCK_EX)
        with self.stage(name):
            yield


def _configuration(task: str, device: str, findings: Findings, stages: Stages) -> None:
    from gpu_validation.planned_and_measured import TIMED_STEPS, Run

    on_cuda, chosen = device == "cuda", configuration(task)
    with stages.stage("planning"):
        run = Run(chosen, small=not on_cuda)
        try:
            findings.say(plan=run.plan(on_cuda=on_cuda))
        except Exception as error:
            findings.failed("planning", error)
    with stages.on_the_card("measuring"):
        reserved = findings.content.get("plan", {}).get("reserved_bytes")
        if on_cuda and reserved is not None:
            card_bytes = torch.cuda.get_device_properties(0).total_memory
            if chosen.card_gib is not None:
                card_bytes = as_small_as(chosen.card_gib, card_bytes)
            if not fits(reserved, card_bytes):
                findings.say(**does_not_fit(reserved, card_bytes))
                return
        steps = TIMED_STEPS if on_cuda else REHEARSED_STEPS
        findings.say(measured=run.measure(torch.device(device), timed_steps=steps))
    if "plan" in findings.content:
        findings.say(status=MEASURED)


def as_small_as(card_gib: int, card_bytes: int) -> int:
    """Let the allocator have no more than on a card of `card_gib`; the bytes of the smaller card."""
    smaller = min(card_bytes, card_gib * 2**30)
    torch.cuda.set_per_process_memory_fraction((USABLE * smaller - CONTEXT_BYTES) / card_bytes)
    return smaller


def does_not_fit(reserved_bytes: int, card_bytes: int) -> dict[str, str]:
    planned, card = size(reserved_bytes), size(card_bytes)
    return {"status": NOT_RUN, "reason": f"planned {planned} reserved does not fit {card}"}


def _operators(device: str, findings: Findings, stages: Stages) -> None:
    from gpu_validation.operators import measure_operators

    on_cuda = device == "cuda"
    with stages.on_the_card("measuring operators"):
        _collect(measure_operators(on_cuda=on_cuda, small=not on_cuda), findings)


def _loss_curves(device: str, findings: Findings, stages: Stages) -> None:
    from gpu_validation.loss_curves import loss_curves

    with stages.on_the_card("training on text"):
        _collect(loss_curves(torch.device(device), small=device != "cuda"), findings)


def _allocator(device: str, findings: Findings, stages: Stages, *, expandable: bool) -> None:
    if device != "cuda":
        findings.say(status=NOT_RUN, reason="the allocator is that of a GPU")
        return
    with stages.on_the_card("comparing the allocator"):
        largest = min(LARGEST_EVENTS_BYTES, (settled(free_bytes) or 0) // EVENTS_SHARE)
        _collect(compare_all(CudaTensors, largest_total_bytes=largest, expandable=expandable), findings)


def _collect(rows: Iterable[dict[str, Any]], findings: Findings) -> None:
    so_far: list[dict[str, Any]] = []
    for row in rows:
        so_far.append(row)
        findings.say(rows=so_far)
    findings.say(status=MEASURED)


def explained(error: BaseException) -> str:
    """One line of at most LONGEST_REASON characters."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    message = " ".join(str(error).split()) or "without a message"
    return f"{type(error).__name__}: {message}"[:LONGEST_REASON]


def place_of(error: BaseException) -> list[str]:
    """The last calls, innermost last, without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
