"""How bytes, parts and conditions are written for people."""

from __future__ import annotations

import math
from typing import Any

from lowmem.memory.ledger import Part

PART_NAMES: dict[Part, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "activations",
    "temporary": "temporary",
    "other": "other",
}
BASELINE_NAMES = {
    "adamw_fused": "AdamW fused",
    "adamw_foreach": "AdamW foreach",
    "adamw_fused_backward": "AdamW in backward",
    "adamw_fp32_master": "AdamW, fp32 master",
    "bitsandbytes_adamw8bit": "AdamW 8-bit",
    "lora_r16": "LoRA r=16",
    "qlora_r16": "QLoRA r=16",
}
MEASURED_BY = {
    "tracked": "live tensors counted operator by operator, in blocks of 512 bytes",
    "allocator": "the CUDA allocator's counters",
    "simulated": "simulated operator by operator on tensors without contents",
    "formula": "formulas",
}
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def unit_for(nbytes: int) -> tuple[str, int]:
    """The largest unit in which `nbytes` is at least one, and its bytes."""
    return next((unit for unit in _UNITS if abs(nbytes) >= unit[1]), _UNITS[-1])


def in_unit(nbytes: int | None, unit: tuple[str, int]) -> str:
    """The number alone, for a column whose head names the unit; what is unknown is a dash."""
    if nbytes is None:
        return "-"
    if unit[1] == 1:
        return f"{nbytes:,}"
    value = nbytes / unit[1]
    return "<0.01" if 0 < value < 0.005 else f"{value:,.2f}"


def size(nbytes: int | None) -> str:
    """12.34 MiB, or a dash for what is unknown."""
    if nbytes is None:
        return "-"
    unit = unit_for(nbytes)
    return f"{in_unit(nbytes, unit)} {unit[0]}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def number(value: Any) -> float | None:
    """A number of a JSON file; "NaN" and "Infinity" are strings there. None for everything else."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None


def shown(value: Any) -> str:
    """A value of a JSON file as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return (
            f"{value:.4g}"
            if math.isfinite(value)
            else str(value).replace("nan", "NaN").replace("inf", "Infinity")
        )
    return str(value)


def condition_lines(conditions: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of every condition of a measurement, in order."""
    return [(name.replace("_", " "), shown(value)) for name, value in conditions.items()]
