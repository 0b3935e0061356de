"""The results file: every configuration from the start, rewritten whole after each that ends."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_validation.configurations import CONFIGURATIONS, Configuration

MEASURED, FAILED, NOT_RUN = "measured", "failed", "not run"
NOT_ASKED_FOR, NOT_REACHED = "not asked for", "not reached yet"

CONDITIONS = "conditions"
CONFIGURED = "configurations"
OPERATORS = "operators"
LOSS_CURVES = "loss_curves"
ALLOCATORS = ("allocator", "allocator-expandable")
LISTS = (OPERATORS, *ALLOCATORS, LOSS_CURVES)
"""Tasks whose findings are rows."""


def task_names() -> list[str]:
    """All that is run, in its order: what says most about the plan comes first."""
    names = [each.name for each in CONFIGURATIONS]
    return [CONDITIONS, *names[:3], ALLOCATORS[0], OPERATORS, *names[3:], ALLOCATORS[1], LOSS_CURVES]


class Document:
    """A dictionary of JSON values, kept equal to `path` where one is given."""

    def __init__(self, device: str, asked_for: Sequence[str], path: Path | None):
        self._path = path
        self.content: dict[str, Any] = {
            "what": "planned against measured memory of training steps",
            "device": device,
            CONDITIONS: {},
            CONFIGURED: [
                {"name": each.name, **_not_run(each.name, asked_for), "settings": settings(each)}
                for each in CONFIGURATIONS
            ],
            **{name: {**_not_run(name, asked_for), "rows": []} for name in LISTS},
        }
        self.write()

    def record(self, task: str, found: dict[str, Any]) -> None:
        """Put what a task has reported into its place. `found` has `status`, and `reason` unless it went well."""
        if task == CONDITIONS:
            self.content[CONDITIONS] = found
        elif task in LISTS:
            self.content[task] = {"rows": [], **found}
        else:
            entry = next(each for each in self.content[CONFIGURED] if each["name"] == task)
            entry.pop("reason", None)
            entry |= found | errors(found)
        self.write()

    def write(self) -> None:
        if self._path is not None:
            write_json(self._path, self.content)


def errors(found: dict[str, Any]) -> dict[str, float | None]:
    """planned / measured - 1, of the peaks and of what was reserved; None where either is unknown."""
    plan, measured = found.get("plan") or {}, found.get("measured") or {}
    relative: dict[str, float | None] = {}
    for name, key in (("error", "peak_bytes"), ("reserved_error", "reserved_bytes")):
        planned, real = plan.get(key), measured.get(key)
        relative[name] = planned / real - 1 if planned is not None and real else None
    return relative


def settings(chosen: Configuration) -> dict[str, Any]:
    """What tells a configuration from the others, in words of its recipe."""
    optimizer = chosen.torch_adamw or chosen.optimizer.removeprefix("name: ")
    return {
        "model": chosen.model,
        "layers": chosen.layers,
        "optimizer": f"torch {optimizer}" if chosen.torch_adamw else optimizer,
        "rank": chosen.rank,
        "tokens": chosen.tokens,
        "batch": chosen.batch,
        "accumulate": chosen.accumulate,
        "rows": chosen.rows,
        "checkpointing": chosen.checkpointing,
        "loss": chosen.loss,
        "card_gib": chosen.card_gib,
        "also": list(chosen.also),
    }


def write_json(path: Path, content: Any) -> None:
    """Under another name first, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _not_run(name: str, asked_for: Sequence[str]) -> dict[str, str]:
    return {"status": NOT_RUN, "reason": NOT_REACHED if name in asked_for else NOT_ASKED_FOR}
