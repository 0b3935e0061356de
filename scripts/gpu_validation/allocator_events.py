"""Random allocations and frees, on the allocator of a GPU and on its model, one event after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem.memory.caching_allocator import CachingAllocator

KIB, MIB = 2**10, 2**20
SEEDS = 6
EVENTS = 500
BOUNDARIES = (512, MIB, MIB + 1, 10 * MIB - 512, 10 * MIB, 10 * MIB + 1, 20 * MIB, 2 * MIB, 32 * MIB)
"""Sizes at which a rule of the allocator changes."""


@dataclass(frozen=True)
class Event:
    """`nbytes` is None where `key` is freed."""

    key: int
    nbytes: int | None


class Counted(Protocol):
    """What both sides can do; bytes."""

    @property
    def allocated_bytes(self) -> int: ...

    @property
    def reserved_bytes(self) -> int: ...

    def malloc(self, key: int, nbytes: int) -> None: ...

    def free(self, key: int) -> None: ...


class CudaTensors:
    """The real allocator, asked by plain tensors. All of them and the cache are gone when it is made."""

    def __init__(self) -> None:
        torch.cuda.empty_cache()
        self._live: dict[int, Tensor] = {}

    @property
    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved()

    def malloc(self, key: int, nbytes: int) -> None:
        self._live[key] = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def free(self, key: int) -> None:
        del self._live[key]


def random_events(seed: int, count: int, largest_total_bytes: int) -> Iterator[Event]:
    """Never more than `largest_total_bytes` alive; about as many frees as allocations in the long run."""
    draw = random.Random(seed)
    live: dict[int, int] = {}
    for key in range(count):
        nbytes = _size(draw)
        is_full = sum(live.values()) + nbytes > largest_total_bytes
        if live and (is_full or draw.random() < 0.45):
            freed = draw.choice(list(live))
            del live[freed]
            yield Event(freed, None)
        elif not is_full:
            live[key] = nbytes
            yield Event(key, nbytes)


def compare(events: Iterator[Event], real: Counted, model: Counted) -> dict[str, Any]:
    """How many events agreed, the first that did not, and the largest differences in bytes, as JSON values."""
    first: dict[str, Any] | None = None
    number = largest_allocated = largest_reserved = 0
    for number, event in enumerate(events, start=1):
        for side in (real, model):
            if event.nbytes is None:
                side.free(event.key)
            else:
                side.malloc(event.key, event.nbytes)
        allocated = model.allocated_bytes - real.allocated_bytes
        reserved = model.reserved_bytes - real.reserved_bytes
        largest_allocated = max(largest_allocated, abs(allocated))
        largest_reserved = max(largest_reserved, abs(reserved))
        if first is None and (allocated or reserved):
            first = {
                "event": number,
                "nbytes": event.nbytes,
                "model_minus_real_allocated_bytes": allocated,
                "model_minus_real_reserved_bytes": reserved,
            }
    return {
        "events": number,
        "first_difference": first,
        "largest_allocated_difference_bytes": largest_allocated,
        "largest_reserved_difference_bytes": largest_reserved,
        "reserved_bytes": real.reserved_bytes,
    }


def compare_all(
    real: Callable[[], Counted], *, largest_total_bytes: int, expandable: bool
) -> Iterator[dict[str, Any]]:
    """One comparison a seed, as soon as it is known."""
    for seed in range(SEEDS):
        events = random_events(seed, EVENTS, largest_total_bytes)
        yield {"seed": seed} | compare(events, real(), CachingAllocator(expandable=expandable))


def _size(draw: random.Random) -> int:
    """Bytes; as many for the small pool as for the large one, the bounds of the rules among them."""
    kind = draw.random()
    if kind < 0.1:
        return draw.choice(BOUNDARIES)
    low, high = (1, MIB) if kind < 0.5 else (MIB, 10 * MIB) if kind < 0.75 else (10 * MIB, 200 * MIB)
    return int(low * (high / low) ** draw.random())
