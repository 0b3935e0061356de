"""The content of memory.json: what a run needed, what AdamW needs on the same work, and the difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.memory.cards import fits
from lowmem.memory.ledger import PARTS
from lowmem.memory.readings import Measured, Source
from lowmem.memory.wording import PART_NAMES, percent, size

HEADLINE = "adamw_fused"
BASELINES = (HEADLINE, "adamw_foreach", "adamw_fused_backward")

TOLERATED_OVER_PLAN = 0.1
"""Part of the planned peak by which a run may exceed it before it is said."""

SOURCES: dict[Source, str] = {
    "tracked": "measured",
    "allocator": "measured",
    "simulated": "simulated",
    "formula": "formula",
}


def memory_document(
    measured: Measured,
    baselines: Mapping[str, Measured | str | None],
    conditions: Mapping[str, Any],
    *,
    gpu_bytes: int | None = None,
    planned: Measured | str | None = None,
) -> dict[str, Any]:
    """memory.json as plain JSON values. What was not measured is null, never 0.

    `baselines` are AdamW runs on the same work, by name (see BASELINES), or why there is none (it did not
    fit, say). The saving is against `adamw_fused` and is negative where the run needed more. `fits` asks
    whether a card of `gpu_bytes` holds what the allocator reserved and the CUDA context; without a card it
    is null. `planned` is a simulation of the same steps, or why there is none.
    """
    known = {name: one for name, one in baselines.items() if isinstance(one, Measured)}
    adamw = known.get(HEADLINE)
    saved = None if adamw is None else adamw.peak_bytes - measured.peak_bytes
    reserved = measured.reserved_bytes
    names = [*BASELINES, *(name for name in baselines if name not in BASELINES)]
    reasons = {name: reason for name, reason in baselines.items() if isinstance(reason, str)}
    document = {
        **_account(measured),
        "baselines": {name: _account(known[name]) if name in known else None for name in names},
        "not_measured": reasons | ({"planned": planned} if isinstance(planned, str) else {}),
        "saved_bytes": saved,
        "saved_fraction": None if adamw is None or saved is None else saved / adamw.peak_bytes,
        "planned": None,
        "fits": None if gpu_bytes is None or reserved is None else fits(reserved, gpu_bytes),
        "gpu_bytes": gpu_bytes,
        "conditions": dict(conditions),
    }
    if isinstance(planned, Measured):
        document["planned"] = _account(planned) | {"error": planned.peak_bytes / measured.peak_bytes - 1}
        document["warnings"] += over_plan(measured, planned)
    return document


def over_plan(measured: Measured, planned: Measured) -> list[str]:
    """Why a run that needed clearly more than its plan did, as far as the parts tell; mostly nothing."""
    if measured.peak_bytes <= (1 + TOLERATED_OVER_PLAN) * planned.peak_bytes:
        return []
    more = {part: measured.parts[part] - planned.parts[part] for part in PARTS}
    worst = max(PARTS, key=lambda part: more[part])
    excess = measured.peak_bytes - planned.peak_bytes
    return [
        f"the run needed {size(excess)} ({percent(excess / planned.peak_bytes)}) more than its plan of "
        f"{size(planned.peak_bytes)}; {PART_NAMES[worst]} differ most, {size(measured.parts[worst])} "
        f"instead of {size(planned.parts[worst])}"
    ]


def _account(measured: Measured) -> dict[str, Any]:
    return {
        "source": SOURCES[measured.source],
        "measured_by": measured.source,
        "steps": measured.steps,
        "peak_bytes": measured.peak_bytes,
        "steady_peak_bytes": measured.steady_peak_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "driver_bytes": measured.driver_bytes,
        "parts": dict(measured.parts),
        "warnings": list(measured.warnings),
    }
