"""The plan of a run's memory: the shape of memory.json, with what only a plan can say. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem.memory.cards import Card, margin_bytes
from lowmem.memory.document import memory_document
from lowmem.memory.ledger import Part, Phase
from lowmem.memory.readings import Measured


@dataclass(frozen=True)
class Held:
    """What is alive at a moment: `count` tensors of one kind, `nbytes` together."""

    what: str
    part: Part
    count: int
    nbytes: int


@dataclass(frozen=True)
class Moment:
    """The fullest moment of one planned step."""

    name: str
    peak_bytes: int
    parts: dict[Part, int]
    phase: Phase | None
    place: str
    held: list[Held]


@dataclass(frozen=True)
class Checkpoint:
    """What saving takes: bytes of one checkpoint and of the final model on the disk, and on the host meanwhile."""

    disk_bytes: int
    final_model_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class Change:
    """One or several keys of the recipe, and what the run would need with them."""

    overrides: list[str]
    peak_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a recipe will need. `document` is what `lowmem plan --json` prints; the properties are its main lines."""

    document: dict[str, Any]

    @property
    def peak_bytes(self) -> int:
        return self.document["peak_bytes"]

    @property
    def reserved_bytes(self) -> int:
        return self.document["reserved_bytes"]

    @property
    def parts(self) -> dict[str, int]:
        return self.document["parts"]

    @property
    def fits(self) -> bool | None:
        """None when no card was named."""
        return self.document["fits"]

    @property
    def moments(self) -> list[dict[str, Any]]:
        return self.document["steps_planned"]


def plan_document(
    planned: Measured,
    moments: Sequence[Moment],
    conditions: Mapping[str, Any],
    *,
    card: Card | None,
    baselines: Mapping[str, Measured | str],
    checkpoint: Checkpoint | None,
    changes: Sequence[Change],
    notes: Sequence[str],
    pinned_host_bytes: int = 0,
) -> dict[str, Any]:
    """JSON values. `planned` is about the training steps; `moments` may hold evaluations after them."""
    document = memory_document(
        planned, baselines, conditions, gpu_bytes=None if card is None else card.memory_bytes
    )
    del document["planned"]
    fullest = next(moment for moment in moments if moment.peak_bytes == planned.peak_bytes)
    reserved = planned.reserved_bytes
    return document | {
        "source": "planned",
        "gpu": None if card is None else card.name,
        "margin_bytes": None
        if card is None or reserved is None
        else margin_bytes(reserved, card.memory_bytes),
        "peak": {"step": fullest.name, "phase": fullest.phase, "place": fullest.place},
        "largest": [vars(held) for held in fullest.held],
        "steps_planned": [
            {
                "step": moment.name,
                "peak_bytes": moment.peak_bytes,
                "phase": moment.phase,
                "place": moment.place,
            }
            for moment in moments
        ],
        "pinned_host_bytes": pinned_host_bytes,
        "checkpoint": None if checkpoint is None else vars(checkpoint),
        "changes_that_fit": [vars(change) for change in changes],
        "notes": list(notes),
    }
