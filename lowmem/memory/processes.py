"""processes.json: what each process of a divided run held, counted, and what the formulas say of it.

Bytes of weights and optimizer state are those of storages, each in blocks of 512 bytes. What was not measured is null
and has its reason in `not_measured`, never 0.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem.memory.table import FIRST_COLUMN, WIDTH
from lowmem.memory.wording import in_unit, unit_for

FILE = "processes.json"
ROWS = {
    "weights_bytes": "weights",
    "optimizer_state_bytes": "optimizer state",
    "peak_allocated_bytes": "peak allocated",
}
NO_ALLOCATOR = (
    "on a CPU no allocator counts, and the tracker of one process would count a library's buffers wrongly"
)


@dataclass(frozen=True)
class HeldByProcesses:
    """Of each process, in the order of their ranks. `peaks` is None where nothing counts them."""

    weights: Sequence[int]
    optimizer_state: Sequence[int]
    peaks: Sequence[int] | None


def processes_document(
    held: HeldByProcesses, strategy: str, *, steps: int, planned: HeldByProcesses | str | None
) -> dict[str, Any]:
    """As plain JSON values. `planned` is what formulas say, why they say nothing, or None where nobody asked.

    steps: after how many of them was counted; the fullest counts.
    """
    missing = {} if held.peaks is not None else {"peak_allocated_bytes": NO_ALLOCATOR}
    return {
        "world": len(held.weights),
        "strategy": strategy,
        "steps": steps,
        **_ranges(held),
        "planned": _ranges(planned) if isinstance(planned, HeldByProcesses) else None,
        "not_measured": missing | ({"planned": planned} if isinstance(planned, str) else {}),
    }


def _ranges(held: HeldByProcesses) -> dict[str, dict[str, int] | None]:
    found = zip(ROWS, (held.weights, held.optimizer_state, held.peaks), strict=True)
    return {name: None if each is None else {"least": min(each), "most": max(each)} for name, each in found}


def is_processes_document(value: Any) -> bool:
    """Whether it has the shape that `processes_document` gives it."""
    if not isinstance(value, dict) or not {"world", "strategy", "steps", "planned"} <= value.keys():
        return False
    planned = value["planned"]
    accounts = [value] if planned is None else [value, planned]
    return isinstance(value.get("not_measured"), dict) and all(_is_account(each) for each in accounts)


def _is_account(value: Any) -> bool:
    if not isinstance(value, dict) or not ROWS.keys() <= value.keys():
        return False
    weights, state, peak = (value[name] for name in ROWS)
    return all(
        isinstance(each, dict) and {"least", "most"} <= each.keys()
        for each in (weights, state, *([] if peak is None else [peak]))
    )


def process_rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: least and most of all processes, and the same by formula where there is one."""
    planned = document["planned"] or {}
    unit = unit_for(max(document[name]["most"] for name in ROWS if document[name] is not None))
    head = [unit[0], "least", "most", *(["planned least", "planned most"] if planned else [])]
    rows = []
    for name, title in ROWS.items():
        if document[name] is None:
            continue
        ranges = [document[name], *([planned.get(name) or {}] if planned else [])]
        rows.append([title, *(in_unit(each.get(end), unit) for each in ranges for end in ("least", "most"))])
    return head, rows


def process_lines(document: dict[str, Any]) -> list[str]:
    """Sentences below the table: how it was counted, and what is not there."""
    steps = document["steps"]
    lines = [
        f"Held by each of {document['world']} processes under {document['strategy']}, wherever its memory is: counted "
        f"after {steps} step{'s' if steps != 1 else ''}, in blocks of 512 bytes."
    ]
    for name, reason in document["not_measured"].items():
        what = "Not planned" if name == "planned" else f"The {ROWS.get(name, name)} is not measured"
        lines.append(f"{what}: {reason}.")
    return lines


def process_table(document: dict[str, Any]) -> str:
    """For a terminal of 80 columns; no line ends in a newline."""
    head, rows = process_rows(document)
    widths = [max(12, len(title) + 2) for title in head[1:]]
    lines = []
    for cells in (head, *rows):
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths, strict=True))
        lines.append(cells[0].ljust(FIRST_COLUMN) + "".join(numbers))
    lines.insert(1, "-" * (FIRST_COLUMN + sum(widths)))
    return "\n".join([*lines, "", *textwrap.wrap(" ".join(process_lines(document)), WIDTH)])
