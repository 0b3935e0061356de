"""The memory table of a terminal: one row a part, one column for the run and one for each AdamW."""

from __future__ import annotations

import textwrap
from typing import Any

from lowmem.memory.ledger import PARTS
from lowmem.memory.wording import (
    BASELINE_NAMES,
    MEASURED_BY,
    PART_NAMES,
    condition_lines,
    in_unit,
    percent,
    size,
    unit_for,
)

WIDTH = 80
FIRST_COLUMN = 16


def accounts(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(title, account) of the run and of each baseline that is known, in columns' order."""
    known = [(name, account) for name, account in document["baselines"].items() if account is not None]
    own = "this plan" if document["source"] == "planned" else "this run"
    return [(own, document), *((BASELINE_NAMES.get(name, name), account) for name, account in known)]


def table_rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, parts first, then the peak and, where known, what the allocator reserved."""
    columns = accounts(document)
    unit = unit_for(max(account["peak_bytes"] for _, account in columns))
    rows = []
    for part in PARTS:
        rows.append(
            [PART_NAMES[part], *(in_unit(account["parts"].get(part), unit) for _, account in columns)]
        )
    rows.append(["peak", *(in_unit(account["peak_bytes"], unit) for _, account in columns)])
    if any(account["reserved_bytes"] is not None for _, account in columns):
        rows.append(["reserved", *(in_unit(account["reserved_bytes"], unit) for _, account in columns)])
    return [unit[0], *(title for title, _ in columns)], rows


def saving_lines(document: dict[str, Any]) -> list[str]:
    """One line for each AdamW the run is compared with, or for why it is not."""
    lines = []
    for title, account in accounts(document)[1:]:
        theirs, ours = account["peak_bytes"], document["peak_bytes"]
        amount = f"{size(abs(theirs - ours))} ({percent(abs(theirs - ours) / theirs)})"
        line = f"saved {amount} against {title}" if ours <= theirs else f"needs {amount} more than {title}"
        lines.append(line if account["source"] == "measured" else f"{line} ({account['source']})")
    for name, reason in document.get("not_measured", {}).items():
        if name == "planned":
            continue
        lines.append(f"{BASELINE_NAMES.get(name, name)} was not measured: {reason}")
    return lines


def plan_lines(document: dict[str, Any]) -> list[str]:
    """What a simulation of the same steps says, where there is one."""
    planned = document.get("planned")
    if planned is None:
        reason = document.get("not_measured", {}).get("planned")
        return [] if reason is None else [f"not planned: {reason}"]
    off = f"{100 * planned['error']:+.1f} %".replace("+0.0 %", "0.0 %").replace("-0.0 %", "0.0 %")
    return [f"planned {size(planned['peak_bytes'])} for the same steps, {off} of what was measured"]


def warning_lines(document: dict[str, Any]) -> list[str]:
    return [
        f"{title}: {warning}"
        for title, account in accounts(document)
        for warning in account.get("warnings", [])
    ]


def method_line(document: dict[str, Any]) -> str:
    """How the numbers came about, in one sentence."""
    how = document["source"]
    if how == "measured":
        steps, means = document["steps"], MEASURED_BY[document["measured_by"]]
        how = f"{steps} measured optimizer step{'s' if steps != 1 else ''}; {means}"
    return f"Each column is the fullest moment of its own run ({how})."


def table(document: dict[str, Any]) -> str:
    """The content of memory.json for a terminal of 80 columns; no line ends in a newline."""
    head, rows = table_rows(document)
    widths = [max(12, len(title) + 2) for title in head[1:]]
    rule = "-" * (FIRST_COLUMN + sum(widths))

    def line(cells: list[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths, strict=True))
        return cells[0].ljust(FIRST_COLUMN) + "".join(numbers)

    lines = [line(head), rule]
    for row in rows:
        lines += [rule, line(row)] if row[0] == "peak" else [line(row)]
    found = [*saving_lines(document), *plan_lines(document)]
    savings = [text for line in found for text in textwrap.wrap(line, WIDTH)]
    lines += ["", *savings] if savings else []
    conditions = ", ".join(f"{name} {value}" for name, value in condition_lines(document["conditions"]))
    for text in (
        method_line(document),
        conditions,
        *(f"Warning: {text}" for text in warning_lines(document)),
    ):
        lines += ["", *textwrap.wrap(text, WIDTH)] if text else []
    return "\n".join(lines)
