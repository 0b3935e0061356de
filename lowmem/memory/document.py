"""The content of memory.json: what a run needed, what AdamW needs on the same work, and the difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.memory.readings import Measured

HEADLINE = "adamw_fused"
BASELINES = (HEADLINE, "adamw_foreach", "adamw_fused_backward")

CONTEXT_BYTES = 6 * 2**30 // 10
"""What the CUDA context takes beside the allocator, taken high."""

USABLE = 0.97
"""The part of a card that a process gets."""


def memory_document(
    measured: Measured,
    baselines: Mapping[str, Measured | str | None],
    conditions: Mapping[str, Any],
    *,
    gpu_bytes: int | None = None,
) -> dict[str, Any]:
    """memory.json as plain JSON values. What was not measured is null, never 0.

    `baselines` are AdamW runs on the same work, by name (see BASELINES), or why there is none (it did not
    fit, say). The saving is against `adamw_fused` and is negative where the run needed more. `fits` asks
    whether a card of `gpu_bytes` holds what the allocator reserved and the CUDA context; without a card it
    is null.
    """
    known = {name: one for name, one in baselines.items() if isinstance(one, Measured)}
    adamw = known.get(HEADLINE)
    saved = None if adamw is None else adamw.peak_bytes - measured.peak_bytes
    fits = None
    if gpu_bytes is not None and measured.reserved_bytes is not None:
        fits = measured.reserved_bytes + CONTEXT_BYTES <= USABLE * gpu_bytes
    names = [*BASELINES, *(name for name in baselines if name not in BASELINES)]
    return {
        **_account(measured),
        "baselines": {name: _account(known[name]) if name in known else None for name in names},
        "not_measured": {name: reason for name, reason in baselines.items() if isinstance(reason, str)},
        "saved_bytes": saved,
        "saved_fraction": None if adamw is None or saved is None else saved / adamw.peak_bytes,
        "fits": fits,
        "gpu_bytes": gpu_bytes,
        "conditions": dict(conditions),
    }


def _account(measured: Measured) -> dict[str, Any]:
    return {
        "source": "measured",
        "measured_by": measured.source,
        "steps": measured.steps,
        "peak_bytes": measured.peak_bytes,
        "steady_peak_bytes": measured.steady_peak_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "parts": dict(measured.parts),
        "warnings": list(measured.warnings),
    }
